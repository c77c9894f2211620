"""What `minitron status` and `logs --stage` read in the output of a run, written by the run's own console."""

from __future__ import annotations

import io

import pytest

from minitron_platform.cluster.job_log import failure, progress, stage_log
from minitron_platform.console import Console


@pytest.fixture
def console():
    """A console whose output is `console.rich.file.getvalue()`, as in a job's log."""
    console = Console()
    console.rich.file = io.StringIO()
    return console


def printed(console):
    return console.rich.file.getvalue()


def test_the_newest_line_of_a_run_says_where_it_is(console, monkeypatch):
    monkeypatch.setattr("minitron_platform.console.HEARTBEAT_SECONDS", 0.0)
    assert str(progress("")) == ""
    console.say("[green]✓[/] [bold]data      [/] 40 rows [dim]· 3 s[/]")
    assert (progress(printed(console)).stage, progress(printed(console)).status) == ("data", "done")
    with console.working("[bold]search[/]"):
        console.status("3/8 trials")
        while "search" not in printed(console):
            pass
    assert progress(printed(console)).stage == "search"
    assert progress(printed(console)).status.startswith("3/8 trials · ")


def test_a_run_that_took_seconds_to_close_is_done(console):
    console.say("[green]✓[/] [bold]register[/] version 1")
    console.say("  … [bold]closing[/]  2 s")
    assert progress(printed(console)).stage == "closing"
    console.say("[dim]total time 9 s[/]")
    assert str(progress(printed(console))) == "register done"


def test_the_part_of_a_stage_is_cut_from_the_log(console):
    console.say("plan")
    for stage in ("data", "search", "data"):
        console.say(f"  about {stage}")
        console.say(f"[green]✓[/] [bold]{stage:<10}[/] done")
    console.say("  … [bold]distill[/]  step 1 · 9 s")
    assert stage_log(printed(console), "search").splitlines() == ["  about search", "✓ search     done"]
    assert stage_log(printed(console), "data").count("about data") == 2
    assert stage_log(printed(console), "distill") == "  … distill  step 1 · 9 s\n"
    assert stage_log(printed(console), "register") == ""


def test_a_failed_run_says_why_in_one_line():
    refused = "✓ data\nerror: data.path: no such file\n  fix: check the path\nJob ended\n"
    assert failure(refused) == "data.path: no such file; check the path"
    crashed = (
        "Traceback (most recent call last):\n  File \"a.py\", line 1\nModuleNotFoundError: No module named 'rich'\n"
    )
    assert failure(crashed) == "ModuleNotFoundError: No module named 'rich'"
    assert failure("nothing to see\n") == ""
