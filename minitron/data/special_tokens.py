"""The special tokens that a model's tokenizer puts before and after a document.

Models trained with a beginning-of-sequence token (BOS) fail without it: the first position is an attention sink, and a model
that has never seen another token there predicts badly after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from minitron.arguments import check_tokenizer
from minitron.errors import InputError

_TEXTS = ("a", "0", ".")  # every vocabulary contains at least one of these


@dataclass(frozen=True)
class DocumentTokens:
    """Token ids before and after a document's text."""

    begin: tuple[int, ...]
    """Before the text, and at the start of every context that begins inside a document: BOS, or () if it is not used."""
    end: tuple[int, ...]
    """After the text; the last one is the end-of-text token. () if the tokenizer has none."""
    bos: int | None
    """The tokenizer's BOS token, used or not; None if it has none."""

    def chosen(self, add_bos: bool | None) -> DocumentTokens:
        """These tokens with BOS in front (`add_bos` true), with nothing in front (false), or unchanged (None).

        Raises InputError if `add_bos` is true and there is no BOS token.
        """
        if not add_bos:
            return self if add_bos is None else replace(self, begin=())
        if self.begin:
            return self
        if self.bos is None:
            raise InputError(
                "add_bos: true, but the tokenizer has no beginning-of-sequence token",
                "leave it at auto, or give the tokenizer a bos_token",
            )
        return replace(self, begin=(self.bos,))

    def opened(self, ids: Sequence[int]) -> list[int]:
        """The ids of a text with `begin` in front, unless the text already starts with it."""
        return [*ids] if self.begins(ids) else [*self.begin, *ids]

    def begins(self, ids: Sequence[int]) -> bool:
        """Whether the ids start with `begin`."""
        return tuple(ids[: len(self.begin)]) == self.begin


def document_tokens(tokenizer: Any, add_bos: bool | None = None) -> DocumentTokens:
    """The tokens that a transformers `tokenizer` puts around a text when called with add_special_tokens=True.

    They are determined by encoding a text with and without special tokens. The end-of-text token is added if the tokenizer
    does not add it. `add_bos` overrides the beginning, as in `DocumentTokens.chosen`.
    Raises InputError for an object that is not a tokenizer, or one that encodes the text itself differently.
    """
    check_tokenizer("tokenizer", tokenizer)
    before, after = around(tokenizer)
    eos = tokenizer.eos_token_id
    end = after if eos is None or after[-1:] == (eos,) else (*after, eos)
    return DocumentTokens(before, end, tokenizer.bos_token_id).chosen(add_bos)


def around(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that `tokenizer` adds before and after a text. Raises InputError as `document_tokens`."""
    options = {"padding": False, "truncation": False}
    for text in _TEXTS:
        plain = tokenizer.encode(text, add_special_tokens=False, **options)
        whole = tokenizer.encode(text, add_special_tokens=True, **options)
        for start in range(len(whole) - len(plain) + 1):
            if plain and whole[start : start + len(plain)] == plain:
                return tuple(whole[:start]), tuple(whole[start + len(plain) :])
    raise InputError(
        f"the tokenizer {tokenizer.name_or_path!r} encodes a text differently with special tokens than without",
        "use the tokenizer that belongs to the model",
    )
