"""Filters of system calls (seccomp) for the sandbox's processes. Only the standard library is imported: this runs inside.

A filter holds for the process that installs it and for its children, and cannot be taken back. Numbers are those of Linux on
the kinds of machines in MACHINES.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from typing import Any

SET_SECCOMP = 22  # prctl's PR_SET_SECCOMP
CLONE_PTRACE, CLONE_PARENT, CLONE_NEWUSER = 0x2000, 0x8000, 0x1000_0000
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
        101,  # ptrace
        *(425, 426, 427),  # io_uring_setup, io_uring_enter, io_uring_register
        *(141, 142, 144, 251, 314),  # setpriority, sched_setparam, sched_setscheduler, ioprio_set, sched_setattr
    ),
    "aarch64": (
        *(194, 190, 186, 180, 279, 447),
        *(217, 218, 219),
        117,
        *(425, 426, 427),
        *(140, 118, 119, 30, 274),
    ),
}
KILL = {"x86_64": 62, "aarch64": 129}
# Those whose first argument is the process that gets a signal: tkill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo, pidfd_open.
SIGNAL_CALLS = {"x86_64": (200, 234, 129, 297, 434), "aarch64": (130, 131, 138, 240, 434)}
PIDFD_SEND_SIGNAL = 424
FCNTL, IOCTL = {"x86_64": 72, "aarch64": 25}, {"x86_64": 16, "aarch64": 29}
# Their second arguments that name a process to signal: F_SETOWN, F_SETOWN_EX; FIOSETOWN, SIOCSPGRP.
OWNERS_OF_FILES, OWNERS_OF_SOCKETS = (8, 15), (0x8901, 0x8902)
Line = tuple[int, int, int, int]  # of a filter: what it does, how many lines it skips if true and if false, a number
LOAD, EQUAL, ANY_BIT, AT_LEAST, ANSWER = 0x20, 0x15, 0x45, 0x35, 0x06
REFUSE, UNKNOWN, ALLOW = (ANSWER, 0, 0, REFUSED), (ANSWER, 0, 0, MISSING), (ANSWER, 0, 0, ALLOWED)
FIRST, SECOND = (LOAD, 0, 0, 16), (LOAD, 0, 0, 24)  # the low halves of the first two arguments


def keep_inside() -> None:
    """Refuse what would give memory without a limit or that outlives the process, reach the keys of the user who started the
    sandbox, reach outside by another kind of socket, go around this filter (io_uring), change the limits and the priority of
    another process, or have a process that its parent's parent must wait for (CLONE_PARENT, ptrace). User namespaces, where
    memory could be mounted, are refused too: bwrap refuses them only to users other than root.

    clone3, whose flags a filter cannot read, is refused as unknown, and the C library then calls clone. Raises OSError if there
    is no filter for this kind of machine, or if it is not accepted.
    """
    machine = os.uname().machine
    if machine not in MACHINES:
        raise OSError(f"there is no filter of system calls for {machine}")
    flags = CLONE_NEWUSER | CLONE_PARENT | CLONE_PTRACE
    _install(
        [
            (LOAD, 0, 0, 4),  # the kind of machine: others, such as the 32 bits of the same one, have other numbers
            (EQUAL, 1, 0, MACHINES[machine]),
            REFUSE,
            (LOAD, 0, 0, 0),  # the number of the system call
            (AT_LEAST, 0, 1, 0x4000_0000),  # x32
            UNKNOWN,
            *_calls((CLONE3,), [UNKNOWN]),
            *_calls(REFUSED_CALLS[machine], [REFUSE]),
            *_calls((CLONE[machine], UNSHARE[machine]), [FIRST, (ANY_BIT, 0, 1, flags), REFUSE, ALLOW]),
            *_calls(SOCKETS[machine], [FIRST, *_unless_one_of(FAMILIES)]),
            *_calls(OWN_PROCESS_CALLS[machine], [FIRST, *_unless_one_of((0,))]),
            ALLOW,
        ]
    )


def refuse_signals(process: int) -> None:
    """Refuse to send a signal to that process, to its group, or to all processes at once, directly or by a file that does."""
    machine = os.uname().machine
    everyone = 0xFFFF_FFFF  # -1
    _install(
        [
            (LOAD, 0, 0, 0),
            *_calls((KILL[machine],), [FIRST, *_if_one_of((process, (1 << 32) - process, everyone))]),
            *_calls(SIGNAL_CALLS[machine], [FIRST, *_if_one_of((process,))]),
            *_calls((PIDFD_SEND_SIGNAL,), [REFUSE]),
            *_calls((FCNTL[machine],), [SECOND, *_if_one_of(OWNERS_OF_FILES)]),
            *_calls((IOCTL[machine],), [SECOND, *_if_one_of(OWNERS_OF_SOCKETS)]),
            ALLOW,
        ]
    )


def _calls(numbers: Sequence[int], then: Sequence[Line]) -> list[Line]:
    """Lines that do `then` for system calls of these numbers, and go on behind it for others."""
    return [*_tests(numbers, 0, len(then)), *then]


def _if_one_of(values: Sequence[int]) -> list[Line]:
    """Lines that refuse the system call if what was loaded is one of the values, and allow it otherwise."""
    return [*_tests(values, 0, 1), REFUSE, ALLOW]


def _unless_one_of(values: Sequence[int]) -> list[Line]:
    return [*_tests(values, 1, 0), REFUSE, ALLOW]


def _tests(values: Sequence[int], found: int, other: int) -> list[Line]:
    """Lines that skip `found` of the lines behind them if what was loaded is one of the values, and `other` if not."""
    last = len(values) - 1
    return [(EQUAL, last - n + found, 0 if n < last else other, value) for n, value in enumerate(values)]


def _install(program: Sequence[Line]) -> None:
    filters = b"".join(struct.pack("HBBI", *line) for line in program)
    memory = ctypes.create_string_buffer(filters, len(filters))
    header = ctypes.create_string_buffer(struct.pack("HL", len(program), ctypes.addressof(memory)))
    prctl(SET_SECCOMP, 2, header, problem="the filter of system calls is not accepted")  # bwrap has set no_new_privs


def prctl(option: int, *arguments: Any, problem: str = "") -> None:
    """Call prctl(2) with the arguments and zeros. Raises OSError."""
    zeros = [0] * (4 - len(arguments))
    if ctypes.CDLL(None, use_errno=True).prctl(option, *arguments, *zeros):
        raise OSError(ctypes.get_errno(), problem or f"prctl({option}, {arguments[0]}) has failed")
