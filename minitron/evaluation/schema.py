"""Whether a JSON value is what a JSON schema says, for the keywords that the schema of results uses."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from minitron.arguments import short_repr

_WORDS = {
    "object": "an object",
    "array": "a list",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
    "integer": "a whole number",
    "number": "a number",
}


def mismatch(value: Any, schema: Mapping[str, Any]) -> str:
    """The first place at which `value` is not what `schema` says, with its keys: "models.0.dtype: 5 is not text"; empty if
    there is none. A number that a float cannot hold is none."""
    return _mismatch(value, schema, schema.get("$defs", {}), "")


def _mismatch(value: Any, schema: Mapping[str, Any], defs: Mapping[str, Any], key: str) -> str:
    if "$ref" in schema:
        schema = defs[schema["$ref"].removeprefix("#/$defs/")]
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    allowed = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
    problem = ""
    if kinds and not any(_is(value, kind) for kind in kinds):
        problem = f"is not {' or '.join(_WORDS[kind] for kind in kinds)}"
    elif allowed and value not in allowed:
        problem = f"is not {' or '.join(short_repr(each) for each in allowed)}"
    elif "minimum" in schema and value < schema["minimum"]:
        problem = f"is less than {schema['minimum']}"
    if problem:
        return f"{key or 'the file'}: {short_repr(value)} {problem}"
    before = f"{key}." if key else ""
    if isinstance(value, dict):
        for name in schema.get("required", ()):
            if name not in value:
                return f"{before}{name}: is missing"
        known, others = schema.get("properties", {}), schema.get("additionalProperties", {})
        for name, each in value.items():
            own = known.get(name, others)
            found = (
                f"{before}{name}: is no key of such a file"
                if own is False
                else _mismatch(each, own, defs, before + name)
            )
            if found:
                return found
    elif isinstance(value, list):
        for number, each in enumerate(value):
            if found := _mismatch(each, schema.get("items", {}), defs, f"{before}{number}"):
                return found
    return ""


def _is(value: Any, kind: str) -> bool:
    match kind:
        case "object":
            return isinstance(value, dict)
        case "array":
            return isinstance(value, list)
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case _:
            whole = isinstance(value, int) and not isinstance(value, bool)
            return isinstance(value, float) or (whole and abs(value) <= sys.float_info.max)
