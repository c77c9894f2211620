"""Mistral and Mistral-NeMo."""

from minitron.families.decoder import decoder

FAMILY = decoder("mistral")
