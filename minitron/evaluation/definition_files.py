"""Checks of a task definition's YAML before lm-eval reads it: plain values, functions by their names, and no floods.

lm-eval imports what `!function` names while it reads a file, wherever that stands, also in a key. So the names are taken from
the nodes of the file, and not from the values that become of them.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import yaml

from minitron.arguments import short_repr
from minitron.errors import InputError

MOST_BYTES = 2**20  # of a file; the longest of lm-eval has 60,000
MOST_VALUES = 200_000  # in a file, with every alias written out
FUNCTION = "!function"
PLAIN = re.compile(
    r"tag:yaml\.org,2002:[a-z]+"
)  # the tags of numbers, texts and lists; those of Python's objects go on
NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)  # module.function, which is beside the file or in lm-eval


def check_file(task: str, file: Path) -> None:
    """Raise InputError for a file that is not YAML of plain values, whose aliases are too many values, or that names a function
    by anything but module.function: a path leads anywhere. task: its name in errors."""
    if problem := _problem(file, file.stat().st_mtime_ns):
        raise InputError(f"task {task!r}: its definition {file}: {problem}", "correct the file, or leave the task out")


@lru_cache(maxsize=1024)
def _problem(file: Path, version: int) -> str:
    """What is wrong with a file; empty if nothing is. version: of the file, so that a changed one is read again."""
    if file.stat().st_size > MOST_BYTES:
        return f"{file.stat().st_size:,} bytes are too many"
    try:
        root = yaml.compose(file.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        _count(root, {})
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return " ".join(str(error).split())[:300]
    return ""


def _count(node: yaml.Node | None, known: dict[int, int]) -> int:
    """Number of values below a node, with every alias written out. known: the number by node, 0 inside the node itself.

    Raises ValueError for what a definition cannot contain.
    """
    if node is None:
        return 0
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("an alias that contains itself")
        return known[id(node)]
    known[id(node)] = 0
    if node.tag == FUNCTION:
        if not (isinstance(node, yaml.ScalarNode) and NAME.fullmatch(node.value)):
            raise ValueError(f"{short_repr(node.value)} is not the name of a Python function, such as utils.text")
    elif not PLAIN.fullmatch(node.tag):
        raise ValueError(f"the tag {short_repr(node.tag)} is not known")
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == FUNCTION:
                raise ValueError("a key that is not plain")
            children += [key, value]
    count = 1 + sum(_count(child, known) for child in children)
    if count > MOST_VALUES:
        raise ValueError(f"more than {MOST_VALUES:,} values")
    known[id(node)] = count
    return count
