"""Measures a variant as its parent was measured: on the same held-out rows, with the same teacher and benchmarks."""

from __future__ import annotations

from typing import Any

from torch import nn

from minitron import storage
from minitron.architecture import Architecture
from minitron.data import tokenizer_identity
from minitron.device import device
from minitron.errors import InputError, StorageError
from minitron.models import load_tokenizer, source_architecture
from minitron.names import check_name
from minitron_platform.console import Console
from minitron_platform.gates.documents import documents_path
from minitron_platform.locations import Locations
from minitron_platform.recipes.build import worker_tasks
from minitron_platform.report.finished_run import finished_run
from minitron_platform.stages.evaluate import Evaluation, Quality, measure, measurement_fingerprint, read_quality
from minitron_platform.stages.stage_records import path_inside
from minitron_platform.stages.state import RunState
from minitron_platform.stages.targets import Targets, distill_inputs
from minitron_platform.stages.teacher import Teacher
from minitron_platform.tracking.lineage import title
from minitron_platform.tracking.version_figures import Measured, VersionFigures, figures_of
from minitron_platform.variants.weights import UNMEASURED
from minitron_platform.workers.worker import Worker

NAME = "variant"


def run_of(parent: Any, locations: Locations) -> RunState:
    """The run that made a version, or made what it is a variant of. Raises InputError if the storage does not have it."""
    key = parent.tags.get("minitron.run")
    if key is None:
        raise InputError(f"{title(parent)}: no run is recorded that measured it", UNMEASURED)
    try:
        state = finished_run(locations, check_name(key, title(parent)))
    except (InputError, StorageError) as error:
        remedy = f"name the storage of that run with --storage; or {UNMEASURED}"
        raise InputError(
            f"what {title(parent)} was measured on is not in the storage: {error.problem}", remedy
        ) from error
    figures = figures_of(parent)
    if figures is None or figures.heldout != state.output(Targets).fingerprint:
        raise InputError(
            f"{title(parent)} was measured on other rows, or with another teacher, than its run has now",
            f"run the recipe again and give the version that it registers as --parent; or {UNMEASURED}",
        )
    return state


def check_comparable(state: RunState, parent: Any, model: nn.Module, tokenizer: Any) -> None:
    """Raise InputError for a variant with another tokenizer or vocabulary than the teacher, with which it has no KL."""
    teacher = storage.fetch(state.output(Teacher).folder, weights=False)
    if tokenizer_identity(tokenizer) != tokenizer_identity(load_tokenizer(teacher)):
        raise InputError(
            f"its tokenizer turns text into other tokens than that of {title(parent)}: loss and KL cannot be compared",
            f"keep the tokenizer (a chat template may differ); or {UNMEASURED}",
        )
    own, expected = Architecture.from_config(model.config).vocab_size, source_architecture(str(teacher))[0].vocab_size
    if own != expected:
        raise InputError(
            f"its vocabulary has {own:,} tokens, that of the teacher of {title(parent)} {expected:,}: loss and KL cannot be "
            "compared",
            f"undo what added or removed rows of the embeddings (resize_token_embeddings({expected})); or {UNMEASURED}",
        )


def measured(
    state: RunState, parent: Any, model: nn.Module, weights: str, console: Console
) -> tuple[VersionFigures, Quality]:
    """The figures of a loaded variant, whose checkpoint is the folder `weights` in the storage. What is stored of them is not
    measured again."""
    path = storage.join(weights.rsplit("/", 1)[0], f"quality-{measurement_fingerprint(state)}.json")
    task = Evaluation(
        inputs=distill_inputs(state),
        tokenizer=state.output(Teacher).folder,
        models={NAME: weights},
        stored={NAME: path},
        speeds=None,
        tasks=worker_tasks(state.recipe.evaluate),
        batch_rows=state.recipe.evaluate.batch_rows,
        add_bos=state.recipe.data.bos,
        answers=state.locations.answers,
        prompts=(),
        completed={},
    )
    worker = Worker(rank=0, count=1, progress=console, send=lambda event: None)
    quality = measure(task, worker, NAME, model.to(device()).eval(), read_quality(path))
    theirs = figures_of(parent)
    assert theirs is not None
    mine = Measured(
        loss=quality.loss,
        kl=quality.kl,
        tasks=quality.tasks,
        failures=quality.failures,
        documents=path_inside(state.locations.storage, documents_path(path)),
    )
    return VersionFigures(heldout=theirs.heldout, student=mine, teacher=theirs.teacher, parent=theirs.student), quality
