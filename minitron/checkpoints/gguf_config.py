"""The config of a GGUF file, completed by the file's header, of which transformers leaves out most keys without a word."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from minitron.arguments import short_repr
from minitron.checkpoints.gguf_header import GgufHeader, Value
from minitron.checkpoints.gguf_keys import COMMON, OWN
from minitron.checkpoints.gguf_rope import ORIGINAL
from minitron.checkpoints.gguf_scaling import SCALING, convert_scaling
from minitron.errors import InputError
from minitron.families import FAMILIES

if TYPE_CHECKING:
    from transformers import PretrainedConfig

HARMLESS = ("tensor_data_layout", "pooling_type", "classifier.output_labels")  # of no use to a language model's logits
LISTED = 8  # values of an array in an error


def complete_config(config: PretrainedConfig, header: GgufHeader, where: str) -> None:
    """Complete the config of a GGUF file, which transformers has read, by the file's header.

    Raises InputError for a value with which transformers' model does not compute, and for a key that is not known, because it
    may change the model. A config without a family table stays as it is: it is refused elsewhere. where: the file's name in
    errors.
    """
    if config.model_type not in FAMILIES:
        return
    if config.model_type not in OWN:
        raise InputError(
            f"{where}: transformers takes it for a {config.model_type} model because of its general.name, and does not load "
            "such files",
            ORIGINAL,
        )
    keys = {**COMMON, **OWN[config.model_type]}
    values = {name: header.values[name] for name in keys if name in header.values}
    values |= {name: key.missing(config) for name, key in keys.items() if key.missing and name not in header.values}
    for name in [name for name in keys if name in values]:  # in the order of the table: some depend on others
        write = keys[name].write
        if write:
            write(config, values[name])
    for name, value in values.items():
        accepted = keys[name].accepted(config)
        if not any(_same(value, other) for other in accepted):
            raise InputError(
                f"{where}: {header.architecture}.{name} is {_shown(value)} in its header, but transformers' "
                f"{config.model_type} model computes with {_shown(accepted[0])}",
                ORIGINAL,
            )
    for name, value in header.values.items():
        if name not in keys and name not in SCALING and name not in HARMLESS:
            raise InputError(
                f"{where}: {header.architecture}.{name}, which is {_shown(value)} in its header, is not known for "
                f"{config.model_type} models and may change what the model computes",
                ORIGINAL,
            )
    convert_scaling(config, header, where)


def _same(value: Value, other: Value) -> bool:
    """Whether two values are the same, up to the rounding to float32 of a file. One value for each layer, all alike, is that
    value."""
    if isinstance(value, tuple) and not isinstance(other, tuple):
        return len(set(value)) == 1 and _same(value[0], other)
    if isinstance(value, int | float) and isinstance(other, int | float):
        return math.isfinite(value) and math.isclose(value, other, rel_tol=1e-6)
    return value == other


def _shown(value: Value) -> str:
    if not isinstance(value, tuple):
        return short_repr(value)
    return f"[{', '.join(map(str, value[:LISTED]))}{', …' if len(value) > LISTED else ''}]"
