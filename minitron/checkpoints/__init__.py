"""Checkpoints of other programs: which tensors they hold, whether these fill the model, and what names them."""
