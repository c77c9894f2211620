"""Tokenizers that begin texts as a model was trained, where it was not trained as its tokenizer begins them."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import processors

from minitron.data.special_tokens import around, document_tokens
from minitron.errors import InputError
from minitron.models import load_tokenizer, save_tokenizer


def with_beginning(tokenizer: Any, add_bos: bool | None) -> Any:
    """A transformers tokenizer that puts BOS in front of texts (`add_bos` true) or nothing (false), also after it was saved and
    loaded; `tokenizer` itself if it does so already, or if `add_bos` is None.

    Raises InputError if it has no BOS token, and if it is of a kind whose beginning cannot be changed.
    """
    chosen = document_tokens(tokenizer, add_bos)
    if chosen == document_tokens(tokenizer):
        return tokenizer
    _, after = around(tokenizer)
    changed = copy.deepcopy(tokenizer)
    backend = getattr(changed, "backend_tokenizer", None)
    if backend is not None:
        changed.add_bos_token = add_bos
        changed.init_kwargs["add_bos_token"] = add_bos
        changed.init_kwargs["add_eos_token"] = bool(after)
        backend.post_processor = _post_processor(tokenizer, chosen.begin, after)
        with tempfile.TemporaryDirectory() as folder:
            save_tokenizer(changed, Path(folder))
            if around(load_tokenizer(folder)) == (chosen.begin, after):
                return changed
    raise InputError(
        f"add_bos: {str(add_bos).lower()}, but transformers cannot change how a {type(tokenizer).__name__} begins texts",
        "leave it at auto, or give the teacher a tokenizer.json",
    )


def _post_processor(tokenizer: Any, before: tuple[int, ...], after: tuple[int, ...]) -> Any:
    """What puts these tokens around a text. It keeps the corrections of offsets of a byte-level tokenizer."""
    first, last = (tokenizer.convert_ids_to_tokens([*ids]) for ids in (before, after))
    template = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *(f"{token}:1" for token in first), "$B:1", *(f"{token}:1" for token in last)],
        special_tokens=list(zip((*first, *last), (*before, *after), strict=True)),
    )
    own = json.loads(tokenizer.backend_tokenizer.to_str())["post_processor"] or {}
    kept = [
        processors.ByteLevel(**{name: value for name, value in part.items() if name != "type"})
        for part in own.get("processors", [own])
        if part.get("type") == "ByteLevel"
    ]
    return processors.Sequence([*kept, template]) if kept else template
