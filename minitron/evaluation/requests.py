"""lm-eval's requests as token ids, with the same special tokens as packed rows.

lm-eval's own backend leaves special tokens to the tokenizer: an end-of-text token would then stand between a question and its
answer, a rolling request would start with BOS twice, and a truncated request would lose BOS.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from minitron.data import DocumentTokens
from minitron.evaluation.encoding import EncodedAhead


def _encoded_texts(context: str, continuation: str) -> Iterator[str]:
    """The texts that lm-eval encodes for a request; spaces at the end of a context belong to the continuation."""
    yield context + continuation
    if context:
        yield context.rstrip()


class DocumentRequests(HFLM):
    """lm-eval's transformers backend, in which every request starts with the tokens `around.begin` exactly once, also if it is
    truncated on the left. A text without context follows `prefix_token_id`, see `minitron.evaluation.scorer.first_context`; so
    does one whose context has no tokens, such as white space, which lm-eval counts as a part of the text."""

    around: DocumentTokens
    cut = 0
    """Number of truncated requests."""

    @cached_property
    def _encoded(self) -> EncodedAhead:
        return EncodedAhead(self.tokenizer)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._encoded.plan([text for request in requests for text in _encoded_texts(*request.args)])
        return super().loglikelihood(requests, disable_tqdm=True)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
    ) -> list[int]:
        ids = list(self._encoded(string))
        if add_special_tokens is not False:
            ids = self.around.opened(ids)
        return self.cut_left(ids, left_truncate_len) if left_truncate_len else ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        before, tokens = super()._encode_pair(context, continuation)
        return before or [self.prefix_token_id], tokens

    def prompt(self, string: str, longest: int | None = None) -> list[int]:
        """The ids of a text to continue, the last `longest` of them."""
        return self.tok_encode(string, left_truncate_len=longest) or [self.prefix_token_id]

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask, two int64 [len(strings), length of the longest]."""
        rows = [self.prompt(string, left_truncate_len) for string in strings]
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self.tokenizer.pad_token_id)
        mask = torch.zeros((len(rows), longest), dtype=torch.int64)
        for number, row in enumerate(rows):
            columns = slice(longest - len(row), None) if padding_side == "left" else slice(0, len(row))
            ids[number, columns] = torch.tensor(row)
            mask[number, columns] = 1
        return ids, mask

    def cut_left(self, ids: list[int], length: int, needed: int = 0) -> list[int]:
        """The last `length` ids. If `ids` starts with `around.begin`, the result does too, unless that would leave fewer than
        the last `needed` ids."""
        if len(ids) <= length:
            return ids
        self.cut += 1
        begin = list(self.around.begin) if self.around.begins(ids) else []
        if len(begin) + needed > length:
            begin = []
        return [*begin, *ids[-(length - len(begin)) :]]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        windows = [self._windows(request.args[0]) for request in requests]
        pairs = [(None, context, tokens) for of_request in windows for context, tokens in of_request]
        answers = iter(self._loglikelihood_tokens(pairs))
        return [sum(next(answers)[0] for _ in of_request) for of_request in windows]

    def _windows(self, string: str) -> list[tuple[list[int], list[int]]]:
        """Pairs (context, tokens to predict) that together predict every token of a text once."""
        begin = list(self.around.begin)
        ids = self.tok_encode(string)[len(begin) :]
        # the context of every window but the first is one token of the text
        overlapping = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length - len(begin), context_len=1)
        windows = [make_disjoint_window(window) for window in overlapping]
        before = [begin[:-1], *[begin] * (len(windows) - 1)]  # the first window starts with the prefix token already
        return [([*first, *context], tokens) for first, (context, tokens) in zip(before, windows, strict=False)]
