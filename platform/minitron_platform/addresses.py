"""Network addresses."""

from __future__ import annotations

import ipaddress
import re
from typing import Any
from urllib.parse import SplitResult, urlsplit

from minitron.arguments import check_type
from minitron.errors import InputError


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine's loopback interface, which other machines cannot reach."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_jobs_address(address: Any) -> None:
    """Raise InputError unless `address` is one of a Ray Jobs API, http://HOST:8265 or https://HOST, without a password."""
    check_type("address", address, str, "the address of a Jobs API, such as http://HOST:8265")
    parts = _split(address)
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(
            f"address {address!r}: not the address of a Jobs API",
            "give the address of the head's dashboard, http://HOST:8265 or https://HOST (not ray:// or port 6379)",
        )
    if parts.password is not None:
        raise InputError(
            f"address of {parts.hostname}: contains a password",
            "remove it, and set RAY_AUTH_TOKEN_PATH to the token's file",
        )


def _split(address: str) -> SplitResult | None:
    """The parts of an address; None for one that has none, such as a port that is not a number."""
    try:
        parts = urlsplit(address)
        _ = parts.port, parts.hostname  # computed, and checked, here
    except ValueError:
        return None
    return parts


def check_ray_address(address: Any) -> None:
    """Raise InputError unless `address` can be one of a Ray cluster for ray.init; None is a private Ray."""
    if address is None:
        return
    check_type("address", address, str, "the address of a Ray cluster, such as HOST:6379")
    if address.startswith(("http://", "https://")):
        raise InputError(
            f"Ray address {address!r}: this is the address of a Jobs API, which only accepts whole runs",
            "use it with `minitron submit --address`, or unset RAY_ADDRESS to run on this machine",
        )
    if address not in ("auto", "local") and not re.fullmatch(r"([a-z]+://)?.+:\d+", address):
        raise InputError(
            f"Ray address {address!r}: not the address of a Ray cluster",
            "give HOST:6379, ray://HOST:10001 or auto, or leave it out for a private Ray on this machine",
        )
