"""The programs of one document, as of one benchmark: none can change what becomes of another, or pass for what it is not."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.programs import has_sandbox, sandboxed

from minitron.evaluation.sandbox import Limits

pytestmark = pytest.mark.skipif(not has_sandbox(), reason="nothing runs without bubblewrap")
Run = Callable[..., list[bool]]


@pytest.fixture
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs the programs of a document, each with a second of CPU time."""
    with sandboxed(tmp_path_factory.mktemp("programs"), Limits(seconds=1)) as run:
        yield run


LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nis_x86 = os.uname().machine == 'x86_64'\n"
SIGIO = """
import fcntl, os, socket, time
one, other = socket.socketpair()
fcntl.fcntl(one, fcntl.F_SETOWN, os.getppid())
fcntl.fcntl(one, 10, 9)  # F_SETSIG
fcntl.fcntl(one, fcntl.F_SETFL, os.O_ASYNC)
other.send(b"a")
time.sleep(0.5)
"""
INTERFERING = {
    "killing its parent": "import os\nos.kill(os.getppid(), 9)",
    "stopping its parent": "import os\nos.kill(os.getppid(), 19)",
    "killing its parent's group": "import os\nos.kill(-os.getppid(), 9)",
    "stopping everything": "import os\nos.kill(-1, 19)",
    "a signal to its parent's thread": LIBC + "assert libc.syscall(200 if is_x86 else 130, os.getppid(), 9) == 0",
    "a signal by a file": SIGIO,
    "a signal by a folder of /proc": LIBC
    + "assert libc.syscall(424, os.open(f'/proc/{os.getppid()}', os.O_RDONLY), 9, None, 0) == 0",
    "tracing another process": LIBC + "assert libc.ptrace(0, 0, 0, 0) == 0",
    "its parent's child": LIBC + "assert libc.syscall(56 if is_x86 else 220, 0x8011, 0, 0, 0, 0) != -1",
    "answering in the place of the first process": (
        "open('/proc/1/fd/1', 'w').write('{\"value\": [true, true, true], \"is_clean\": true}\\n')"
    ),
    "a process that hangs after its child said that all is well": "import os, time\nif os.fork(): time.sleep(99)",
}


@pytest.mark.parametrize("name", INTERFERING)
def test_a_program_that_interferes_fails_alone(name: str, programs: Run) -> None:
    assert programs("pass", INTERFERING[name], "pass") == [True, False, True]
    assert programs("assert 0", "pass") == [False, True]  # the answer is of this document


# A program that ends well and what must not be left of it, which the next one looks for.
LEFT_FOR_THE_NEXT = {
    "a name that is no text": (
        LIBC
        + "import time\nif os.fork() == 0:\n    libc.prctl(15, b'\\xff\\xfe', 0, 0, 0)\n    time.sleep(59)\ntime.sleep(0.2)",
        "pass",
    ),
    "a file": ("open('/tmp/a', 'w')", "import os\nassert not os.path.exists('/tmp/a')"),
    "a module": (
        "open('/tmp/json.py', 'w').write('1 / 0')",
        "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import json'], check=True)",
    ),
    "a full folder": (
        "for n in 'ab': open(f'/tmp/{n}', 'wb').write(bytes(8_000_000))",
        "for n in 'cd': open(f'/tmp/{n}', 'wb').write(bytes(8_000_000))",
    ),
    "a low priority": (
        "import os, subprocess\nif os.path.exists('/proc/self/autogroup'):\n"
        "    subprocess.run(['/bin/sh', '-c', 'echo 19 > /proc/self/autogroup'])",
        "import os\nif os.path.exists('/proc/self/autogroup'): assert 'nice 0' in open('/proc/self/autogroup').read()",
    ),
    "a flag of its input": (
        "import fcntl, os\nfcntl.fcntl(0, fcntl.F_SETFL, os.O_APPEND)",
        "import fcntl, os\nassert not fcntl.fcntl(0, fcntl.F_GETFL) & os.O_APPEND",
    ),
    "a process that ignores interrupts": (
        "import os, signal\nsignal.signal(2, signal.SIG_IGN)\nos.killpg(0, 2)",
        "import os\ntry: os.kill(os.getpid(), 2)\nexcept KeyboardInterrupt: pass\nelse: 1 / 0",
    ),
}


@pytest.mark.parametrize("name", LEFT_FOR_THE_NEXT)
def test_nothing_of_a_program_is_left_for_the_next_of_its_document(name: str, programs: Run) -> None:
    assert programs(*LEFT_FOR_THE_NEXT[name]) == [True, True]


@pytest.mark.skipif(os.geteuid() == 0, reason="the folder of temporary files is root's")
@pytest.mark.parametrize("mode", [0o555, 0])
def test_a_program_that_closes_the_folder_of_temporary_files_closes_it_for_itself_alone(
    mode: int, programs: Run
) -> None:
    assert programs(f"import os\nos.chmod('/tmp', {mode})", "open('/tmp/a', 'w')") == [True, True]
    assert programs("open('/tmp/a', 'w')") == [True]


