"""The command that a user is told to type."""

from __future__ import annotations

from minitron_platform.cli.program import command_line, program


def test_a_job_prints_commands_for_the_shell_of_who_submitted_it(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("sys.argv", ["/cluster/minitron_platform/__main__.py", "run", "recipe.yaml"])
    assert program().endswith("python -m minitron_platform")
    monkeypatch.setenv("MINITRON_RESUME", "minitron submit mine.yaml --storage s3://runs")
    assert program() == "minitron"
    assert command_line() == "minitron submit mine.yaml --storage s3://runs"
