"""lm-eval's requests as token ids that start as the packed rows of a model do.

lm-eval's own backend leaves special tokens to the tokenizer: one that ends texts would end a question before its answer, a
rolling request gets the beginning twice, and one that is cut loses it.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from minitron.data import DocumentTokens


class DocumentRequests(HFLM):
    """lm-eval's transformers backend; every request starts with the `begin` of `around`, once, also where it is cut from the
    left. Without a `begin`, a text that nothing precedes follows an end-of-text token, as a document in a row does."""

    around: DocumentTokens
    cut = 0
    """How many requests were cut."""

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
    ) -> list[int]:
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=False)
        if add_special_tokens is not False:
            ids = self.around.opened(ids)
        return self.cut_left(ids, left_truncate_len) if left_truncate_len else ids

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [len(strings), longest] token ids and their mask."""
        rows = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
        shape = len(rows), max(map(len, rows))
        ids = torch.full(shape, self.tokenizer.pad_token_id)
        mask = torch.zeros(shape, dtype=torch.int64)
        for number, row in enumerate(rows):
            where = slice(shape[1] - len(row), None) if padding_side == "left" else slice(0, len(row))
            ids[number, where] = torch.tensor(row)
            mask[number, where] = 1
        return ids, mask

    def cut_left(self, ids: list[int], length: int, needed: int = 0) -> list[int]:
        """At most `length` ids, the last ones; a `begin` in front stays there, unless the `needed` last leave it no room."""
        if len(ids) <= length:
            return ids
        self.cut += 1
        begin = list(self.around.begin) if self.around.begins(ids) else []
        if len(begin) + needed > length:
            begin = []
        return [*begin, *ids[-(length - len(begin)) :]]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        windows = [self._windows(request.args[0]) for request in requests]
        pairs = [(None, context, tokens) for found in windows for context, tokens in found]
        answers = iter(self._loglikelihood_tokens(pairs))
        totals = [sum(next(answers)[0] for _ in found) for found in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _windows(self, string: str) -> list[tuple[list[int], list[int]]]:
        """(context, tokens to predict) that together predict every token of a text once."""
        begin = list(self.around.begin)
        ids = self.tok_encode(string)[len(begin) :]
        # all but the first have a token of the text before them as well
        found = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length - len(begin), context_len=1)
        windows = [make_disjoint_window(window) for window in found]
        before = [begin[:-1], *[begin] * (len(windows) - 1)]  # the first has the prefix token already
        return [([*first, *context], tokens) for first, (context, tokens) in zip(before, windows, strict=False)]
