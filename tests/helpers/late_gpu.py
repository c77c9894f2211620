"""A stand-in for a GPU whose copies are made as late as streams and events allow: what waits for too little sees that they
are not there yet."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

MISSING = -1


class LateGpu:
    """Replaces torch's copies to and from CUDA. Raises AssertionError for a copy that would make the host wait, and for a
    thread that would use, and so take memory on, the node's first GPU instead of its process's."""

    number = 3  # of this process's GPU

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.main = Stream(self)
        self.recorded: list[tuple[Tensor, Stream]] = []  # as `Tensor.record_stream` was called
        self._on_gpu: dict[int, Tensor] = {}  # by the address of their storage, which is kept so that it stays theirs
        self._pinned: dict[int, Tensor] = {}
        self._thread = threading.local()
        self.set_device(self.number)
        cuda = {
            "is_available": lambda: True,
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
        for name in ("empty", "empty_like"):
            monkeypatch.setattr(torch, name, partial(self._allocated, getattr(torch, name)))
        plain_to, plain_copy = Tensor.to, Tensor.copy_

        def to(tensor: Tensor, *target: Any, non_blocking: bool = False, **named: Any) -> Tensor:
            if torch.device("cuda") not in target:
                return plain_to(tensor, *target, non_blocking=non_blocking, **named)
            return copy_(self.holding(torch.full_like(tensor, MISSING)), tensor, non_blocking)

        def copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
            if self.holds(target) == self.holds(source):
                return plain_copy(target, source)
            here = source if self.holds(target) else target
            assert non_blocking, "the host waits for this copy"
            assert _address(here) in self._pinned, "the host waits for a copy from or to memory that is not pinned"
            self.current().copies.append(lambda: plain_copy(target, source))
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

    def holding(self, tensor: Tensor) -> Tensor:
        """The tensor, now one of this GPU's."""
        return self._on_gpu.setdefault(_address(tensor), tensor)

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
        self.copies: list[Callable[[], Tensor]] = []  # that nobody has waited for

    def record_event(self) -> Event:
        event = Event(self.gpu)
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        event.synchronize()


class Event:
    def __init__(self, gpu: LateGpu) -> None:
        self.gpu = gpu

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or self.gpu.current()
        self.before = list(self.stream.copies)

    def synchronize(self) -> None:
        self.gpu.current()  # checks the thread
        for copy in self.before:
            if copy in self.stream.copies:
                self.stream.copies.remove(copy)
                copy()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
