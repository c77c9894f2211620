"""What a family's table says: which parameter of a transformers model carries which axis.

Slicing, counting and the hooks for importance read these tables and nothing else about a model.
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

Axis = str | tuple[str, ...]  # several axes: one after another in one dimension, as fused projections store them


@dataclass(frozen=True)
class Parameter:
    """One tensor: its name, the axis along each of its dimensions, and the config flag it depends on, if any."""

    name: str
    axes: tuple[Axis, ...]
    flag: str = ""


@dataclass(frozen=True)
class Family:
    """One transformers model type.

    `inner` names are relative to a decoder layer, `outer` names to the model. Modules of a layer: `head_input` and
    `mlp_input` take the heads and the neurons as their input, `activation` the MLP's pre-activation; `qkv` give queries,
    keys and values, in this order, from one fused module or three; `norms` feed attention and MLP, the MLP's last;
    `experts` holds the fused tensors gate_up_proj [experts, 2·MLP, hidden] and down_proj [experts, hidden, MLP] of a
    mixture, which has no `mlp_input` and no `activation`.
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
    per_layer: tuple[str, ...] = ("layer_types",)  # config lists with one entry a layer
    hidden_in_heads: bool = False  # transformers refuses a hidden size that is no multiple of the number of heads
    longrope_in_hidden: bool = False  # transformers counts longrope's factors from hidden_size // number of heads
