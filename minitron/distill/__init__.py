"""Distillation: the loss, the teacher's stored targets, the loop and its checkpoints."""

from minitron.distill.loop import DistillConfig, StepReport, distill
from minitron.distill.loss import linear_kl_div
from minitron.distill.teacher import LiveTeacher, StoredTeacher, store_hidden

__all__ = ["DistillConfig", "LiveTeacher", "StepReport", "StoredTeacher", "distill", "linear_kl_div", "store_hidden"]
