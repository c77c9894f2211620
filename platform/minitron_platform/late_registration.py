"""Registers the students of finished runs whose registration MLflow did not take at the time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from minitron.errors import InputError
from minitron.storage import redact
from minitron_platform.locations import Locations
from minitron_platform.recipes.schema import Member
from minitron_platform.report.finished_run import finished_run, waits
from minitron_platform.report.write import write_results
from minitron_platform.stages.register import Register
from minitron_platform.stages.registration import ANSWER_SECONDS, RegisterOutput, send
from minitron_platform.stages.stage_records import read_record, write_record
from minitron_platform.stages.state import RunState
from minitron_platform.tracking.client import RegistryError
from minitron_platform.tracking.flusher import Flusher
from minitron_platform.tracking.spool import Spool


def register_waiting(locations: Locations, key: str, spool: Spool, flusher: Flusher) -> Iterator[str]:
    """Register the students of a run that wait for it, write its report and results again, and end its record as FINISHED.

    Yields the summary of each registration. A run that is not finished is left to its next driver, and of one whose students
    are registered no other stage is read: they may have been deleted. Raises RegistryError if the registry does not answer,
    InputError if the students wait for another one, and what `finished_run` raises.
    """
    if not waits(locations, key):
        return
    state = finished_run(locations, key)
    for member in state.recipe.family:
        state.current = member
        if state.output(Register).is_final:
            continue
        registered = _register(state, member, spool, flusher)
        yield registered.summary
    run = spool.record(key)
    run.start(key)
    for path in write_results(state):
        run.artifact(path)
    run.end("FINISHED")


def _register(state: RunState, member: Member, spool: Spool, flusher: Flusher) -> RegisterOutput:
    output = state.output(Register, member)
    registration = output.waiting
    assert registration is not None
    if registration.registry is not None and state.locations.uses_own_database:
        raise InputError(
            f"{output.title}: it waits for MLflow at {registration.registry}, not for {redact(state.locations.tracking_uri)}",
            "add --tracking-uri with that address, or with the one that this machine reaches it at",
        )
    previous = state.recipe.origin(member)
    parent = state.output(Register, previous) if previous else None
    run_id = flusher.wait_for(state.run_key, ANSWER_SECONDS)
    if run_id is None:
        raise RegistryError(f"{output.title}: MLflow has not accepted the run's record", "check that it answers")
    record_id = flusher.wait_for(registration.record, ANSWER_SECONDS)
    registered = send(output, registration, state.locations.tracking_uri, parent, run_id, record_id)
    folder = state.locations.stage(Register.name, output.fingerprint)
    record = read_record(state.locations.storage, folder, RegisterOutput)
    assert record is not None  # `output` is from there
    write_record(state.locations.storage, folder, replace(record, output=registered))
    state.finish(Register(), registered)
    log = spool.record(registration.record)
    log.start(state.title(Register.name), parent=state.run_key, of=output.fingerprint)
    log.tags({"summary": registered.summary})
    log.params({"version": registered.version})
    log.end()
    return registered
