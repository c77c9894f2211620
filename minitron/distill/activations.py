"""The activations that layers keep for the backward pass, per token, from the architecture alone.

They are the tensors that autograd saves in transformers' layers; a test counts them for every family.
"""

from __future__ import annotations

from minitron.architecture import Architecture
from minitron.families.table import HEAD_DIM, HIDDEN, Parameter

FLOAT = 4  # bytes of a float32
# families whose rotary embedding concatenates a rotated and an unrotated part: attention's output then has another layout
# and is copied
JOINED_ROTARY = ("nemotron", "phi3")


def kept_per_token(architecture: Architecture, value_bytes: int, activation_checkpointing: str) -> int:
    """Bytes that one layer keeps per token with one of `ACTIVATION_CHECKPOINTING`; value_bytes: of the dtype that it
    computes in."""
    stream = architecture.hidden_size * value_bytes
    if activation_checkpointing == "full":
        return stream
    if activation_checkpointing == "selective":
        return stream + _products(architecture, value_bytes) + _attention_output(architecture, value_bytes)
    return (
        _norms(architecture, architecture.layer_parameters, value_bytes)
        + _attention(architecture, value_bytes)
        + _mlp(architecture, value_bytes)
    )


def final_norm(architecture: Architecture, value_bytes: int) -> int:
    """Bytes that the norm before the head keeps per token."""
    return _norms(architecture, architecture.outer_parameters, value_bytes)


def forward_per_token(architecture: Architecture, value_bytes: int) -> int:
    """Peak bytes per token of a layer that runs without gradients, its input included."""
    width = architecture.intermediate_size * max(1, architecture.experts_per_token)
    return (3 * width + 4 * architecture.hidden_size) * value_bytes


def backward_per_token(architecture: Architecture, value_bytes: int) -> int:
    """Peak bytes per token of gradients during the backward pass of a layer."""
    experts = max(1, architecture.experts_per_token)
    width = architecture.intermediate_size * experts * value_bytes
    hidden = architecture.hidden_size
    return max(2 * width, 3 * FLOAT * hidden) + hidden * value_bytes


def fp8_per_token(architecture: Architecture) -> int:
    """Peak bytes per token that FP8 products add in a layer: the widest input, or gradient, of a linear module in float32, and
    that scaled. Experts of a mixture have no FP8 products. Compiled products take less."""
    wide = 0 if architecture.table.experts else architecture.intermediate_size
    return 2 * FLOAT * max(architecture.hidden_size, architecture.num_heads * architecture.head_dim, wide)


def _products(architecture: Architecture, value_bytes: int) -> int:
    """Results of the matrix products of a layer."""
    values = 0
    for parameter in architecture.layer_parameters:
        if len(parameter.axes) == 2:
            values += architecture.axis_size(parameter.axes[0])
        elif len(parameter.axes) == 3:  # all experts; each token is routed to some of them
            values += architecture.axis_size(parameter.axes[1]) * architecture.experts_per_token
    return values * value_bytes


def _attention_output(architecture: Architecture, value_bytes: int) -> int:
    """The output of attention, with the float32 log-sum-exp of each head."""
    return architecture.num_heads * (architecture.head_dim * value_bytes + FLOAT)


def _attention(architecture: Architecture, value_bytes: int) -> int:
    """Rotated queries and keys, values, and the output."""
    queries = architecture.num_heads * architecture.head_dim
    keys = architecture.num_kv_heads * architecture.head_dim
    values = queries + 2 * keys
    if len(architecture.table.qkv) == 1:
        values += queries + keys  # the values are a view of the fused product, which is kept as a whole
    if architecture.family in JOINED_ROTARY:
        values += queries
    return values * value_bytes + _attention_output(architecture, value_bytes)


def _mlp(architecture: Architecture, value_bytes: int) -> int:
    """Gated: both products, the activation and the input of the last product; otherwise only the last two."""
    width = architecture.intermediate_size
    hidden = architecture.hidden_size
    if architecture.table.experts:  # also each expert's input, and its output before it is weighted
        return architecture.experts_per_token * (4 * width + 2 * hidden) * value_bytes
    into = sum(
        architecture.axis_size(p.axes[0])
        for p in architecture.layer_parameters
        if len(p.axes) == 2 and p.axes[1] == HIDDEN and p.name.startswith("mlp.")
    )
    return (2 * width + (into if into > width else 0)) * value_bytes


def _norms(architecture: Architecture, parameters: list[Parameter], value_bytes: int) -> int:
    """What the norms among `parameters` keep. RMSNorms keep their input in float32, and what they multiply with their weight
    in the model's dtype, or in float32 if the weight is stored minus one; LayerNorms keep their input. The output is kept if it
    is the input of a matrix product."""
    offset = architecture.table.norm_offset
    total = 0
    biased = {p.name.removesuffix(".bias") for p in parameters if p.name.endswith("norm.bias")}
    into_products = {*architecture.table.norms, architecture.table.final_norm}
    for parameter in parameters:
        name = parameter.name.removesuffix(".weight")
        if len(parameter.axes) != 1 or not parameter.name.endswith("norm.weight"):
            continue
        inner = FLOAT + (FLOAT if offset else value_bytes)
        if name in biased:
            inner = value_bytes
        if parameter.axes == (HEAD_DIM,):
            heads = architecture.num_heads if "q_norm" in name else architecture.num_kv_heads
            total += heads * (architecture.head_dim * inner + FLOAT)
        else:
            output = value_bytes if name in into_products else 0
            total += architecture.hidden_size * (inner + output) + FLOAT
    return total
