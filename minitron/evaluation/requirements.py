"""Checks of a benchmark's requirements before any work: packages, metrics, documents, and context length for its answers.

The Python files that lm-eval's task definitions refer to are parsed and never run. Nothing is downloaded.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minitron.errors import InputError

ALLOW = "allow_code: true (--allow-code on the command line)"
IFEVAL = {"langdetect", "immutabledict", "nltk"}  # of the extra minitron[ifeval]
HUB_SECONDS = 5.0  # timeout of a request to the hub
ANSWER_TOKENS = 256  # lm-eval's default length of a generated answer
_INSTALLED_AS = {"sklearn": "scikit-learn", "PIL": "pillow", "bs4": "beautifulsoup4", "yaml": "pyyaml"}


def check_packages(name: str, config: dict[str, Any], roots: Sequence[Path]) -> None:
    """Raise InputError if the definition's Python files import packages that are not installed.

    roots: here and below, folders that definitions and their Python files may be in; the first is that of lm-eval's tasks.
    """
    imported = {package for file in modules(config, roots) for package in _imports(file)}
    missing = sorted(package for package in imported if find_spec(package) is None)
    if missing:
        command = " ".join(_INSTALLED_AS.get(package, package) for package in missing)
        raise InputError(
            f"task {name!r}: its definition needs {', '.join(missing)}, which is not installed",
            f"pip install {command}" if set(missing) - IFEVAL else "pip install 'minitron[ifeval]'",
        )


def check_nltk_data(name: str, config: dict[str, Any], roots: Sequence[Path]) -> None:
    """Raise InputError for data of NLTK that the definition's Python files would download, and that is not on this machine."""
    missing = sorted(
        data for file in modules(config, roots) for data in _nltk_downloads(file) if not _has_nltk_data(data)
    )
    if missing:
        raise InputError(
            f"task {name!r}: NLTK's data {', '.join(missing)} is not on this machine, and nothing is downloaded unasked",
            f"python -m nltk.downloader {' '.join(missing)}, or set NLTK_DATA to a folder that has tokenizers/{missing[0]}",
        )


def _has_nltk_data(name: str) -> bool:
    import nltk

    try:
        nltk.data.find(f"tokenizers/{name}")
    except LookupError:
        return False
    return True


def check_metrics(name: str, metrics: Sequence[str]) -> None:
    """Raise InputError for metrics of the package `evaluate`, whose code is on the hub, that are neither in the local cache nor
    on the hub."""
    for metric in metrics:
        check_metric_file(metric)
        if not (_hub_home() / "modules/evaluate_modules/metrics" / f"evaluate-metric--{metric}").exists():
            _ask_hub(f"evaluate-metric/{metric}", "space", f"task {name!r}: the metric {metric!r}")


def check_metric_file(metric: str) -> None:
    """Raise InputError for a file in the working folder that `evaluate.load` would run instead of the hub's metric."""
    if Path(metric).exists():
        raise InputError(
            f"{metric!r} in the working folder would be run as the metric of that name",
            "change to another working directory, or rename it",
        )


def check_documents(name: str, config: dict[str, Any]) -> None:
    """Raise InputError for a hub dataset that is neither in the local cache nor on the hub."""
    path = str(config.get("dataset_path") or "")
    if "/" not in path or config.get("custom_dataset") or (config.get("dataset_kwargs") or {}).get("data_files"):
        return  # lm-eval's code creates the documents
    cached = os.environ.get("HF_DATASETS_CACHE") or _hub_home() / "datasets"
    hub = os.environ.get("HF_HUB_CACHE") or _hub_home() / "hub"
    if (Path(cached) / path.replace("/", "___")).is_dir() or (
        Path(hub) / f"datasets--{path.replace('/', '--')}"
    ).is_dir():
        return
    _ask_hub(path, "dataset", f"task {name!r}: its documents, the hub's dataset {path},")


def check_room(name: str, config: dict[str, Any], longest: int | None) -> None:
    """Raise InputError if generated answers may fill the whole context of `longest` tokens, without room for the question."""
    if config.get("output_type") != "generate_until" or longest is None:
        return
    settings = config.get("generation_kwargs") or {}
    keys = ("max_gen_toks", "max_new_tokens", "max_tokens")
    tokens = next((settings[key] for key in keys if settings.get(key)), ANSWER_TOKENS)
    if int(tokens) >= longest:
        raise InputError(
            f"task {name!r}: its answers may have {tokens} tokens, but the model's context has {longest}, question included",
            "use a model with a longer context, or another task",
        )


