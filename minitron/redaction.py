"""Addresses as parts, and texts without the secrets that addresses may contain."""

from __future__ import annotations

import re
from dataclasses import dataclass

STORAGES = ("memory", "s3", "gs", "gcs", "abfs", "az", "hf")
HARMLESS = (  # parameters of databases that hold no secrets
    *("sslmode", "sslrootcert", "ssl_ca", "charset", "driver", "mode", "uri", "timeout", "connect_timeout"),
    *("application_name", "target_session_attrs"),
)
# Every pattern takes time in proportion to the text: logs may have lines of megabytes.
_ADDRESS = re.compile(r"(?<![A-Za-z0-9+.-])[A-Za-z0-9+.-]+://\S+")
_QUERY = re.compile(r"[?&;#]")
_STORAGE_QUERY = re.compile(r"\?[\w.-]+=")  # ? is also a wildcard
_SECRET = re.compile(  # as libraries show a path's query or a database's settings
    r"(?i)(?:(?<=[?&;])[\w.-]{0,60}(?:token|key|signature|sig|credential)|(?:password|passwd|pwd|secret)[\w.-]{0,60})(?==[^\s=])"
    r"=(?:'[^']*'|\"[^\"]*\"|[^\s&;,)]+)"
)
_WORD = re.compile(r"\S+")
_PATH_QUERY = re.compile(r"\?[\w.%-]{1,60}=[^'\"]*")
_PARAMETER = re.compile(r"[\w.-]+(?==)")


@dataclass(frozen=True)
class Address:
    """An address SCHEME://USER@REST?QUERY. USER and QUERY may hold secrets, and are not part of its text.

    Passwords may have any characters, also @ and /, so USER is everything up to the last @. Only in addresses of storages an @
    may belong to REST, unless a colon comes before: s3://bucket/a@b, hf://datasets/user/name@branch, abfs://container@account.
    """

    scheme: str
    user: str
    rest: str
    query: str

    @classmethod
    def parse(cls, text: str) -> Address:
        """The parts of `text`, which contains "://"."""
        scheme, _, after = text.partition("://")
        kind = scheme.split("+")[0].lower()
        user, _, rest = after.rpartition("@")
        if kind in ("sqlite", "file", "local") or (
            kind in STORAGES and not (":" in user or _STORAGE_QUERY.search(user))
        ):
            user, rest = "", after
        if kind in ("file", "local"):
            return cls(scheme, "", rest, "")
        start = (_STORAGE_QUERY if kind in STORAGES else _QUERY).search(rest)
        return cls(scheme, user, rest[: start.start()] if start else rest, rest[start.start() :] if start else "")

    def __str__(self) -> str:
        return f"{self.scheme}://{self.rest}"

    @property
    def secret(self) -> str:
        """What of it may be a secret, in words without the secret; empty if nothing is."""
        if ":" in self.user:
            return "a password"
        unknown = [name for name in _PARAMETER.findall(self.query) if name not in HARMLESS]
        return f"the parameter {unknown[0]!r}" if unknown else ""


def redact(text: str) -> str:
    """`text` with every address in it shown without user, password and query, paths of requests without their query, and
    `name=value` without the value where the name is that of a secret."""
    shown = _ADDRESS.sub(lambda match: str(Address.parse(match[0])), text)
    shown = _WORD.sub(_without_query, shown)
    return _SECRET.sub(lambda match: f"{match[0].partition('=')[0]}=...", shown)


def _without_query(word: re.Match[str]) -> str:
    """A word of a text; if it is the path of a request, as HTTP libraries show it, without its query."""
    query = _PATH_QUERY.search(word[0])
    return word[0] if query is None or "/" not in word[0][: query.start()] else word[0].replace(query[0], "", 1)


def secret_in(text: str) -> str:
    """What of the addresses in `text` may be a secret, in words without the secret; empty if nothing is."""
    return next(filter(None, (Address.parse(match[0]).secret for match in _ADDRESS.finditer(text))), "")
