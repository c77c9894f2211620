"""Micro-batches and an update of a real training on the meta device: nothing is computed, and the bytes that a GPU would hold
are counted whenever a storage is allocated or freed."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from minitron.architecture import Architecture
from minitron.distill import DistillConfig, LiveTeacher, Losses
from minitron.distill.blocks import running_blocks
from minitron.distill.losses import chunked, kernels
from minitron.distill.losses.objective import Objective
from minitron.distill.sharding import begin_micro_batch, shard_
from minitron.distill.state import TrainingState
from minitron.logits import Head
from minitron.meta_models import InMemory


class LiveBytes(TorchDispatchMode):
    """Bytes of live storages that operations within the block have allocated; `peaks` has the highest value of each part."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.part = 0, ""
        self.peaks: dict[str, int] = defaultdict(int)
        self._seen: dict[int, Any] = {}
        self._sizes: dict[int, int] = {}

    def know(self, tensors: Any) -> int:
        """Count storages that were allocated before; returns their bytes."""
        before = self.alive
        for tensor in tensors:
            self._add(tensor)
        return self.alive - before

    def lap(self, part: str) -> None:
        """Called like a stopwatch: the operations until now belong to `part`, and the next part of the micro-batch begins."""
        following = {"data": "teacher", "teacher": "student", "student": "loss", "loss": "backward"}
        self.begin(following.get(part, ""))

    def begin(self, part: str) -> None:
        self.part = part
        self.peaks[part] = max(self.peaks[part], self.alive)

    @contextmanager
    def resized(self) -> Iterator[None]:
        """Count what FSDP2 frees and takes again: it resizes the storages of gathered weights."""
        resize = torch.UntypedStorage.resize_

        def counted(storage: Any, size: int) -> None:
            resize(storage, size)
            self._count(storage)

        torch.UntypedStorage.resize_ = counted  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]

    def _add(self, tensor: Tensor) -> None:
        self._count(tensor.untyped_storage())

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()

        def gone(_: Any) -> None:
            del self._seen[key]
            self.alive -= self._sizes.pop(key)

        if key not in self._seen:
            self._seen[key] = weakref.ref(storage, gone)
        self.alive += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peaks[self.part] = max(self.peaks[self.part], self.alive)

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if any(kind.__name__ in ("DTensor", "OptimState8bit") for kind in types):
            return NotImplemented  # the local shard, or the codes and scales, are counted, not the full tensor
        named = named or {}
        if function is torch.ops.aten.addmm.dtype_out:
            # There are no values to compute, and torch 2.11 fails at this operator on the meta device.
            return named["out"]
        result = function(*arguments, **named)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result


def _flash(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any = None, **_: Any) -> Any:
    attention = torch.ops.aten._scaled_dot_product_flash_attention
    out = attention(query, key, value, 0.0, True, False, scale=scaling)[0]
    return out.transpose(1, 2).contiguous(), None


chunked.CHUNK_TOKENS["meta"] = chunked.CHUNK_TOKENS["cpu"]


def _plain(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any = None, **_: Any) -> Any:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    weights = torch.softmax(query @ key.transpose(-1, -2) * scaling, -1)
    return (weights @ value).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register("on_meta", _flash)
ALL_ATTENTION_FUNCTIONS.register("plain", _plain)


@contextmanager
def like_cuda() -> Iterator[None]:
    """Make code treat meta tensors as CUDA tensors; the kernel of the loss, which allocates nothing, is skipped."""
    before = kernels.logit_loss, torch.cuda.device_of

    class Launch:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *arguments, **named: None

    original = torch.Tensor.is_cuda
    try:
        torch.Tensor.is_cuda = property(lambda tensor: True)  # type: ignore[assignment]
        kernels.logit_loss, torch.cuda.device_of = Launch(), lambda tensor: nullcontext()
        yield
    finally:
        torch.Tensor.is_cuda = original  # type: ignore[assignment]
        kernels.logit_loss, torch.cuda.device_of = before


