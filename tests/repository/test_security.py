"""SECURITY.md promises only what a test holds."""

from __future__ import annotations

import re

from helpers.command import ROOT


def test_every_promise_names_tests_that_exist():
    sections = (ROOT / "SECURITY.md").read_text().split("\n## ")
    (promises,) = [section for section in sections if section.startswith("What is protected from whom")]
    rows = re.findall(r"^\| (?!promise|---)(.+) \| (.+) \|$", promises, re.MULTILINE)
    assert len(rows) > 20
    known = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    for promise, tests in rows:
        named = re.findall(r"`(test_\w+)`", tests)
        assert named, promise
        assert set(named) <= known, (promise, set(named) - known)
