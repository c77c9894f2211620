"""Checks that a checkpoint's tensors are those of the model in its config, and explains the likely cause if not."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch

from minitron.architecture import Architecture
from minitron.checkpoints.files import Checkpoint, layout_of, stored_parts
from minitron.checkpoints.headers import Header
from minitron.checkpoints.quantised import FULL
from minitron.errors import InputError
from minitron.families import Parameter

FLOATS = ("F64", "F32", "F16", "BF16")
BASE = "model."  # transformers' base_model_prefix, which it adds or takes away when it loads
# Buffers that older checkpoints store although they follow from the config; transformers ignores them.
HARMLESS = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)|position_ids|masked_bias)$"
)
SCALES = re.compile(r"(scale|scale_inv|zeros|qzeros|qweight|g_idx|weight_packed|absmax|quant_map|SCB|zero_point)$")
MULTIMODAL = re.compile(r"language_model\.|text_model\.|vision|visual|multi_modal|audio")


@dataclass(frozen=True)
class Difference:
    """Differences between a model's parameters and a checkpoint's tensors.

    missing: names of the model's that the checkpoint lacks. unexpected: the reverse. shapes, dtypes: descriptions of tensors
    that are stored with another shape, or are not floating-point.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes or self.dtypes)

    def __str__(self) -> str:
        parts = (
            ("missing", self.missing),
            ("that the model does not have", self.unexpected),
            ("of another shape", self.shapes),
            ("that are not floating-point weights", self.dtypes),
        )
        return "; ".join(f"{len(names):,} {what} ({_first(names)})" for what, names in parts if names)


def _first(names: Collection[str]) -> str:
    shown = sorted(names, key=_natural)[:3]
    return ", ".join(shown) + (", …" if len(names) > len(shown) else "")


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def is_harmless(name: str) -> bool:
    """Whether a tensor that the model does not have can be ignored safely."""
    return bool(HARMLESS.search(name))


def filled(
    headers: Mapping[str, Header], architecture: Architecture, where: str, quantised: Collection[str] = ()
) -> dict[str, Header]:
    """`headers` by the names that the parameters of `architecture` have on disk, as transformers would load them.

    A separate head under a config that ties it is kept in the result: only its weights can tell whether it equals the
    embedding matrix. quantised: names of matrices whose dtype and shape differ from the parameter's (see
    `minitron.checkpoints.quantised`). where: the checkpoint's name in errors. Raises InputError with the likely cause unless
    the checkpoint has every parameter in its shape and nothing else.
    """
    expected = expected_shapes(architecture, headers)
    table = architecture.table
    known = dict(expected)
    if architecture.tied:
        known[table.head] = known[table.embedding]
    contents: dict[str, Header] = {}
    unexpected = []
    for name in sorted(headers, key=lambda name: name not in known):  # exact names take precedence over renamed ones
        loaded = _as_loaded(name, known)
        if loaded in known and loaded not in contents:
            contents[loaded] = headers[name]
        elif not is_harmless(name):
            unexpected.append(name)
    if architecture.tied and table.embedding not in contents and table.head in contents:
        contents[table.embedding] = contents.pop(table.head)
    own = {headers[name].name for name in quantised}
    plain = {name: header for name, header in contents.items() if header.name not in own}
    difference = Difference(
        missing=tuple(name for name in expected if name not in contents),
        unexpected=tuple(unexpected),
        shapes=tuple(
            f"{header.name} is {list(header.shape)}, not {list(known[name])}"
            for name, header in plain.items()
            if header.shape != known[name]
        ),
        dtypes=tuple(f"{header.name} is {header.dtype}" for header in plain.values() if header.dtype not in FLOATS),
    )
    if difference:
        raise refusal(difference, architecture, where, headers)
    return contents


