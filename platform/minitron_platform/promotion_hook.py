"""Tells others of a promotion or a rollback: runs a command, or posts to an address.

Only who moves the alias says which, by an option or the environment: what a registry or a recipe says is never run.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import urllib.error
from typing import Any
from urllib.parse import urlsplit

from minitron.errors import InputError, MinitronError, one_line
from minitron.loopback import is_loopback
from minitron.storage import redact
from minitron_platform.posting import post_json

SECONDS = 60.0  # longest time of a command or request
PREFIX = "MINITRON_EVENT_"  # of the environment variables with the event's values


class HookError(MinitronError):
    """The alias was moved, but the command or address that should hear of it failed."""


def check_hook(hook: str) -> None:
    """Raise InputError for a hook that cannot work: no command, or an unencrypted address of another machine."""
    if _is_address(hook):
        address = urlsplit(hook)
        if not address.hostname:
            raise InputError(
                f"on-promote: {redact(hook)} has no host", "give an address such as https://example.org/hook"
            )
        if address.scheme == "http" and not is_loopback(address.hostname):
            raise InputError(f"on-promote: {redact(hook)} is not encrypted", "use https://, or a command")
        return
    try:
        parts = shlex.split(hook)
    except ValueError as error:
        raise InputError(f"on-promote: {hook!r} is not a command ({error})", "close its quotes") from error
    if not parts:
        raise InputError("on-promote: there is no command", "give a command or an https:// address, or leave it out")


def call_hook(hook: str, event: dict[str, Any]) -> None:
    """Run the command `hook`, or post to the address that it is, with `event`.

    A command is started without a shell; it gets the event as JSON on its standard input, and its texts and numbers as
    environment variables. An address gets the JSON, and is not followed to another one. Raises HookError if that fails or takes
    more than a minute.
    """
    body = json.dumps(event).encode()
    try:
        if _is_address(hook):
            post_json(hook, body, timeout=SECONDS)
        else:
            _run(shlex.split(hook), event, body)
    except (OSError, subprocess.SubprocessError, urllib.error.URLError) as error:
        what = redact(hook) if _is_address(hook) else shlex.split(hook)[0]
        raise HookError(
            f"the alias was moved to version {event['version']}, but {what} failed: {redact(one_line(error))}",
            "run it again yourself if it matters",
        ) from error


def _is_address(hook: str) -> bool:
    return hook.startswith(("http://", "https://"))


def _run(command: list[str], event: dict[str, Any], body: bytes) -> None:
    values = {f"{PREFIX}{name.upper()}": str(value) for name, value in event.items() if isinstance(value, str | int)}
    done = subprocess.run(
        command,
        input=body,
        env={**os.environ, **values},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=SECONDS,
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise subprocess.SubprocessError(f"exit code {done.returncode}" + (f": {lines[-1][:200]}" if lines else ""))
