"""Reading a GGUF file once, where transformers reads it separately for config, tokenizer and weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from threading import Lock

_lock = Lock()


@contextmanager
def read_once() -> Iterator[None]:
    """Cache each GGUF file's header and gguf's table of tensor names inside the context.

    transformers 5 reads the header, including the whole vocabulary, for the config, for the tokenizer and for the weights, and
    rebuilds the table for every submodule of the model: four fifths of the loading time of a model of 135M parameters. It
    looks up both in the package gguf when it calls them, so replacing them there is enough.
    """
    if find_spec("gguf") is None:  # transformers reports the missing package if it needs it
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
