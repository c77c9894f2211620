"""transformers as engine: all prompts of a batch begin and end together, with a KV cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from minitron.arguments import check_model
from minitron.device import synchronize
from minitron.evaluation.mode import evaluating
from minitron.kv_cache import cache_of, with_cache
from minitron.throughput.engine import Request, Workload


class InMemoryEngine:
    """A transformers causal LM on its device and in its dtype. Prompts are random token ids."""

    kind = "transformers"

    def __init__(self, model: Any) -> None:
        check_model("model", model)
        self.model = model
        self.longest: int | None = getattr(model.config, "max_position_embeddings", None)
        tensors = {tensor.data_ptr(): tensor for tensor in [*model.parameters(), *model.buffers()]}  # tied ones once
        self._weights = sum(tensor.nbytes for tensor in tensors.values())
        self._memory: int | None = None

    def warm_up(self, workload: Workload) -> None:
        """The first pass of a shape selects kernels and allocates memory."""
        self.run(Workload(workload.input_tokens, min(workload.output_tokens, 4), workload.batch), seed=0)

    def run(self, workload: Workload, seed: int) -> Sequence[Request]:
        """Raises torch.OutOfMemoryError for a batch that does not fit on a GPU."""
        device = self.model.device
        generator = torch.Generator().manual_seed(seed)
        shape = (workload.batch, workload.input_tokens)
        ids = torch.randint(self.model.config.vocab_size, shape, generator=generator).to(device)
        on_gpu = device.type == "cuda"
        with torch.inference_mode(), evaluating(self.model):
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device) if on_gpu else 0
            synchronize(device)
            start = time.perf_counter()
            token, cache = self._step(ids, None)
            synchronize(device)
            first = time.perf_counter() - start
            for _ in range(workload.output_tokens - 1):
                token, cache = self._step(token, cache)
            synchronize(device)
            last = time.perf_counter() - start
        needed = torch.cuda.max_memory_allocated(device) - before if on_gpu else _cache_bytes(cache)
        self._memory = self._weights + needed
        return [Request(workload.input_tokens, workload.output_tokens, first, last)] * workload.batch

    def memory(self) -> int | None:
        """Weights, and on a GPU the peak of everything that was allocated for the batch; on a CPU its KV cache alone."""
        return self._memory

    def _step(self, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        """The most probable next tokens [batch, 1] after `ids` [batch, length], and the cache with them."""
        output = self.model(input_ids=ids, logits_to_keep=1, **with_cache(cache))
        return output.logits[:, -1].argmax(-1, keepdim=True), cache_of(output)


def _cache_bytes(cache: Any) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
