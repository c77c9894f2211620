"""A sandbox for programs that a model has written: bubblewrap (bwrap) with resource limits.

Inside there are the Python interpreter with its packages and the system's libraries, all read-only, 16 MiB of temporary files
and nothing else: no other file, no environment variable, no network, no process outside. Linux only.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from minitron.errors import InputError, MinitronError

INSIDE, WORKER = "/minitron", "sandbox_worker.py"
TMP_BYTES = 16 << 20  # of temporary files
START_SECONDS = 30.0  # longest start
MARGIN_SECONDS = 30.0  # added to the limit of a call: loading the packages that its function imports
USERS = range(40_000, 60_000)  # user ids that root gives up its rights for
INSTALL = "install bubblewrap (apt-get install bubblewrap) and allow it to create namespaces, or leave the task out"


@dataclass(frozen=True)
class Limits:
    """Limits of a sandbox.

    seconds: of one program with all processes that it starts, CPU time, which is looked at 20 times a second; it may take three
    times as long by the clock, as on a busy machine. lm-eval's code_eval has 3 by the clock. memory_bytes: address space of
    each process, and memory of all together. processes: including threads; in the whole sandbox.
    """

    seconds: float = 5.0
    memory_bytes: int = 2 << 30
    processes: int = 16


class StoppedError(MinitronError):
    """A call in a sandbox raised an exception, was stopped at a limit, or ended its process."""


class Sandbox:
    """Calls functions of Python files in a process of their own that can reach nothing outside.

    The process is started by the first call, and again by the next one after it was stopped or left files behind. Raises
    InputError where bubblewrap is not installed or is not allowed to work.
    """

    def __init__(self, limits: Limits | None = None, folders: Sequence[Path] = ()) -> None:
        """folders: that are there inside too, read-only."""
        self.limits = limits or Limits()
        self.folders = folders
        self.problems: dict[str, str] = {}
        """What went wrong in each program that has failed, by `minitron.evaluation.sandbox_worker.program_key`."""
        self._process: subprocess.Popen[bytes] | None = None

    def call(self, file: Path, function: str, *arguments: Any, seconds: float | None = None, **keywords: Any) -> Any:
        """The result of a function of a Python file. Arguments and result are JSON values.

        seconds: the longest time of day; by default that of one program. Raises StoppedError.
        """
        seconds = self.limits.seconds if seconds is None else seconds
        if self._process is None:
            self.start()
        request = {
            "file": str(file),
            "function": function,
            "arguments": arguments,
            "keywords": keywords,
            "seconds": seconds,
        }
        answer = self._exchange(json.dumps(request, default=str) + "\n", seconds + MARGIN_SECONDS)
        if answer is None:
            self.stop()
            raise StoppedError("it was stopped, or it ended the sandbox")
        if not answer["is_clean"]:
            self.stop()
        if "problem" in answer:
            raise StoppedError(str(answer["problem"]))
        if isinstance(programs := answer.get("programs"), dict):
            self.problems |= {str(key): str(problem) for key, problem in programs.items()}
        return answer["value"]

    def start(self) -> None:
        """Start the process, unless it runs. Raises InputError."""
        if self._process is not None:
            return
        program = shutil.which("bwrap")
        if program is None:
            raise InputError("there is no sandbox: the program bwrap is not installed", INSTALL)
        settings = {
            "seconds": self.limits.seconds,
            "memory_bytes": self.limits.memory_bytes,
            "processes": self.limits.processes,
            # root's processes are not limited in number, not even under another id in a user namespace
            "user": secrets.choice(USERS) if os.geteuid() == 0 else None,
            "packages": _packages(),
        }
        python = Path(sys.executable).resolve()
        folders = [Path(sys.base_prefix).resolve(), *map(Path, _packages()), *self.folders]
        with tempfile.TemporaryFile() as errors:
            self._process = subprocess.Popen(
                [program, *_walls(folders), "--", str(python), "-I", f"{INSIDE}/{WORKER}", json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={},
                umask=0o022,  # of the folders that bwrap makes inside
            )
            weakref.finalize(self, _kill, self._process)
            assert self._process.stdout is not None
            if _line(self._process.stdout.fileno(), START_SECONDS) != b"ready":
                self.stop()
                errors.seek(0)
                reason = errors.read(2000).decode(errors="replace").strip() or "it did not start"
                raise InputError(f"there is no sandbox: bwrap failed: {reason.splitlines()[-1]}", INSTALL)

    def stop(self) -> None:
        """End the process with everything in it."""
        if self._process is not None:
            _kill(self._process)
            self._process = None

    def _exchange(self, request: str, seconds: float) -> dict[str, Any] | None:
        """The answer of the process to a request; None without a valid one."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(request.encode())
            self._process.stdin.flush()
            answer = json.loads(_line(self._process.stdout.fileno(), seconds))
        except (OSError, ValueError):
            return None
        return answer if isinstance(answer, dict) and "is_clean" in answer else None


