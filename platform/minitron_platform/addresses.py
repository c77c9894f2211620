"""Network addresses."""

from __future__ import annotations

import random
import re
import socket
from contextlib import suppress
from typing import Any
from urllib.parse import SplitResult, urlsplit

from minitron.arguments import check_type
from minitron.errors import InputError, MinitronError
from minitron.loopback import is_loopback
from minitron.storage import redact

JOBS_API = re.compile(r"https?://([\w.-]+|\[[0-9a-fA-F:.]+\])(:\d{1,5})?(/[\w./-]*)?")


def answers(address: str, seconds: float) -> bool:
    """Whether something listens at `address` (HOST:PORT), waiting for at most `seconds`."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()
    except (OSError, ValueError):
        return False
    return True


def free_ports(count: int) -> list[int]:
    """Ports of this machine at which nothing listens now. They are none of those that the system gives to a program that asks
    for any port, and none that Ray's workers take by default. Raises MinitronError if there are too few."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 32_768), 200):  # unlike processes with the same seed
        with suppress(OSError):
            socket.create_server(("", port)).close()
            found.append(port)
        if len(found) == count:
            return found
    raise MinitronError(
        "no port is free between 20000 and 32767", "end what listens there: `ss -ltn` shows the ports in use"
    )


def check_jobs_address(address: Any) -> None:
    """Raise InputError unless `address` is one of a Ray Jobs API, http://HOST:8265 or https://HOST, without user and query,
    which may be secrets."""
    check_type("address", address, str, "the address of a Jobs API, such as http://HOST:8265")
    if "@" in address or "?" in address:
        raise InputError(
            f"address {redact(address)!r}: was given with a user or a query, and addresses are shown and logged",
            "give http://HOST:8265 or https://HOST alone, and set RAY_AUTH_TOKEN_PATH to the token's file",
        )
    if not JOBS_API.fullmatch(address) or _split(address) is None:
        raise InputError(
            f"address {address!r}: not the address of a Jobs API",
            "give the address of the head's dashboard, http://HOST:8265 or https://HOST (not ray:// or port 6379)",
        )


def check_token_address(address: str, token: str | None, *, insecure: bool) -> None:
    """Raise InputError for an address of a Jobs API to which nothing private can be sent: http to another machine.

    token: the cluster's, if there is one. insecure: the user accepts it.
    """
    parts = urlsplit(address)
    if insecure or parts.scheme == "https" or is_loopback(parts.hostname):
        return
    if token is None:
        raise InputError(
            f"address {address!r}: no cluster token is set, and without one everybody who reaches the head can run code on it",
            "set RAY_AUTH_TOKEN_PATH to the file with the cluster's token, or forward the port and use "
            "http://127.0.0.1:8265; to connect nevertheless, use --insecure",
        )
    raise InputError(
        f"address {address!r}: the cluster's token would be sent to another machine without encryption",
        "use https://, or forward the port (ssh -L 8265:127.0.0.1:8265 HEAD) and use http://127.0.0.1:8265; in a network where "
        "nobody can listen, use --insecure",
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
    if "@" in address or "?" in address:
        raise InputError(
            f"Ray address {redact(address)!r}: was given with a user or a query, and addresses are shown and logged",
            "give HOST:6379 or ray://HOST:10001 alone, and set RAY_AUTH_TOKEN_PATH to the token's file",
        )
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
