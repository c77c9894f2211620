"""Standard streams that are closed where the command is started, as by some schedulers of jobs."""

from __future__ import annotations

import json
import subprocess
import sys

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
