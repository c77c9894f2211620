"""Standard streams that are closed where the command is started, as by some schedulers of jobs, or that cannot be written."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from helpers.command import environment

SHOW = """
import json, os, sys
from minitron_platform.cli import main
try:
    main(args=["--version"])
except SystemExit:
    numbers = [os.readlink(f"/proc/self/fd/{number}") for number in range(3)]
    print("written", file=sys.stderr)
    child = os.system("echo written >&2")
    open(sys.argv[1], "w").write(json.dumps([numbers, sys.stdin.read(), child]))
"""


def test_no_file_that_the_command_opens_is_taken_for_a_stream_that_is_closed(tmp_path):
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", SHOW, str(tmp_path / "seen")]
    subprocess.run(closed, env=environment(), check=True)
    assert json.loads((tmp_path / "seen").read_text()) == [["/dev/null"] * 3, "", 0]


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_ends_the_command_with_a_sentence(unbuffered):
    typed = [sys.executable, "-m", "minitron_platform", "--help"]
    settings = environment() | {"PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        refused = subprocess.run(typed, env=settings, stdout=full, stderr=subprocess.PIPE, text=True)
        silent = subprocess.run(typed, env=settings, stdout=full, stderr=full)
    problem, fix = refused.stderr.split("\n", 2)[1:]
    assert problem == "error: standard output cannot be written (No space left on device)"
    assert fix.startswith("  fix: free some space where it goes")
    assert len(refused.stderr.splitlines()) == 3  # after a blank one
    assert (refused.returncode, silent.returncode) == (2, 2)
