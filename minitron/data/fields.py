"""The text of one row: a field, several fields in a template, or a chat in the tokenizer's template."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from minitron.data.sources import TextSource, template_parts
from minitron.errors import InputError

ABSENT = object()
_REPR = reprlib.Repr()  # of nested values only the beginning
_REPR.maxstring = _REPR.maxother = 60


class RowText:
    """Turns the rows of a source into texts. `tokenizer`: for a source with `messages`; it has a chat template.

    Raises InputError if the tokenizer is missing or has no chat template.
    """

    def __init__(self, source: TextSource, tokenizer: Any = None) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self._parts = list(template_parts(source.template)) if source.template is not None else []
        if source.messages is not None and not getattr(tokenizer, "chat_template", None):
            what = "the tokenizer has no chat template" if tokenizer is not None else "no tokenizer is given"
            raise InputError(
                f"messages: {source.messages}, but {what}", "use the tokenizer of a chat model, or key or template"
            )

    def __call__(self, row: Any, location: Any) -> str | None:
        """The text of a row; None if a field is absent or null and the source leaves such rows out.

        location: printed in errors. Raises InputError for a row or a field that contains no text.
        """
        if not isinstance(row, Mapping):
            raise InputError(
                f"{location}: {shortened(row)} is not an object",
                f"each document must be an object with the key {self.source.columns()[0]!r}",
            )
        values = {}
        for key in self.source.columns():
            value = _value(row, key)
            if value is None or value is ABSENT:
                if self.source.on_missing == "skip":
                    return None
                raise _missing(row, key, value, location)
            values[key] = value
        if self.source.messages is not None:
            return _checked(self._chat(values[self.source.messages], location), self.source.messages, location)
        if not self._parts:
            return _checked(values[self.source.key], self.source.key, location)
        texts = {key: value if _is_number(value) else _checked(value, key, location) for key, value in values.items()}
        return "".join(f"{plain}{texts[key] if key else ''}" for plain, key in self._parts)

    def _chat(self, messages: Any, location: Any) -> str:
        key = self.source.messages
        if not isinstance(messages, list) or not messages or not all(isinstance(item, Mapping) for item in messages):
            raise InputError(
                f"{location}: {key!r} is {shortened(messages)}, not a list of messages",
                'each message must be an object with "role" and "content"',
            )
        try:
            return _chat_text(self.tokenizer, [dict(item) for item in messages])
        except ValueError as error:
            raise InputError(
                f"{location}: the tokenizer's chat template refuses {key!r} ({error})",
                "correct the messages' roles and contents, or remove the row",
            ) from error


def ends_inside_chats(tokenizer: Any) -> bool:
    """Whether a tokenizer's chat template may write the end-of-text token before the end of a chat, as most do after every
    message or answer."""
    chat = [{"role": role, "content": "a"} for role in ("user", "assistant") * 2]
    try:
        text = _chat_text(tokenizer, chat)
    except ValueError:
        return True  # of a template for other roles it is not known
    return tokenizer.eos_token_id in tokenizer.encode(text, add_special_tokens=False)[:-1]


def _chat_text(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    """What a tokenizer's chat template writes. Raises ValueError if it refuses the messages."""
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(str(error)) from error


def top_level(key: str, names: Mapping[str, Any] | list[str]) -> str:
    """The column among `names` that contains the field `key`: `key` itself, or the part before one of its dots; empty if
    there is none."""
    parts = key.split(".")
    candidates = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((name for name in candidates if name in names), "")


def _value(row: Any, key: str) -> Any:
    """The value of a field, which may be inside other fields; ABSENT without it, None if one on the way to it is null."""
    while True:
        if not isinstance(row, Mapping):
            return ABSENT
        name = top_level(key, row)
        if not name:
            return ABSENT
        row = row[name]
        key = key[len(name) + 1 :]
        if not key or row is None:
            return row


def _missing(row: Mapping[str, Any], key: str, value: Any, location: Any) -> InputError:
    if value is None:
        return InputError(
            f"{location}: {key!r} is null", "set on_missing: skip to leave such rows out, or correct the row"
        )
    keys = ", ".join(shortened(str(name)) for name in list(row)[:20])
    return InputError(f"{location}: no key {key!r}", f"set key to one of its keys: {keys}; or on_missing: skip")


def _checked(text: Any, key: str, location: Any) -> str:
    if not isinstance(text, str):
        raise InputError(
            f"{location}: {key!r} is {shortened(text)}, not a string",
            "set key to a field that contains text in every row",
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{location}: {key!r} has half a surrogate pair, {text[error.start]!r}, at character {error.start}",
            "tokenizers do not accept it: remove the line or write the text as UTF-8",
        ) from error
    return text


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def shortened(value: Any) -> str:
    """A value of a file for a message: one line of at most 60 characters, without control characters."""
    shown = value.strip()[:61] if isinstance(value, str) else _REPR.repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in shown)
