"""Gate: the folder has a model card, and the card a licence."""

from __future__ import annotations

import yaml

from minitron_platform.gates.gate import Status, Subject, Verdict
from minitron_platform.tracking.version_weights import CARD


def card(subject: Subject) -> list[Verdict]:
    """Without `register.gates.card` a missing card or licence is only mentioned: versions of earlier releases have none."""
    file = subject.folder / CARD
    lacking: Status = "failed" if subject.settings.card else "unknown"
    if not file.is_file():
        return [Verdict("model card", lacking, f"no {CARD}", "there")]
    licence = licence_of(file.read_text(encoding="utf-8", errors="replace"))
    status: Status = "passed" if licence else lacking
    return [
        Verdict("model card", "passed", CARD, "there"),
        Verdict("licence", status, licence or "the card names none", "named in the card"),
    ]


def licence_of(text: str) -> str | None:
    """The licence in the metadata at the top of a card, as the hub reads it; None if it names none."""
    if not text.startswith("---"):
        return None
    try:
        metadata = yaml.safe_load(text[3:].split("\n---", 1)[0])
    except yaml.YAMLError:
        return None
    licence = metadata.get("license") if isinstance(metadata, dict) else None
    return str(licence) if licence else None
