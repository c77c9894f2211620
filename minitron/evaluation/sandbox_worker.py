"""Calls scoring functions inside the sandbox; `minitron.evaluation.sandbox` starts it as `python -I worker.py SETTINGS`.

Only the standard library is imported here. SETTINGS is JSON, see `Sandbox`. Requests are lines of JSON on standard input,
{"file", "function", "arguments", "keywords"}; each is answered with a line on standard output: {"value": …} or {"problem": …},
"is_clean", and "programs": what went wrong in each program that failed, by `program_key`.

Every call runs in a child process, and so does every program that a model has written. When a program ends or is stopped, all
processes that it started are killed, and when a call ends, its files are deleted too. Where files are left all the same,
"is_clean" is false, and the other side starts a new sandbox.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
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
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

ANSWER_BYTES = 1 << 20  # longest result of a call
PROBLEM_BYTES = 1000  # longest description of what went wrong in a program
FILE_BYTES = 10_000_000  # largest file
OPEN_FILES = 128
LOOK_SECONDS = 0.05  # between two looks at the memory and the CPU time of all processes
KILL_SECONDS = 5.0  # in which the processes that a program has started must be gone
GONE_SECONDS = 0.001  # between two looks whether they are
TIME_OF_DAY = 3.0  # most seconds that a program may take for one of CPU time: other work must not decide what it scores
SET_DUMPABLE, SET_SECCOMP = 4, 22  # Linux: prctl's PR_SET_DUMPABLE and PR_SET_SECCOMP
NEW_USER = 0x1000_0000  # CLONE_NEWUSER
REFUSED, MISSING = 0x5_0000 | 1, 0x5_0000 | 38  # a system call that fails with EPERM, with ENOSYS
ALLOWED = 0x7FFF_0000
# Families of sockets that end in the sandbox: AF_UNIX, AF_INET and AF_INET6. AF_VSOCK, for one, does not.
FAMILIES = (1, 2, 10)
# Machine: its number in a filter.
MACHINES = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}
CLONE, UNSHARE = {"x86_64": 56, "aarch64": 220}, {"x86_64": 272, "aarch64": 97}
CLONE3 = 435
SOCKETS = {"x86_64": (41, 53), "aarch64": (198, 199)}  # socket, socketpair
# Those whose first argument names a process, and may only be 0, the caller: prlimit64, sched_setaffinity.
OWN_PROCESS_CALLS = {"x86_64": (302, 203), "aarch64": (261, 122)}
REFUSED_CALLS = {
    "x86_64": (
        *(29, 64, 68, 240, 319, 447),  # shmget, semget, msgget, mq_open, memfd_create, memfd_secret
        *(248, 249, 250),  # add_key, request_key, keyctl
        *(425, 426, 427),  # io_uring_setup, io_uring_enter, io_uring_register
        *(141, 142, 144, 251, 314),  # setpriority, sched_setparam, sched_setscheduler, ioprio_set, sched_setattr
    ),
    "aarch64": (
        *(194, 190, 186, 180, 279, 447),
        *(217, 218, 219),
        *(425, 426, 427),
        *(140, 118, 119, 30, 274),
    ),
}
Function = Callable[..., Any]
Line = tuple[int, int, int, int]  # of a filter: what it does, how many lines it skips if true and if false, a number


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
        kept = _names_in_folders()
        for line in requests:
            answer = _call(json.loads(line), modules)
            answers.write(json.dumps(answer | {"is_clean": _are_only(kept)}) + "\n")
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
    """Refuse system calls to this process and its children (seccomp) that would give memory without a limit or that outlives
    the process, reach the keys of the user who started the sandbox, reach outside by another kind of socket, go around this
    filter (io_uring), or change the limits and the priority of this process for the next program. User namespaces, where
    memory could be mounted, are refused too: bwrap refuses them only to users other than root.

    clone3, whose flags a filter cannot read, is refused as unknown, and the C library then calls clone. Raises OSError if there
    is no filter for this kind of machine, or if it is not accepted.
    """
    machine = os.uname().machine
    if machine not in MACHINES:
        raise OSError(f"there is no filter of system calls for {machine}")
    load, equal, any_bit, at_least, answer = 0x20, 0x15, 0x45, 0x35, 0x06
    refuse, unknown, allow = (answer, 0, 0, REFUSED), (answer, 0, 0, MISSING), (answer, 0, 0, ALLOWED)
    argument = (load, 0, 0, 16)  # the low half of the first one

    def calls(numbers: Sequence[int], then: Sequence[Line]) -> list[Line]:
        """Lines that do `then` for system calls of these numbers, and go on behind it for others."""
        last = len(numbers) - 1
        tests = [
            (equal, last - index, 0 if index < last else len(then), number) for index, number in enumerate(numbers)
        ]
        return [*tests, *then]

    families = [(equal, len(FAMILIES) - index, 0, family) for index, family in enumerate(FAMILIES)]
    program = [
        (load, 0, 0, 4),  # the kind of machine: others, such as the 32 bits of the same one, have other numbers
        (equal, 1, 0, MACHINES[machine]),
        refuse,
        (load, 0, 0, 0),  # the number of the system call
        (at_least, 0, 1, 0x4000_0000),  # x32
        unknown,
        *calls((CLONE3,), [unknown]),
        *calls(REFUSED_CALLS[machine], [refuse]),
        *calls((CLONE[machine], UNSHARE[machine]), [argument, (any_bit, 0, 1, NEW_USER), refuse, allow]),
        *calls(SOCKETS[machine], [argument, *families, refuse, allow]),
        *calls(OWN_PROCESS_CALLS[machine], [argument, (equal, 1, 0, 0), refuse, allow]),
        allow,
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
            value = function(*request["arguments"], **request["keywords"])
            return json.dumps({"value": value, "programs": PROBLEMS}).encode()
        except BaseException as error:  # noqa: BLE001, the other side raises it
            return json.dumps({"problem": f"{type(error).__name__}: {error}"[:1000]}).encode()

    text = _in_child(work, request["seconds"], ANSWER_BYTES, runs_programs=True)
    _clean_up()
    try:
        answer = json.loads(text)
    except ValueError:
        answer = None
    return answer if isinstance(answer, dict) else {"problem": "it was stopped, or it ended the process"}


PROBLEMS: dict[str, str] = {}  # of the programs that one call has run, in the process of the call


def program_key(program: str, test: str) -> str:
    """The name of a program with its test."""
    return hashlib.sha256(f"{test}\0{program}".encode(errors="replace")).hexdigest()


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


def _in_child(
    work: Callable[[], bytes],
    seconds: float,
    most: int,
    cpu_seconds: float = math.inf,
    *,
    runs_programs: bool = False,
) -> bytes:
    """The bytes that `work` returns in a child process, at most `most`; what there is of them after `seconds`, or when all
    processes of the sandbox together have more memory than one may have, or have taken more than `cpu_seconds` of CPU time.
    All processes that it has started are killed.

    runs_programs: of a child that calls this function itself, whose own children are killed in its stead when the memory is too
    much: it has the results of other programs.
    """
    others = {process.number for process in _processes()}
    cpu = _CpuTime()
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
        has_ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        if not select.select([read], [], [], 0 if has_ended else min(left, LOOK_SECONDS))[0]:
            if has_ended:  # what it has started holds the pipe
                break
            # listed before the memory is looked at, so that the next program, which may begin now, is not among them
            started = {process.number for process in _processes()} - others - {child}
            if _resident_bytes() > resource.getrlimit(resource.RLIMIT_AS)[0]:
                if not (runs_programs and started):
                    break
                _kill(started)
            if cpu.seconds() > cpu_seconds:
                break
            continue
        part = os.read(read, 1 << 16)
        if not part:
            break
        received += part
    os.close(read)
    is_over = cpu.seconds() > cpu_seconds  # it may have ended before it was looked at
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    _kill_others(others)
    return b"" if is_over else received


def _kill_others(kept: set[int]) -> None:
    """Kill all processes of the sandbox but this one and those whose numbers are in `kept`, and wait until they are gone: the
    next program could see one that the sandbox's first process has not yet waited for, and it counts as one of its processes.
    Raises TimeoutError if there are always new ones."""
    deadline = time.monotonic() + KILL_SECONDS
    while numbers := {process.number for process in _processes()} - kept:
        if time.monotonic() > deadline:
            raise TimeoutError("its processes cannot be stopped")
        _kill(numbers)
        time.sleep(GONE_SECONDS)


def _kill(numbers: set[int]) -> None:
    for number in numbers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


class _Process(NamedTuple):
    """A process of the sandbox, also one that has ended if its parent has not waited for it. The kernel says the same state of
    one whose first thread has ended while others go on. Times are in clock ticks."""

    number: int
    started: int
    own: int
    """CPU time of the process itself."""
    children: int
    """CPU time of its children, and of their children, that have ended."""


def _processes() -> Iterator[_Process]:
    """All processes but this one."""
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError), open(f"/proc/{entry.name}/stat") as file:
                # behind the name: state, parent, ..., utime, stime, cutime, cstime (14 to 17 in proc(5)), ..., start (22)
                values = file.read().rpartition(")")[2].split()
                user, system, their_user, their_system = map(int, values[11:15])
                yield _Process(int(entry.name), int(values[19]), user + system, their_user + their_system)


class _CpuTime:
    """The CPU time of all processes of the sandbox but this one, since the object was made.

    A process that ends adds its time to that of its parent, or of the sandbox's first process, so that nothing is lost. Where a
    parent has refused to hear of it (SIGCHLD ignored) it is lost: what was seen of each process is therefore added up too.
    """

    def __init__(self) -> None:
        first = list(_processes())
        self._total = self._sum(first)
        self._before = {(each.number, each.started): each.own for each in first}
        self._seen: dict[tuple[int, int], int] = {}

    def seconds(self) -> float:
        now = list(_processes())
        self._seen |= {(each.number, each.started): each.own for each in now}
        seen = sum(own - self._before.get(key, 0) for key, own in self._seen.items())
        return max(self._sum(now) - self._total, seen) / os.sysconf("SC_CLK_TCK")

    @staticmethod
    def _sum(processes: Sequence[_Process]) -> int:
        return sum(each.own + each.children for each in processes) + round(_ended_children() * os.sysconf("SC_CLK_TCK"))


def _ended_children() -> float:
    """CPU time of the children of this process that have ended, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _resident_bytes() -> int:
    """Memory of all processes of the sandbox; what they share counts for each."""
    pages = 0
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                pages += _resident_pages(f"/proc/{entry.name}")
    return pages * resource.getpagesize()


