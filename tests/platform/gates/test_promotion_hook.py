"""The command or address that is told of a promotion."""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from minitron.errors import InputError
from minitron_platform.promotion_hook import HookError, call_hook, check_hook

EVENT = {"event": "promoted", "model": "$(touch planted); `id`", "version": "3", "gates": [{"gate": "size"}]}
PROGRAM = """import os, sys
values = sys.stdin.read(), os.environ["MINITRON_EVENT_MODEL"], *sys.argv[2:]
open(sys.argv[1], "w").write("\\n".join(values))
"""


def test_a_command_gets_the_event_and_no_shell_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tell.py").write_text(PROGRAM)
    call_hook(f"{sys.executable} -S tell.py out '$HOME; touch other'", EVENT)
    body, model, argument = (tmp_path / "out").read_text().split("\n")
    assert json.loads(body) == EVENT
    assert (model, argument) == (EVENT["model"], "$HOME; touch other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tell.py"]


def test_a_command_that_fails_says_so_and_that_the_alias_was_moved() -> None:
    with pytest.raises(
        HookError, match=r"the alias was moved to version 3, but .* failed: .*exit code 7: no such site"
    ):
        call_hook(f"{sys.executable} -S -c \"import sys; sys.stderr.write('no such site'); sys.exit(7)\"", EVENT)
    with pytest.raises(HookError, match="the alias was moved to version 3, but missing-command failed"):
        call_hook("missing-command", EVENT)


@pytest.mark.parametrize("status", [200, 302, 500])
def test_an_address_gets_the_event_and_is_not_followed_elsewhere(status: int) -> None:
    bodies: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}/hook?token=secret"
        if status == 200:
            call_hook(address, EVENT)
        else:
            with pytest.raises(HookError, match=str(status)) as failed:
                call_hook(address, EVENT)
            assert "secret" not in str(failed.value)
        thread.join()
    assert bodies == [EVENT]


@pytest.mark.parametrize("hook", ["", "  ", "tell 'them", "http://example.org/hook", "https:///hook"])
def test_a_hook_that_cannot_work_is_refused_before_anything_is_promoted(hook: str) -> None:
    with pytest.raises(InputError, match="on-promote"):
        check_hook(hook)
