"""Llama 1 to 3, and the many models that share its type (SmolLM2, for one)."""

from minitron.families.decoder import decoder

FAMILY = decoder(
    "llama",
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
    hidden_in_heads=True,
)
