"""The layout of the tests: they mirror the packages, and share code through helpers and fixtures alone."""

from __future__ import annotations

import ast

from helpers.command import ROOT

TESTS = ROOT / "tests"
PACKAGES = {"minitron": "minitron", "search": "search/minitron_search", "platform": "platform/minitron_platform"}
OTHERS = ("clusters", "end_to_end", "properties", "helpers", "repository")
FILES = {path.relative_to(TESTS): path for path in TESTS.rglob("*.py")}


def _imports(path):
    """Module and name of every import of a file; the name is empty for `import module`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (("." * node.level + (node.module or ""), alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)


def _mirrors_a_package(path):
    first, *inner = path.parts[:-1] or [""]
    if first in PACKAGES:
        return ROOT.joinpath(PACKAGES[first], *inner).is_dir()
    return path.name == "conftest.py" if first == "" else first in OTHERS and not inner


def test_tests_are_in_the_folders_of_the_packages_or_of_whole_runs():
    assert len(FILES) > 50
    assert [path for path in FILES if not _mirrors_a_package(path)] == []


def _is_of_a_test_or_private(module, name):
    parts = [*module.split("."), name]
    if any(part.startswith(("test_", "conftest")) for part in parts) or parts[0] in ("tests", ""):
        return True
    return parts[0] == "helpers" and any(part.startswith("_") for part in parts)


def test_no_test_imports_another_test_or_a_private_name_of_a_helper():
    imports = [(str(path), *names) for path, file in FILES.items() for names in _imports(file)]
    assert len(imports) > 500
    assert [found for found in imports if _is_of_a_test_or_private(*found[1:])] == []


def test_the_names_of_tests_are_the_same_in_every_process(request):
    """Those of xdist compare them before the first test: a name with a packed file's bytes, and so the time, ends the run."""
    assert [item.nodeid for item in request.session.items if r"\x1f\x8b" in item.nodeid] == []
