"""How models attend to packed rows: which kernel, which positions each sees, and which documents are apart."""

from minitron.attention.interface import takes_masks, use_own_attention
from minitron.attention.rows import Kernel, chosen_kernel, row_arguments

__all__ = ["Kernel", "chosen_kernel", "row_arguments", "takes_masks", "use_own_attention"]
