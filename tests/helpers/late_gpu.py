"""A stand-in for a GPU whose copies are made as late as streams and events allow: what waits for too little sees that they
are not there yet. Its kernels run at once, after the copies to it in their stream. With `early` copies are made at once too:
what is copied or overwritten too soon is seen."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from helpers.step_counts import READS, waits
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

MISSING = -1
CPU = {"cpu", torch.device("cpu")}
# in inference mode the operation below these is not seen
VALUES = {Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__}


class LateGpu:
    """Replaces torch's copies to and from CUDA. Raises AssertionError for what would make the host wait, unless `waits` counts
    it, and for a thread that would use, and so take memory on, the node's first GPU instead of its process's."""

    number = 3  # of this process's GPU

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, early: bool = False) -> None:
        self.main = Stream(self)
        self.waits: Counter[str] | None = None
        self.event_waits = 0  # of the host
        self.recorded: list[tuple[Tensor, Stream]] = []  # as `Tensor.record_stream` was called
        self._on_gpu: dict[int, Tensor] = {}  # by the address of their storage, which is kept so that it stays theirs
        self._pinned: dict[int, Tensor] = {}
        self._thread = threading.local()
        self.set_device(self.number)
        cuda = {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "current_device": lambda: self.number,
            "set_device": self.set_device,
            "Stream": lambda device: Stream(self),
            "Event": lambda: Event(self),
            "stream": self.within,
            "current_stream": lambda device=None: self.current(),
            "synchronize": lambda: self.main.record_event().synchronize(),
        }
        for name, function in cuda.items():
            monkeypatch.setattr(torch.cuda, name, function)
        # a PyTorch that was built for GPUs would ask the driver, which is not there
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
        for name in ("empty", "empty_like"):
            monkeypatch.setattr(torch, name, partial(self._allocated, getattr(torch, name)))
        plain_to, plain_copy = Tensor.to, Tensor.copy_

        def to(tensor: Tensor, *target: Any, non_blocking: bool = False, **named: Any) -> Tensor:
            if self.holds(tensor) and CPU & {*target}:  # into memory that PyTorch pins, if the host does not wait
                return copy_(self._pin(torch.full(tensor.shape, MISSING, dtype=tensor.dtype)), tensor, non_blocking)
            if torch.device("cuda") not in target:
                return plain_to(tensor, *target, non_blocking=non_blocking, **named)
            if self.holds(tensor):
                return tensor
            return copy_(self.holding(torch.full_like(tensor, MISSING)), tensor, non_blocking)

        def copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
            if self.holds(target) == self.holds(source):
                return plain_copy(target, source)
            here = source if self.holds(target) else target
            stream, copy = self.current(), partial(plain_copy, target, source)
            stream.copies.append(copy)
            pinned = _address(here) in self._pinned
            if not (non_blocking and pinned):
                self.wait("this copy" if pinned else "a copy from or to memory that is not pinned")
            if early or not (non_blocking and pinned):
                stream.make([*stream.copies])
            return target

        monkeypatch.setattr(Tensor, "to", to)
        monkeypatch.setattr(Tensor, "copy_", copy_)
        monkeypatch.setattr(Tensor, "is_cuda", property(self.holds))
        monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: self._pin(tensor.clone()))
        monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: self.recorded.append((tensor, stream)))

    def set_device(self, number: int) -> None:
        self._thread.device = number

    def current(self) -> Stream:
        assert getattr(self._thread, "device", 0) == self.number, "this thread uses the node's first GPU"
        return getattr(self._thread, "stream", self.main)

    @contextmanager
    def within(self, stream: Stream) -> Iterator[None]:
        self._thread.stream = stream
        yield
        self._thread.stream = self.main

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Within the block, what is made on this GPU or computed from its tensors is its own too, and the host waits for it."""
        with _Kernels(self), _Host(self):
            yield

    def wait(self, what: str) -> None:
        assert self.waits is not None, f"the host waits for {what}"
        self.waits[what] += 1

    def holding(self, tensor: Tensor) -> Tensor:
        """The tensor, now one of this GPU's."""
        if tensor.numel():
            self._on_gpu.setdefault(_address(tensor), tensor)
        return tensor

    def hold(self, model: nn.Module) -> None:
        for tensor in (*model.parameters(), *model.buffers()):
            self.holding(tensor)

    def holds(self, tensor: Tensor) -> bool:
        return _address(tensor) in self._on_gpu

    def _pin(self, tensor: Tensor) -> Tensor:
        return self._pinned.setdefault(_address(tensor), tensor)

    def _allocated(self, make: Callable[..., Tensor], *shape: Any, pin_memory: bool = False, **named: Any) -> Tensor:
        made = make(*shape, **named)
        return self._pin(made.fill_(MISSING)) if pin_memory else made


class Stream:
    def __init__(self, gpu: LateGpu) -> None:
        self.gpu = gpu
        self.copies: list[partial[Any]] = []  # that nobody has waited for, and waits for other streams between them

    def make(self, copies: Iterable[partial[Any]]) -> None:
        for copy in copies:
            if copy in self.copies:
                self.copies.remove(copy)
                with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.inference_mode():
                    copy()

    def compute(self) -> None:
        """The next kernel has what was copied to the GPU before it."""
        self.make([copy for copy in self.copies if not copy.args or self.gpu.holds(copy.args[0])])

    def record_event(self) -> Event:
        event = Event(self.gpu)
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        self.copies.append(partial(event.make))
        if self is self.gpu.main:  # where kernels follow, which run at once
            self.compute()


class Event:
    def __init__(self, gpu: LateGpu) -> None:
        self.gpu = gpu

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or self.gpu.current()
        self.before = list(self.stream.copies)

    def synchronize(self) -> None:
        self.gpu.event_waits += 1
        self.make()

    def make(self) -> None:
        self.gpu.current()  # checks the thread
        self.stream.make(self.before)


class _Kernels(TorchDispatchMode):
    def __init__(self, gpu: LateGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = named or {}
        read = [leaf for leaf in tree_leaves((arguments, named)) if isinstance(leaf, Tensor) and leaf.numel()]
        if not any(map(self.gpu.holds, read)):
            return function(*arguments, **named)
        name = function._schema.name.split("::")[1]
        assert all(self.gpu.holds(tensor) for tensor in read if tensor.ndim), (
            f"{name} of tensors that are not on the GPU"
        )
        if waits(name, arguments):
            self.gpu.wait(name)
        self.gpu.current().compute()
        return tree_map_only(Tensor, self.gpu.holding, function(*arguments, **named))


class _Host(TorchFunctionMode):
    def __init__(self, gpu: LateGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = named or {}
        if function == Tensor.device.__get__ and self.gpu.holds(arguments[0]):
            return torch.device("cuda")
        if function in READS | VALUES and self.gpu.holds(arguments[0]):
            self.gpu.wait(function.__name__)
        if named.get("device") != torch.device("cuda"):
            return function(*arguments, **named)
        return self.gpu.holding(function(*arguments, **{**named, "device": "cpu"}))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
