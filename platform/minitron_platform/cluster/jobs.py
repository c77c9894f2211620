"""The submitted runs of a cluster: their status and logs, and how they are stopped, over the Jobs API of its head.

The driver of a run is on the cluster, so the run does not need the terminal that submitted it. Ray does not restart a job
that ended, or that was lost with its cluster. Finished work is in the storage; submitting the run again starts a new job, with
the next attempt number, that resumes it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

import aiohttp
from ray.job_submission import JobSubmissionClient

from minitron.errors import InputError, MinitronError
from minitron_platform.cluster.job_log import Progress, progress, stage_log
from minitron_platform.cluster.job_rows import ENDED, JobRow, find_job, job_rows
from minitron_platform.cluster.job_start import STOP_SECONDS
from minitron_platform.cluster.jobs_api import connect, head_errors, said

STOP_WAIT = STOP_SECONDS + 20.0  # seconds
RECONNECTIONS = 10  # to a log, one after another
RECONNECT_SECONDS = 3.0


def status(address: str, submission_id: str | None = None, *, insecure: bool = False) -> list[JobRow]:
    """The submitted runs, newest first.

    address, insecure: as for `submit_text`. submission_id: return only the run with this submission id or name.
    Raises InputError for an id or name that does not identify one run, MinitronError if the head refuses or does not answer.
    """
    client = connect(address, insecure)
    with head_errors(address):
        rows = job_rows(client)
    return rows if submission_id is None else [find_job(rows, submission_id)]


def job_progress(address: str, row: JobRow, *, insecure: bool = False) -> Progress:
    """The stage that a run is at, from its log; a status that says why if its node is gone or the log is no text, which must
    not hide what is known of other runs. Raises what `status` raises."""
    client = connect(address, insecure)
    try:
        log = client.get_job_logs(row.submission_id)
    except (OSError, RuntimeError) as error:
        return Progress("", f"its log cannot be read: {said(error)}")
    return progress(log)


def logs(
    address: str, submission_id: str, follow: bool = False, *, stage: str | None = None, insecure: bool = False
) -> Iterator[str]:
    """The output of a run, in pieces; with `follow`, new output as it comes until the run ends, after a lost connection too.

    stage: only what was printed during this stage; not with `follow`.
    `follow` needs a thread without a running event loop. Raises what `status` raises, and MinitronError if the connection is
    lost and does not come back.
    """
    client = connect(address, insecure)
    with head_errors(address):
        row = find_job(job_rows(client), submission_id)
        if follow:
            yield from _followed(client, row)
            return
        log = client.get_job_logs(row.submission_id)
        if stage is None:
            yield log
            return
        part = stage_log(log, stage)
        if not part:
            raise InputError(
                f"job {row.submission_id}: its log has nothing about the stage {stage}",
                "the run has not begun it, or it was done within seconds; see the whole log without --stage",
            )
        yield part


def exit_code(address: str, submission_id: str, *, insecure: bool = False) -> int:
    """The exit code for the end of a run: 0 if it succeeded, 130 if it was stopped, otherwise that of its command, which is 128
    and the signal that has killed it, or 1.

    Raises what `status` raises.
    """
    client = connect(address, insecure)
    with head_errors(address):
        job = client.get_job_info(submission_id)
    match job.status.value:
        case "SUCCEEDED":
            return 0
        case "STOPPED":
            return 130
    code = job.driver_exit_code or 1
    return code if code > 0 else 128 - code


def stop(address: str, submission_id: str, *, insecure: bool = False) -> str:
    """Stop a run, wait until it has ended and return its status.

    The run ends its records as KILLED, and its workers, for which it has STOP_SECONDS; what it has finished is kept.
    Raises what `status` raises, and MinitronError if it has not ended STOP_WAIT after the request.
    """
    client = connect(address, insecure)
    with head_errors(address):
        row = find_job(job_rows(client), submission_id)
        client.stop_job(row.submission_id)
        deadline = time.monotonic() + STOP_WAIT
        state: str = client.get_job_status(row.submission_id).value
        while state not in ENDED and time.monotonic() < deadline:
            time.sleep(0.3)
            state = client.get_job_status(row.submission_id).value
        if state == "PENDING":  # Ray stops no command that it has not started yet
            raise MinitronError(
                f"{row.submission_id} has not started, so that it cannot end yet: it waits for resources or its environment",
                "do nothing more: it ends as soon as it starts, or when Ray gives it up, after 15 minutes by default",
            )
        if state not in ENDED:
            raise MinitronError(
                f"{row.submission_id} is still {state.lower()}, {STOP_WAIT:g} s after it was told to stop",
                "stop it again; if that does not help, look at the node of its command in Ray's dashboard",
            )
        return state


def _followed(client: JobSubmissionClient, row: JobRow) -> Iterator[str]:
    """The output of a run until it ends."""
    printed = 0  # characters
    lost = 0
    while True:
        seen = 0  # characters of this connection, which begins with the first line again
        try:
            for piece in _sync(client.tail_job_logs(row.submission_id)):
                seen += len(piece)
                if seen > printed:
                    yield piece[-(seen - printed) :]
                    printed, lost = seen, 0
            if client.get_job_status(row.submission_id).value in ENDED:
                return
        except (OSError, aiohttp.ClientError, RuntimeError):
            if lost >= RECONNECTIONS:
                raise
        lost += 1
        if lost > RECONNECTIONS:
            raise MinitronError(f"{row.submission_id}: the log ended, but not the job", "run the command again")
        time.sleep(RECONNECT_SECONDS)


def _sync(stream: AsyncIterator[str]) -> Iterator[str]:
    """An asynchronous iterator as an ordinary one."""
    with asyncio.Runner() as runner:
        while (piece := runner.run(_next(stream))) is not None:
            yield piece


async def _next(stream: AsyncIterator[str]) -> str | None:
    return await anext(stream, None)
