"""Phi-3, Phi-3.5-mini and Phi-4: fused projections; the config has no head_dim until pruning writes one."""

from minitron.families.decoder import decoder

FAMILY = decoder("phi3", fused=True, activation="mlp.activation_fn", longrope_in_hidden=True)
