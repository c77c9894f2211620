"""The model card of a variant."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import minitron
from minitron.evaluation.metrics import KL, LOSS, error_note
from minitron.evaluation.scores import score_row
from minitron.text import markdown
from minitron_platform.gates.card import licence_of
from minitron_platform.stages.model_card import loading_lines
from minitron_platform.tracking.lineage import title
from minitron_platform.tracking.variant_tags import Kind
from minitron_platform.tracking.version_figures import VersionFigures
from minitron_platform.tracking.version_weights import CARD

if TYPE_CHECKING:
    from huggingface_hub import ModelCard


def variant_card(
    name: str, kind: Kind, parent: Any, folder: Path, figures: VersionFigures | None, parent_card: str | None
) -> ModelCard:
    """The card of a variant in `folder`, with what a card that is there says about how it was made.

    parent_card: text of the parent's card; the licence is taken from it unless the folder's card names one.
    """
    from huggingface_hub import ModelCard, ModelCardData

    own = folder / CARD
    text = own.read_text(encoding="utf-8", errors="replace") if own.is_file() else ""
    header = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=licence_of(text) or (licence_of(parent_card) if parent_card else None),
        base_model=None,
        tags=["minitron", kind],
    )
    body = "\n".join(_lines(name, kind, parent, figures, _without_header(text)))
    return ModelCard(f"---\n{header.to_yaml()}\n---\n\n{body}\n")


def _lines(name: str, kind: Kind, parent: Any, figures: VersionFigures | None, own: str) -> Iterator[str]:
    yield f"# {markdown(name)}"
    yield ""
    yield f"{markdown(title(parent))}, {kind} with another tool; registered by Minitron {minitron.__version__}."
    yield ""
    yield "## Results"
    yield ""
    yield from ["Not measured."] if figures is None else _results(figures)
    yield ""
    yield "## Intended use"
    yield ""
    yield (
        "For what its parent is intended for, after an evaluation on the task at hand: the results above are all that was "
        "measured."
    )
    yield ""
    yield "## Licence"
    yield ""
    yield "The licence of the base model that its parent was made from applies to this model too."
    yield ""
    yield from loading_lines()
    if own:
        yield ""
        yield "## What its folder said"
        yield ""
        yield own


def _results(figures: VersionFigures) -> Iterator[str]:
    columns = {"this model": figures.student, "parent": figures.parent, "teacher": figures.teacher}
    known = {heading: each for heading, each in columns.items() if each is not None}
    yield f"| | {' | '.join(known)} |"
    yield f"|---|{'---:|' * len(known)}"
    for metric, field in ((LOSS, "loss"), (KL, "kl")):
        values = [getattr(each, field) for each in known.values()]
        yield f"| {metric.title} | {' | '.join('' if value is None else metric.text(value) for value in values)} |"
    for task in figures.student.tasks:
        row, cells = score_row(task, [each.tasks.get(task) for each in known.values()])
        yield f"| {markdown(row)} | {' | '.join(cells)} |"
    if note := error_note(score.stderr for each in known.values() for score in each.tasks.values()):
        yield ""
        yield f"{note}."


def _without_header(text: str) -> str:
    """The text of a card below its metadata."""
    return text[3:].partition("\n---")[2].strip() if text.startswith("---") else text.strip()
