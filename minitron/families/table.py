"""What a family adapter says: which parameter of a transformers model carries which axis.

Slicing, counting and the hooks for importance read these tables and nothing else about a model.
"""

from __future__ import annotations

from dataclasses import dataclass

HIDDEN = "hidden"  # embedding channels
MLP = "mlp"  # neurons of the MLP
HEADS = "heads"  # query heads, head_dim values each
KV_HEADS = "kv_heads"  # key or value heads, head_dim values each
HEAD_DIM = "head_dim"  # inside one head; never pruned
VOCAB = "vocab"  # rows of the embedding matrix; never pruned


@dataclass(frozen=True)
class Parameter:
    """One tensor: its name, the axis along each of its dimensions, and the config flag it depends on, if any."""

    name: str
    axes: tuple[str, ...]
    flag: str = ""


@dataclass(frozen=True)
class Family:
    """One transformers model type.

    `inner` names are relative to a decoder layer, `outer` names to the model. `head_input` and `mlp_input` are the modules
    of a layer whose input carries the heads and the neurons; `norms` are the layer's norms whose output carries the
    embedding channels. `flags` are boolean config attributes that switch parameters on.
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
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    flags: tuple[str, ...] = ()
    hidden_in_heads: bool = False  # transformers refuses a hidden size that is no multiple of the number of heads
    per_layer: tuple[str, ...] = ("layer_types",)  # config lists with one entry a layer


def decoder(
    model_type: str,
    *,
    gated: bool = True,
    norm_bias: bool = False,
    qkv_bias: str | None = None,
    output_bias: str | None = None,
    mlp_bias: str | None = None,
    qk_norm: bool = False,
    hidden_in_heads: bool = False,
) -> Family:
    """The table of the common pre-norm decoder.

    Each `*_bias` is None for never, "" for always, or the name of the config flag that decides.
    """
    inner = [
        Parameter("self_attn.q_proj.weight", (HEADS, HIDDEN)),
        Parameter("self_attn.k_proj.weight", (KV_HEADS, HIDDEN)),
        Parameter("self_attn.v_proj.weight", (KV_HEADS, HIDDEN)),
        Parameter("self_attn.o_proj.weight", (HIDDEN, HEADS)),
        Parameter("mlp.up_proj.weight", (MLP, HIDDEN)),
        Parameter("mlp.down_proj.weight", (HIDDEN, MLP)),
    ]
    if gated:
        inner.append(Parameter("mlp.gate_proj.weight", (MLP, HIDDEN)))
    if qkv_bias is not None:
        inner += [
            Parameter("self_attn.q_proj.bias", (HEADS,), qkv_bias),
            Parameter("self_attn.k_proj.bias", (KV_HEADS,), qkv_bias),
            Parameter("self_attn.v_proj.bias", (KV_HEADS,), qkv_bias),
        ]
    if output_bias is not None:
        inner.append(Parameter("self_attn.o_proj.bias", (HIDDEN,), output_bias))
    if mlp_bias is not None:
        inner += [Parameter("mlp.up_proj.bias", (MLP,), mlp_bias), Parameter("mlp.down_proj.bias", (HIDDEN,), mlp_bias)]
        if gated:
            inner.append(Parameter("mlp.gate_proj.bias", (MLP,), mlp_bias))
    if qk_norm:
        inner += [Parameter("self_attn.q_norm.weight", (HEAD_DIM,)), Parameter("self_attn.k_norm.weight", (HEAD_DIM,))]
    outer = [Parameter("model.embed_tokens.weight", (VOCAB, HIDDEN)), Parameter("lm_head.weight", (VOCAB, HIDDEN))]
    for norm, place in (
        ("input_layernorm", inner),
        ("post_attention_layernorm", inner),
        ("model.norm", outer),
    ):
        place.append(Parameter(f"{norm}.weight", (HIDDEN,)))
        if norm_bias:
            place.append(Parameter(f"{norm}.bias", (HIDDEN,)))
    flags = tuple(sorted({flag for flag in (qkv_bias, output_bias, mlp_bias) if flag}))
    return Family(model_type, tuple(outer), tuple(inner), flags=flags, hidden_in_heads=hidden_in_heads)
