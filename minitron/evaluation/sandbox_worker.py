"""Calls scoring functions inside the sandbox; `minitron.evaluation.sandbox` starts it as `python -I worker.py SETTINGS`.

Only the standard library is imported here. SETTINGS is JSON, see `Sandbox`. Requests are lines of JSON on standard input,
{"file", "function", "arguments", "keywords"}; each is answered with a line on standard output: {"value": …} or {"problem": …}.

Every call runs in a child process, and so does every program that a model has written. When a call ends, all processes that
it started are killed and its files are deleted.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import math
import os
import resource
import select
import shutil
import signal
import struct
import sys
import time
import types
from collections.abc import Callable
from typing import Any

ANSWER_BYTES = 1 << 20  # longest result of a call
FILE_BYTES = 10_000_000  # largest file
OPEN_FILES = 128
LOOK_SECONDS = 0.05  # between two looks at the memory of all processes
SET_DUMPABLE, SET_SECCOMP = 4, 22  # Linux: prctl's PR_SET_DUMPABLE and PR_SET_SECCOMP
NEW_USER = 0x1000_0000  # CLONE_NEWUSER
REFUSED, MISSING = 0x5_0000 | 1, 0x5_0000 | 38  # a system call that fails with EPERM, with ENOSYS
ALLOWED = 0x7FFF_0000
# Machine: its number in a filter, and those of its system calls clone, clone3 and unshare.
SYSTEM_CALLS = {"x86_64": (0xC000_003E, 56, 435, 272), "aarch64": (0xC000_00B7, 220, 435, 97)}
# Those that make memory which no limit of a process counts, or which outlives the process: shmget, semget, msgget, mq_open,
# memfd_create, memfd_secret.
MEMORY_CALLS = {"x86_64": (29, 64, 68, 240, 319, 447), "aarch64": (194, 190, 186, 180, 279, 447)}
Function = Callable[..., Any]


def main(settings: dict[str, Any]) -> None:
    _limit(settings)
    sys.path += settings["packages"]
    sys.modules["evaluate"] = _metrics(settings["seconds"])
    with os.fdopen(os.dup(0), encoding="utf-8") as requests, os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        with open(os.devnull, "r+b") as null:
            os.dup2(null.fileno(), 0)
            os.dup2(null.fileno(), 1)
        answers.write("ready\n")
        answers.flush()
        modules: dict[str, types.ModuleType] = {}
        for line in requests:
            answers.write(json.dumps(_call(json.loads(line), modules)) + "\n")
            answers.flush()


def _limit(settings: dict[str, Any]) -> None:
    """Limit this process and its children, and give up root's rights."""
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_AS, settings["memory_bytes"]),
        (resource.RLIMIT_NPROC, settings["processes"]),
    ):
        resource.setrlimit(limit, (value, value))
    if settings["user"] is not None:
        os.setgroups([])
        os.setresgid(settings["user"], settings["user"], settings["user"])
        os.setresuid(settings["user"], settings["user"], settings["user"])
    _filter_system_calls()
    # No other process of this user can then read or change this one's memory and files.
    ctypes.CDLL(None).prctl(SET_DUMPABLE, 0, 0, 0, 0)


def _filter_system_calls() -> None:
    """Refuse system calls to this process and its children (seccomp) that would give memory without a limit: those of
    MEMORY_CALLS, and user namespaces, where memory could be mounted.

    bwrap refuses such namespaces only to users other than root. clone3, whose flags a filter cannot read, is refused as
    unknown, and the C library then calls clone. Raises OSError if there is no filter for this kind of machine, or if it is not
    accepted.
    """
    if os.uname().machine not in SYSTEM_CALLS:
        raise OSError(f"there is no filter of system calls for {os.uname().machine}")
    machine, clone, clone3, unshare = SYSTEM_CALLS[os.uname().machine]
    memory_calls = MEMORY_CALLS[os.uname().machine]
    load, equal, any_bit, at_least, answer = 0x20, 0x15, 0x45, 0x35, 0x06
    program = [
        (load, 0, 0, 4),  # the kind of machine: others, such as the 32 bits of the same one, have other numbers
        (equal, 1, 0, machine),
        (answer, 0, 0, REFUSED),
        (load, 0, 0, 0),  # the number of the system call
        *((equal, 5 + len(memory_calls) - index, 0, call) for index, call in enumerate(memory_calls)),
        (at_least, 5, 0, 0x4000_0000),  # x32
        (equal, 5, 0, clone3),
        (equal, 1, 0, clone),
        (equal, 0, 4, unshare),
        (load, 0, 0, 16),  # the low half of its first argument
        (any_bit, 0, 2, NEW_USER),
        (answer, 0, 0, REFUSED),
        (answer, 0, 0, MISSING),
        (answer, 0, 0, ALLOWED),
    ]
    filters = b"".join(struct.pack("HBBI", *line) for line in program)
    memory = ctypes.create_string_buffer(filters, len(filters))
    header = ctypes.create_string_buffer(struct.pack("HL", len(program), ctypes.addressof(memory)))
    if ctypes.CDLL(None, use_errno=True).prctl(SET_SECCOMP, 2, header, 0, 0):  # bwrap has set no_new_privs
        raise OSError(ctypes.get_errno(), "the filter of system calls is not accepted")


