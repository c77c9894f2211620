"""Choice of the losses that a distillation minimises (arXiv 2407.14679 section 2.4)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from minitron.architecture import Architecture
from minitron.arguments import check_fields, check_type
from minitron.distill.losses.divergences import DIVERGENCES
from minitron.errors import InputError

HIDDEN_LOSSES = ("cosine", "mse")
_LAYER = r"(\d+|last(?:-\d+)?)"
_MAP = re.compile(f"{_LAYER}:{_LAYER}")


@dataclass(frozen=True)
class Losses:
    """The objective L = L_logits + cross_entropy · L_CLM + alpha · L_is, a mean over tokens.

    L_is is the sum of the intermediate losses `hidden`, `embedding`, `attention` and `mlp_input`. They compare pairs of layers
    "teacher:student"; each side is a layer number from 0, or counted from the end: "29:13", "last-2:last-2". Raises InputError
    for invalid values, and for combinations that are not an objective.
    """

    logits: str = "forward_kl"
    """L_logits, the divergence of the next-token distributions: "forward_kl", "reverse_kl", "jensen_shannon", "mse" or
    "cosine"; "none" for an objective without it."""
    temperature: float = 1.0
    """Divides both models' logits. L_logits is multiplied by its square, so that the gradient keeps its scale."""
    cross_entropy: float = 0.0
    """Weight of L_CLM, the cross-entropy with the next token of the text."""
    top_k: int = 0
    """Restrict forward KL to the teacher's `top_k` most likely tokens, renormalised; 0 for the whole vocabulary."""
    hidden: tuple[str, ...] = ()
    """Pairs of layers whose outputs are compared, after the norm that follows them."""
    hidden_loss: str = "cosine"
    """The loss between hidden states, embeddings and MLP inputs: "cosine" (1 - cos) or "mse"."""
    embedding: bool = False
    """Whether the token embeddings are compared."""
    attention: tuple[str, ...] = ()
    """Pairs of layers whose query, key and value relations are compared (MiniLMv2, arXiv 2012.15828)."""
    mlp_input: tuple[str, ...] = ()
    """Pairs of layers whose MLP inputs are compared."""
    alpha: float | None = None
    """Weight of L_is; None for L_logits / L_is of each row, recomputed at every step."""

    def __post_init__(self) -> None:
        check_fields(self)
        for key in ("temperature", "cross_entropy", "alpha"):
            value = getattr(self, key)
            if value is not None:
                object.__setattr__(self, key, float(value))  # of an int, tensors and kernels would make integers
        _one_of("logits", self.logits, (*DIVERGENCES, "none"))
        _one_of("hidden_loss", self.hidden_loss, HIDDEN_LOSSES)
        if not self.temperature > 0:
            raise InputError(f"temperature: {self.temperature}", "give a number above 0")
        for key in ("cross_entropy", "top_k", "alpha"):
            value = getattr(self, key)
            if value is not None and not value >= 0:
                raise InputError(f"{key}: {value}", "give 0 or more")
        if self.top_k and self.logits != "forward_kl":
            raise InputError(
                f"top_k: {self.top_k} with logits: {self.logits}", "use logits: forward_kl, or leave top_k out"
            )
        if self.logits == "none" and not self.cross_entropy:
            raise InputError("logits: none without a cross_entropy", "give cross_entropy a weight, for example 1.0")
        if self.logits == "none" and self.alpha is None and self.needs_live_teacher:
            raise InputError("alpha: none, which is L_logits / L_is, with logits: none", "give alpha a number")
        for key in ("hidden", "attention", "mlp_input"):
            object.__setattr__(self, key, tuple(getattr(self, key)))  # lists, as JSON gives them
            for text in getattr(self, key):
                if not _MAP.fullmatch(text):
                    raise InputError(
                        f"{key}: {text!r} is not a map of layers", "write teacher:student, as in last-2:last-2 or 29:13"
                    )

    @property
    def needs_teacher(self) -> bool:
        """Whether any loss compares with a teacher."""
        return self.logits != "none" or self.needs_live_teacher

    @property
    def needs_live_teacher(self) -> bool:
        """Whether the losses need more of the teacher than its final hidden states."""
        return bool(self.hidden or self.embedding or self.attention or self.mlp_input)


def _one_of(key: str, value: str, names: tuple[str, ...]) -> None:
    if value not in names:
        raise InputError(f"{key}: {value!r}", f"use one of {', '.join(names)}")


def mapped_layers(text: str, teacher_layers: int, student_layers: int) -> tuple[int, int]:
    """(teacher layer, student layer), counted from 0, of a pair "teacher:student". Raises InputError if a model has fewer
    layers."""
    match = _MAP.fullmatch(text)
    assert match is not None, text
    numbers = []
    for side, name, count in (("teacher", match[1], teacher_layers), ("student", match[2], student_layers)):
        number = int(name) if name.isdigit() else count - 1 - int(name.removeprefix("last").removeprefix("-") or 0)
        if not 0 <= number < count:
            raise InputError(
                f"layer map {text!r}: the {side} has no layer {name}", f"its {count} layers are 0 to {count - 1}"
            )
        numbers.append(number)
    return numbers[0], numbers[1]


def default_losses(student: Architecture, teacher: Architecture) -> tuple[Losses, str]:
    """The losses that suit the number of removed layers, and the reason as a sentence (arXiv 2407.14679, best practices 6 and
    7)."""
    check_type("student", student, Architecture)
    check_type("teacher", teacher, Architecture)
    removed = teacher.num_layers - student.num_layers
    reason = f"{removed} of {teacher.num_layers} layers are removed"
    if 3 * removed > teacher.num_layers:
        layer = f"last-{min(2, student.num_layers - 1)}"
        losses = Losses(hidden=(f"{layer}:{layer}",), embedding=True)
        return losses, f"logits, hidden states and embeddings: {reason}, more than a third"
    return Losses(), f"logits alone: {reason}, no more than a third"
