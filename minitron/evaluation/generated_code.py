"""Benchmarks that execute or evaluate what a model has written: which they are, and their scoring in a sandbox.

Such a definition of lm-eval runs its model's programs itself, with a metric whose code it downloads (`code_eval`), with `exec`
or `eval`, or it gives answers to a parser of formulas. All its scoring functions are called in a `Sandbox`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from minitron.errors import InputError, MinitronError
from minitron.evaluation.requirements import ALLOW, check_metric_file, loaded_metrics, modules, named_function
from minitron.evaluation.sandbox import Limits, Sandbox, StoppedError
from minitron.evaluation.sandbox_worker import TIME_OF_DAY, program_key
from minitron.evaluation.scores import Evaluated, Sample
from minitron.replaced import replaced

CODE_METRIC = "code_eval"
_PARSERS = {"sympy", "math_verify", "latex2sympy2", "latex2sympy2_extended"}
# Longest grading of one document, besides its programs; lm-eval's graders stop sooner by themselves.
GRADER_SECONDS = 60.0
# What is graded instead of an answer whose grading failed: a program that fails, and a text without an answer.
NO_PROGRAM = "raise SystemExit('stopped')"
NO_ANSWER = ""


def runs_generated_code(config: dict[str, Any], roots: Sequence[Path]) -> bool:
    """Whether a task executes or evaluates what the model generates, according to its definition or its Python files."""
    return bool(config.get("unsafe_code")) or any(_runs_code(file) for file in modules(config, roots))


def hub_metrics(config: dict[str, Any], roots: Sequence[Path]) -> list[str]:
    """The metrics of the package `evaluate` that a task loads: Python code from the hub. `code_eval` is not among them."""
    listed = {str(each["metric"]) for each in config.get("metric_list") or () if each.get("hf_evaluate")}
    return sorted(listed.union(*(loaded_metrics(file) for file in modules(config, roots))) - {CODE_METRIC})


def may_load_metrics(config: dict[str, Any], roots: Sequence[Path]) -> bool:
    """Whether a task may ask the package `evaluate` for a metric: by a name that lm-eval does not know, or in its own code. The
    package takes seconds to import."""
    import lm_eval.api.metrics  # registers lm-eval's own  # noqa: F401
    from lm_eval.api.registry import METRIC_REGISTRY

    listed = config.get("metric_list") or ()
    known = all(not each.get("hf_evaluate") and str(each.get("metric")) in METRIC_REGISTRY for each in listed)
    return not known or "class" in config or any(_imports_evaluate(file) for file in modules(config, roots))


def sandboxed(
    task: str, config: dict[str, Any], named: dict[str, Any], roots: Sequence[Path]
) -> tuple[dict[str, Any], Sandbox]:
    """The definition `config` with its scoring functions called in a sandbox, and the sandbox.

    named: the same definition with names of functions instead of the functions. roots: folders with its Python files. Raises
    InputError without a sandbox.
    """
    if "class" in config:
        raise InputError(
            f"task {task!r}: it scores with a class of its own, which cannot run in the sandbox", "leave it out"
        )
    sandbox = Sandbox(Limits(), roots)
    sandbox.start()
    changed = dict(config)
    if "process_results" in named:
        grade = _Scoring(task, sandbox, *named_function(named["process_results"], roots))

        def process_results(document: dict[str, Any], results: list[Any]) -> Any:
            return grade(Arguments((document, results)), Arguments((document, [NO_ANSWER for _ in results])))

        changed["process_results"] = process_results
    changed["metric_list"] = [
        {**entry, "metric": _metric(task, sandbox, by_name["metric"], roots)} if callable(entry["metric"]) else entry
        for entry, by_name in zip(config.get("metric_list") or (), named.get("metric_list") or (), strict=True)
    ]
    return changed, sandbox


def with_problems(result: Evaluated, sandbox: Sandbox) -> Evaluated:
    """The result of a task that was scored in `sandbox`, whose samples say what went wrong in their programs."""

    def named(sample: Sample) -> Sample:
        program = sample.answer if sample.extracted is None else sample.extracted
        return replace(sample, problem=sandbox.problems.get(program_key(program, sample.target)))

    return replace(result, samples=tuple(map(named, result.samples)))


def _metric(task: str, sandbox: Sandbox, name: str, roots: Sequence[Path]) -> Callable[..., Any]:
    """A metric of a task that is computed in the sandbox. It has the name of the function that computes it."""
    file, function = named_function(name, roots)
    score = _Scoring(task, sandbox, file, function)

    def metric(*, references: list[Any], predictions: list[Any], **settings: Any) -> Any:
        given = {"references": references, "predictions": predictions, **settings}
        none = [[NO_PROGRAM for _ in each] if isinstance(each, list) else NO_PROGRAM for each in predictions]
        return score(Arguments((), given), Arguments((), {**given, "predictions": none}))

    metric.__name__ = function
    return metric


@dataclass(frozen=True)
class Arguments:
    """Arguments of a call."""

    positional: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)

    @property
    def num_answers(self) -> int:
        """Number of texts of the model among them: the results of a document, or a metric's predictions."""
        answers = self.keywords.get("predictions", self.positional[-1] if self.positional else [])
        return sum(len(each) if isinstance(each, list | tuple) else 1 for each in answers)


