"""The figures of a registered version, which its registration writes as the tag `minitron.figures`, and the gates read."""

from __future__ import annotations

import logging
import math
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from minitron.arguments import short_repr
from minitron.evaluation.scores import Score

log = logging.getLogger(__name__)

FIGURES_TAG = "minitron.figures"
# JSON has no NaN; as null it would not be read as a number again, and all other figures would be lost with it
KEEPS_NAN = ConfigDict(frozen=True, ser_json_inf_nan="strings")


class Measured(BaseModel):
    """Measurements of one model."""

    model_config = KEEPS_NAN

    loss: float
    """Held-out, nats per token."""
    kl: float | None = None
    """To the teacher, nats per token."""
    tasks: dict[str, Score] = {}
    failures: dict[str, str] = {}
    """Reasons of benchmarks that failed."""
    tokens_per_second: float | None = None
    documents: str | None = None
    """File of the results of every row and document, relative to the storage."""


class VersionFigures(BaseModel):
    """What is known of a version, and of the models that it is compared with."""

    model_config = KEEPS_NAN

    heldout: str | None = None
    """Identity of the teacher and of the held-out rows: loss and KL of two versions with the same can be compared."""
    student: Measured
    teacher: Measured | None = None
    pruned: Measured | None = None
    """Figures of the student before its distillation; None in versions of earlier releases."""
    parent: Measured | None = None
    """Figures of the model that an aligned or quantised variant was made from."""


def figures_of(version: Any) -> VersionFigures | None:
    """The recorded figures; of a version that was registered before there was the tag, its loss and KL. None if there are
    none, or with a warning if somebody has written other ones."""
    text = version.tags.get(FIGURES_TAG)
    if text is not None:
        try:
            return VersionFigures.model_validate_json(text)
        except ValidationError:
            log.warning("%s version %s: the tag %s has no figures", version.name, version.version, FIGURES_TAG)
    loss, kl = (number_in(version, f"minitron.heldout_{name}") for name in ("loss", "kl"))
    return None if loss is None else VersionFigures(student=Measured(loss=loss, kl=kl))


def number_in(version: Any, tag: str) -> float | None:
    """The number in a version's tag; None, with a warning, for one that somebody else has written."""
    text = version.tags.get(tag)
    try:
        number = None if text is None else float(text)
    except ValueError:
        number = math.nan
    if number is not None and not math.isfinite(number):
        log.warning(
            "%s version %s: the tag %s is not a number: %s", version.name, version.version, tag, short_repr(text)
        )
        return None
    return number
