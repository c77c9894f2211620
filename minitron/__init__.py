"""The Minitron method as a library: importance, pruning, distillation and evaluation of transformers models.

Needs torch, transformers, datasets and lm-eval; never Ray or MLflow. Names are loaded on first use, so that importing
the package is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from minitron.architecture import Architecture as Architecture
    from minitron.distill.losses.logits import linear_kl_div as linear_kl_div
    from minitron.evaluation import evaluate as evaluate
    from minitron.importance import ImportanceScores as ImportanceScores
    from minitron.importance import estimate_importance as estimate_importance
    from minitron.pruning import prune as prune

_PUBLIC = {
    "Architecture": "minitron.architecture",
    "ImportanceScores": "minitron.importance",
    "estimate_importance": "minitron.importance",
    "prune": "minitron.pruning",
    "linear_kl_div": "minitron.distill.losses.logits",
    "evaluate": "minitron.evaluation",
}

__all__ = [*_PUBLIC, "__version__"]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'minitron' has no attribute {name!r}")
