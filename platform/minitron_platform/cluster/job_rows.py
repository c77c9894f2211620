"""The submitted runs that a cluster knows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from ray.job_submission import JobSubmissionClient

from minitron.errors import InputError
from minitron_platform.cluster.job_log import failure

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class JobRow:
    """A submitted run."""

    submission_id: str
    name: str
    """Of the run."""
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
    """Of Minitron, where the run was submitted."""
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
    known = ", ".join(f"{row.submission_id} ({row.status.lower()})" for row in (named or rows)) or "none"
    problem = "more than one job has this name" if named else "no such job"
    raise InputError(f"job {name!r}: {problem}", f"give one of: {known}")


def _reason(message: str) -> str:
    """Why a run failed, from Ray's explanation, which ends with the last lines of the run's log."""
    first, _, log = message.partition("\n")
    return failure(log) or first.split(", last available logs")[0]
