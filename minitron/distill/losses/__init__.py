"""What a student is trained to minimise: on the logits, on layers within, and which of them a recipe chooses."""

from minitron.distill.losses.config import Losses, default_losses, mapped_layers

__all__ = ["Losses", "default_losses", "mapped_layers"]
