"""Qwen2 and Qwen2.5: biases on queries, keys and values."""

from minitron.families.decoder import decoder

FAMILY = decoder("qwen2", qkv_bias="")
