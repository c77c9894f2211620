"""What a candidate may need at most where it will serve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minitron.architecture import Architecture

VALUE_BYTES = 2  # weights, keys and values are served in 16 bits


@dataclass(frozen=True)
class Limits:
    """Upper limits for serving `batch` sequences of `context` tokens; None for no limit.

    `flops_per_token` is of a forward pass, `kv_cache_bytes` of all sequences' keys and values (every layer counted as
    attending to the whole context), `memory_bytes` of weights and KV cache together. `latency_ms` is the time to
    their first tokens, which follows from no formula: `minitron_search.latency` measures it.
    """

    context: int
    batch: int = 1
    flops_per_token: float | None = None
    kv_cache_bytes: float | None = None
    memory_bytes: float | None = None
    latency_ms: float | None = None

    def needs(self, architecture: Architecture) -> dict[str, int]:
        """What `architecture` needs of each that can be calculated, under the limits' names."""
        cache = architecture.kv_cache_bytes(self.batch * self.context, VALUE_BYTES)
        return {
            "flops_per_token": architecture.flops_per_token(self.context),
            "kv_cache_bytes": cache,
            "memory_bytes": VALUE_BYTES * architecture.num_parameters + cache,
        }

    def exceeded(self, architecture: Architecture) -> str:
        """The limits that `architecture` goes beyond, as text; empty if none."""
        return self._over(self.needs(architecture), "is")

    def unreachable(self, architectures: Sequence[Architecture]) -> str:
        """The limits that each of `architectures` goes beyond, with the least that any needs; empty if there is none."""
        needs = [self.needs(architecture) for architecture in architectures]
        return self._over({name: min(need[name] for need in needs) for name in needs[0]}, "is at least")

    def _over(self, needs: dict[str, int], verb: str) -> str:
        return ", ".join(
            f"{name} {verb} {need:,} (limit {limit:,.0f})"
            for name, need in needs.items()
            if (limit := getattr(self, name)) is not None and need > limit
        )