@lru_cache(maxsize=256)
def _hub_problem(repository: str, kind: str) -> str:
    """Why a repository on the hub cannot be read; empty if it can."""
    if any(
        os.environ.get(f"HF_{part}_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE") for part in ("HUB", "DATASETS")
    ):
        return "HF_HUB_OFFLINE is set, and the cache does not have it"
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        HfApi().repo_info(repository, repo_type=kind, timeout=HUB_SECONDS)
    except (HTTPError, HFValidationError, OSError) as error:
        return f"the hub answers: {(str(error).strip().splitlines() or [type(error).__name__])[0][:200]}"
    return ""


def _ask_hub(repository: str, kind: str, what: str) -> None:
    if problem := _hub_problem(repository, kind):
        raise InputError(
            f"{what} cannot be loaded ({problem})",
            "run once with network access, which fills the cache, or leave the task out"
            + ("; or give local documents as the task's data" if kind == "dataset" else ""),
        )


def _hub_home() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HF_HOME") or Path(cache) / "huggingface")


def modules(config: Any, roots: Sequence[Path]) -> set[Path]:
    """The Python files that a definition refers to, and lm-eval's task modules that they import."""
    pending = list(_named(config, roots))
    known: set[Path] = set()
    while pending:
        file = pending.pop()
        if file not in known and file.is_file():
            known.add(file)
            pending += [
                roots[0].parent.parent / f"{module.replace('.', '/')}.py"
                for module in _imported_modules(file)
                if module.startswith("lm_eval.tasks.")
            ]
    return known


def _named(config: Any, roots: Sequence[Path]) -> Iterator[Path]:
    # a definition that is read without its functions has strings FOLDER/module.function instead, at any depth
    if isinstance(config, dict | list):
        for value in config.values() if isinstance(config, dict) else config:
            yield from _named(value, roots)
    elif isinstance(config, str) and "\n" not in config and any(config.startswith(f"{r}{os.sep}") for r in roots):
        yield named_function(config, roots)[0]


def named_function(name: str, roots: Sequence[Path]) -> tuple[Path, str]:
    """The file and the name of a function that a definition refers to. name: FOLDER/module.function.

    As lm-eval resolves it: a module beside the definition, otherwise one of lm-eval's package with its full name.
    """
    folder, _, qualified = name.rpartition(os.sep)
    module, _, function = qualified.rpartition(".")
    file = Path(folder) / f"{module.replace('.', os.sep)}.py"
    if not file.exists() and module.startswith("lm_eval."):
        file = roots[0].parent.parent / f"{module.replace('.', os.sep)}.py"
    return file, function


def check_functions(name: str, config: dict[str, Any], roots: Sequence[Path], *, allow_own: bool) -> None:
    """Raise InputError for a definition whose Python functions are not in `roots`: lm-eval would import a module of that name
    from anywhere, also from the working folder. allow_own: allow functions of the roots that are neither lm-eval's nor ours."""
    for file in set(_named(config, roots)):
        if not (file.is_file() and any(file.resolve().is_relative_to(root) for root in roots)):
            raise InputError(
                f"task {name!r}: its definition refers to {file}, which is not in lm-eval's package", "leave it out"
            )
        if not (allow_own or any(file.resolve().is_relative_to(root) for root in roots[:2])):
            raise InputError(
                f"task {name!r}: its definition runs the Python code in {file}",
                f"if you trust that code, allow it with {ALLOW}; otherwise leave the task out",
            )


def _imports(file: Path) -> set[str]:
    """Packages that a file imports, without the standard library, lm-eval and the modules in the file's own folder."""
    packages = {module.split(".")[0] for module in _imported_modules(file)}
    siblings = {path.stem for path in file.parent.glob("*.py")}
    return {p for p in packages if p not in sys.stdlib_module_names and p not in siblings and p != "lm_eval"}


@lru_cache(maxsize=256)
def _imported_modules(file: Path) -> tuple[str, ...]:
    """Modules imported at module level, without optional ones (inside a `try` whose handlers do not raise)."""
    return tuple(_imported(ast.parse(file.read_text(encoding="utf-8")).body))


def _imported(body: list[ast.stmt]) -> Iterator[str]:
    for statement in body:
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
            yield statement.module
            yield from (f"{statement.module}.{alias.name}" for alias in statement.names)
        elif isinstance(statement, ast.Try) and any(
            isinstance(node, ast.Raise) for handler in statement.handlers for node in ast.walk(handler)
        ):
            yield from _imported(statement.body)


@lru_cache(maxsize=256)
def loaded_metrics(file: Path) -> frozenset[str]:
    """Names of metrics that a file loads with `evaluate.load`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "evaluate"
    }
    return frozenset(
        str(node.args[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "load"
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in names
        and node.args
        and isinstance(node.args[0], ast.Constant)
    )


@lru_cache(maxsize=256)
def _nltk_downloads(file: Path) -> frozenset[str]:
    """Names of NLTK's data that a file downloads with `nltk.download`."""
    return frozenset(
        str(node.args[0].value)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func) == "nltk.download"
        and node.args
        and isinstance(node.args[0], ast.Constant)
    )
