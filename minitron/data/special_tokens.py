"""What begins and ends a document: the special tokens that the model's own tokenizer puts around a text.

Families that are trained with a beginning-of-sequence token (BOS) in front are broken without it: the first position
takes the attention that has nowhere to go, and a model that has never seen another token there predicts badly after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from minitron.errors import InputError

_TEXTS = ("a", "0", ".")  # short ones that any vocabulary knows at least one of


@dataclass(frozen=True)
class DocumentTokens:
    """Token ids around a document's text."""

    begin: tuple[int, ...]
    """Before the text, and at the start of every context that begins inside a document: BOS; () where none is used."""
    end: tuple[int, ...]
    """After the text; the last is the end-of-text token. () where the tokenizer has none."""
    bos: int | None
    """The BOS token that the tokenizer knows, whether it is used or not."""

    def chosen(self, add_bos: bool | None) -> DocumentTokens:
        """With `add_bos` true BOS in front where there is nothing, with false nothing in front, with None as it is.

        Raises InputError where `add_bos` is true and there is no BOS token.
        """
        if not add_bos:
            return self if add_bos is None else replace(self, begin=())
        if self.begin:
            return self
        if self.bos is None:
            raise InputError(
                "add_bos: true, and the tokenizer has no beginning-of-sequence token",
                "leave it at auto, or give the tokenizer a bos_token",
            )
        return replace(self, begin=(self.bos,))

    def opened(self, ids: Sequence[int]) -> list[int]:
        """The ids of a text with `begin` in front of them, once: a text that spells it out gets no second."""
        return [*ids] if self.begins(ids) else [*self.begin, *ids]

    def begins(self, ids: Sequence[int]) -> bool:
        """Whether the ids start with `begin`."""
        return tuple(ids[: len(self.begin)]) == self.begin


def document_tokens(tokenizer: Any, add_bos: bool | None = None) -> DocumentTokens:
    """What `tokenizer`, one of transformers', puts around a text when it is called with add_special_tokens=True.

    It is found by encoding a text with special tokens and without. An end-of-text token is added where the tokenizer ends no
    text with it. `add_bos` overrides the beginning, as in `DocumentTokens.chosen`.
    """
    before, after = _around(tokenizer)
    eos = tokenizer.eos_token_id
    end = after if eos is None or after[-1:] == (eos,) else (*after, eos)
    return DocumentTokens(before, end, tokenizer.bos_token_id).chosen(add_bos)


def _around(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that `tokenizer` adds before a text and after it."""
    options = {"padding": False, "truncation": False}
    for text in _TEXTS:
        plain = tokenizer.encode(text, add_special_tokens=False, **options)
        whole = tokenizer.encode(text, add_special_tokens=True, **options)
        for start in range(len(whole) - len(plain) + 1):
            if plain and whole[start : start + len(plain)] == plain:
                return tuple(whole[:start]), tuple(whole[start + len(plain) :])
    raise InputError(
        f"the tokenizer {tokenizer.name_or_path!r} encodes a text otherwise with special tokens than without",
        "use the tokenizer that belongs to the model",
    )
