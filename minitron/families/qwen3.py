"""Qwen3: norms over query and key heads."""

from minitron.families.decoder import decoder

FAMILY = decoder("qwen3", qkv_bias="attention_bias", output_bias="attention_bias", qk_norm=True)
