"""Where tokens of tokenised text are: numbered blocks of tokens, and spans in them, without the tokens themselves."""

from __future__ import annotations

import numpy as np

from minitron.data.tokenising import PIECE, token_starts

LOCATED = np.dtype([*PIECE.descr, ("block", "<i8"), ("start", "<i8")])
"""A piece of text, the number of the block that has its tokens, and the position of the first one there."""
SPAN = np.dtype([("block", "<i8"), ("start", "<i8"), ("tokens", "<i8")])
"""Consecutive tokens of a block."""


def located(pieces: np.ndarray, block: int) -> np.ndarray:
    """The pieces (dtype PIECE) whose tokens are all those of a block, as LOCATED."""
    result = np.empty(len(pieces), LOCATED)
    for name in PIECE.names or ():
        result[name] = pieces[name]
    result["block"] = block
    result["start"] = token_starts(pieces)
    return result


def spans_of(pieces: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The first `tokens` of each of the LOCATED pieces as SPANs; what follows one another in a block is one span."""
    some = tokens > 0
    block, start, tokens = pieces["block"][some], pieces["start"][some], tokens[some]
    new = np.ones(len(tokens), bool)
    new[1:] = (block[1:] != block[:-1]) | (start[1:] != (start + tokens)[:-1])
    first = np.flatnonzero(new)
    spans = np.empty(len(first), SPAN)
    spans["block"], spans["start"] = block[first], start[first]
    spans["tokens"] = np.add.reduceat(tokens, first) if len(first) else 0
    return spans


def divided(spans: np.ndarray, position: int) -> tuple[np.ndarray, np.ndarray]:
    """The spans before a token, counted from the first, and those from it on."""
    ends = np.cumsum(spans["tokens"])
    number = int(np.searchsorted(ends, position, "right"))  # of the span that has the token
    before, after = spans[:number], spans[number:].copy()
    inside = position - (int(ends[number - 1]) if number else 0)
    if inside:
        part = spans[number : number + 1].copy()
        part["tokens"] = inside
        before = np.concatenate([before, part])
        after["start"][0] += inside
        after["tokens"][0] -= inside
    return before, after
