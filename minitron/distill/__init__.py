"""Distillation: the losses, the teacher's stored targets, the loop and its checkpoints.

Names are loaded on first use, so that settings can be read without the loop, which imports torch's sharding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from minitron.lazy_names import lazy_names

if TYPE_CHECKING:
    from minitron.distill.config import DistillConfig as DistillConfig
    from minitron.distill.curve import Point as Point
    from minitron.distill.curve import read_curve as read_curve
    from minitron.distill.loop import distill as distill
    from minitron.distill.losses import Losses as Losses
    from minitron.distill.losses import default_losses as default_losses
    from minitron.distill.losses.logits import linear_kl_div as linear_kl_div
    from minitron.distill.losses.logits import linear_logit_loss as linear_logit_loss
    from minitron.distill.report import StepReport as StepReport
    from minitron.distill.teacher.live import LiveTeacher as LiveTeacher
    from minitron.distill.teacher.stored import StoredTeacher as StoredTeacher
    from minitron.distill.teacher.stored import store_hidden as store_hidden
    from minitron.distill.teacher.top_k import TopKTeacher as TopKTeacher
    from minitron.distill.teacher.top_k import store_top_k as store_top_k

_PUBLIC = {
    "DistillConfig": ".config",
    "LiveTeacher": ".teacher.live",
    "Losses": ".losses",
    "Point": ".curve",
    "StepReport": ".report",
    "StoredTeacher": ".teacher.stored",
    "TopKTeacher": ".teacher.top_k",
    "default_losses": ".losses",
    "distill": ".loop",
    "linear_kl_div": ".losses.logits",
    "linear_logit_loss": ".losses.logits",
    "read_curve": ".curve",
    "store_hidden": ".teacher.stored",
    "store_top_k": ".teacher.top_k",
}

__all__ = list(_PUBLIC)


def __dir__() -> list[str]:
    return __all__


__getattr__ = lazy_names(__name__, _PUBLIC)
