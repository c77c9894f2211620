"""Rows of several documents, and the hidden states of each document in a separate forward pass."""

from __future__ import annotations

import torch
from helpers import tiny

from minitron.data import DocumentBoundaries

DOCUMENTS = DocumentBoundaries(7)


def packed(count=2, seq_length=24, seed=1):
    """Rows with several documents each, some of one token."""
    rows = tiny.rows(count, seq_length, seed=seed)
    rows[rows == DOCUMENTS.end] = 8
    rows[:, [5, 6, 15 + seed]] = DOCUMENTS.end
    return rows


def one_by_one(model, rows, end=DOCUMENTS.end):
    """Final hidden states from a forward pass per document, with the masks of transformers."""
    states = []
    for row in rows:
        ends = [i + 1 for i, token in enumerate(row.tolist()) if token == end]
        parts = row.tensor_split([end for end in ends if end < len(row)])
        states.append(torch.cat([model.get_decoder()(part[None]).last_hidden_state[0] for part in parts]))
    return torch.stack(states)
