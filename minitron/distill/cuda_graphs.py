"""Micro-batches as CUDA graphs: all kernels of one are launched together, instead of one after the other by the host.

A small model's kernels take less time than their launches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from minitron.architecture import Architecture
from minitron.distill.feeder import Feeder, MicroBatch
from minitron.distill.losses.objective import Objective
from minitron.distill.teacher.live import LiveTeacher
from minitron.distill.timing import Stopwatch
from minitron.errors import InputError

FIRST_RUNS = 2
"""Micro-batches of a shape that run before it is recorded: their layers are compiled, and kernels chosen, while they do."""

Run = Callable[[Sequence[int], MicroBatch, Tensor], None]
"""Computes a micro-batch: the numbers of its rows, the rows, and their share of the step, a scalar."""


class _Recorded(NamedTuple):
    inputs: list[Tensor]
    """Read by the graph: each micro-batch is copied into them."""
    launch: Callable[[], object]


class CudaGraphs:
    """Calls `run` for the first micro-batches of a shape, and launches the CUDA graph of such a call for those that follow.

    What `run` computes depends on tensors alone, without the rows' numbers, and is left in tensors that exist before and stay
    where they are. A graph computes the same bits: its kernels are the same. It keeps the memory of its activations.
    """

    def __init__(self, run: Run, watch: Stopwatch) -> None:
        self.run = run
        self.watch = watch
        self._runs: Counter[Any] = Counter()  # by shape
        self._recorded: dict[Any, _Recorded] = {}
        self._pool: Any = None

    def __enter__(self) -> CudaGraphs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._recorded.clear()  # gives their memory back

    def __call__(self, indices: Sequence[int], batch: MicroBatch, share: Tensor) -> None:
        tensors = [*_tensors(batch), share]
        shape = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        if shape not in self._recorded:
            self._runs[shape] += 1
            if self._runs[shape] <= FIRST_RUNS:
                self.run(indices, batch, share)
                return
            self._recorded[shape] = self._record(batch, share)
        recorded = self._recorded[shape]
        for kept, tensor in zip(recorded.inputs, tensors, strict=True):
            kept.copy_(tensor)
        recorded.launch()

    def _record(self, batch: MicroBatch, share: Tensor) -> _Recorded:
        own, own_share = tree_map_only(Tensor, torch.clone, batch), share.clone()
        self._pool = self._pool or new_pool()
        with self.watch.paused():  # its events would become part of the graph
            launch = record(lambda: self.run((), own, own_share), self._pool)
        return _Recorded([*_tensors(own), own_share], launch)


def available(device: torch.device) -> bool:
    """Whether micro-batches on this device can be recorded."""
    return device.type == "cuda"


def new_pool() -> Any:
    """Memory that all graphs of a training share, as only one of them runs at a time."""
    return torch.cuda.graph_pool_handle()


def record(work: Callable[[], None], pool: Any) -> Callable[[], object]:
    """The CUDA graph of what `work` launches; nothing is computed yet. Other threads may use the GPU meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        work()
    return graph.replay


def check_recordable(objective: Objective, feeder: Feeder) -> None:
    """Raise InputError for an objective whose micro-batches cannot be CUDA graphs."""
    problem = ""
    if objective.intermediate:
        problem = "losses on layers, which read what hooks record"
    elif Architecture.from_config(objective.student.config).num_experts:
        problem = "a mixture of experts, in which the host waits for the router"
    elif isinstance(objective.targets, LiveTeacher):
        if objective.targets.sharded:
            problem = "a teacher whose layers are split over the processes"
        elif Architecture.from_config(objective.targets.model.config).num_experts:
            problem = "a teacher with a mixture of experts, in which the host waits for the router"
    elif objective.targets is not None and not feeder.is_stored:
        problem = f"targets of the class {type(objective.targets).__name__}, which may depend on the rows' numbers"
    if problem:
        raise InputError(f"cuda_graphs: {problem}", "set it to false")


def _tensors(batch: MicroBatch) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
