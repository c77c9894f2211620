"""The time to the first token of a candidate, or to a further one, on this cluster's devices, measured once and stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import ray
import torch

from minitron import storage
from minitron.architecture import Architecture
from minitron.arguments import check_fields
from minitron.checkpoints.reading import read_config
from minitron.device import DTYPES, device, device_name
from minitron.errors import MinitronError
from minitron.evaluation import interleaved_throughput, interleaved_token_latency
from minitron.model_imports import import_models
from minitron.models import quiet_transformers
from minitron_search.arguments import absolute_path

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

MODELS_AT_A_TIME = 4  # in memory together; they need less memory than training one of them
LOOK_SECONDS = 2.0
SECONDS = 0.5  # per model, and at least five passes


@dataclass(frozen=True)
class Latency:
    """Measures the time of a token for `batch` sequences of `context` tokens, with logits at the last position alone.

    kind: "first", one forward pass over the prompts, or "further", the step that computes the last of the `context` tokens with
    the keys and values of the others in the KV cache.

    An architecture is measured as a model with random weights, in `dtype` ("bfloat16" or "float32"), with the other config
    values of the checkpoint folder `origin`; on a CPU it runs with `threads` threads. Times are stored in `folder` by
    architecture, device, dtype, batch and context. Relative paths are made absolute. Raises InputError for a path that is
    empty or no string.
    """

    origin: str
    dtype: str
    batch: int
    context: int
    folder: str
    threads: int = 1
    kind: Literal["first", "further"] = "first"

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "origin", absolute_path("origin", self.origin))
        object.__setattr__(self, "folder", absolute_path("folder", self.folder))

    def measure(
        self,
        architectures: Sequence[Architecture],
        *,
        share: Mapping[str, float],
        progress: Callable[[int, int], None] | None = None,
        look: Callable[[], None] = lambda: None,
        before_commit: Callable[[], None] = lambda: None,
    ) -> dict[Architecture, float]:
        """Milliseconds of each architecture: the median of at least five passes, which alternate with those of up to three
        other architectures.

        The passes run in Ray tasks that request `share`, the resources of a trial by Ray's names, one task at a time so that
        none slows another. `progress(measured, total)` is called after each task, `look()` every few seconds; what it
        raises cancels the task. `before_commit()` is called in the task before times are stored, and may raise a MinitronError
        to prevent that. Needs Ray to be running. Raises MinitronError for an architecture that cannot be run, for example
        because it does not fit in memory.
        """
        remote = ray.remote(num_cpus=share.get("CPU"), num_gpus=share.get("GPU"), memory=share.get("memory"))(_measure)
        milliseconds: dict[Architecture, float] = {}
        for start in range(0, len(architectures), MODELS_AT_A_TIME):
            group = architectures[start : start + MODELS_AT_A_TIME]
            try:
                milliseconds |= dict(zip(group, _result(remote.remote(self, group, before_commit), look), strict=True))
            except ray.exceptions.RayError as error:
                raise MinitronError(
                    f"latency of {self.batch} sequences of {self.context} tokens: {group[0]} and the candidates measured with "
                    f"it cannot be run ({str(error).strip().splitlines()[-1]})",
                    "lower batch or context of the limits, or set memory_bytes, which excludes large candidates first",
                ) from error
            if progress:
                progress(len(milliseconds), len(architectures))
        return milliseconds

    def path(self, architecture: Architecture) -> str:
        """File that stores the time of an architecture on this process's device."""
        key = {
            "architecture": architecture.to_dict(),
            "device": device_name(),
            "dtype": self.dtype,
            "batch": self.batch,
            "context": self.context,
            **({"kind": self.kind} if self.kind != "first" else {}),  # files of earlier versions have none
        }
        return storage.join(self.folder, f"{storage.fingerprint(key)}.json")


def _result(task: Any, look: Callable[[], None]) -> Any:
    """What a task returns; it is cancelled if `look` raises."""
    try:
        while not ray.wait([task], timeout=LOOK_SECONDS)[0]:
            look()
    except BaseException:
        ray.cancel(task, force=True)
        raise
    return ray.get(task)


def _measure(latency: Latency, architectures: Sequence[Architecture], before_commit: Callable[[], None]) -> list[float]:
    """Milliseconds of each architecture in this process."""
    if device().type == "cpu":
        torch.set_num_threads(latency.threads)
    paths = [latency.path(architecture) for architecture in architectures]
    new = [index for index, path in enumerate(paths) if not storage.exists(path)]
    if new:
        config = _config(latency.origin)
        models = {str(index): _random_model(config, architectures[index], latency.dtype) for index in new}
        seconds = _seconds(latency, models)
        before_commit()
        for index in new:
            storage.write_json(
                paths[index],
                {
                    "milliseconds": 1000 * seconds[str(index)],
                    "kind": latency.kind,
                    "device": device_name(),
                    "architecture": str(architectures[index]),
                },
            )
    return [storage.read_json(path)["milliseconds"] for path in paths]


def _seconds(latency: Latency, models: Mapping[str, PreTrainedModel]) -> dict[str, float]:
    if latency.kind == "further":
        steps = interleaved_token_latency(models, context=latency.context, batch_rows=latency.batch, seconds=SECONDS)
        return {name: step.seconds for name, step in steps.items()}
    speeds = interleaved_throughput(models, seq_length=latency.context, batch_rows=latency.batch, seconds=SECONDS)
    return {name: latency.batch * latency.context / speed.tokens_per_second for name, speed in speeds.items()}


def _config(folder: str) -> PretrainedConfig:
    local = str(storage.fetch(folder))
    return read_config(local, local, trust_remote_code=False, local_files_only=True)


def _random_model(config: PretrainedConfig, architecture: Architecture, dtype: str) -> PreTrainedModel:
    import_models()
    from transformers import AutoModelForCausalLM

    with quiet_transformers(), torch.device(device()):
        return AutoModelForCausalLM.from_config(architecture.to_config(config), dtype=DTYPES[dtype]).eval()
