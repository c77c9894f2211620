"""Asks all gates about a version, and writes down what they said."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from minitron_platform.gates.card import card
from minitron_platform.gates.champion import champion
from minitron_platform.gates.clean_process import load_in_clean_process
from minitron_platform.gates.distillation import distillation
from minitron_platform.gates.gate import Gate, Subject, Verdict
from minitron_platform.gates.latency import latency
from minitron_platform.gates.loads import loads
from minitron_platform.gates.memory import memory
from minitron_platform.gates.parent import parent
from minitron_platform.gates.size import size
from minitron_platform.gates.teacher import teacher
from minitron_platform.recipes.schema import Gates

log = logging.getLogger(__name__)

GATES: tuple[Gate, ...] = (loads, size, memory, latency, card, distillation, teacher, parent, champion)
GATES_TAG = "minitron.gates"  # of a version: the recipe's `register.gates`, JSON
PROMOTED_TAG = "minitron.promoted."  # followed by the alias: who promoted it, when, why and what the gates said, JSON
REPEATS = 5  # timed prompts
LONGEST_RECORD = 20_000  # characters of a tag; MLflow accepts 100,000


def settings_of(version: Any) -> Gates:
    """The gates that a version was registered with; the default ones if its tag has none."""
    text = version.tags.get(GATES_TAG)
    if text is None:
        return Gates()
    try:
        return Gates.model_validate_json(text)
    except ValidationError:
        log.warning("%s version %s: the tag %s has no gates", version.name, version.version, GATES_TAG)
        return Gates()


def judge(version: Any, folder: Path, champion_version: Any | None, storage_root: str | None) -> list[Verdict]:
    """What all gates say of a version. folder: its verified weights. champion_version: that the alias points at, if any."""
    settings = settings_of(version)
    timed = REPEATS if settings.max_latency_ms is not None else 0
    loaded = load_in_clean_process(folder, prompt_tokens=settings.latency_tokens if timed else 16, repeats=timed)
    subject = Subject(version, folder, settings, loaded, champion_version, storage_root)
    return [verdict for gate in GATES for verdict in gate(subject)]


def record(verdicts: Sequence[Verdict], *, by: str, previous: str | None, reason: str | None) -> str:
    """The value of a version's tag that says who promoted it, when, why and on which figures.

    reason: why it was promoted although gates failed; None if none did.
    """
    values: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "by": by[:200],
        "previous": previous,
        **({} if reason is None else {"forced": True, "reason": reason[:2000]}),
        "gates": [asdict(verdict) for verdict in verdicts],
    }
    while len(text := json.dumps(values, ensure_ascii=False)) > LONGEST_RECORD:
        values["gates"].pop()
    return text
