"""A node of Ray as a child process, which is stopped with exactly the processes that it has started."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ray._private.utils import set_kill_on_parent_death_linux

from minitron.errors import InputError, MinitronError
from minitron_platform.cluster.ray_session import private_folder

STOP_WAIT = 25.0  # seconds for a process to end; Slurm kills what it has told to end after 30
STARTS = 3  # attempts to start a node
STARTED = "Ray runtime started"  # in the output of `ray start`
TAIL = 2000  # characters of Ray's output in an error


class RayNode:
    """A running `ray start --block`. The kernel ends all processes of the node with it, and it with this process."""

    def __init__(self, title: str, arguments: Sequence[str], folder: str, say: Callable[[str], None]) -> None:
        self._title = title
        self._log = Path(folder).with_name("ray-start.log")
        self._command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--temp-dir", folder]
        # with Ray's default, two nodes on one machine would give their workers the same ports
        self._command += ["--min-worker-port", "0", "--max-worker-port", "0", *arguments]
        self._say = say
        self._starts = 0
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        self._starts += 1
        with self._log.open("w") as log:
            return start(self._command, log.fileno())

    @property
    def has_ended(self) -> bool:
        """Whether the node has stopped, or could not start."""
        return self._process.poll() is not None

    def check(self) -> None:
        """Start the node again if it could not start: Ray gives its agents 15 s, which a busy machine may exceed. Raises
        MinitronError with the end of Ray's output if it has started and ended, or could not start three times."""
        if not self.has_ended:
            return
        output = self._log.read_text(errors="replace")
        problem = f"Ray's {self._title} on {socket.gethostname()}"
        if STARTED in output or self._starts == STARTS:
            raise MinitronError(f"{problem} has ended:\n{output[-TAIL:].strip()}", "see Ray's output above")
        self._say(f"{problem} has not started, and is started again: {output.strip().splitlines()[-1:]}")
        self._process = self._start()

    def stop(self) -> None:
        """End it now."""
        end(self._process, signal.SIGINT)


@contextmanager
def ray_node(title: str, arguments: Sequence[str], say: Callable[[str], None]) -> Iterator[RayNode]:
    """A node of Ray inside the block, with files in a folder of its own, which only this user can enter.

    title: names it in errors. arguments: of `ray start`. say: receives messages, one line at a time.
    """
    with private_folder() as folder:
        node = RayNode(title, arguments, folder, say)
        try:
            yield node
        finally:
            node.stop()


def start(command: Sequence[str], output: int | None = None) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, which does not get the signals of this process's group.

    The kernel kills it if this process dies. output: file descriptor for its output; by default that of this process.
    Raises InputError if the program is not found.
    """

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # shells start background processes with SIGINT ignored
        set_kill_on_parent_death_linux()

    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=prepare,
        )
    except OSError as error:
        raise InputError(f"{command[0]}: {error.strerror}", "activate the environment that has it") from error


def end(process: subprocess.Popen[bytes], number: int) -> None:
    """Send the signal `number`, and SIGKILL if the process does not end within 25 s."""
    process.send_signal(number)
    try:
        process.wait(STOP_WAIT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
