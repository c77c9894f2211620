"""Distillation: the losses, the teacher's stored targets, the loop and its checkpoints."""

from minitron.distill.config import DistillConfig
from minitron.distill.curve import Point, read_curve
from minitron.distill.loop import distill
from minitron.distill.losses import Losses, default_losses
from minitron.distill.losses.logits import linear_kl_div, linear_logit_loss
from minitron.distill.report import StepReport
from minitron.distill.teacher.live import LiveTeacher
from minitron.distill.teacher.stored import StoredTeacher, store_hidden
from minitron.distill.teacher.top_k import TopKTeacher, store_top_k

__all__ = [
    "DistillConfig",
    "LiveTeacher",
    "Losses",
    "Point",
    "StepReport",
    "StoredTeacher",
    "TopKTeacher",
    "default_losses",
    "distill",
    "linear_kl_div",
    "linear_logit_loss",
    "read_curve",
    "store_hidden",
    "store_top_k",
]
