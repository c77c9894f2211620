"""Where documents begin in packed rows, read from the tokens around them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minitron.errors import InputError


@dataclass(frozen=True)
class DocumentBoundaries:
    """How documents follow each other in rows that `minitron.data.pack` wrote.

    A document begins after every end-of-text token `end`, also if the token is spelled out in a text. `begin` are the tokens
    before a document's text. Raises InputError if there are several of these and the end-of-text token is among them.
    """

    end: int
    begin: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.end in self.begin and len(self.begin) > 1:
            raise InputError(
                f"documents begin with the tokens {list(self.begin)}, among them the end-of-text token {self.end}",
                "pack the text without BOS, or do not separate documents",
            )

    def starts(self, input_ids: Tensor) -> Tensor:
        """Whether a document, or the row's part of one, starts at each token of [rows, seq_length]: bool of the same shape."""
        ends = input_ids == self.end
        if self.begin == (self.end,):
            # The same token begins and ends documents: in a sequence of them, ends and beginnings alternate, and a row starts
            # with a beginning.
            position = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
            before = position.masked_fill(ends, -1).cummax(dim=1).values  # position of the last other token
            ends = ends & ((position - before + (before < 0)) % 2 == 1)
        starts = ends.roll(1, dims=1)
        starts[:, 0] = True
        return starts

    def numbers(self, input_ids: Tensor) -> Tensor:
        """The number of each token's document within its row, ascending from 1: int32 [rows, seq_length]."""
        return self.starts(input_ids).cumsum(dim=1, dtype=torch.int32)

    def positions(self, input_ids: Tensor) -> Tensor:
        """Each token's position within its document: int64 [rows, seq_length]."""
        position = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        return position - position.masked_fill(~self.starts(input_ids), 0).cummax(dim=1).values
