"""What is logged, read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

import minitron
import minitron_platform
import minitron_search


def test_an_error_that_is_logged_is_one_line():
    """As text, an error of Minitron has two, of which a log shows the second without its beginning: `one_line` or its
    problem."""
    broken = []
    for package in (minitron, minitron_platform, minitron_search):
        for path in Path(package.__file__).parent.rglob("*.py"):
            handlers = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ExceptHandler)]
            for handler in handlers:
                broken += [f"{path}:{call.lineno}" for call in _logged(handler) if handler.name in _names(call)]
    assert broken == []


def _logged(handler):
    for node in ast.walk(handler):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="log"))):
                yield node


def _names(call):
    return {argument.id for argument in call.args if isinstance(argument, ast.Name)}
