"""`minitron sync`: sends to MLflow what it lacks of a storage: records of runs, and students that wait to be registered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml
from rich.markup import escape

from minitron import storage
from minitron.errors import InputError, MinitronError, StorageError, one_line
from minitron.storage import redact
from minitron_platform.console import Console
from minitron_platform.late_registration import register_waiting
from minitron_platform.leases import LeaseHeldError, lease
from minitron_platform.locations import Locations
from minitron_platform.tracking.check import check_accepts
from minitron_platform.tracking.flusher import Flusher
from minitron_platform.tracking.spool import Spool


def sync(locations: Locations, console: Console) -> int:
    """Send the records of every run in the storage that MLflow lacks, and register the students that wait for that; returns how
    many records were sent.

    Runs whose driver is alive are left to it. What a run left open because its driver was killed is ended as KILLED; the next
    driver of the run continues it. A run whose students cannot be registered, for example because a file is damaged, is said
    and does not hinder the others. Raises InputError for a storage without records, MinitronError if MLflow does not take
    everything or a student cannot be registered, and what `check_accepts` raises.
    """
    sent, unsent = 0, 0
    failed: list[str] = []
    keys = run_keys(locations)
    if not keys:
        raise InputError(f"{locations.storage}: there are no records of runs", "check --storage")
    for key in keys:
        with console.working(key):
            try:
                with lease(locations, f"run-{key}", f"run {key}", run=key, console=console, wait=False):
                    synced = _sync_run(locations, key, console)
            except LeaseHeldError as held:
                console.say(f"{escape(held.problem)}, which sends its records itself")
                continue
        sent += synced.sent
        unsent += synced.left
        if synced.problem is not None:
            console.say(f"[red]{escape(f'{key}: {one_line(synced.problem)}')}[/]")
            failed.append(key)
    if unsent:
        raise MinitronError(
            f"{unsent:,} records are not in MLflow yet; they stay in {locations.storage}",
            "check that MLflow answers, and run the command again",
        )
    if failed:
        raise MinitronError(
            f"{', '.join(failed)}: students may wait to be registered",
            "fix what is said above, and run the command again",
        )
    return sent


def run_keys(locations: Locations) -> list[str]:
    """The runs that have records in the storage, or on this machine from an earlier version."""
    runs = storage.join(locations.storage, "runs")
    older = storage.join(locations.local, "runs")
    names = {*storage.names(runs), *storage.names(older)}
    return sorted(
        key for key in names if any(storage.names(where(key)) for where in (locations.spool, locations.older_spool))
    )


@dataclass(frozen=True)
class _Synced:
    """What was done for a run. sent, left: numbers of records. problem: why its students cannot be registered."""

    sent: int = 0
    left: int = 0
    problem: MinitronError | None = None


def _sync_run(locations: Locations, key: str, console: Console) -> _Synced:
    """Send the records of one run and register its students. Raises RegistryError if MLflow does not answer."""
    problem = None
    spool = Spool(locations.spool(key), older=locations.older_spool(key))
    try:
        experiment = spool.experiment or _experiment_of_recipe(locations, key)
        if not experiment:
            console.say(f"[yellow]{escape(key)}: nothing says which experiment it belongs to, so it is left out[/]")
            return _Synced()
        check_accepts(locations.tracking_uri, experiment)
        spool.end_open("KILLED")
        flusher = Flusher(spool, locations.tracking_uri, experiment)
        try:
            for line in register_waiting(locations, key, spool, flusher):
                console.say(f"[green]✓[/] {escape(line)}")
        except (InputError, StorageError) as error:
            problem = error
        finally:
            console.status(flusher.text)
            left = flusher.close()
        sent = flusher.sent()
    finally:
        spool.close()
    if sent or left:
        unsent = f", {left:,} are left" if left else ""
        console.say(f"{escape(key)}: {sent:,} records sent to {escape(redact(locations.tracking_uri))}{unsent}")
    return _Synced(sent, left, problem)


def _experiment_of_recipe(locations: Locations, key: str) -> str:
    """The experiment in the recipe that an earlier version kept with its records; empty if there is none."""
    path = storage.join(locations.local_run(key), "recipe.yaml")
    if not storage.exists(path):
        return ""
    try:
        # its nodes alone: aliases and << would become more values than fit into memory
        recipe: Any = yaml.compose(storage.read_bytes(path), Loader=yaml.SafeLoader)
        return str({key.value: value.value for key, value in recipe.value}["experiment"])
    except (yaml.YAMLError, StorageError, KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return ""
