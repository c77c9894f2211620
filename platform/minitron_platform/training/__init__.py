"""A distillation on Ray Train, what its workers say, and its curve."""
