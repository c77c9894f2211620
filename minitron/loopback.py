"""This machine's loopback interface, over which secrets may be sent without encryption."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str | None) -> bool:
    """Whether `host` is this machine's loopback interface, which other machines cannot reach: `localhost`, an address of
    127.0.0.0/8, or ::1. Other names are not, wherever they lead."""
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False