def expected_shapes(architecture: Architecture, names: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's parameters on disk, in the layout of a checkpoint with tensors of these `names`."""
    layout = layout_of(names)

    def stored(parameter: Parameter, prefix: str) -> Iterable[tuple[str, tuple[int, ...]]]:
        shape = [architecture.axis_size(axis) for axis in parameter.axes]
        for name, part in stored_parts(prefix + parameter.name, torch.empty(shape, device="meta"), layout):
            yield name, tuple(part.shape)

    shapes = {name: shape for p in architecture.outer_parameters for name, shape in stored(p, "")}
    for layer in range(architecture.num_layers):
        prefix = f"{architecture.table.layers}.{layer}."
        shapes |= {name: shape for p in architecture.layer_parameters for name, shape in stored(p, prefix)}
    return shapes


def _as_loaded(name: str, known: Collection[str]) -> str:
    """The parameter that transformers loads a stored tensor into, if any."""
    if name in known:
        return name
    stripped = name.removeprefix(BASE)
    return stripped if stripped in known else BASE + name


def refusal(
    difference: Difference, architecture: Architecture, where: str, names: Collection[str] | None = None
) -> InputError:
    """The error for a checkpoint that does not fill its model; `names` are all of its tensors, where they are known."""
    for explain in (_quantised, _adapters, _prefix, _layers, _experts, _head, _biases):
        if explanation := explain(difference, architecture, names or difference.unexpected):
            reason, remedy = explanation
            break
    else:
        reason, remedy = _otherwise(difference)
    return InputError(f"{where}: the tensors are not those of the model in config.json: {difference}. {reason}", remedy)


def check_tied(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Raise InputError for a checkpoint with a head that differs from the embedding although the config ties them."""
    table = architecture.table
    if not architecture.tied or table.head not in checkpoint.headers:
        return
    if not torch.equal(checkpoint.tensor(table.head), checkpoint.tensor(table.embedding)):
        raise untied_head(architecture, str(checkpoint.folder))


def untied_head(architecture: Architecture, where: str) -> InputError:
    """The error for a head that differs from the embedding although the config ties them; transformers would not tie them."""
    table = architecture.table
    return InputError(
        f"{where}: config.json ties {table.head} to {table.embedding}, but the checkpoint has both and they differ",
        "set tie_word_embeddings to false in config.json",
    )


Explanation = tuple[str, str] | None  # likely cause, and remedy
WHOLE = "give the complete checkpoint with the config.json that it was saved with"


def _quantised(difference: Difference, architecture: Architecture, names: Collection[str]) -> Explanation:
    if difference.dtypes or any(SCALES.search(name) for name in difference.unexpected):
        return "The weights are quantised in a way that config.json does not describe", FULL
    return None


def _adapters(difference: Difference, architecture: Architecture, names: Collection[str]) -> Explanation:
    if any(".lora_" in name or ".base_layer." in name for name in difference.unexpected):
        return "They are adapters of another model", "merge them: model.merge_and_unload(), then save_pretrained"
    return None


def _prefix(difference: Difference, architecture: Architecture, names: Collection[str]) -> Explanation:
    embedding = architecture.table.embedding.removeprefix(BASE)
    if architecture.table.embedding not in difference.missing:
        return None
    for name in difference.unexpected:
        if name == embedding or not name.endswith(f".{embedding}"):
            continue
        prefix = name.removesuffix(embedding)
        if MULTIMODAL.search(prefix) or any(MULTIMODAL.match(other) for other in difference.unexpected):
            return (
                f"The text model is inside a larger one: its names begin with {prefix!r}",
                "save its text model as a checkpoint of its own, as docs/adding-a-family.md shows, and give that",
            )
        prefix = prefix.removesuffix(BASE) or prefix
        return (
            f"The names begin with {prefix!r}, as they do when a wrapper around the model was saved",
            f"save the model inside the wrapper with save_pretrained, or remove {prefix!r} from the names",
        )
    return None


def _layers(difference: Difference, architecture: Architecture, names: Collection[str]) -> Explanation:
    numbers = _numbers(
        names, re.compile(rf"(?:^|\.){re.escape(architecture.table.layers.removeprefix(BASE))}\.(\d+)\.")
    )
    expected = architecture.num_layers
    if not numbers or max(numbers) + 1 == expected:
        return None
    return (
        f"They make {max(numbers) + 1} layers, but num_hidden_layers is {expected}",
        WHOLE,
    )


def _experts(difference: Difference, architecture: Architecture, names: Collection[str]) -> Explanation:
    numbers = _numbers(names, re.compile(r"\.experts\.(\d+)\."))
    if not architecture.num_experts or not numbers or max(numbers) + 1 == architecture.num_experts:
        return None
    return (
        f"They make {max(numbers) + 1} experts per layer, but config.json says {architecture.num_experts}",
        WHOLE,
    )


def _numbers(names: Collection[str], pattern: re.Pattern[str]) -> set[int]:
    return {int(match[1]) for name in names if (match := pattern.search(name))}


def _head(difference: Difference, architecture: Architecture, names: Collection[str]) -> Explanation:
    if difference.missing == (architecture.table.head,):
        return (
            "config.json says that the head is a separate matrix",
            "if the model's head is its embedding matrix, set tie_word_embeddings to true in config.json; otherwise give the "
            "complete checkpoint",
        )
    return None


def _biases(difference: Difference, architecture: Architecture, names: Collection[str]) -> Explanation:
    different = (*difference.missing, *difference.unexpected)
    flags = architecture.table.flags
    if flags and different and all(name.endswith(".bias") for name in different):
        return (
            f"{' and '.join(flags)} in config.json control the biases",
            f"correct {' or '.join(flags)} in config.json",
        )
    return None


def _otherwise(difference: Difference) -> tuple[str, str]:
    incomplete = difference.missing and not difference.unexpected
    return ("The checkpoint is not complete" if incomplete else "The checkpoint belongs to another model"), WHOLE
