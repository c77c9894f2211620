"""Gemma 2: scaled embeddings, norms on both sides of attention and MLP, soft-capped logits."""

from minitron.families.decoder import decoder

FAMILY = decoder(
    "gemma2",
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    output_norms=True,
    norm_offset=1.0,
    embedding_scaled=True,
    hidden_in_heads=True,
    required={"use_bidirectional_attention": False},
)
