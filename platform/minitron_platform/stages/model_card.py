"""The model card of a student: README.md of its checkpoint in the format of the Hugging Face hub, and the description of its
version in the registry."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import minitron
from minitron.evaluation.metrics import KL, SPEED, error_note
from minitron.evaluation.scores import score_row
from minitron.text import markdown
from minitron_platform.recipes.build import text_sources
from minitron_platform.recipes.schema import Recipe
from minitron_platform.stages.correct import Correct
from minitron_platform.stages.data import Data
from minitron_platform.stages.distill import Distill
from minitron_platform.stages.evaluate import HELDOUT, MODELS, Evaluate, Figures
from minitron_platform.stages.state import RunState
from minitron_platform.stages.teacher import Teacher
from minitron_platform.tracking.version_weights import CARD

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

DESCRIPTION_LENGTH = 5000  # MLflow's limit on some databases, in characters


def model_card(state: RunState) -> ModelCard:
    """The card of the current model of the family, whose evaluation is finished."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    distilled = state.output(Evaluate).table["distilled"]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=task,
            dataset_split=score.split,
            metric_type=score.metric,
            metric_name=score.sentence,
            metric_value=score.value,
        )
        for task, score in distilled.tasks.items()
    ]
    teacher = state.recipe.teacher.model
    header = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=base_licence(state.recipe),
        base_model=teacher if _is_hub_name(teacher) else None,
        tags=["minitron", "pruned", "distilled"],
        model_name=state.member.model if results else None,
        eval_results=results or None,
    )
    return ModelCard(f"---\n{header.to_yaml()}\n---\n\n{_body(state)}")


def description(card: ModelCard) -> str:
    """The card without its header, as MLflow shows it and takes it."""
    text: str = card.text.strip()
    return text if len(text) <= DESCRIPTION_LENGTH else f"{text[: DESCRIPTION_LENGTH - 20]}\n\n(cut off)"


def base_licence(recipe: Recipe) -> str | None:
    """The licence that the base model's own card states, from its folder or the hub's local cache; None if there is none."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    teacher = recipe.teacher.model
    path: object = Path(teacher).expanduser() / CARD
    if _is_hub_name(teacher):
        path = try_to_load_from_cache(teacher, CARD, revision=recipe.teacher.revision)
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return None
    try:
        licence = ModelCard.load(path).data.license
    except (ValueError, OSError):  # a card without a valid header
        return None
    return licence if isinstance(licence, str) else None


def _is_hub_name(model: str) -> bool:
    return (
        model.count("/") == 1
        and ":" not in model
        and not model.startswith((".", "/", "~"))
        and not Path(model).exists()
    )


def _body(state: RunState) -> str:
    return "\n".join(_lines(state)) + "\n"


def _lines(state: RunState) -> Iterator[str]:
    member = state.member
    distilled = state.output(Distill)
    table = state.output(Evaluate).table
    previous = state.recipe.origin(member)
    teacher = state.recipe.teacher.model
    data = state.output(Data)
    correct = state.output(Correct)
    sources = ", ".join(source.label for source in text_sources(state.recipe.data).values())
    licence = base_licence(state.recipe)
    less = 1 - distilled.parameters / state.output(Teacher).parameters
    yield f"# {markdown(member.model)}"
    yield ""
    yield (
        f"A language model of {distilled.parameters:,} parameters, {less:.0%} fewer than {markdown(teacher)}, which it was "
        "made from by structured pruning and knowledge distillation (arXiv 2407.14679, 2408.11796) with Minitron."
    )
    yield ""
    yield "## How it was made"
    yield ""
    yield f"- pruned from {markdown(previous.model) if previous else markdown(teacher)} to {distilled.architecture}"
    yield f"- teacher: {markdown(teacher)}, {correct.summary if correct.corrected else 'not corrected'}"
    yield f"- distilled on {distilled.tokens:,} tokens of {markdown(sources)} (training rows {data.train})"
    if state.recipe.data.bos is not None:
        yield (
            "- text begins with the BOS token (data.add_bos: true), which its tokenizer adds"
            if state.recipe.data.bos
            else "- text begins without a BOS token (data.add_bos: false), and its tokenizer adds none"
        )
    yield f"- losses: {distilled.losses_chosen}"
    yield f"- Minitron {minitron.__version__}, recipe {markdown(state.recipe.name)}, run {markdown(state.run_key)}"
    yield ""
    yield "## Results"
    yield ""
    yield from _results(table)
    yield ""
    note = error_note(score.stderr for figures in table.values() for score in figures.tasks.values())
    heldout = f"Loss and KL in {KL.unit} on {table['distilled'].heldout_tokens:,} held-out tokens"
    yield f"{'; '.join([heldout, *([note] if note else [])])}."
    yield ""
    yield "## Intended use"
    yield ""
    yield (
        "For what its base model is intended for, where less memory or time matters, after an evaluation on the task at hand: "
        "pruning loses abilities unevenly, and the results above are all that was measured. It has the base model's biases."
    )
    yield ""
    yield "## Licence"
    yield ""
    stated = (
        f"The base model's card states {markdown(licence)}." if licence else "The base model's card was not at hand."
    )
    yield f"{stated} The licence of the base model, {markdown(teacher)}, applies to this model too."
    yield ""
    yield from loading_lines()


def loading_lines() -> Iterator[str]:
    """The section of a card that says how to load the model."""
    yield "## How to load it"
    yield ""
    yield "```python"
    yield "from transformers import AutoModelForCausalLM, AutoTokenizer"
    yield ""
    yield 'folder = "."  # where this file is'
    yield 'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")'
    yield "tokenizer = AutoTokenizer.from_pretrained(folder)"
    yield "```"


def _results(table: dict[str, Figures]) -> Iterator[str]:
    """The table of results in Markdown: a column for each of MODELS."""
    yield "| | teacher | pruned only | distilled |"
    yield "|---|---:|---:|---:|"
    rows = [("parameters", [f"{table[name].parameters:,}" for name in MODELS])]
    for field, metric in HELDOUT.items():
        rows.append((metric.title, [metric.text(getattr(table[name], field)) for name in MODELS]))
    for task in table["distilled"].tasks:
        title, shown = score_row(task, [table[name].tasks.get(task) for name in MODELS], "failed")
        rows.append((markdown(title), shown))
    speeds = [table[name].tokens_per_second for name in MODELS]
    if any(speed is not None for speed in speeds):
        rows.append((SPEED.unit, ["" if speed is None else SPEED.text(speed) for speed in speeds]))
    for title, cells in rows:
        yield f"| {title} | {' | '.join(cells)} |"
