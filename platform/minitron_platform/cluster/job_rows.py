"""The submitted runs that a cluster knows."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ray.job_submission import JobSubmissionClient

from minitron.errors import InputError
from minitron_platform.cluster.job_log import failure

SHOWN = 8  # jobs in an error
_EXIT_CODE = re.compile(r"failed with exit code (-?\d+)")
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class JobRow:
    """A submitted run."""

    submission_id: str
    name: str
    """Name of the run."""
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    started: float | None
    """Unix time in seconds."""
    ended: float | None
    """Unix time in seconds."""
    message: str
    """Ray's explanation of the status, its first line."""
    reason: str
    """The error that ended a run that has failed, as one line; empty otherwise."""
    code: str
    """Content hash of the packages that were sent."""
    version: str
    """Version of Minitron on the machine that submitted the run."""
    resume: str = ""
    """The command that submitted it, which submits it again; empty if it was submitted from Python."""

    @property
    def is_active(self) -> bool:
        """Whether the job is pending or running."""
        return self.status not in ENDED

    @property
    def work(self) -> str:
        """Identifies the recipe, settings and code; all attempts have it in common. The submission id without the attempt."""
        return self.submission_id.rsplit("-a", 1)[0]

    @property
    def attempt(self) -> int:
        """Number of the attempt, from 1."""
        return int(self.submission_id.rsplit("-a", 1)[1])


def job_rows(client: JobSubmissionClient) -> list[JobRow]:
    """The submitted runs, newest first."""
    rows = [
        JobRow(
            submission_id=job.submission_id,
            name=job.metadata["minitron.run"],
            status=job.status.value,
            started=job.start_time / 1000 if job.start_time else None,
            ended=job.end_time / 1000 if job.end_time else None,
            message=(job.message or "").split(", last available logs")[0].split("\n")[0],
            reason=_reason(job.message or "") if job.status.value == "FAILED" else "",
            code=job.metadata.get("minitron.code", ""),
            version=job.metadata.get("minitron.version", ""),
            resume=job.metadata.get("minitron.resume", ""),
        )
        for job in client.list_jobs()
        if job.submission_id and "minitron.run" in (job.metadata or {})  # not jobs of other programs
    ]
    return sorted(rows, key=lambda row: row.started or time.time(), reverse=True)


def find_job(rows: Sequence[JobRow], name: str) -> JobRow:
    """The job with the submission id or run name `name`. For a run name, its only active job, or the last attempt if all of
    its attempts are at the same work. Raises InputError if there is none or more than one."""
    for row in rows:
        if row.submission_id == name:
            return row
    named = [row for row in rows if name in (row.name, row.work)]
    active = [row for row in named if row.is_active]
    if len(active) == 1:
        return active[0]
    if named and not active and len({row.work for row in named}) == 1:
        return max(named, key=lambda row: row.attempt)
    shown = [f"{row.submission_id} ({row.status.lower()})" for row in (named or rows)]
    if not shown:
        raise InputError(
            f"job {name!r}: no such job", "the cluster knows none; give the address at which it was submitted"
        )
    hidden = len(shown) - SHOWN
    more = f", or {hidden} older one{'s' if hidden > 1 else ''}, which `minitron jobs` lists" if hidden > 0 else ""
    problem = "more than one job has this name" if named else "no such job"
    raise InputError(f"job {name!r}: {problem}", f"give one of: {', '.join(shown[:SHOWN])}{more}")


def _reason(message: str) -> str:
    """Why a run failed, from Ray's explanation, which ends with the last lines of the run's log."""
    first, _, log = message.partition("\n")
    first = first.split(", last available logs")[0]
    code = _EXIT_CODE.search(first)
    if code and (number := _signal(int(code[1]))):
        name = signal.Signals(number).name if number in {*signal.Signals} else f"signal {number}"
        cause = (
            ", which the system does to a process where a node has no memory left" if number == signal.SIGKILL else ""
        )
        return f"the run's own process was killed ({name}){cause}; resume it, its finished work is kept"
    return failure(log) or first


def _signal(code: int) -> int:
    """The signal that a process has ended by, from its exit code as Python or a shell has it; 0 for none."""
    return -code if code < 0 else code - 128 if code == 128 + signal.SIGKILL else 0
