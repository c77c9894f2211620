"""Programs that run in the sandbox, several of them for one document."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from minitron.errors import InputError
from minitron.evaluation.sandbox import Limits, Sandbox, check_sandbox

RUNS_PROGRAMS = """
import evaluate
def all_solved(programs):
    results = evaluate.load("code_eval").compute(references=[""], predictions=[programs], k=[1])[1]
    return [result["passed"] for _, result in results[0]]
def solved(program):
    return evaluate.load("code_eval").compute(references=[""], predictions=[[program]], k=[1])[0]["pass@1"]
"""


def has_sandbox() -> bool:
    try:
        check_sandbox()
    except InputError:
        return False
    return True


@contextmanager
def sandboxed(folder: Path, limits: Limits) -> Iterator[Callable[..., list[bool]]]:
    """Runs the programs of a document: a function of their texts that returns whether each ended without an exception."""
    file = folder / "runner.py"
    file.write_text(RUNS_PROGRAMS)
    for each in (folder, *folder.parents[:2]):
        each.chmod(0o755)  # root's sandbox has the rights of another user
    sandbox = Sandbox(limits, [folder])

    def run(*programs: str) -> list[bool]:
        solved: list[bool] = sandbox.call(file, "all_solved", programs, seconds=60)
        return solved

    try:
        yield run
    finally:
        sandbox.stop()
