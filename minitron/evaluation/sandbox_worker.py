"""Calls scoring functions inside the sandbox; `minitron.evaluation.sandbox` starts it as `python -I FILE SETTINGS`.

Only the standard library is imported here, and the file beside this one. SETTINGS is JSON, see `Sandbox`. Requests are lines of
JSON on standard input, {"file", "function", "arguments", "keywords"}; each is answered with a line on standard output:
{"value": …} or {"problem": …}, "is_clean", and "programs": what went wrong in each program that failed, by `program_key`.

This process is the first one of the sandbox, which no other can stop or look into. Every call runs in a child of it, and every
program that a model has written in a child of the call: each in a session of its own, and without a way to signal its parent.
When a program ends or is stopped, the processes and the files that it left are removed. Where some are left all the same,
"is_clean" is false, and the other side starts a new sandbox.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import resource
import select
import shutil
import signal
import socket
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

if __name__ == "__main__":  # isolated: the folder of this file is not searched
    sys.path.insert(0, os.path.dirname(__file__))
    import system_calls  # type: ignore[import-not-found]

    del sys.path[0]
else:
    from minitron.evaluation import system_calls

ANSWER_BYTES = 8 << 20  # longest result of a call
PROBLEM_BYTES = 1000  # longest description of what went wrong in a program
PROBLEMS_BYTES = 4 << 20  # of all programs of a call; those behind it have none
FILE_BYTES = 10_000_000  # largest file
OPEN_FILES = 128
LOOK_SECONDS = 0.05  # between two looks at the memory and the CPU time of all processes
MOST_FILES = 10_000  # that are deleted
KILL_SECONDS = 5.0  # in which the processes that a program has started must be gone
GONE_SECONDS = 0.001  # between two looks whether they are
TIME_OF_DAY = 3.0  # most seconds that a program may take for one of CPU time: other work must not decide what it scores
END_WITH_PARENT, SET_DUMPABLE, TAKE_ORPHANS = (
    1,
    4,
    36,
)  # PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER of prctl
ALL_CHILDREN = 0x4000_0000  # waitpid's __WALL: also those that do not end with SIGCHLD
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
        kept = _folders()
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
        system_calls.prctl(
            END_WITH_PARENT, signal.SIGKILL
        )  # which bwrap had asked for, and another user's process loses
    system_calls.keep_inside()
    system_calls.prctl(
        SET_DUMPABLE, 0
    )  # no other process of this user can then read or change this one's memory and files
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the first process hears of no signal that it has no handler for


def _call(request: dict[str, Any], modules: dict[str, types.ModuleType]) -> dict[str, Any]:
    """The answer to a request. modules: the loaded ones by file."""
    try:
        function = _function(request["file"], request["function"], modules)
    except Exception as error:  # noqa: BLE001, the other side raises it
        return {"problem": f"{type(error).__name__}: {error}"}

    def work() -> bytes:
        system_calls.prctl(TAKE_ORPHANS, 1)
        try:
            value = function(*request["arguments"], **request["keywords"])
            return json.dumps({"value": value, "programs": _sent_problems()}).encode()
        except BaseException as error:  # noqa: BLE001, the other side raises it
            return json.dumps({"problem": f"{type(error).__name__}: {error}"[:1000]}).encode()

    text = _in_child(work, request["seconds"], ANSWER_BYTES, runs_programs=True)
    with contextlib.suppress(PermissionError):  # it has closed the folder, and is_clean says so
        _remove(os.listdir("/tmp"))
    try:
        answer = json.loads(text)
    except ValueError:
        answer = None
    return answer if isinstance(answer, dict) else {"problem": "it was stopped, or it ended the process"}


PROBLEMS: dict[str, str] = {}  # of the programs that one call has run, in the process of the call


def _sent_problems() -> dict[str, str]:
    """The first of them, as many as an answer has room for."""
    sent, size = {}, 0
    for key, problem in PROBLEMS.items():
        size += len(json.dumps({key: problem}))
        if size > PROBLEMS_BYTES:
            break
        sent[key] = problem
    return sent


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
    """The bytes that `work` returns in a child process, at most `most`; none if that has not ended after `seconds`, or before
    all processes of the sandbox together have more memory than one may have, or have taken more than `cpu_seconds` of CPU time.
    All processes that it has started are killed.

    runs_programs: of a child that calls this function itself, whose own children are killed in its stead when the memory is too
    much: it has the results of other programs.
    """
    others = {process.number for process in _processes()}
    cpu = _CpuTime()
    read, write = os.pipe()
    parent, child = os.getpid(), os.fork()
    if child == 0:
        write_bytes, leave = os.write, os._exit  # which a program may replace
        try:
            os.setsid()  # a group of its own, and its own share of the CPUs
            null = os.open(os.devnull, os.O_RDWR)
            for descriptor in range(3):
                os.dup2(null, descriptor)
            os.dup2(write, 3)
            os.closerange(4, OPEN_FILES)  # also those on which the other processes talk
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if not runs_programs:
                system_calls.refuse_signals(parent)
            data = work()
            while data:
                data = data[write_bytes(3, data) :]
        finally:
            leave(0)
    os.close(write)
    deadline, next_look = time.monotonic() + seconds, time.monotonic() + LOOK_SECONDS
    received, is_open, has_ended = b"", True, False
    while len(received) <= most and (now := time.monotonic()) < deadline:
        if now >= next_look:
            next_look = now + LOOK_SECONDS
            _wait_for_ended(child)
            # listed before the memory is looked at, so that the next program, which may begin now, is not among them
            started = {process.number for process in _processes()} - others - {child}
            if _resident_bytes() > resource.getrlimit(resource.RLIMIT_AS)[0]:
                if not (runs_programs and started):
                    break
                _kill(started)
            if cpu.seconds() > cpu_seconds:
                break
        has_ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        if is_open and select.select([read], [], [], 0 if has_ended else max(0.0, min(deadline, next_look) - now))[0]:
            part = os.read(read, 1 << 16)
            received += part
            is_open = bool(part)
        elif has_ended:  # also if what it has started holds the pipe
            break
        elif not is_open:
            time.sleep(GONE_SECONDS)
    os.close(read)
    is_over = not has_ended or cpu.seconds() > cpu_seconds  # it may have ended before it was looked at
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    _kill_others(others)
    return b"" if is_over else received


def _wait_for_ended(kept: int | None = None) -> None:
    """Wait for the children of this process that have ended, among them the orphans of others, up to the child `kept`."""
    options = os.WEXITED | os.WNOHANG | os.WNOWAIT | ALL_CHILDREN
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, options)) and ended.si_pid != kept:
            os.waitpid(ended.si_pid, ALL_CHILDREN)


def _kill_others(kept: set[int]) -> None:
    """Kill all processes of the sandbox but this one and those whose numbers are in `kept`, and wait until they are gone: the
    next program could see one that the sandbox's first process has not yet waited for, and it counts as one of its processes.
    Raises TimeoutError if there are always new ones."""
    deadline = time.monotonic() + KILL_SECONDS
    while numbers := {process.number for process in _processes()} - kept:
        if time.monotonic() > deadline:
            raise TimeoutError("its processes cannot be stopped")
        _kill(numbers)
        _wait_for_ended()
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
            with contextlib.suppress(OSError), open(f"/proc/{entry.name}/stat", "rb") as file:
                # behind the name: state, parent, ..., utime, stime, cutime, cstime (14 to 17 in proc(5)), ..., start (22)
                values = file.read().rpartition(b")")[2].split()
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


def _remove(names: Sequence[str]) -> None:
    """Delete these entries of /tmp: not closed folders, nor deep ones, nor a great many, whose number only a program's time
    limits."""
    left = MOST_FILES - len(names)
    for name in names if left >= 0 else ():
        path = f"/tmp/{name}"
        with contextlib.suppress(OSError, RecursionError):
            if not os.path.isdir(path) or os.path.islink(path):
                os.unlink(path)
            elif (left := left - _entries(path, left)) >= 0:
                shutil.rmtree(path)


def _entries(path: str, most: int) -> int:
    """The number of entries in a folder and the folders in it, counted up to the first folder with which they are more than
    `most`."""
    found = 0
    for _, folders, files in os.walk(path):
        found += len(folders) + len(files)
        if found > most:
            break
    return found


class _Temporary:
    """What there is in /tmp before a program runs."""

    def __init__(self) -> None:
        self._names, self._mode, self._free = set(os.listdir("/tmp")), os.stat("/tmp").st_mode, _free_blocks()

    def restore(self) -> None:
        """Remove what has come since then."""
        with contextlib.suppress(PermissionError):  # the folder is root's, as which no program runs
            os.chmod("/tmp", self._mode)
        _remove(sorted(set(os.listdir("/tmp")) - self._names))
        deadline = time.monotonic() + GONE_SECONDS * 50
        while _free_blocks() < self._free and time.monotonic() < deadline:
            # the kernel then looks for sockets, and files in messages, that only a cycle of messages holds
            for end in socket.socketpair():
                end.close()
            time.sleep(GONE_SECONDS)


def _free_blocks() -> int:
    return os.statvfs("/tmp").f_bfree


def _folders() -> dict[str, tuple[object, ...]]:
    """What is in /tmp before the first call, by folder: the folders that lead to those of the caller, which are not entered."""
    found = {}
    for folder, folders, _ in os.walk("/tmp"):
        found[folder] = _described_folder(folder)
        folders[:] = [name for name in folders if not os.path.ismount(os.path.join(folder, name))]
    return found


def _described_folder(path: str) -> tuple[object, ...]:
    """Its names, rights, attributes and free room, all of which another program could see."""
    return sorted(os.listdir(path)), os.stat(path).st_mode, sorted(os.listxattr(path)), os.statvfs(path).f_bfree


def _are_only(kept: dict[str, tuple[object, ...]]) -> bool:
    """Whether there is nothing else in these folders."""
    try:
        return all(_described_folder(path) == found for path, found in kept.items())
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
            exec(compile(source, "<program>", "exec", dont_inherit=True), {})
        except BaseException as error:  # noqa: BLE001, whatever it is, the program has failed
            return _described(error, source, program.count("\n") + 1).encode(errors="replace")[:PROBLEM_BYTES]
        return word

    before = _Temporary()
    said = _in_child(work, TIME_OF_DAY * seconds, PROBLEM_BYTES, cpu)
    before.restore()
    if word in said and not said.replace(word, b""):  # several times where the program has forked
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
