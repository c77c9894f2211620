"""`promote`: points an alias at a version of a registered model if it passes its gates; and the way back."""

from __future__ import annotations

import getpass
import json
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from minitron.arguments import check_type
from minitron.errors import InputError
from minitron.storage import manifest
from minitron_platform.arguments import check_optional_string, path_string
from minitron_platform.gates.gate import Verdict
from minitron_platform.gates.judge import PROMOTED_TAG, judge, record
from minitron_platform.locations import resolve_locations
from minitron_platform.promotion_hook import call_hook, check_hook
from minitron_platform.tracking.client import (
    aliased_version,
    checked_alias,
    open_registry,
    registered_model,
    registered_version,
)
from minitron_platform.tracking.moves import CANDIDATE, CHAMPION, Promotion
from minitron_platform.tracking.moves import promote as move_alias
from minitron_platform.tracking.moves import rollback as move_back
from minitron_platform.tracking.version_weights import MANIFEST_TAG, verified_folder

TRACKING_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql")  # of MLflow servers and databases


class GateError(InputError):
    """A version that fails gates; `verdicts` says what each gate measured."""

    def __init__(self, problem: str, remedy: str = "", verdicts: tuple[Verdict, ...] = ()) -> None:
        super().__init__(problem, remedy)
        self.verdicts = verdicts


@dataclass(frozen=True)
class GatedPromotion(Promotion):
    """A promotion, with what the gates said."""

    verdicts: tuple[Verdict, ...] = ()


def promote(
    where: str | Path,
    model: str,
    *,
    version: str | int | None = None,
    alias: str = CHAMPION,
    tracking_uri: str | None = None,
    unverified: bool = False,
    force: bool = False,
    reason: str | None = None,
    on_promote: str | None = None,
) -> GatedPromotion:
    """Point `alias` at a version of `model` if it passes its gates; the same as `minitron promote`.

    where: the storage that the model was made in (a folder or an fsspec address, as `--storage`), or the address of MLflow's
    server or database. version: by default the one with the alias `candidate`. tracking_uri: MLflow's address, if `where` is a
    storage that does not contain MLflow's database. unverified: allow a version that does not say which weights were
    registered. force: also if gates fail, for the `reason`, which is recorded. Weights that were altered cannot be forced.
    on_promote: a command, or an http address, that is told of the promotion; see `promotion_hook`.
    Raises InputError for an unknown model or version, an invalid alias and an alias that was moved meanwhile, GateError for a
    version that fails gates, StorageError for missing or altered weights, HookError if `on_promote` fails after the promotion.
    """
    where = path_string("where", where)
    if not where:
        raise InputError("where: the address is empty", "give the storage, such as 'runs', or MLflow's address")
    for name, flag in (("unverified", unverified), ("force", force)):
        check_type(name, flag, bool, "true or false")
    for name, value in (("model", model), ("alias", alias)):
        check_type(name, value, str, "a string")
    check_optional_string("tracking_uri", tracking_uri)
    check_optional_string("reason", reason)
    check_optional_string("on_promote", on_promote)
    if version is not None:
        check_type("version", version, (str, int), "a version, such as 3")
    storage_root = None
    if where.split("://")[0].split("+")[0] in TRACKING_SCHEMES:
        tracking_uri = where
    else:
        locations = resolve_locations(where, tracking_uri)
        tracking_uri, storage_root = locations.tracking_uri, locations.storage
    return gated_promotion(
        tracking_uri,
        model,
        version=None if version is None else str(version),
        alias=alias,
        storage_root=storage_root,
        unverified=unverified,
        force=force,
        reason=reason,
        on_promote=on_promote,
    )


def gated_promotion(
    tracking_uri: str,
    name: str,
    *,
    version: str | None = None,
    alias: str = CHAMPION,
    storage_root: str | None = None,
    unverified: bool = False,
    force: bool = False,
    reason: str | None = None,
    on_promote: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> GatedPromotion:
    """As `promote`, with the address of MLflow. say: gets a line before work that may take long."""
    checked_alias(alias)
    if force and not (reason or "").strip():
        raise InputError("a promotion past its gates needs a reason, which is recorded", 'add --reason "why"')
    if on_promote is not None:
        check_hook(on_promote)
    with open_registry(tracking_uri) as client:
        model = registered_model(client, name)
        chosen = registered_version(client, name, version or aliased_version(model, CANDIDATE))
        before = model.aliases.get(alias)
        replaced = None
        if before is not None and str(before) != str(chosen.version):
            replaced = registered_version(client, name, str(before))
        say(f"comparing and loading the weights of version {chosen.version}")
        with verified_folder(client, chosen, storage_root, unverified=unverified) as folder:
            verdicts = (_weights(chosen, folder), *judge(chosen, folder, replaced, storage_root))
    failed = [verdict for verdict in verdicts if verdict.status == "failed"]
    if failed and not force:
        names = ", ".join(verdict.gate for verdict in failed)
        raise GateError(
            f"version {chosen.version} of {name} is not promoted: {names}",
            'choose another version, or add --force --reason "why"',
            verdicts,
        )
    text = record(
        verdicts, by=_user(), previous=None if before is None else str(before), reason=reason if failed else None
    )
    moved = move_alias(
        tracking_uri,
        name,
        version=str(chosen.version),
        alias=alias,
        verified=True,
        since=(None if before is None else str(before),),
        tags={} if str(before) == str(chosen.version) else {PROMOTED_TAG + alias: text},
    )
    if on_promote is not None:
        _tell(on_promote, "promoted", moved, str(chosen.source), json.loads(text), say)
    return GatedPromotion(moved.name, moved.version, moved.alias, moved.previous, verdicts)


def rollback(
    tracking_uri: str,
    name: str,
    *,
    alias: str = CHAMPION,
    storage_root: str | None = None,
    on_promote: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Promotion:
    """As `tracking.moves.rollback`. on_promote, say: as for `gated_promotion`. Raises HookError, too."""
    if on_promote is not None:
        check_hook(on_promote)
    moved = move_back(tracking_uri, name, alias=alias, storage_root=storage_root)
    if on_promote is not None:
        with open_registry(tracking_uri) as client:
            source = str(registered_version(client, name, moved.version).source)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        _tell(on_promote, "rolled_back", moved, source, {"time": now, "by": _user()}, say)
    return moved


def _tell(
    hook: str, event: str, moved: Promotion, source: str, more: Mapping[str, Any], say: Callable[[str], None]
) -> None:
    move = {"model": moved.name, "version": moved.version, "alias": moved.alias, "previous": moved.previous}
    say("telling " + ("the address" if "://" in hook else "the command") + " of on-promote")
    call_hook(hook, {"event": event, **move, "source": source, **more})


def _weights(version: Any, folder: Path) -> Verdict:
    """What the comparison of the weights has found, which raises an error if they were altered."""
    size = f"{len(manifest(str(folder))['files'])} files"
    if MANIFEST_TAG not in version.tags:
        return Verdict("weights", "unknown", f"{size}, unverified", "as registered")
    return Verdict("weights", "passed", f"{size} compared", "as registered")


def _user() -> str:
    """Who promotes: MLflow's user if there is one, otherwise that of this machine."""
    try:
        local = getpass.getuser()
    except (KeyError, OSError):
        local = str(os.getuid())
    return f"{os.environ.get('MLFLOW_TRACKING_USERNAME') or local} on {socket.gethostname()}"
