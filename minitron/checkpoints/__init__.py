"""Checkpoint files: which tensors they contain, whether these fill the model, and the checkpoint's identity."""
