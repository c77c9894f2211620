"""Connections to the Jobs API of a cluster's head."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from minitron.errors import MinitronError
from minitron_platform.addresses import check_jobs_address, check_token_address
from minitron_platform.cluster.tokens import auth_token, refused_token

NOISY_LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
AGENT_SECONDS = 60.0  # a head that has just started answers before it can start jobs


class _Client(JobSubmissionClient):
    """Ray's client with timeouts, of which it has none itself, and with patience with a head that has just started."""

    def submit_job(self, **arguments: Any) -> str:
        deadline = time.monotonic() + AGENT_SECONDS
        while True:
            try:
                return super().submit_job(**arguments)
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(1.0)

    def _do_request(self, method: str, endpoint: str, **arguments: Any) -> Any:
        # (connect, read) in seconds; the first request is always the one for the version
        arguments.setdefault("timeout", (4, 8 if endpoint == "/api/version" else 60))
        return super()._do_request(method, endpoint, **arguments)


def connect(address: str, insecure: bool) -> JobSubmissionClient:
    """A client for the Jobs API at `address`. Raises InputError for an address that is invalid or not safe to use."""
    check_jobs_address(address)
    token = auth_token()
    check_token_address(address, token, insecure=insecure)
    for logger in NOISY_LOGGERS:
        logging.getLogger(logger).setLevel(logging.WARNING)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with head_errors(address), _without("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        return _Client(address, headers=headers)


@contextmanager
def _without(*names: str) -> Iterator[None]:
    # Ray prefers the address in these variables to the one that it is given, which is the one that was checked.
    removed = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(removed)


@contextmanager
def head_errors(address: str) -> Iterator[None]:
    """Turn the errors of Ray's client into MinitronErrors."""
    try:
        yield
    except AuthenticationError as error:
        raise refused_token(address) from error
    except (OSError, aiohttp.ClientError) as error:  # the errors of `requests` are OSErrors
        raise MinitronError(
            f"{address}: no answer ({type(error).__name__})",
            "check that the head is running and that this machine can reach its dashboard port; forward it if necessary",
        ) from error
    except RuntimeError as error:
        raise MinitronError(
            f"{address}: {said(error)}",
            "check that this is the dashboard of a Ray head with the same version of Ray as here, and its logs",
        ) from error


def said(error: Exception) -> str:
    """An error of Ray's client as one line. Of a traceback on the cluster only the end names what is wrong."""
    lines = [line for line in str(error).splitlines() if line.strip(" .")]
    if not lines:
        return type(error).__name__
    first, traceback, _ = lines[0].partition("Traceback (most recent call last)")
    return (first + lines[-1] if traceback else lines[0]).strip()[:500]
