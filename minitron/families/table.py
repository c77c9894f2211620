"""Family tables: which axis lies along which dimension of each parameter of a transformers model.

Slicing, parameter counts and the hooks for importance use these tables and no other knowledge of a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

HIDDEN = "hidden"  # embedding channels
MLP = "mlp"  # neurons of the MLP; in a mixture of experts, of one expert
HEADS = "heads"  # query heads, head_dim values each
KV_HEADS = "kv_heads"  # key or value heads, head_dim values each
EXPERTS = "experts"  # experts of a mixture; always the first dimension
HEAD_DIM = "head_dim"  # inside one head; never pruned
VOCAB = "vocab"  # rows of the embedding matrix; never pruned

Axis = str | tuple[str, ...]  # several axes: concatenated along one dimension, as in fused projections


@dataclass(frozen=True)
class Parameter:
    """One parameter: its name, the axis along each dimension, and the config flag that it depends on, if any."""

    name: str
    axes: tuple[Axis, ...]
    flag: str = ""


@dataclass(frozen=True)
class Family:
    """The table of one transformers model type.

    Parameter names in `inner` are relative to a decoder layer, those in `outer` to the model. Names of a layer's modules:
    `head_input` and `mlp_input` have the heads and the neurons as their input, `activation` the MLP's pre-activation; `qkv`
    compute queries, keys and values, in this order, in one fused module or three; `norms` are the inputs of attention and
    MLP, the MLP's last; `experts` has the fused parameters gate_up_proj [experts, 2·MLP, hidden] and down_proj [experts,
    hidden, MLP] of a mixture of experts, which has no `mlp_input` and no `activation`.
    """

    model_type: str
    outer: tuple[Parameter, ...]
    inner: tuple[Parameter, ...]
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    head_input: str = "self_attn.o_proj"
    mlp_input: str = "mlp.down_proj"
    activation: str = "mlp.act_fn"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    experts: str = ""
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norm_offset: float = 0.0  # a norm multiplies by this plus its stored weight
    embedding_scaled: bool = False  # the model multiplies its embeddings by sqrt(hidden_size)
    flags: tuple[str, ...] = ()  # boolean config attributes that switch parameters on
    config_names: Mapping[str, str] = field(
        default_factory=dict
    )  # Architecture field -> config attribute, where unusual
    required: Mapping[str, object] = field(default_factory=dict)  # config attributes that must have this value
    per_layer: tuple[str, ...] = ("layer_types",)  # config lists with one entry per layer
    hidden_in_heads: bool = False  # transformers requires the hidden size to be a multiple of the number of heads
    longrope_in_hidden: bool = False  # transformers derives longrope's factors from hidden_size // number of heads
