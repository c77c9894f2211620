"""How long a shape takes to its first token on the device that it is to serve on, measured once and kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray
import torch

from minitron import storage
from minitron.architecture import Architecture
from minitron.device import DTYPES, device, device_name
from minitron.errors import MinitronError
from minitron.evaluation import interleaved_throughput
from minitron.models import quiet_transformers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

TOGETHER = 4  # shapes in memory at once: fewer bytes than training one of them takes
SECONDS = 0.5  # for each shape, and five passes at least


@dataclass(frozen=True)
class Latency:
    """One forward pass over `batch` sequences of `context` tokens, with the head at the last position alone: the time to
    the first token. Shapes are models with random weights and the config of the checkpoint `origin`, in `dtype`; on a CPU
    they have `threads`. What was measured is kept in `folder` by architecture, device, dtype, batch and context."""

    origin: str
    dtype: str
    batch: int
    context: int
    folder: str
    threads: int = 1

    def measure(
        self,
        architectures: Sequence[Architecture],
        *,
        share: Mapping[str, float],
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[Architecture, float]:
        """Milliseconds of each, the median of five passes or more in turns with up to three other shapes.

        They are measured in Ray tasks that take what a trial takes (`share`: Ray's names and amounts), one task
        at a time, so that none disturbs another. `progress(done, all)` counts shapes. Needs Ray to be running. Raises
        MinitronError when a shape cannot be run, as when it does not fit in memory.
        """
        remote = ray.remote(num_cpus=share.get("CPU"), num_gpus=share.get("GPU"), memory=share.get("memory"))(_measure)
        milliseconds: dict[Architecture, float] = {}
        for start in range(0, len(architectures), TOGETHER):
            some = architectures[start : start + TOGETHER]
            try:
                milliseconds |= dict(zip(some, ray.get(remote.remote(self, some)), strict=True))
            except ray.exceptions.RayError as error:
                raise MinitronError(
                    f"latency of {self.batch} sequences of {self.context} tokens: {some[0]} and those measured with it "
                    f"cannot be run ({str(error).strip().splitlines()[-1]})",
                    "lower the limits' batch or context, or limit memory_bytes, which leaves shapes out before",
                ) from error
            if progress:
                progress(len(milliseconds), len(architectures))
        return milliseconds

    def path(self, architecture: Architecture) -> str:
        """Where the time of a shape on this process's device is kept."""
        key = {
            "architecture": architecture.to_dict(),
            "device": device_name(),
            "dtype": self.dtype,
            "batch": self.batch,
            "context": self.context,
        }
        return storage.join(self.folder, f"{storage.fingerprint(key)}.json")


def _measure(latency: Latency, architectures: Sequence[Architecture]) -> list[float]:
    """Milliseconds of each, here."""
    if device().type == "cpu":
        torch.set_num_threads(latency.threads)
    paths = [latency.path(architecture) for architecture in architectures]
    new = [index for index, path in enumerate(paths) if not storage.exists(path)]
    if new:
        config = _config(latency.origin)
        models = {str(index): _random_model(config, architectures[index], latency.dtype) for index in new}
        speeds = interleaved_throughput(models, seq_length=latency.context, batch_rows=latency.batch, seconds=SECONDS)
        for index in new:
            speed = speeds[str(index)]
            milliseconds = 1000 * latency.batch * latency.context / speed.tokens_per_second
            storage.write_json(
                paths[index],
                {
                    "milliseconds": milliseconds,
                    "passes": speed.passes,
                    "device": device_name(),
                    "architecture": str(architectures[index]),
                },
            )
    return [storage.read_json(path)["milliseconds"] for path in paths]


def _config(folder: str) -> PretrainedConfig:
    from transformers import AutoConfig

    with quiet_transformers():
        return AutoConfig.from_pretrained(storage.fetch(folder), trust_remote_code=False, local_files_only=True)


def _random_model(config: PretrainedConfig, architecture: Architecture, dtype: str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    with quiet_transformers(), torch.device(device()):
        return AutoModelForCausalLM.from_config(architecture.to_config(config), dtype=DTYPES[dtype]).eval()
