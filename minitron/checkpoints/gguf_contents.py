"""Checks that a GGUF file's tensors are those of the model in its header: transformers leaves out all others without a word."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from minitron.architecture import Architecture
from minitron.checkpoints.contents import Difference, expected_shapes
from minitron.checkpoints.gguf_header import GgufHeader
from minitron.checkpoints.gguf_rope import FACTORS, ORIGINAL
from minitron.errors import InputError

HARMLESS = re.compile(r"blk\.\d+\.attn_rot_embd\.weight")  # rotary frequencies, which follow from the header
BLOCK = re.compile(r"blk\.(\d+)\.")
EXPERTS = "mlp.experts."  # one tensor for all experts, without a suffix in transformers' name
FUSED = f"{EXPERTS}gate_up_proj"
HALVES = (f"{EXPERTS}gate_proj", f"{EXPERTS}up_proj")  # what llama.cpp stores FUSED as
SUFFIXES = (".weight", ".bias")
AGAIN = "download or convert the file again"


def check_tensors(header: GgufHeader, architecture: Architecture, where: str) -> None:
    """Raise InputError, with the likely cause, unless a GGUF file has every parameter of the model in its header in its shape,
    and nothing else. The factors of RoPE are left to `minitron.checkpoints.gguf_rope`.

    where: the file's name in errors.
    """
    expected = dict(_stored(header.architecture, architecture))
    difference = Difference(
        missing=tuple(name for name in expected if name not in header.tensors),
        unexpected=tuple(
            name for name in header.tensors if name not in expected and name != FACTORS and not HARMLESS.fullmatch(name)
        ),
        shapes=tuple(
            f"{name} is {list(header.tensors[name].shape)}, not {list(shape)}"
            for name, shape in expected.items()
            if name in header.tensors and header.tensors[name].shape != shape
        ),
    )
    if difference:
        reason, remedy = _explained(difference, architecture, header)
        raise InputError(
            f"{where}: the tensors are not those of the model in the file's header: {difference}. {reason}", remedy
        )


def _stored(gguf_architecture: str, architecture: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name in a GGUF file, shape) of each parameter; one that llama.cpp has no name for keeps transformers'."""
    import gguf

    [kind] = [kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == gguf_architecture]
    names: Mapping[str, str] = gguf.get_tensor_name_map(kind, architecture.num_layers)
    for parameter, shape in expected_shapes(architecture, ()).items():
        for name, part in _parts(parameter, shape):
            stem, suffix = name, ".weight" if EXPERTS in name else ""
            for end in SUFFIXES:
                if name.endswith(end):
                    stem, suffix = name.removesuffix(end), end
            yield (names[stem] + suffix if stem in names else name), part


def _parts(parameter: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    if not parameter.endswith(FUSED):
        yield parameter, shape
        return
    experts, rows, columns = shape
    for half in HALVES:
        yield parameter.removesuffix(FUSED) + half, (experts, rows // len(HALVES), columns)


def _explained(difference: Difference, architecture: Architecture, header: GgufHeader) -> tuple[str, str]:
    """The likely cause, and the remedy."""
    blocks = 1 + max((int(match[1]) for name in header.tensors if (match := BLOCK.match(name))), default=-1)
    if blocks != architecture.num_layers:
        return f"They make {blocks} layers, but the header's block_count is {architecture.num_layers}", AGAIN
    if not difference.unexpected and not difference.shapes:
        return "The file is not complete", AGAIN
    if difference.missing or difference.shapes:
        return "The header is another model's, or transformers does not read files of this model", ORIGINAL
    what = "biases" if all(name.endswith(".bias") for name in difference.unexpected) else "tensors"
    return (
        f"transformers would leave out these {what} of a {header.architecture} model, which is then another",
        ORIGINAL,
    )
