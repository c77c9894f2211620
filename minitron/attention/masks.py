"""Which positions of a row each position sees, as a dense mask or as blocks for flex_attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # positions to a side of flex_attention's blocks, its default
Visible = Callable[[Any, Any, Any, Any], Any]


def visible(window: int | None, documents: Tensor | None) -> Visible:
    """A flex_attention mask_mod: whether, in row and head, the position `query` sees `key`.

    Causal; within the last `window` positions, itself among them; and within its document, by `documents`, int32 [rows,
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
    """bool [rows, 1, seq_length, seq_length], of one row without `documents`: True where the query sees the key."""
    rows = torch.arange(1 if documents is None else len(documents), device=device)[:, None, None]
    position = torch.arange(seq_length, device=device)
    mask: Tensor = visible(window, documents)(rows, None, position[:, None], position[None, :])
    return mask.expand(len(rows), seq_length, seq_length)[:, None]


def block_mask(seq_length: int, window: int | None, documents: Tensor | None, device: torch.device) -> BlockMask:
    """The same for flex_attention.

    What `create_block_mask` finds in every pair of positions is read from each block's corners, because documents are in
    order: no tensor has more values than rows times blocks times blocks, and no value goes to the host.
    """
    first = torch.arange(0, seq_length, BLOCK, device=device)
    last = (first + BLOCK - 1).clamp(max=seq_length - 1)
    nearest = visible(window, documents), first[:, None], last[None, :]  # of a block below the diagonal
    farthest = visible(window, documents), last[:, None], first[None, :]
    rows = torch.arange(1 if documents is None else len(documents), device=device)[:, None, None]
    some, every = (sees(rows, None, query, key).expand(len(rows), -1, -1) for sees, query, key in (nearest, farthest))
    diagonal = torch.eye(len(first), dtype=torch.bool, device=device)
    complete = last - first + 1 == BLOCK  # the kernel fills the last block up with positions that nothing sees
    every = every & ~diagonal & complete[:, None] & complete[None, :]
    some = (some | diagonal) & ~every
    return BlockMask.from_kv_blocks(
        *_ordered(some),
        *_ordered(every),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible(window, documents),
        seq_lengths=(seq_length, seq_length),
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(number of marked blocks of each row of blocks, all numbers of blocks with the marked ones first)."""
    marked = blocks[:, None].int()
    return marked.sum(dim=-1, dtype=torch.int32), marked.argsort(dim=-1, descending=True, stable=True).int()
