"""Texts from files, models and other machines, made safe to show."""

from __future__ import annotations

import re

# Control characters but for tab and line break, characters that reverse the direction of a text, and half surrogates.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_MARKDOWN = re.compile(r"[\\`*_\[\]<>|#~]")
_COLOUR = re.compile("(\x1b\\[[0-9;]{0,20}m)")


def printable(text: str) -> str:
    """`text` with everything that would command a terminal, or deceive its reader, replaced by a visible character."""
    return _UNSAFE.sub(_symbol, text)


def printable_log(text: str) -> str:
    """As `printable`, for the output of a program: colours stay, and a carriage return becomes a line break."""
    pieces = _COLOUR.split(text.replace("\r\n", "\n").replace("\r", "\n"))
    return "".join(piece if number % 2 else printable(piece) for number, piece in enumerate(pieces))


def markdown(text: str) -> str:
    """`text` on one line, printable, without characters that mean something in Markdown or HTML."""
    return _MARKDOWN.sub(r"\\\g<0>", " ".join(printable(text).split()))


def _symbol(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)  # Unicode's picture of the control character
    return "\u2421" if code == 0x7F else "\ufffd"
