"""Nemotron-4 and Minitron: squared ReLU without a gate, LayerNorm that stores its weight minus one."""

from minitron.families.decoder import decoder

FAMILY = decoder(
    "nemotron",
    gated=False,
    norm_bias=True,
    norm_offset=1.0,
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
)
