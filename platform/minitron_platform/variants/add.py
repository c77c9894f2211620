"""Registers a model that another tool has made from a registered one, with its lineage and figures."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import minitron
from minitron import storage
from minitron.device import DTYPES
from minitron.errors import InputError
from minitron.models import source_architecture
from minitron_platform.console import Console
from minitron_platform.gates.judge import GATES_TAG
from minitron_platform.locations import Locations
from minitron_platform.stages.model_card import description
from minitron_platform.stages.stage_records import path_inside
from minitron_platform.stages.targets import distill_inputs
from minitron_platform.tracking.client import check_model_name, checked_alias, open_registry, version_named, versions_of
from minitron_platform.tracking.lineage import title
from minitron_platform.tracking.registry import figure_tags, register
from minitron_platform.tracking.variant_tags import KIND_TAG, PARENT_TAG, Kind
from minitron_platform.tracking.version_figures import VersionFigures, figures_of
from minitron_platform.tracking.version_weights import CARD, MANIFEST_TAG, PATH_TAG, read_card
from minitron_platform.variants.card import variant_card
from minitron_platform.variants.figures import check_comparable, measured, run_of
from minitron_platform.variants.mlflow_run import model_figures, run_of_variant
from minitron_platform.variants.weights import checkpoint_folder, load_variant, store

# what is true of a variant because it is true of its parent
INHERITED = (
    *("minitron.teacher", "minitron.teacher_sha256", "minitron.teacher_corrected"),
    *("minitron.recipe", "minitron.run", "minitron.data", "minitron.data_sha256", GATES_TAG),
    *("minitron.losses", "minitron.tokens"),
)


@dataclass(frozen=True)
class Added:
    """A registered variant."""

    name: str
    version: str
    parent: str
    """Its title."""
    figures: VersionFigures | None
    source: str
    """Folder of its weights in the storage."""


def add_variant(
    locations: Locations,
    source: str,
    *,
    name: str,
    parent: str,
    kind: Kind,
    alias: str,
    console: Console,
    unmeasured: bool = False,
) -> Added:
    """Copy the checkpoint in the folder `source` to the storage, measure it as its parent was measured, and register it.

    parent: NAME@ALIAS or NAME/VERSION. The same weights are registered once; what was measured is not measured again.
    unmeasured: register it without figures, or with those that it has already. Raises InputError for a checkpoint that cannot
    be read, or not be measured, and for weights that the model `name` has already with another parent.
    """
    check_model_name(name)
    checked_alias(alias)
    folder = checkpoint_folder(source, kind)
    with open_registry(locations.tracking_uri) as client:
        made_from = version_named(client, parent)
        parent_card = read_card(client, made_from, locations.storage)
    architecture, _ = source_architecture(source)
    tags = {
        **{tag: made_from.tags[tag] for tag in INHERITED if tag in made_from.tags},
        KIND_TAG: kind,
        PARENT_TAG: title(made_from),
        "minitron.version": minitron.__version__,
        "minitron.architecture": json.dumps(architecture.to_dict(), sort_keys=True),
        "minitron.parameters": str(architecture.num_parameters),
    }
    figures, quality = None, None
    if unmeasured:
        weights, manifest, known = _stored(locations, folder, name, tags)
        figures = None if known is None else figures_of(known)
    else:
        state = run_of(made_from, locations)
        with console.working(f"measuring {kind} {name}"):
            console.status("loading")
            model, tokenizer = load_variant(source, DTYPES[distill_inputs(state).dtype])
            check_comparable(state, made_from, model, tokenizer)
            weights, manifest, _ = _stored(locations, folder, name, tags)
            figures, quality = measured(state, made_from, model, weights, console)
        tags |= figure_tags(figures)
    card = variant_card(name, kind, made_from, folder, figures, parent_card)
    storage.write_bytes(storage.join(weights, CARD), str(card).encode())
    with open_registry(locations.tracking_uri) as client:
        run_id = run_of_variant(client, made_from, name, kind, manifest)
    shown = None
    if run_id is not None and figures is not None and quality is not None:
        shown = model_figures(run_id, quality, figures, architecture.num_parameters, made_from, kind)
    version = register(
        locations.tracking_uri,
        name=name,
        source=weights,
        run_id=run_id,
        tags=tags | {PATH_TAG: path_inside(locations.storage, weights)},
        description=description(card),
        alias=alias,
        figures=shown,
    )
    return Added(name, version, title(made_from), figures, weights)


def _stored(locations: Locations, folder: Path, name: str, tags: dict[str, str]) -> tuple[str, str, Any | None]:
    """The copy of the weights in the storage, the SHA-256 of its manifest, and the version of the model `name` that has them
    already, if any. Raises InputError if it has them as something else."""
    weights = store(locations, folder, name)
    expected = hashlib.sha256(storage.read_bytes(storage.join(weights, storage.MANIFEST))).hexdigest()
    with open_registry(locations.tracking_uri) as client:
        for version in versions_of(client, name):
            if version.tags.get(MANIFEST_TAG) != expected:
                continue
            differing = [tag for tag in (KIND_TAG, PARENT_TAG) if version.tags.get(tag) != tags[tag]]
            if differing:
                values = ", ".join(f"{tag} {version.tags.get(tag, 'none')!r}" for tag in differing)
                raise InputError(
                    f"{title(version)} has the same weights, with another origin ({values})",
                    "give its kind and parent, another model name with --as, or delete it with `minitron models delete`",
                )
            return weights, expected, version
    return weights, expected, None