def meta_model(family: str, device: str = "meta", attention: str = "on_meta", **sizes: Any) -> nn.Module:
    """A bfloat16 model from the transformers config of a family with the given `sizes`."""
    config = AutoConfig.for_model(family, max_position_embeddings=131_072, **sizes)
    config.architectures = None
    with torch.device(device):
        made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    return made.eval()


class Stored:
    """A teacher with stored hidden states: its head, and the hidden states of the rows."""

    def __init__(self, head: Head) -> None:
        self.head = head

    def batch(self, indices: Any, input_ids: Tensor) -> Any:
        weight = self.head.weight
        return {
            "teacher_hidden": torch.empty(input_ids.numel(), weight.shape[1], dtype=weight.dtype, device=weight.device),
            "teacher_head": self.head,
            "teacher_log_sum_exp": torch.empty(input_ids.numel(), device=weight.device),
        }

    def prefetch(self, indices: Any) -> None:
        pass


def count_step(
    student: nn.Module,
    teacher: nn.Module | None,
    config: DistillConfig,
    seq_length: int,
    *,
    live: bool = False,
    micro_batches: int = 2,
) -> LiveBytes:
    """Run micro-batches and an update of `student` with `teacher`, or with cross-entropy alone if it is None."""
    counter = LiveBytes()
    counter.begin("state")
    counter.know(student.parameters())
    targets: Any = None
    losses = Losses() if teacher is not None else Losses(logits="none", cross_entropy=1.0)
    if teacher is not None:
        head = Head.of(teacher)
        targets = LiveTeacher(teacher) if live else Stored(head)
        counter.know(teacher.parameters() if live else [head.weight])
    objective = Objective(student, targets, losses, None, counter)  # type: ignore[arg-type]
    rows = config.micro_batch_rows
    blocks = running_blocks(student, activation_checkpointing=config.activation_checkpointing, compiled=False)
    with blocks, counter, TrainingState(objective.trained(), config) as state:
        for _ in range(micro_batches):
            tokens = torch.zeros(rows, seq_length, dtype=torch.int64, device=next(student.parameters()).device)
            counter.lap("data")
            loss, _ = objective([0] * rows, tokens)
            loss.backward()
            del loss
        counter.begin("optimizer")
        state.update(1e-4)
    return counter


def count_split_step(
    student: Callable[[], nn.Module],
    teacher: Callable[[], nn.Module],
    config: DistillConfig,
    seq_length: int,
    *,
    live: bool = False,
) -> LiveBytes:
    """Two micro-batches of a student, its parts those of the first of many processes, as `minitron.distill.sharding.shard_`
    makes them, on fake tensors; beside is the head of the teacher, or its split layers too if it is `live`. What is there
    before the first micro-batch is a part of its own, the start."""
    counter = LiveBytes()
    with FakeTensorMode(allow_non_fake_inputs=True), counter, counter.resized():
        made = student()
        other = teacher()
        targets: Any = _split_teacher(other) if live else Stored(Head(torch.empty_like(Head.of(other).weight)))
        del other
        objective = Objective(made, targets, Losses(), None, counter)  # type: ignore[arg-type]
        how = config.activation_checkpointing
        with running_blocks(made, activation_checkpointing=how, compiled=False):
            shard_(objective, torch.device("cpu"))
            with TrainingState(objective.trained(), config):
                counter.peaks.clear()  # of models that are whole here before they are split
                counter.begin("start")
                for last in (False, True):
                    begin_micro_batch(objective, last=last)
                    tokens = torch.zeros(config.micro_batch_rows, seq_length, dtype=torch.int64)
                    counter.lap("data")
                    loss, _ = objective([0] * config.micro_batch_rows, tokens)
                    loss.backward()
                    del loss
    return counter


def _split_teacher(model: nn.Module) -> LiveTeacher:
    """A teacher that is split over the processes, read from a fake `model`, whose parameters are put on the meta device."""
    weights = InMemory(model)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(torch.empty_like(parameter, device="meta")))
    with mock.patch.object(nn.Module, "to", lambda module, *_: module):  # it is there already
        return LiveTeacher(model, shard=True, device=torch.device("cpu"), weights=weights)


def architecture(model: nn.Module) -> Architecture:
    return Architecture.from_config(model.config)
