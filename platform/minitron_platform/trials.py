"""The trials of a search, as the user sees them and as MLflow keeps them."""

from __future__ import annotations

from typing import Any

from rich.markup import escape

from minitron.architecture import Architecture
from minitron_platform.context import Context
from minitron_platform.spool import RunLog
from minitron_search.trial import trial_key, trial_result

CURVES = ("train_loss", "train_kl", "learning_rate", "grad_norm", "tokens_per_second")


def record_trials(context: Context, folder: str, found: list[Architecture]) -> None:
    """Close the record of every trial with its result."""
    for architecture in found:
        log = _open(context, architecture)
        result = trial_result(folder, architecture)
        if result is None:
            log.end("FAILED")
            continue
        shape = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads")
        log.params({name: result["architecture"][name] for name in shape} | {"parameters": result["parameters"]})
        log.metrics(
            {
                "heldout_kl": result["kl"],
                "heldout_loss": result["loss"],
                "top1_agreement": result["top1_agreement"],
                "heldout_kl_undistilled": result["kl_undistilled"],
                "tokens": result["tokens"],
            },
            step=result["config"]["steps"],
        )
        log.end("FINISHED")


def _open(context: Context, architecture: Architecture) -> RunLog:
    log = context.log(f"trial-{trial_key(architecture)}")
    log.start(str(architecture), parent=context.log("search").key, tags={"minitron.kind": "trial"})
    return log


class TrialsView:
    """Turns what trials report into the live line, a line per finished trial, and metrics."""

    def __init__(self, context: Context, folder: str, found: list[Architecture]) -> None:
        self.context, self.console = context, context.console
        self.by_key = {trial_key(a): a for a in found}
        self.active: dict[str, dict[str, Any]] = {}
        self.logs: dict[str, RunLog] = {}
        self.first_kl: dict[str, float] = {}
        self.finished = sum(trial_result(folder, a) is not None for a in found)
        self.console.status(self._status)

    def event(self, key: str, numbers: dict[str, Any]) -> None:
        """A report of one trial: see `minitron_search.trial.run_trial`; or {"failed": reason}."""
        if key not in self.logs:
            self.logs[key] = _open(self.context, self.by_key[key])
        log, name = self.logs[key], str(self.by_key[key])
        if "steps" in numbers:
            self.active[key] = numbers
        if "train_loss" in numbers:
            log.metrics({k: numbers[k] for k in CURVES if k in numbers}, step=int(numbers["step"]))
        elif "failed" in numbers:
            self.active.pop(key, None)
            self.console.say(f"  [yellow]failed[/]  {name}: {escape(str(numbers['failed']))}")
            log.tags({"minitron.failure": numbers["failed"]})
        elif "kl" in numbers and numbers["step"] == 0:
            self.first_kl[key] = numbers["kl"]
        elif "kl" in numbers:
            self.active.pop(key, None)
            self.finished += 1
            before = f"{self.first_kl[key]:.2f} → " if key in self.first_kl else ""
            self.console.say(f"  {self.finished}/{len(self.by_key)}  {name}  held-out KL {before}{numbers['kl']:.3f}")

    def _status(self) -> str:
        shown = [
            f"{self.by_key[key].num_layers}L·{self.by_key[key].hidden_size} {numbers['step']}/{numbers['steps']}"
            + (f" loss {numbers['train_loss']:.2f}" if "train_loss" in numbers else "")
            for key, numbers in list(self.active.items())
        ]
        return f"{self.finished}/{len(self.by_key)} candidates · " + (" · ".join(shown) or "starting workers")
