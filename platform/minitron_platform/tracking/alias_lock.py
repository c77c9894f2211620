"""A lock on an alias of a registered model, for all processes that use the same registry.

MLflow sets aliases and tags without looking at what they were, so two promotions at once would lose one of their records. What
it does atomically, in every database and on every server, is to create a registered model, whose name is unique: while a
process moves an alias there is an empty one. One that a killed process has left is removed by the next.
"""

from __future__ import annotations

import hashlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from minitron.errors import MinitronError

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

LOCK_PREFIX = "minitron-lock-"  # of the names of these models
OWNER_TAG = "minitron.owner"
HELD_SECONDS = 20.0  # longest time that a process writes under its lock
LEFT_SECONDS = 30.0  # after which the same lock was left by a killed process
PAUSE_SECONDS = 0.1  # between two attempts


class AliasLock:
    """A lock that this process holds."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._since = time.monotonic()

    def check(self) -> None:
        """Raise MinitronError if the registry has been so slow that others may have removed the lock; call it before every
        write."""
        if time.monotonic() - self._since > HELD_SECONDS:
            raise MinitronError(
                f"{self._title}: MLflow has taken more than {HELD_SECONDS:.0f} s to answer", "try again"
            )


@contextmanager
def alias_lock(client: MlflowClient, name: str, alias: str) -> Iterator[AliasLock]:
    """Hold the lock of `name`@`alias`; waits while another process holds it."""
    lock_name = LOCK_PREFIX + hashlib.sha256(f"{name}\0{alias}".encode()).hexdigest()[:20]
    title = f"{name}@{alias}"
    owner = uuid.uuid4().hex
    seen, since = "", 0.0
    while True:
        lock = AliasLock(title)
        holder = _try(client, lock_name, owner, f"{title} is being moved")
        if holder == owner:
            break
        if holder != seen:
            seen, since = holder, time.monotonic()
        elif holder and time.monotonic() - since > LEFT_SECONDS:
            log.warning("%s: a process that moved it has ended in between; its lock is removed", title)
            _release(client, lock_name, holder)
        time.sleep(PAUSE_SECONDS)
    try:
        yield lock
    finally:
        _release(client, lock_name, owner)


def _try(client: MlflowClient, lock_name: str, owner: str, description: str) -> str:
    """Create the lock; returns whose it is now, empty for nobody's."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(lock_name, tags={OWNER_TAG: owner}, description=description)
    except MlflowException as error:
        # the second, if the lock is removed while MLflow looks at what is in the way
        if error.error_code not in ("RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"):
            raise
        return _owner(client, lock_name)  # perhaps this process's: a request whose answer was lost is sent again
    return owner


def _owner(client: MlflowClient, lock_name: str) -> str:
    """Whose lock it is; empty if there is none."""
    return unless_missing(lambda: str(client.get_registered_model(lock_name).tags.get(OWNER_TAG, "unknown")), "")


def _release(client: MlflowClient, lock_name: str, owner: str) -> None:
    """Remove the lock if it is still that owner's."""
    if _owner(client, lock_name) == owner:
        unless_missing(lambda: client.delete_registered_model(lock_name), None)


def unless_missing(request: Callable[[], Any], default: Any) -> Any:
    """The answer of a request about a registered model; `default` if there is none of that name."""
    from mlflow.exceptions import MlflowException

    try:
        return request()
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return default
