"""Ctrl-C ends a command in a sentence and with code 130."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest
from click.testing import CliRunner
from helpers.command import environment

from minitron_platform.cli import commands


def test_the_command_that_resumes_a_run_is_shown_without_secrets(monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    address = "postgresql://me:hunter2@db/mlflow"
    monkeypatch.setattr("sys.argv", ["minitron", "recipes", "--tracking-uri", address])
    monkeypatch.setattr("minitron_platform.recipes.load.shipped_recipes", interrupt)
    result = CliRunner().invoke(commands.main, ["recipes"])
    assert result.exit_code == 130
    assert "recipes --tracking-uri postgresql://db/mlflow" in result.output


@pytest.fixture
def own_signals():
    """Signals as they are when a program starts: pytest's workers ignore SIGINT, and Ray, which other tests start in this
    process, handles SIGTERM."""
    own = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in own.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_ctrl_c_ends_in_a_sentence_whatever_an_interrupted_library_raises(monkeypatch, own_signals):
    def interrupted():
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)  # in this thread: another one of this process would notice it too late
        raise RecursionError("half a library is imported")

    monkeypatch.setattr("minitron_platform.recipes.load.shipped_recipes", interrupted)
    result = CliRunner().invoke(commands.main, ["recipes"])
    assert result.exit_code == 130, result.exception
    assert "stopped; to resume: " in result.output
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_before_the_command_is_loaded_ends_in_a_sentence():
    code = """
import sys
from minitron_platform.cli import main

class Interrupt:
    def find_spec(self, name, *_):
        if name == "minitron.errors":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
main()
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert done.stderr.strip() == "stopped before anything had begun"


INTERRUPTS_A_DATACLASS = """
import sys

class Interrupt:
    def find_spec(self, name, *_):
        if name == "minitron_platform.recipes.load":
            exec("raise KeyboardInterrupt")  # dataclasses run code as text, too

sys.meta_path.insert(0, Interrupt())
"""


def test_ctrl_c_within_code_as_text_ends_python_m_with_a_code_too(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTS_A_DATACLASS)
    variables = environment()
    variables["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *filter(None, [variables.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "minitron_platform", "recipes"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
    assert "stopped; to resume: " in done.stderr
    assert done.returncode == 130
