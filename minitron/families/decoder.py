"""Builds the family table of the common pre-norm decoder and its variations."""

from __future__ import annotations

from typing import Any

from minitron.families.table import EXPERTS, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, MLP, VOCAB, Family, Parameter


def decoder(
    model_type: str,
    *,
    gated: bool = True,
    fused: bool = False,
    experts: bool = False,
    norm_bias: bool = False,
    qkv_bias: str | None = None,
    output_bias: str | None = None,
    mlp_bias: str | None = None,
    qk_norm: bool = False,
    output_norms: bool = False,
    **fields: Any,
) -> Family:
    """The family table of a decoder.

    gated: the MLP has a gate. fused: one tensor for q, k and v, and one for gate and up. experts: the MLP is a mixture of
    experts. Each `*_bias` is None for never, "" for always, or the name of the config flag that decides. qk_norm: a norm
    over each query and key head. output_norms: attention and MLP are also followed by a norm. fields: further fields of
    `Family`.
    """
    inner = [
        *_attention(fused, qkv_bias, output_bias, qk_norm),
        *(_mixture() if experts else _mlp(gated, fused, mlp_bias)),
    ]
    norms = ["input_layernorm", "post_attention_layernorm"]
    if output_norms:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        fields["norms"] = ("input_layernorm", "pre_feedforward_layernorm")
    for norm in norms:
        inner += _norm(norm, norm_bias)
    outer = [
        Parameter("model.embed_tokens.weight", (VOCAB, HIDDEN)),
        Parameter("lm_head.weight", (VOCAB, HIDDEN)),
        *_norm("model.norm", norm_bias),
    ]
    if fused:
        fields["qkv"] = ("self_attn.qkv_proj",)
    if experts:
        fields |= {"experts": "mlp.experts", "mlp_input": "", "activation": ""}
    flags = tuple(sorted({flag for flag in (qkv_bias, output_bias, mlp_bias) if flag}))
    return Family(model_type, tuple(outer), tuple(inner), flags=flags, **fields)


def _attention(fused: bool, qkv_bias: str | None, output_bias: str | None, qk_norm: bool) -> list[Parameter]:
    if fused:
        parameters = [Parameter("self_attn.qkv_proj.weight", ((HEADS, KV_HEADS, KV_HEADS), HIDDEN))]
    else:
        parameters = [
            Parameter("self_attn.q_proj.weight", (HEADS, HIDDEN)),
            Parameter("self_attn.k_proj.weight", (KV_HEADS, HIDDEN)),
            Parameter("self_attn.v_proj.weight", (KV_HEADS, HIDDEN)),
        ]
    parameters.append(Parameter("self_attn.o_proj.weight", (HIDDEN, HEADS)))
    if qkv_bias is not None:
        parameters += [
            Parameter("self_attn.q_proj.bias", (HEADS,), qkv_bias),
            Parameter("self_attn.k_proj.bias", (KV_HEADS,), qkv_bias),
            Parameter("self_attn.v_proj.bias", (KV_HEADS,), qkv_bias),
        ]
    if output_bias is not None:
        parameters.append(Parameter("self_attn.o_proj.bias", (HIDDEN,), output_bias))
    if qk_norm:
        parameters += [Parameter(f"self_attn.{norm}.weight", (HEAD_DIM,)) for norm in ("q_norm", "k_norm")]
    return parameters


def _mlp(gated: bool, fused: bool, bias: str | None) -> list[Parameter]:
    if fused:
        parameters = [Parameter("mlp.gate_up_proj.weight", ((MLP, MLP), HIDDEN))]
    else:
        into = ("up_proj", "gate_proj") if gated else ("up_proj",)
        parameters = [Parameter(f"mlp.{name}.weight", (MLP, HIDDEN)) for name in into]
        if bias is not None:
            parameters += [Parameter(f"mlp.{name}.bias", (MLP,), bias) for name in into]
    parameters.append(Parameter("mlp.down_proj.weight", (HIDDEN, MLP)))
    if bias is not None:
        parameters.append(Parameter("mlp.down_proj.bias", (HIDDEN,), bias))
    return parameters


def _mixture() -> list[Parameter]:
    return [
        Parameter("mlp.gate.weight", (EXPERTS, HIDDEN)),
        Parameter("mlp.experts.gate_up_proj", (EXPERTS, (MLP, MLP), HIDDEN)),
        Parameter("mlp.experts.down_proj", (EXPERTS, HIDDEN, MLP)),
    ]


def _norm(name: str, bias: bool) -> list[Parameter]:
    return [Parameter(f"{name}.{part}", (HIDDEN,)) for part in (("weight", "bias") if bias else ("weight",))]
