"""Imports have no side effects on the process."""

from __future__ import annotations

import subprocess
import sys

from helpers.command import ROOT, environment

IMPORTED_AGAIN = """
import importlib, os, pkgutil, sys, warnings
PACKAGES = ("minitron", "minitron_search", "minitron_platform")

def import_all():
    for name in PACKAGES:
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(package.__path__, f"{name}."):
            if not module.name.endswith(".__main__"):
                importlib.import_module(module.name)

before = dict(os.environ)
import_all()  # imports the libraries too, which do have side effects
for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
    del sys.modules[name]
os.environ.clear()
os.environ.update(before)
filters = list(warnings.filters)
import_all()
assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())
assert warnings.filters == filters, set(warnings.filters) ^ set(filters)
print("nothing changed in", sum(name.partition(".")[0] in PACKAGES for name in sys.modules), "modules")
"""


def test_imports_change_neither_the_environment_nor_the_warning_filters():
    code = [sys.executable, "-c", IMPORTED_AGAIN]
    done = subprocess.run(code, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert "nothing changed in" in done.stdout, done.stderr[-2000:]


def test_the_command_line_starts_without_torch():
    started = "import sys, minitron_platform.cli.commands; print(sorted({'torch', 'ray', 'numpy'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", started], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stderr
