"""A text source: where a corpus is, and which text of it becomes documents."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal

from minitron.arguments import check_fields, short_repr
from minitron.errors import InputError

Kind = Literal["python-docs", "text", "jsonl", "csv", "parquet", "hub"]
ROWS: tuple[Kind, ...] = ("jsonl", "csv", "parquet", "hub")
"""Kinds whose documents are rows with fields."""
BLANK_LINE = "blank-line"
_BLANK_LINE = r"\r?\n(?:[ \t]*\r?\n)+"
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")


@dataclass(frozen=True)
class TextSource:
    """A corpus.

    kind: "python-docs", "text", "jsonl", "csv", "parquet" or "hub". path: a file, folder or glob at any fsspec address (text,
    jsonl, csv, parquet), or the name of a dataset on the hub; unused for python-docs. name, split, revision: configuration,
    split and revision of a dataset on the hub.

    key: the field or column with the text; "meta.text" is the field "text" inside "meta", unless a field has the whole name.
    template: instead of `key`, a text with fields in braces, such as "{title}\\n\\n{text}"; "{{" is a brace. messages: instead
    of `key`, the field with a chat, a list of {"role", "content"}, which the tokenizer's chat template turns into text.

    separator: for text, what divides a file into documents: "blank-line", a text such as "<|endoftext|>", or a regular
    expression between slashes, such as "/^-{5,}$/"; None: each file is one document.

    on_missing: whether a row whose field is null or absent is an error or is left out. min_characters, max_characters:
    documents that are shorter or longer are left out. weight: the source's share of the tokens in relation to the weights
    of the other sources.

    Raises InputError for a wrong type, and for fields that contradict each other.
    """

    kind: Kind
    path: str = ""
    key: str = "text"
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    template: str | None = None
    messages: str | None = None
    separator: str | None = None
    on_missing: Literal["error", "skip"] = "error"
    min_characters: int = 0
    max_characters: int | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise InputError(f"weight: {self.weight}", "use a number above 0")
        if self.min_characters < 0 or (self.max_characters is not None and self.max_characters < 1):
            raise InputError(
                f"min_characters: {self.min_characters}, max_characters: {self.max_characters}", "use positive numbers"
            )
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise InputError(
                f"max_characters: {self.max_characters} is below min_characters {self.min_characters}",
                "leave one of the two out",
            )
        self._check_kind()
        if self.template is not None:
            template_fields(self.template)
        self.separator_pattern()

    def _check_kind(self) -> None:
        if self.separator is not None and self.kind != "text":
            raise InputError(
                f"separator: {short_repr(self.separator)} with kind {self.kind!r}",
                "separators divide files of kind: text",
            )
        for field in ("template", "messages"):
            if getattr(self, field) is not None and self.kind not in ROWS:
                raise InputError(
                    f"{field}: {short_repr(getattr(self, field))} with kind {self.kind!r}",
                    f"it needs rows with fields: kind {', '.join(ROWS)}",
                )
        chosen = [name for name in ("template", "messages") if getattr(self, name) is not None]
        chosen += ["key"] if self.key != "text" else []
        if len(chosen) > 1:
            raise InputError(f"{chosen[0]}: given beside {chosen[1]}", "give only one of key, template and messages")

    def separator_pattern(self) -> re.Pattern[str] | None:
        """`separator` as a regular expression. Raises InputError for one that is not valid, or matches an empty text."""
        if self.separator is None:
            return None
        expression = re.escape(self.separator)
        if self.separator == BLANK_LINE:
            expression = _BLANK_LINE
        elif len(self.separator) > 2 and self.separator[0] == self.separator[-1] == "/":
            expression = self.separator[1:-1]
        try:
            pattern = re.compile(expression, re.MULTILINE)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(
                f"separator: {self.separator!r} is not a valid regular expression ({error})",
                "correct it, or write a plain text without slashes around it",
            ) from error
        if pattern.match(""):
            raise InputError(
                f"separator: {self.separator!r} matches an empty text", "give a text that stands between documents"
            )
        return pattern

    def columns(self) -> list[str]:
        """The fields of a row that its text is made of, without duplicates."""
        if self.messages is not None:
            return [self.messages]
        return template_fields(self.template) if self.template is not None else [self.key]

    def options(self) -> dict[str, Any]:
        """The settings besides kind, place and key that decide which text is read, as far as they are not the defaults."""
        names = ("template", "messages", "separator", "on_missing", "min_characters", "max_characters")
        defaults = {field.name: field.default for field in fields(self)}
        return {name: getattr(self, name) for name in names if getattr(self, name) != defaults[name]}

    @property
    def label(self) -> str:
        """Kind and path, for messages."""
        return f"{self.kind} {self.path}".strip()


def template_fields(template: str) -> list[str]:
    """The fields that a template names, without duplicates, in order. Raises InputError for a template without fields or with
    a single brace."""
    names = [field for _, field in template_parts(template) if field]
    if not names:
        raise InputError(
            f"template: {short_repr(template)} names no field", 'write fields in braces: "{title}\\n\\n{text}"'
        )
    return list(dict.fromkeys(names))


def template_parts(template: str) -> Iterator[tuple[str, str]]:
    """A template as (plain text, name of the field after it) pairs; the last name is empty. Raises InputError for a single
    brace."""
    plain, end = "", 0
    for match in _FIELD.finditer(template):
        plain += template[end : match.start()]
        end = match.end()
        if match[1]:
            yield plain, match[1].strip()
            plain = ""
        elif len(match[0]) == 2:
            plain += match[0][0]
        else:
            raise InputError(
                f"template: a single {match[0]!r} at character {match.start()}",
                f"write {match[0] * 2} for a brace in the text",
            )
    yield plain + template[end:], ""
