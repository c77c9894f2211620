"""The file of results that `minitron evaluate` writes and `minitron compare` reads.

Its JSON schema is `definitions/results.schema.json`. `format` is raised when a reader of the older one could not read it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minitron import __version__, storage
from minitron.arguments import short_repr
from minitron.errors import InputError
from minitron.evaluation.scores import Evaluated
from minitron.evaluation.tasks import Task

FORMAT = 1
SCHEMA = Path(__file__).resolve().parent / "definitions" / "results.schema.json"


@dataclass(frozen=True)
class ModelResults:
    """The results of one model."""

    model: str
    """Its name as the user gave it."""
    identity: str
    """Hash of its weights, config and tokenizer, 16 hexadecimal digits; of a model at a server, of its address, its name, what
    the server says about it, and the tokenizer."""
    parameters: int | None
    """None for a model at a server."""
    dtype: str
    """That it computed in, by torch's name; "unknown" for a model at a server."""
    device: str
    tasks: dict[str, Evaluated] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    """Reason by task."""
    engine: str = ""
    """What computed its answers: transformers, vllm, or server; empty in results of earlier versions."""
    chat_template: str | None = None
    """Hash of its tokenizer's chat template, 16 hexadecimal digits; None without one, and in results of earlier versions."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings of each task: num_fewshot, limit, chat_template (whether it was used) and data."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the packages that scored it."""


def results_json(
    results: Sequence[ModelResults], tasks: Sequence[Task], suite: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The content of a file of results. tasks: that were run. suite: {name, version} if they are those of a suite."""
    return {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": package_versions(),
        "suite": None if suite is None else dict(suite),
        "settings": settings_json(tasks),
        "models": [_model_json(each) for each in results],
    }


def package_versions() -> dict[str, str]:
    """Versions of Minitron and of the packages that prompts, scores and models come from."""
    return {"minitron": __version__, **{name: version(name) for name in ("lm_eval", "transformers", "torch")}}


def settings_json(tasks: Sequence[Task]) -> dict[str, dict[str, Any]]:
    """The settings of each task, which all models of a file have in common."""
    return {
        task.key: {
            "num_fewshot": task.num_fewshot,
            "limit": task.limit,
            "chat_template": task.chat_template,
            "data": None if task.data is None else storage.redact(task.data),
        }
        for task in tasks
    }


def _model_json(results: ModelResults) -> dict[str, Any]:
    values = asdict(results)
    del values["settings"], values["versions"]  # those of the file
    for key, result in results.tasks.items():
        shown = result.score.shown_as
        values["tasks"][key]["score"] |= {"unit": shown.unit, "scale": shown.scale}
    return values


def read_results(path: str) -> list[ModelResults]:
    """The results in a file that `minitron evaluate --out` wrote. Raises InputError for any other file, and for one that is
    damaged, with the key."""
    remedy = "give a file that `minitron evaluate --out FILE.json` wrote"
    if storage.is_local(path) and storage.local_path(path).is_dir():
        raise InputError(f"{path}: is a folder, not a file of results", remedy)
    try:
        content = json.loads(storage.read_bytes(path), parse_int=_whole)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON ({error})", remedy) from error
    if not isinstance(content, dict) or "format" not in content or not isinstance(content.get("models"), list):
        raise InputError(f"{path}: is not a file of results", remedy)
    if content.get("format") != FORMAT:
        raise InputError(f"{path}: has format {short_repr(content.get('format'))}, not {FORMAT}", remedy)
    if not content["models"]:
        raise InputError(f"{path}: has no models", remedy)
    problem = _mismatch(content) or _wrong_documents(content["models"])
    if problem:
        raise InputError(f"{path}: is damaged: {problem}", remedy)
    common = {"settings": content["settings"], "versions": content["versions"]}
    return [_model({**values, **common}) for values in content["models"]]


def _whole(text: str) -> int:
    """The number of a text. Raises ValueError for one that a float cannot hold."""
    if len(text) > sys.float_info.max_10_exp:
        raise ValueError(f"{text[:10]}… is too large a number")
    return int(text)


def _mismatch(content: dict[str, Any]) -> str:
    """The first place at which the file is not what its schema says, with the keys; empty if there is none."""
    from jsonschema import Draft202012Validator

    error = next(Draft202012Validator(json.loads(SCHEMA.read_text())).iter_errors(content), None)
    if error is None:
        return ""
    message = error.message  # begins with the whole value
    message = message if len(message) < 200 else f"{message[:80]} … {message[-100:]}"
    return f"{'.'.join(map(str, error.absolute_path)) or 'the file'}: {message}"


def _wrong_documents(models: Sequence[Mapping[str, Any]]) -> str:
    """Where documents are missing or repeated, which would count in comparisons; empty if nowhere."""
    for number, model in enumerate(models):
        for task, result in model["tasks"].items():
            key = f"models.{number}.tasks.{task}.documents"
            seen: set[str] = set()
            for document in result["documents"]:
                if document["id"] in seen:
                    return f"{key}: document {short_repr(document['id'])} is there twice"
                seen.add(document["id"])
            if len(seen) != result["score"]["num_documents"]:
                return f"{key}: has {len(seen) or 'no'} documents, but the score is of {result['score']['num_documents']:,}"
    return ""


def _model(values: dict[str, Any]) -> ModelResults:
    tasks = {}
    for key, result in values["tasks"].items():
        score = {name: value for name, value in result["score"].items() if name not in ("unit", "scale")}
        tasks[key] = Evaluated.from_dict({**result, "score": score})
    return ModelResults(**{**values, "tasks": tasks})
