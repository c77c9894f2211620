"""The positions of a row that each position attends to, as a dense mask or as a block mask for flex_attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # side length of flex_attention's blocks in positions, its default
Visible = Callable[[Any, Any, Any, Any], Any]


def visible(window: int | None, documents: Tensor | None) -> Visible:
    """A flex_attention mask_mod: whether the position `query` attends to `key`, for a row and head.

    Causal, within the last `window` positions including itself, and within its document, according to `documents`, int32 [rows,
    seq_length], as `DocumentBoundaries.numbers` gives them.
    """

    def sees(row: Any, head: Any, query: Any, key: Any) -> Any:
        seen = key <= query
        if window is not None:
            seen = seen & (query - key < window)
        if documents is not None:
            seen = seen & (documents[row, query] == documents[row, key])
        return seen

    return sees


def dense_mask(seq_length: int, window: int | None, documents: Tensor | None, device: torch.device) -> Tensor:
    """bool [rows, 1, seq_length, seq_length], of one row without `documents`: True if the query attends to the key."""
    rows = torch.arange(1 if documents is None else len(documents), device=device)[:, None, None]
    position = torch.arange(seq_length, device=device)
    mask: Tensor = visible(window, documents)(rows, None, position[:, None], position[None, :])
    return mask.expand(len(rows), seq_length, seq_length)[:, None]


def block_mask(seq_length: int, window: int | None, documents: Tensor | None, device: torch.device) -> BlockMask:
    """The same mask for flex_attention.

    `create_block_mask` checks every pair of positions; here the corners of each block suffice, because documents are in order:
    no tensor has more than rows · blocks · blocks values, and no value is copied to the host.
    """
    first = torch.arange(0, seq_length, BLOCK, device=device)
    last = (first + BLOCK - 1).clamp(max=seq_length - 1)
    sees = visible(window, documents)
    rows = torch.arange(1 if documents is None else len(documents), device=device)[:, None, None]
    # in a block below the diagonal, the nearest pair of positions and the farthest one
    some = sees(rows, None, first[:, None], last[None, :]).expand(len(rows), -1, -1)
    every = sees(rows, None, last[:, None], first[None, :]).expand(len(rows), -1, -1)
    diagonal = torch.eye(len(first), dtype=torch.bool, device=device)
    complete = last - first + 1 == BLOCK  # the kernel pads the last block with masked positions
    every = every & ~diagonal & complete[:, None] & complete[None, :]
    some = (some | diagonal) & ~every
    return BlockMask.from_kv_blocks(
        *_ordered(some),
        *_ordered(every),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(seq_length, seq_length),
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(number of marked blocks of each row of blocks, all numbers of blocks with the marked ones first)."""
    marked = blocks[:, None].int()
    return marked.sum(dim=-1, dtype=torch.int32), marked.argsort(dim=-1, descending=True, stable=True).int()