def _resident_pages(process: str) -> int:
    """Memory of a process, by its folder in /proc. A thread that has ended, as the first one may have, shows none."""
    for thread in os.scandir(f"{process}/task"):
        with contextlib.suppress(OSError), open(f"{thread.path}/statm") as file:
            if pages := int(file.read().split()[1]):
                return pages
    return 0


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
            shutil.rmtree(entry.path, ignore_errors=True)  # not closed folders, nor deep ones
        else:
            os.unlink(entry.path)


def _names_in_folders() -> dict[str, list[str]]:
    """What is in /tmp before the first call, by folder: the folders that lead to those of the caller, which are not entered."""
    names = {}
    for folder, folders, files in os.walk("/tmp"):
        names[folder] = sorted([*folders, *files])
        folders[:] = [name for name in folders if not os.path.ismount(os.path.join(folder, name))]
    return names


def _are_only(kept: dict[str, list[str]]) -> bool:
    """Whether there is nothing else in these folders."""
    try:
        return all(sorted(os.listdir(folder)) == names for folder, names in kept.items())
    except OSError:  # a folder was removed or closed
        return False


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
                wrong = _problem(program, test, seconds)
                if wrong is not None:
                    PROBLEMS[program_key(program, test)] = wrong
                results[problem].append((number, {"passed": wrong is None}))
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


