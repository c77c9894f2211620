"""Architecture: the shape of a decoder and what follows from it: parameters, FLOPs, KV cache, config."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from minitron.arguments import check_types, short_repr
from minitron.errors import InputError
from minitron.families import Family, Parameter, family_of
from minitron.families.config import LONGROPE, make_plain, read_config, write_config
from minitron.families.table import EXPERTS, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, MLP, VOCAB, Axis

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class PrunableAxis:
    """A field of `Architecture` that pruning makes smaller, and how people see it: `heading` of a table's column, `unit` after
    the number in a label, `plural` for sentences."""

    name: str
    heading: str
    unit: str
    plural: str


# The only list of them: plan, report, records, labels and command line take theirs from here.
AXES = (
    PrunableAxis("num_layers", "layers", "L", "layers"),
    PrunableAxis("hidden_size", "hidden", "", "embedding channels"),
    PrunableAxis("intermediate_size", "MLP", "", "MLP neurons (of each expert)"),
    PrunableAxis("num_heads", "heads", "h", "query heads"),
    PrunableAxis("num_kv_heads", "KV", "kv", "KV heads"),
    PrunableAxis("num_experts", "experts", "e", "experts"),
)
PRUNABLE = tuple(axis.name for axis in AXES)
FIXED = ("family", "vocab_size", "head_dim", "tied", "flags", "experts_per_token")  # fields that pruning cannot change


@dataclass(frozen=True)
class Architecture:
    """The shape of a decoder-only transformer of one family.

    In a mixture of experts `intermediate_size` is the width of one expert, and each token is routed to `experts_per_token` of
    `num_experts` experts; both are 0 in a dense model. tied: the head shares the embedding matrix. flags: config switches
    that are on and add parameters (biases) or constrain sizes (longrope). Raises InputError for sizes that are not those of a
    valid model.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    family: str = "llama"
    flags: tuple[str, ...] = ()
    num_experts: int = 0
    experts_per_token: int = 0

    def __post_init__(self) -> None:
        for field in (*PRUNABLE, "head_dim", "vocab_size"):
            value = getattr(self, field)
            least = 0 if field == "num_experts" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"{field}: {value!r} is not a valid size", f"give a whole number of at least {least}")
        self._check_experts()
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_heads: {self.num_heads} does not divide into num_kv_heads = {self.num_kv_heads} groups",
                f"use a multiple of {self.num_kv_heads}",
            )
        if self.table.hidden_in_heads and self.hidden_size % self.num_heads:
            raise InputError(
                f"hidden_size: {self.hidden_size} is not a multiple of num_heads = {self.num_heads}, which transformers "
                f"requires of {self.family} models",
                f"use a multiple of {self.num_heads}",
            )

    def _check_experts(self) -> None:
        mixture = bool(self.table.experts)
        if mixture != (self.num_experts > 0) or mixture != (self.experts_per_token > 0):
            raise InputError(
                f"num_experts: {self.num_experts} with experts_per_token = {self.experts_per_token} does not describe a "
                f"{self.family} model",
                "give both for a mixture of experts, and neither for a dense model",
            )
        if self.num_experts < self.experts_per_token:
            raise InputError(
                f"num_experts: {self.num_experts} is less than experts_per_token = {self.experts_per_token}",
                f"keep at least {self.experts_per_token}",
            )

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> Architecture:
        """The shape of a transformers config. Raises InputError for a model type without a family table, a multimodal wrapper
        around a text model, and config values that the family table cannot describe."""
        if not hasattr(config, "model_type"):
            raise InputError(
                f"config: {short_repr(config)} is not a transformers config", "give model.config or AutoConfig's result"
            )
        return cls(**read_config(config))

    def to_config(self, config: PretrainedConfig, kept_layers: Sequence[int] | None = None) -> PretrainedConfig:
        """A copy of `config` with these sizes, for a checkpoint that transformers alone can load; `head_dim` is always set.

        kept_layers: the layers of the source that are kept, whose per-layer settings are copied (default: the first ones).
        """
        kept = list(range(self.num_layers)) if kept_layers is None else list(kept_layers)
        result = copy.deepcopy(config)
        for name in self.table.per_layer:
            values = getattr(config, name, None)
            if values is not None:
                setattr(result, name, [values[index] for index in kept])
        write_config(result, self.table, asdict(self))
        make_plain(result)
        return result

    @property
    def table(self) -> Family:
        return family_of(self.family)

    def axis_size(self, axis: Axis) -> int:
        """Length of a tensor dimension of the kind `axis`."""
        if isinstance(axis, tuple):
            return sum(self.axis_size(part) for part in axis)
        return self._axis_sizes[axis]

    @cached_property
    def _axis_sizes(self) -> dict[str, int]:
        return {
            HIDDEN: self.hidden_size,
            MLP: self.intermediate_size,
            HEADS: self.num_heads * self.head_dim,
            KV_HEADS: self.num_kv_heads * self.head_dim,
            EXPERTS: self.num_experts,
            HEAD_DIM: self.head_dim,
            VOCAB: self.vocab_size,
        }

    def _present(self, parameters: Sequence[Parameter]) -> list[Parameter]:
        head = self.table.head if self.tied else None
        return [p for p in parameters if (not p.flag or p.flag in self.flags) and p.name != head]

    @property
    def outer_parameters(self) -> list[Parameter]:
        """Tensors outside the layers; without the head if it is tied to the embedding."""
        return self._present(self.table.outer)

    @property
    def layer_parameters(self) -> list[Parameter]:
        """Tensors of one layer."""
        return self._present(self.table.inner)

    def _count(self, parameters: Sequence[Parameter]) -> int:
        return sum(math.prod(self.axis_size(axis) for axis in p.axes) for p in parameters)

    def _multiplied(self, parameter: Parameter) -> int:
        """Entries of a layer's tensor that take part in matrix products for one token; of experts, only its own."""
        shape = [self.axis_size(axis) for axis in parameter.axes]
        if len(shape) == 3:
            shape[0] = self.experts_per_token
        return math.prod(shape) if len(shape) > 1 else 0

    @cached_property
    def num_parameters(self) -> int:
        """Exact number of parameters; tied matrices are counted once."""
        return self._count(self.outer_parameters) + self.num_layers * self._count(self.layer_parameters)

    @property
    def largest_tensor(self) -> int:
        """Number of values of the largest parameter; of a mixture, all experts of a layer are one."""
        return max(self._count([parameter]) for parameter in (*self.outer_parameters, *self.layer_parameters))

    @property
    def num_non_embedding_parameters(self) -> int:
        """Parameters outside the embedding matrix and the head."""
        vocabulary = [p for p in self.outer_parameters if VOCAB in p.axes]
        return self.num_parameters - self._count(vocabulary)

    def flops_per_token(self, seq_length: int) -> int:
        """FLOPs per token of one forward pass over a causal sequence of `seq_length` tokens: 2 per multiply-add of every
        matrix including the head, of the experts only those a token is routed to, plus 2·L·heads·head_dim·seq_length for
        attention (its causal half)."""
        layer = sum(self._multiplied(parameter) for parameter in self.layer_parameters)
        matrices = self.num_layers * layer + self.vocab_size * self.hidden_size
        return 2 * matrices + 2 * self.num_layers * self.num_heads * self.head_dim * seq_length

    def kv_cache_bytes(self, tokens: int, bytes_per_value: int = 2) -> int:
        """Bytes of the KV cache of `tokens` tokens of context."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * tokens * bytes_per_value

    def check_inside(self, base: Architecture) -> None:
        """Raise InputError unless a model of `base` can be pruned to this shape."""
        for field in FIXED:
            own, original = getattr(self, field), getattr(base, field)
            if own != original:
                raise InputError(f"{field}: {own!r} differs from the model's {original!r}", "pruning cannot change it")
        for field in PRUNABLE:
            own, original = getattr(self, field), getattr(base, field)
            if own > original:
                raise InputError(f"{field}: {own} is larger than the model's {original}", f"use at most {original}")
        if self.num_heads // self.num_kv_heads > base.num_heads // base.num_kv_heads:
            raise InputError(
                f"num_heads: {self.num_heads} in {self.num_kv_heads} groups needs more heads per group than the model has",
                f"use at most {base.num_heads // base.num_kv_heads * self.num_kv_heads}",
            )
        if LONGROPE in self.flags and self.hidden_size // self.num_heads != self.head_dim:
            raise InputError(
                f"hidden_size: {self.hidden_size} with {self.num_heads} heads changes the number of rotary factors that "
                f"transformers expects of a {self.family} model with longrope: hidden_size // heads, not head_dim",
                f"use hidden_size = {self.head_dim * self.num_heads}, or prune hidden_size and num_heads in the same ratio",
            )

    @property
    def sizes(self) -> dict[str, int]:
        """Its size on each of `AXES` that it has; a dense model has no experts."""
        return {axis.name: size for axis in AXES if (size := getattr(self, axis.name))}

    def label(self, axes: Iterable[PrunableAxis] = AXES) -> str:
        """Its sizes on `axes` in a few characters, such as "30L·576·1536·9h·3kv"."""
        sizes = self.sizes
        return "·".join(f"{sizes[axis.name]}{axis.unit}" for axis in axes if axis.name in sizes)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, for `from_dict`."""
        return {**asdict(self), "flags": list(self.flags)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Architecture:
        """The architecture that `to_dict` gave."""
        return cls(**{**values, "flags": tuple(values["flags"])})

    def __str__(self) -> str:
        experts = f" · {self.num_experts} experts" if self.num_experts else ""
        return (
            f"{self.num_layers}L · {self.hidden_size} hidden · {self.intermediate_size} MLP · "
            f"{self.num_heads}/{self.num_kv_heads} heads{experts}"
        )


def axes_present(architectures: Iterable[Architecture]) -> tuple[PrunableAxis, ...]:
    """The axes that any of these has, in the order of `AXES`."""
    names = {name for architecture in _checked(architectures) for name in architecture.sizes}
    return tuple(axis for axis in AXES if axis.name in names)


def axes_that_differ(architectures: Iterable[Architecture]) -> tuple[PrunableAxis, ...]:
    """The axes on which not all of these have the same size; those that they have, where all are alike."""
    shapes = _checked(architectures)
    differing = tuple(axis for axis in AXES if len({getattr(shape, axis.name) for shape in shapes}) > 1)
    return differing or axes_present(shapes)


def _checked(architectures: Iterable[Architecture]) -> list[Architecture]:
    shapes = list(architectures) if isinstance(architectures, Iterable) else architectures
    check_types("architectures", shapes, Architecture)
    return shapes
