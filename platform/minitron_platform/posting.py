"""Requests to other services by HTTP."""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping
from typing import Any


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any, **named: Any) -> None:
        return None


def post_json(address: str, body: bytes, *, timeout: float, headers: Mapping[str, str] | None = None) -> bytes:
    """Post JSON to an address and return the answer. It is not followed to another address, which would get the body and the
    headers too. Raises OSError (urllib's) if there is no answer within `timeout` seconds or it is an error."""
    described = {"Content-Type": "application/json", "User-Agent": "minitron", **(headers or {})}
    request = urllib.request.Request(address, body, described)
    with urllib.request.build_opener(_NoRedirects).open(request, timeout=timeout) as answer:
        return bytes(answer.read())