def test_a_program_is_compiled_as_a_file_of_its_own(programs: Run) -> None:
    """Not with the `from __future__` of the code that compiles it, which leaves annotations unread."""
    unread = "def first(values: List[int]) -> int: return values[0]"
    read = "def same(value: int): pass\nassert same.__annotations__['value'] is int"
    assert programs(unread, read) == [False, True]


def test_a_program_that_forks_and_ends_well_in_both_processes_is_solved(programs: Run) -> None:
    assert programs("import os\nos.fork()", "import os\nif os.fork() == 0: 1 / 0\nos.wait()") == [True, False]


def test_long_errors_of_many_programs_leave_room_for_the_results(programs: Run) -> None:
    failing = [f"raise ValueError('{number}' + '\\x01' * 990)" for number in range(800)]
    assert programs(*failing, "pass") == [False] * 800 + [True]


def test_a_great_many_files_cost_a_new_sandbox(programs: Run) -> None:
    assert programs("import os\nfor n in range(10_001): os.mkdir(f'/tmp/{n}')") == [True]
    assert programs("import os\nassert not os.path.exists('/tmp/1')") == [True]


# Begins a process that goes on when its first thread has ended: /proc says of it that it has ended, and has no memory.
GOES_ON = """
import ctypes, os, threading, time
libc = ctypes.CDLL(None)
def has_ended(number):
    return ') Z' in open(f'/proc/{number}/stat').read()
def begin(work):
    def wait_and_work():
        while not has_ended(os.getpid()): time.sleep(0.01)
        work()
    child = os.fork()
    if child == 0:
        libc.prctl(15, b'sleep')
        threading.Thread(target=wait_and_work).start()
        libc.syscall(60 if os.uname().machine == 'x86_64' else 93, 0)
    while not has_ended(child): time.sleep(0.01)
"""

# Two children, each of which takes less CPU time than one process may.
CPU_TIME = """
import os, time, signal
signal.signal(signal.SIGCHLD, signal.{heard})
for _ in range(2):
    if os.fork() == 0:
        while time.process_time() < {seconds}: pass
        os._exit(0)
try:
    while True: os.wait()
except ChildProcessError: pass
"""


@pytest.mark.parametrize("heard", ["SIG_DFL", "SIG_IGN"])  # the second hides the CPU time of processes that have ended
def test_the_processes_of_a_program_share_its_cpu_time(heard: str, programs: Run) -> None:
    assert programs(CPU_TIME.format(seconds=0.05, heard=heard), CPU_TIME.format(seconds=0.6, heard=heard)) == [
        True,
        False,
    ]


LEFT_RUNNING = {
    # Popen returns when the child has become `sleep`
    "a process": "import subprocess\nsubprocess.Popen(['/usr/bin/sleep', '59'], start_new_session=True)",
    "a process whose first thread has ended": GOES_ON + "begin(lambda: time.sleep(59))",
}


@pytest.mark.parametrize("name", LEFT_RUNNING)
def test_the_processes_of_a_program_are_gone_when_the_next_one_of_its_document_runs(name: str, programs: Run) -> None:
    names = "[open(f'/proc/{n}/comm').read() for n in os.listdir('/proc') if n.isdecimal()]"
    alone = f"import os\nassert 'sleep\\n' not in {names}"
    assert programs(*[LEFT_RUNNING[name], alone] * 10) == [True] * 20


def test_a_process_whose_first_thread_has_ended_takes_of_the_cpu_time(programs: Run) -> None:
    work = "while time.process_time() < 0.7: pass\n    os.write(write, b'a')\n    time.sleep(59)"
    busy = f"read, write = os.pipe()\ndef work():\n    {work}\nbegin(work), begin(work)\nos.read(read, 1), os.read(read, 1)"
    assert programs(GOES_ON + busy, "pass") == [False, True]


SHARED_OUT = """
import os
read, write = os.pipe()
begun, begin = os.pipe()
for _ in range(4):
    if os.fork() == 0:
        memory = b"a" * (150 << 20)
        os.write(write, b"a")
        os.read(begun, 1)  # until all have theirs
        os._exit(0)
for _ in range(4):
    os.read(read, 1)
import time
time.sleep(1)
os.write(begin, b"aaaa")
for _ in range(4):
    os.wait()
"""


SHARED_OUT_TO_THREADS = (
    GOES_ON
    + """
read, write = os.pipe()
def work():
    memory = b"a" * (150 << 20)
    os.write(write, b"a")
    time.sleep(59)
for _ in range(4):
    begin(work)
for _ in range(4):
    os.read(read, 1)
time.sleep(1)
"""
)


@pytest.mark.parametrize(
    "program", [SHARED_OUT, SHARED_OUT_TO_THREADS], ids=["processes", "those without a first thread"]
)
def test_memory_that_a_program_shares_out_to_several_processes_is_limited_too(program: str, tmp_path: Path) -> None:
    small = "b'a' * (150 << 20)"
    with sandboxed(tmp_path, Limits(seconds=20, memory_bytes=400 << 20)) as run:
        assert run(small, program, small, program, small) == [True, False, True, False, True]