@lru_cache(maxsize=1)
def check_sandbox() -> None:
    """Raise InputError if no sandbox can be started on this machine."""
    sandbox = Sandbox()
    sandbox.start()
    sandbox.stop()


def _walls(folders: Sequence[Path]) -> list[str]:
    """bwrap's options: what there is inside, besides the system's libraries."""
    options = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    # no reaper as the first process: a program of the same user could read and write its memory and files
    options += ["--die-with-parent", "--as-pid-1", "--new-session", "--clearenv"]
    for name, value in (
        ("PATH", "/usr/bin:/bin"),
        ("HOME", "/tmp"),
        ("LANG", "C.UTF-8"),
        ("OMP_NUM_THREADS", "1"),  # the threads of numerical libraries count as processes
        ("OPENBLAS_NUM_THREADS", "1"),
        ("PYTHONDONTWRITEBYTECODE", "1"),
    ):
        options += ["--setenv", name, value]
    options += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
    for keys in ("/proc/keys", "/proc/key-users"):  # names of the user's keys; a kernel may have none
        options += ["--ro-bind", "/dev/null", keys] if Path(keys).exists() else []
    options += ["--size", str(TMP_BYTES), "--perms", "1777", "--tmpfs", "/tmp"]
    options += ["--ro-bind", "/usr", "/usr", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for folder in map(Path, ("/bin", "/lib", "/lib32", "/lib64")):
        if folder.is_symlink():
            options += ["--symlink", os.readlink(folder), str(folder)]
        elif folder.is_dir():
            options += ["--ro-bind", str(folder), str(folder)]
    for folder in folders:
        if folder.is_dir() and not folder.is_relative_to("/usr"):
            for parent in list(folder.parents)[-2::-1]:  # bwrap makes missing ones that nobody but it may enter
                options += ["--perms", "0755", "--dir", str(parent)]
            options += ["--ro-bind", str(folder), str(folder)]
    for name in (WORKER, "system_calls.py"):
        options += ["--ro-bind", str(Path(__file__).with_name(name)), f"{INSIDE}/{name}"]
    return [*options, "--remount-ro", "/", "--chdir", "/tmp"]


def _packages() -> list[str]:
    """The folders of installed packages."""
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages") and Path(path).is_dir()]


def _line(descriptor: int, seconds: float) -> bytes:
    """The next line without its end, or what there is of it after `seconds` or at the end of the stream."""
    deadline = time.monotonic() + seconds
    line = b""
    while (left := deadline - time.monotonic()) > 0 and select.select([descriptor], [], [], left)[0]:
        part = os.read(descriptor, 1 << 16)
        line += part
        if not part or line.endswith(b"\n"):
            break
    return line.rstrip(b"\n")


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()  # the rest of the sandbox dies with it
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None and not stream.closed:
            try:
                stream.close()
            except OSError:  # unsent bytes, to a process that is no more
                continue
