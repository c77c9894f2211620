"""Qwen3-MoE, where every layer is a mixture of experts."""

from minitron.families.decoder import decoder

FAMILY = decoder(
    "qwen3_moe",
    experts=True,
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    qk_norm=True,
    config_names={"intermediate_size": "moe_intermediate_size"},
    required={"mlp_only_layers": [], "decoder_sparse_step": 1},
)