@dataclass(frozen=True)
class _Scoring:
    """A scoring function of a task, which is called in the sandbox."""

    task: str
    sandbox: Sandbox
    file: Path
    function: str

    def __call__(self, given: Arguments, without_answer: Arguments) -> Any:
        """The result for `given`; that for `without_answer` if the answer made the function fail, or was stopped."""
        try:
            return self._call(given)
        except StoppedError:
            try:
                return self._call(without_answer)
            except StoppedError as error:
                raise MinitronError(f"task {self.task!r}: its scoring fails in the sandbox: {error.problem}") from error

    def _call(self, arguments: Arguments) -> Any:
        seconds = GRADER_SECONDS + arguments.num_answers * self.sandbox.limits.seconds * TIME_OF_DAY
        return self.sandbox.call(self.file, self.function, *arguments.positional, seconds=seconds, **arguments.keywords)


@contextmanager
def guarded_metrics(task: str, *, allowed: bool) -> Iterator[None]:
    """Inside the context `evaluate.load`, to which lm-eval also gives names of metrics that it does not know, runs no file of
    the working folder, and nothing at all for `code_eval`, which definitions of lm-eval load and try when they are imported.

    allowed: whether it runs other code. Without, InputError is raised at the end, because lm-eval catches all errors.
    """
    import evaluate

    load = evaluate.load
    refused: list[str] = []

    def guarded(path: str, *arguments: Any, **keywords: Any) -> Any:
        if path == CODE_METRIC:
            return SimpleNamespace(compute=_never)
        if not allowed:
            refused.append(str(path))
            raise InputError(f"the metric {path!r} is Python code", "leave it out")
        check_metric_file(path)
        return load(path, *arguments, **keywords)

    try:
        with replaced(evaluate, load=guarded):
            yield
    finally:
        if refused:
            raise InputError(
                f"task {task!r}: lm-eval has no metric {refused[0]!r}, and would run Python code of that name",
                f"correct the name; if you trust that code, allow it with {ALLOW}",
            )


def _never(**_: Any) -> tuple[dict[str, float], dict[str, Any]]:
    """code_eval's result for programs that were not run."""
    return {"pass@1": 0.0}, {}


@lru_cache(maxsize=256)
def _imports_evaluate(file: Path) -> bool:
    """Whether a file imports the package `evaluate` anywhere, or by a name that is computed."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        if isinstance(node, ast.Name | ast.Attribute):
            names = [node.id if isinstance(node, ast.Name) else node.attr]
        if any(name.split(".")[0] in ("evaluate", "importlib", "import_module", "__import__") for name in names):
            return True
    return False


@lru_cache(maxsize=256)
def _runs_code(file: Path) -> bool:
    """Whether a file loads code_eval, calls `eval` or `exec`, or imports a parser of formulas."""
    if CODE_METRIC in loaded_metrics(file):
        return True
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
            return True
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] in _PARSERS for alias in node.names):
            return True
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in _PARSERS:
            return True
    return False
