"""Whether manifests are valid by the definitions of Kubernetes and KubeRay."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import jsonschema
from helpers.command import ROOT

SCHEMAS = ROOT / "tests" / "platform" / "cluster" / "schemas"


@cache
def _definitions() -> dict[str, Any]:
    """All definitions by name; no name is in both files."""
    return {
        name: definition
        for file in ("kuberay-1.7.json", "kubernetes-1.37.json")
        for name, definition in json.loads((SCHEMAS / file).read_text())["$defs"].items()
    }


def check_manifest(manifest: dict[str, Any]) -> None:
    """Raise jsonschema.ValidationError for a manifest that is not valid. null is not: it means an empty value of a template,
    which Kubernetes would ignore."""
    schema = {"$ref": f"#/$defs/{manifest['kind']}", "$defs": _definitions()}
    jsonschema.Draft202012Validator(schema).validate(manifest)
