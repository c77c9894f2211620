"""The Minitron method as a library: importance, pruning, distillation and evaluation of transformers models.

Needs torch, transformers, datasets and lm-eval; never Ray or MLflow. Names are loaded on first use, so that importing
the package is cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from minitron.lazy_names import lazy_names

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


__getattr__ = lazy_names(__name__, _PUBLIC)