def _problem(program: str, test: str, seconds: float) -> str | None:
    """None if a program with its test ends by itself, without an exception, within `seconds` of CPU time of all its processes
    together; otherwise what went wrong: the last line of the error, and the line of the test in which it was raised.

    It runs in the process that says so. What that says is another word each time, which a program has to look for.
    """
    word = os.urandom(16).hex().encode()
    cpu = math.ceil(seconds)
    source = f"{program}\n{test}"

    def work() -> bytes:
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
        try:
            exec(compile(source, "<program>", "exec"), {})
        except BaseException as error:  # noqa: BLE001, whatever it is, the program has failed
            return _described(error, source, program.count("\n") + 1).encode(errors="replace")[:PROBLEM_BYTES]
        return word

    said = _in_child(work, TIME_OF_DAY * seconds, PROBLEM_BYTES, cpu)
    if said == word:
        return None
    limits = f"{cpu} s of CPU time, {TIME_OF_DAY * seconds:g} s by the clock, or memory"
    return said.decode(errors="replace") or f"stopped at a limit ({limits}), or it ended its process"


def _described(error: BaseException, source: str, program_lines: int) -> str:
    """The last line of an error's message, and the line of the test behind `program_lines` that led to it."""
    lines, line, place = source.split("\n"), "", error.__traceback__
    while place is not None:
        number = place.tb_lineno
        if place.tb_frame.f_code.co_filename == "<program>" and program_lines < number <= len(lines):
            line = lines[number - 1].strip()
        place = place.tb_next
    try:
        message = str(error).strip()
    except Exception:  # noqa: BLE001, the error may be a class of the program
        message = ""
    last = f"{type(error).__name__}: {message.splitlines()[-1]}" if message else type(error).__name__
    return f"{last}, in: {line}" if line else last


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