def _call(request: dict[str, Any], modules: dict[str, types.ModuleType]) -> dict[str, Any]:
    """The answer to a request. modules: the loaded ones by file."""
    try:
        function = _function(request["file"], request["function"], modules)
    except Exception as error:  # noqa: BLE001, the other side raises it
        return {"problem": f"{type(error).__name__}: {error}"}

    def work() -> bytes:
        try:
            return json.dumps({"value": function(*request["arguments"], **request["keywords"])}).encode()
        except BaseException as error:  # noqa: BLE001, the other side raises it
            return json.dumps({"problem": f"{type(error).__name__}: {error}"[:1000]}).encode()

    text = _in_child(work, request["seconds"], ANSWER_BYTES)
    _clean_up()
    try:
        answer = json.loads(text)
    except ValueError:
        answer = None
    return answer if isinstance(answer, dict) else {"problem": "it was stopped, or it ended the process"}


def _function(file: str, name: str, modules: dict[str, types.ModuleType]) -> Function:
    if file not in modules:
        spec = importlib.util.spec_from_file_location(f"graded_{len(modules)}", file)
        if spec is None or spec.loader is None:
            raise ImportError(file)
        module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, os.path.dirname(file))
        spec.loader.exec_module(module)
        modules[file] = module
    function: Function = getattr(modules[file], name)
    return function


def _in_child(work: Callable[[], bytes], seconds: float, most: int) -> bytes:
    """The bytes that `work` returns in a child process, at most `most`; what there is of them after `seconds`, or when all
    processes of the sandbox together have more memory than one may have."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(0, 2)
            os.dup2(write, 3)
            os.closerange(4, OPEN_FILES)  # also those on which the other processes talk
            data = work()
            while data:
                data = data[os.write(3, data) :]
        finally:
            os._exit(0)
    os.close(write)
    deadline = time.monotonic() + seconds
    received = b""
    while len(received) <= most and (left := deadline - time.monotonic()) > 0:
        if not select.select([read], [], [], min(left, LOOK_SECONDS))[0]:
            if _resident_bytes() > resource.getrlimit(resource.RLIMIT_AS)[0]:
                break
            continue
        part = os.read(read, 1 << 16)
        if not part:
            break
        received += part
    os.close(read)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return received


def _resident_bytes() -> int:
    """Memory of all processes of the sandbox; what they share counts for each."""
    pages = 0
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            with contextlib.suppress(OSError), open(f"/proc/{entry.name}/statm") as file:
                pages += int(file.read().split()[1])
    return pages * resource.getpagesize()


def _clean_up() -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)  # everything in the sandbox but this process
    while True:  # orphans belong to the sandbox's first process, children of this one must be waited for
        try:
            os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
    for entry in os.scandir("/tmp"):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            os.unlink(entry.path)


def _metrics(seconds: float) -> types.ModuleType:
    """A stand-in for the package `evaluate`, whose metrics are Python files that it downloads. It has `code_eval`."""
    module = types.ModuleType("evaluate")

    def load(name: str, *_: Any, **__: Any) -> Any:
        if name != "code_eval":
            raise ImportError(f"the metric {name!r} is not available in the sandbox")
        return types.SimpleNamespace(compute=compute)

    def compute(
        *, references: list[str], predictions: list[list[str]], k: list[int] | int = 1, **_: Any
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """As the metric of that name: the share of problems that one of k programs solves, and every program's result."""
        results: dict[int, list[tuple[int, dict[str, Any]]]] = {}
        for problem, (programs, test) in enumerate(zip(predictions, references, strict=True)):
            results[problem] = []
            for number, program in enumerate(programs):
                passed = _passes(f"{program}\n{test}", seconds)
                results[problem].append((number, {"passed": passed}))
        scores = {}
        for count in [k] if isinstance(k, int) else k:
            solved = [[result["passed"] for _, result in each] for each in results.values()]
            if all(len(each) >= count for each in solved):
                scores[f"pass@{count}"] = sum(_pass_at(count, each) for each in solved) / len(solved)
        return scores, results

    module.load = load  # type: ignore[attr-defined]
    return module


def _pass_at(k: int, solved: list[bool]) -> float:
    """Unbiased estimate of the probability that one of k programs is right (Chen et al., arXiv 2107.03374, section 2.1)."""
    wrong = len(solved) - sum(solved)
    return 1.0 - math.comb(wrong, k) / math.comb(len(solved), k)


def _passes(program: str, seconds: float) -> bool:
    """Whether a program ends by itself, without an exception, within a time.

    It runs in the process that says so. What that says is another word each time, which a program has to look for.
    """
    word = os.urandom(16).hex().encode()

    def work() -> bytes:
        cpu = math.ceil(seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
        try:
            exec(compile(program, "<program>", "exec"), {})
        except BaseException:  # noqa: BLE001, whatever it is, the program has failed
            return b""
        return word

    return _in_child(work, seconds, len(word)) == word


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
