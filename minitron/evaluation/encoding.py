"""Token ids of texts that are asked for one by one, computed many at a time by all cores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

AHEAD = 1024  # texts that are encoded together
KEPT = 8  # of the texts before them, such as the context that other continuations share, or of texts not announced


class EncodedAhead:
    """Called with a text, gives its ids without special tokens. Texts that were announced are encoded with those after them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._planned: list[str] = []
        self._place: dict[str, int] = {}
        self._known: dict[str, list[int]] = {}

    def plan(self, texts: Sequence[str]) -> None:
        """Announce the texts that will be asked for, in this order."""
        self._planned = list(dict.fromkeys(texts))
        self._place = {text: number for number, text in enumerate(self._planned)}
        self._known = {}

    def __call__(self, text: str) -> list[int]:
        if text in self._known:
            return self._known[text]
        start = self._place.get(text)
        if start is None:
            while len(self._known) >= KEPT:
                del self._known[next(iter(self._known))]
            self._known[text] = self._tokenizer.encode(text, add_special_tokens=False)
            return self._known[text]
        texts = self._planned[max(0, start - KEPT) : start + AHEAD]
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        ids = self._tokenizer(texts, **options)["input_ids"]
        self._known = dict(zip(texts, ids, strict=True))
        if start + AHEAD >= len(self._planned):
            self._planned, self._place = [], {}  # which may be hundreds of MB
        return self._known[text]
