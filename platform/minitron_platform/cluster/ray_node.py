"""A node of Ray as a child process, which is stopped with exactly the processes that it has started."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ray._private.utils import set_kill_on_parent_death_linux

from minitron.errors import InputError, MinitronError
from minitron_platform.cluster.ray_session import private_folder

STOP_WAIT = 25.0  # seconds for a process to end; Slurm kills what it has told to end after 30
TAIL = 2000  # characters of Ray's output in an error


class RayNode:
    """A running `ray start --block`. The kernel ends all processes of the node with it, and it with this process."""

    def __init__(self, title: str, arguments: Sequence[str], folder: str) -> None:
        self._title = title
        self._log = Path(folder).with_name("ray-start.log")
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--temp-dir", folder]
        # with Ray's default, two nodes on one machine would give their workers the same ports
        command += ["--min-worker-port", "0", "--max-worker-port", "0", *arguments]
        with self._log.open("w") as log:
            self._process = start(command, log.fileno())

    @property
    def has_ended(self) -> bool:
        """Whether the node has stopped, or has never started."""
        return self._process.poll() is not None

    def check(self) -> None:
        """Raise MinitronError with the end of Ray's output if the node has ended."""
        if self.has_ended:
            tail = self._log.read_text(errors="replace")[-TAIL:].strip()
            raise MinitronError(
                f"Ray's {self._title} on {socket.gethostname()} has ended:\n{tail}", "see Ray's output above"
            )

    def stop(self) -> None:
        """End it now."""
        end(self._process, signal.SIGINT)


@contextmanager
def ray_node(title: str, arguments: Sequence[str]) -> Iterator[RayNode]:
    """A node of Ray inside the block, with files in a folder of its own, which only this user can enter.

    title: names it in errors. arguments: of `ray start`.
    """
    with private_folder(None) as folder:
        node = RayNode(title, arguments, folder)
        try:
            yield node
        finally:
            node.stop()


def start(command: Sequence[str], output: int | None = None) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, which does not get the signals of this process's group.

    The kernel kills it if this process dies. output: file descriptor for its output; by default that of this process.
    Raises InputError if there is no such program.
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
