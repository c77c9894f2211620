"""Reading a GGUF file once where transformers reads it once for each thing that it wants of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from threading import Lock

_lock = Lock()


@contextmanager
def read_once() -> Iterator[None]:
    """Inside the block each GGUF file's header is read once, and gguf's table of tensor names made once for each architecture.

    transformers 5 reads the header, all of the vocabulary with it, for the config, for the tokenizer and for the weights,
    and makes that table again for every submodule of the model: four fifths of the time of a model of 135M parameters. It
    takes both from the package gguf when it calls them; nothing of a file is changed by reading it.
    """
    if find_spec("gguf") is None:  # transformers says what is missing, if a GGUF file is what is read
        yield
        return
    import gguf

    with _lock:
        reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
        gguf.GGUFReader = lru_cache(maxsize=1)(reader)
        gguf.get_tensor_name_map = lru_cache(maxsize=1)(names)
        try:
            yield
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map = reader, names
