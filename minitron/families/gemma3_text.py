"""Gemma 3, the text model: as Gemma 2, with norms over query and key heads."""

from minitron.families.decoder import decoder

FAMILY = decoder(
    "gemma3_text",
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    qk_norm=True,
    output_norms=True,
    norm_offset=1.0,
    embedding_scaled=True,
    hidden_in_heads=True,
    required={"use_bidirectional_attention": False},
)
