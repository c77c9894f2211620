"""YAML as recipes use it: plain values, every key once, and aliases that end."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from minitron.arguments import short_repr
from minitron.errors import InputError

MOST_BYTES = 2**20  # of a recipe's file; the shipped ones have 3,000
MOST_VALUES = 200_000  # in a recipe, with every alias written out
MOST_DEPTH = 32  # sections inside each other
KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 6e-4 and 9e7 as numbers and 29:13 as text, where YAML 1.1 reads text and a time, and that refuses a
    key which a section has twice."""

    merged = 0  # keys of all sections with a << key

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in lines:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {short_repr(key.value)} is already in line {lines[key.value]}",
                    problem_mark=key.start_mark,
                )
            lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge the sections of `<<` keys into a section. Lists of sections are refused: a few levels of them are billions of
        keys."""
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge" and isinstance(value, yaml.SequenceNode):
                raise yaml.MarkedYAMLError(problem="<< merges one section, not a list", problem_mark=key.start_mark)
        merges = any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value)
        super().flatten_mapping(node)
        self.merged += len(node.value) if merges else 0
        if self.merged > MOST_VALUES:
            raise yaml.MarkedYAMLError(problem="<< merges too many keys", problem_mark=node.start_mark)


_NUMBERS = {
    "tag:yaml.org,2002:int": r"^[-+]?(0|[1-9][0-9_]*)$",
    "tag:yaml.org,2002:float": r"^[-+]?(\d[\d_]*(\.[\d_]*([eE][-+]?\d+)?|[eE][-+]?\d+)|\.\d+([eE][-+]?\d+)?|\.inf)$",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), list("-+0123456789."))


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a recipe's file.

    Raises InputError naming the file, and the line where there is one, for a file that cannot be read or is not YAML, for a key
    that is given twice or is not a name, and for more values or levels than a recipe can have.
    """
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise InputError(f"{path}: {size:,} bytes are too many for a recipe", "give the recipe's YAML file")
        values = _load(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", "check its permissions") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid YAML ({error})", "fix the line that is named") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: contains no keys", "start from a recipe that ships: `minitron recipes`")
    return _plain(values, str(path))


def parse_value(text: str, source: str) -> Any:
    """The value in an override such as "distill.steps=50"; `source` is the override's name in errors. Raises InputError as
    `read_yaml`."""
    try:
        return _plain(_load(text), source)
    except ValueError as error:
        raise InputError(f"{source}: the value is not valid YAML ({error})", "correct it, or quote it") from error


def _load(text: bytes | str) -> Any:
    """Raises ValueError, with a reason of one line, for what is not YAML."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{error.problem or error.context}{where}") from error
    except RecursionError as error:
        raise ValueError("too many levels") from error
    except yaml.reader.ReaderError as error:  # its position counts bytes if they are not UTF-8, otherwise characters
        is_text = error.encoding == "unicode"
        before = text.decode(errors="replace") if is_text and isinstance(text, bytes) else text
        line = len(before[: error.position].splitlines()) or 1
        problem = f"the character {error.character!r} is not allowed" if is_text else f"not UTF-8, {error.reason}"
        raise ValueError(f"{problem}, line {line}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of 5,000 digits, the 30th of February
        raise ValueError(" ".join(str(error).split())) from error


def _plain(values: Any, source: str) -> Any:
    """A copy in which aliases are separate objects, so that an override of one does not change the others."""
    budget = [MOST_VALUES]

    def copy(value: Any, levels: int) -> Any:
        budget[0] -= 1
        if levels > MOST_DEPTH:
            raise InputError(
                f"{source}: more than {MOST_DEPTH} levels of sections, or an alias that contains itself",
                "write the values without the alias",
            )
        if budget[0] < 0:
            raise InputError(f"{source}: more than {MOST_VALUES:,} values", "write fewer, or a range {from, to, step}")
        if isinstance(value, dict):
            return {_key(key, source): copy(inner, levels + 1) for key, inner in value.items()}
        if isinstance(value, list):
            return [copy(inner, levels + 1) for inner in value]
        return value

    return copy(values, 0)


def _key(key: Any, source: str) -> str:
    if not isinstance(key, str) or not KEY.fullmatch(key):
        raise InputError(
            f"{source}: {short_repr(key)} is not a key", "keys are names of letters, digits and _, see docs/recipes.md"
        )
    return key
