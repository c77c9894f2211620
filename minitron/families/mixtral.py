"""Mixtral: a mixture of experts in every layer."""

from minitron.families.decoder import decoder

FAMILY = decoder("mixtral", experts=True, config_names={"num_experts": "num_local_experts"})
