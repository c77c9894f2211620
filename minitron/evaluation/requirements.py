"""What a benchmark needs besides a model, looked for before any work: packages, metrics, documents, room for an answer.

A stock definition names Python files of lm-eval's; they are read here and never run. Nothing is downloaded.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minitron.errors import InputError

HUB_SECONDS = 5.0  # that the hub may take to say whether a data set is there
ANSWER_TOKENS = 256  # lm-eval's default for a definition that does not say
_INSTALLED_AS = {"sklearn": "scikit-learn", "PIL": "pillow", "bs4": "beautifulsoup4", "yaml": "pyyaml"}


def runs_generated_code(config: dict[str, Any], root: Path) -> bool:
    """Whether a definition executes what a model writes: it says so, or its metric does."""
    return bool(config.get("unsafe_code")) or any("code_eval" in _metrics(file) for file in _modules(config, root))


def check_packages(name: str, config: dict[str, Any], root: Path) -> None:
    """Raise InputError for packages that the definition's Python files import and that are not installed."""
    wanted = {package for file in _modules(config, root) for package in _imports(file)}
    missing = sorted(package for package in wanted if find_spec(package) is None)
    if missing:
        raise InputError(
            f"task {name!r}: lm-eval's definition needs {', '.join(missing)}, not installed here",
            f"pip install {' '.join(_INSTALLED_AS.get(package, package) for package in missing)}",
        )


def check_metrics(name: str, config: dict[str, Any], root: Path) -> None:
    """Raise InputError for metrics of the package `evaluate`, whose code comes from the hub, that are not on this machine."""
    listed = {str(each["metric"]) for each in config.get("metric_list") or () if each.get("hf_evaluate")}
    for metric in sorted(listed.union(*(_metrics(file) for file in _modules(config, root)))):
        if Path(metric).exists():  # evaluate.load runs it in place of the hub's
            raise InputError(
                f"task {name!r}: {metric!r} in the working folder would be run as the metric of that name",
                "work in another folder, or rename it",
            )
        if not (_hub_home() / "modules/evaluate_modules/metrics" / f"evaluate-metric--{metric}").exists():
            _ask_hub(f"evaluate-metric/{metric}", "space", f"task {name!r}: the metric {metric!r}")


def check_documents(name: str, config: dict[str, Any]) -> None:
    """Raise InputError for a hub data set that is neither in the cache nor to be had."""
    path = str(config.get("dataset_path") or "")
    if "/" not in path or config.get("custom_dataset") or (config.get("dataset_kwargs") or {}).get("data_files"):
        return  # made by lm-eval's own code
    cached = os.environ.get("HF_DATASETS_CACHE") or _hub_home() / "datasets"
    hub = os.environ.get("HF_HUB_CACHE") or _hub_home() / "hub"
    if (Path(cached) / path.replace("/", "___")).is_dir() or (
        Path(hub) / f"datasets--{path.replace('/', '--')}"
    ).is_dir():
        return
    _ask_hub(path, "dataset", f"task {name!r}: its documents, the hub's {path},")


def check_room(name: str, config: dict[str, Any], longest: int | None) -> None:
    """Raise InputError where an answer takes all `longest` tokens of the model, which leaves no room for a question."""
    if config.get("output_type") != "generate_until" or longest is None:
        return
    settings = config.get("generation_kwargs") or {}
    keys = ("max_gen_toks", "max_new_tokens", "max_tokens")
    tokens = next((settings[key] for key in keys if settings.get(key)), ANSWER_TOKENS)
    if int(tokens) >= longest:
        raise InputError(
            f"task {name!r}: its answers may have {tokens} tokens, and the model takes {longest} with the question",
            "use a model with a longer context, or another task",
        )


@lru_cache(maxsize=256)
def _hub_problem(repository: str, kind: str) -> str:
    """Why the hub does not give something; empty where it does."""
    if any(
        os.environ.get(f"HF_{part}_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE") for part in ("HUB", "DATASETS")
    ):
        return "HF_HUB_OFFLINE is set, and they are not in the cache"
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        HfApi().repo_info(repository, repo_type=kind, timeout=HUB_SECONDS)
    except (HTTPError, HFValidationError, OSError) as error:
        return f"the hub says: {(str(error).strip().splitlines() or [type(error).__name__])[0][:200]}"
    return ""


def _ask_hub(repository: str, kind: str, what: str) -> None:
    if problem := _hub_problem(repository, kind):
        raise InputError(
            f"{what} cannot be had ({problem})",
            "run once with a network so that the cache has it, or leave the task out"
            + ("; `data:` names documents on this machine" if kind == "dataset" else ""),
        )


def _hub_home() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HF_HOME") or Path(cache) / "huggingface")


def _modules(config: Any, root: Path) -> set[Path]:
    """The Python files that a definition names, with lm-eval's own that these import."""
    waiting = list(_named(config, root))
    found: set[Path] = set()
    while waiting:
        file = waiting.pop()
        if file not in found and file.is_file():
            found.add(file)
            waiting += [
                root.parent.parent / f"{module.replace('.', '/')}.py"
                for module in _imported_modules(file)
                if module.startswith("lm_eval.tasks.")
            ]
    return found


def _named(config: Any, root: Path) -> Iterator[Path]:
    # as read without functions: FOLDER/module.function, in a list, a table or alone
    if isinstance(config, dict | list):
        for value in config.values() if isinstance(config, dict) else config:
            yield from _named(value, root)
    elif isinstance(config, str) and config.startswith(f"{root}{os.sep}") and "\n" not in config:
        folder, _, function = config.rpartition(os.sep)
        yield Path(folder) / f"{function.rpartition('.')[0].replace('.', '/')}.py"


def _imports(file: Path) -> set[str]:
    """Packages that a file imports, without Python's own, lm-eval's and the files beside it."""
    packages = {module.split(".")[0] for module in _imported_modules(file)}
    beside = {path.stem for path in file.parent.glob("*.py")}
    return {p for p in packages if p not in sys.stdlib_module_names and p not in beside and p != "lm_eval"}


@lru_cache(maxsize=256)
def _imported_modules(file: Path) -> tuple[str, ...]:
    """Modules imported as soon as the file is; not where a failure to is caught and does not matter."""
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
def _metrics(file: Path) -> frozenset[str]:
    """Names that a file gives to `evaluate.load`."""
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
