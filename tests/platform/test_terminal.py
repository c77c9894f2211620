"""Texts of strangers command no terminal, and are not markup: of configs, tags, names, jobs and records."""

from __future__ import annotations

import io
import json
import logging
import sys
import warnings
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from helpers import tiny
from rich.table import Table

from minitron.errors import InputError, one_line
from minitron.models import check_contents
from minitron.text import markdown
from minitron_platform.cli import commands
from minitron_platform.cluster import jobs
from minitron_platform.cluster.job_log import Progress
from minitron_platform.console import Console
from minitron_platform.report import page

TITLE = "\x1b]0;owned\x07"  # sets the title of the window
ERASE = "\x1b[2J\x1b[1A\r"  # erases the screen
REVERSED = "\u202etxt.exe"
HOSTILE = f"a{TITLE}b{ERASE}c{REVERSED}\x9b31m"
LINK = "[link=http://evil][blink]click[/blink][/link]"


def is_safe(text: str) -> bool:
    return not any(character in text for character in "\x1b\x07\r\x9b\u202e")


@pytest.fixture
def console(monkeypatch):
    """A console on a terminal, and what it shows."""
    monkeypatch.setenv("TERM", "dumb")  # without styles
    shown = Console()
    shown.rich.file = io.StringIO()
    return shown


def test_a_console_shows_control_characters_and_markup_of_texts_as_text(console):
    console.say(HOSTILE)
    console.say(f"[bold]{LINK}[/]")
    console.say("[/] unbalanced [bold")
    table = Table(title=f"{HOSTILE} {LINK}", caption=LINK)
    table.add_column(LINK)
    table.add_row(HOSTILE)
    table.add_row(LINK)
    console.rich.width = 300
    console.table(table)
    console.status(f"{HOSTILE} {LINK}")
    with console.working(LINK):
        console.say(console._text())
    shown = console.rich.file.getvalue()
    assert is_safe(shown)
    assert "␛]0;owned" in shown
    assert "[/] unbalanced [bold" in shown
    assert shown.count(LINK) >= 4  # in the table, as it is
    assert "http://evil" not in shown.replace(LINK, "")


def test_markup_in_a_message_is_neither_a_link_nor_blinks(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    console = Console()
    console.rich.file = io.StringIO()
    console.say(f"[bold]name[/] {LINK}")
    shown = console.rich.file.getvalue()
    assert shown == "\x1b[1mname\x1b[0m click\n"


def test_names_in_a_models_files_do_not_reach_the_terminal_as_they_are(tmp_path):
    model = tiny.model()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": HOSTILE, "architectures": [HOSTILE]}))
    with pytest.raises(InputError) as refused:
        check_contents(str(tmp_path))
    assert is_safe(str(refused.value))
    assert is_safe(one_line(ValueError(HOSTILE)))
    result = CliRunner().invoke(commands.main, ["plan", str(tmp_path / HOSTILE)])
    assert result.exit_code == 2
    assert is_safe(result.output)


def test_what_jobs_and_registries_say_is_shown_as_text(monkeypatch):
    names = {"submission_id": HOSTILE, "name": HOSTILE, "status": "FAILED", "reason": HOSTILE, "message": HOSTILE}
    row = SimpleNamespace(**names, resume=HOSTILE, started=1.0, ended=2.0, is_active=False, attempt=1, version=HOSTILE)
    monkeypatch.setattr(jobs, "status", lambda *arguments, **named: [row])
    monkeypatch.setattr(jobs, "job_progress", lambda *arguments, **named: Progress(HOSTILE, HOSTILE))
    monkeypatch.setattr(jobs, "logs", lambda *arguments, **named: iter([f"\x1b[32mgreen\x1b[0m {HOSTILE}\r\n"]))
    monkeypatch.setattr(jobs, "stop", lambda *arguments, **named: HOSTILE)
    for command in (["jobs"], ["status", "job"], ["logs", "job"], ["stop", "job"]):
        result = CliRunner().invoke(commands.main, [*command, "--address", "http://127.0.0.1:1"], color=True)
        assert result.exit_code == 0, result.output
        assert is_safe(result.output.replace("\x1b[32mgreen\x1b[0m", "")), command
    assert "\x1b[32mgreen" in CliRunner().invoke(commands.main, ["logs", "job", "--address", "x"], color=True).output


def test_what_libraries_log_with_handlers_of_their_own_shows_no_secrets_and_no_control_characters(monkeypatch):
    output = io.StringIO()
    logger = logging.getLogger("mlflow.of_a_test")
    monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(output)])
    monkeypatch.setattr(logger, "propagate", False)
    CliRunner().invoke(commands.main, ["recipes"])
    try:
        raise OSError(f"http://me:hunter2@host/ {HOSTILE} has moved to /x?pass=hunter2&a=b")
    except OSError:
        logger.exception("%s refuses %s", "postgresql://me:hunter2@db/mlflow?password=hunter2", HOSTILE)
    shown = output.getvalue()
    assert is_safe(shown)
    assert "hunter2" not in shown
    assert "postgresql://db/mlflow refuses a" in shown
    assert "has moved to /x" in shown


def test_a_description_in_markdown_shows_texts_as_text():
    shown = markdown(f"<script> [x](http://evil)\n# title |{HOSTILE}")
    assert shown.startswith(r"\<script\> \[x\](http://evil) \# title \|a␛\]0;owned")
    assert is_safe(shown)
    assert "\n" not in shown


def test_tracebacks_and_warnings_of_libraries_are_shown_as_text(monkeypatch, capsys):
    for owner, name in ((sys, "excepthook"), (warnings, "showwarning")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back at the end
    CliRunner().invoke(commands.main, ["recipes"])
    try:
        raise ValueError(f"not in config.json: {HOSTILE}")
    except ValueError as error:
        sys.excepthook(ValueError, error, error.__traceback__)
    warnings.showwarning(UserWarning(HOSTILE), UserWarning, "file.py", 1)
    shown = capsys.readouterr().err
    assert is_safe(shown)
    assert "ValueError: not in config.json: a␛]0;owned" in shown
    assert "UserWarning: a␛]0;owned" in shown


def test_a_page_shows_texts_as_text(monkeypatch):
    environment = page.environment()
    text = environment.from_string("{% macro m(x) %}<b>{{ x }}</b>{% endmacro %}{{ m(text) }}").render(
        text=f"<script>{HOSTILE}"
    )
    assert text.startswith("<b>&lt;script&gt;a␛]0;owned␇b")
    assert is_safe(text)
