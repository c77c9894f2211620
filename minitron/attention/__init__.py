"""How models attend to packed rows: which kernel, which positions each sees, and which documents are apart."""

from minitron.attention.interface import WRAPPED, softcap_of, takes_masks, use_own_attention
from minitron.attention.rows import Kernel, chosen_kernel, row_arguments, short_length

__all__ = [
    "WRAPPED",
    "Kernel",
    "chosen_kernel",
    "row_arguments",
    "short_length",
    "softcap_of",
    "takes_masks",
    "use_own_attention",
]
