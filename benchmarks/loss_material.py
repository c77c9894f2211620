"""Hidden states and heads for the measurements of logit losses: of a small model on text, or random ones with the
sizes of `benchmarks.shapes.RANDOM`.

Each is a dict of bfloat16 tensors on the device: hidden states `hs` and `ht` [tokens, d] and heads `ws` and `wt` [V, d] of a
student and its teacher.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.materials import MODEL
from benchmarks.shapes import RANDOM
from minitron.architecture import Architecture
from minitron.data import TextSource, documents
from minitron.device import device
from minitron.logits import Head
from minitron.models import final_hidden, layers_of, load_source

Material = dict[str, Tensor]

STUDENTS = {"0.4 % noise": (0.004, 0), "2 layers dropped": (0.0, 2), "8 layers dropped": (0.0, 8)}
NOISES = (0.02, 0.3, 1.0)  # noise of the random students, relative to their teacher
NOISE_SEED = 0
LOGIT_DEVIATION = 3.0


def text_students(tokens: int) -> dict[str, Material]:
    """SmolLM2-135M on text from the installed packages' documentation, and students at three distances from it."""
    model, tokenizer = load_source(MODEL)
    ids: list[int] = []
    for document in documents(TextSource("python-docs")):
        if len(ids) >= tokens:
            break
        ids += tokenizer(document.text)["input_ids"]
    rows = torch.tensor(ids[:tokens]).view(-1, min(tokens, 256)).to(device())
    original = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    layers = layers_of(model)
    every, config = list(layers), model.config
    model.to(device(), torch.bfloat16).eval()

    def hidden() -> Tensor:
        with torch.no_grad():
            return torch.cat([final_hidden(model, part) for part in rows.split(2)]).flatten(0, 1)

    ht, wt = hidden(), Head.of(model).weight.detach().clone()
    students = {}
    for name, (noise, dropped) in STUDENTS.items():
        draw = torch.Generator().manual_seed(NOISE_SEED)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                value = original[key]
                parameter.copy_(value + noise * value.std() * torch.randn(value.shape, generator=draw))
        start = len(every) // 2 - dropped // 2
        del layers[start : start + dropped]
        config.num_hidden_layers = len(layers)
        students[name] = {"hs": hidden(), "ws": Head.of(model).weight.detach().clone(), "ht": ht, "wt": wt}
        del layers[:]
        layers.extend(every)
    return students


def random_pair(shapes: str, tokens: int) -> Material:
    """A student and a teacher with independent random values, with the sizes of `RANDOM[shapes]`."""
    draw = torch.Generator(device()).manual_seed(NOISE_SEED)
    teacher, student = RANDOM[shapes]
    hs, ws = _random_logits(tokens, student, draw)
    ht, wt = _random_logits(tokens, teacher, draw)
    return {name: tensor.bfloat16() for name, tensor in (("hs", hs), ("ws", ws), ("ht", ht), ("wt", wt))}


def noisy_pair(shapes: str, tokens: int, noise: float) -> Material:
    """A teacher, and a student of the same width that is the teacher with `noise`, with less noise in the head."""
    draw = torch.Generator(device()).manual_seed(NOISE_SEED)
    ht, wt = _random_logits(tokens, RANDOM[shapes][1], draw)
    hs = ht + noise * torch.randn(ht.shape, generator=draw, device=device())
    ws = wt + 0.3 * noise * wt.std() * torch.randn(wt.shape, generator=draw, device=device())
    return {name: tensor.bfloat16() for name, tensor in (("hs", hs), ("ws", ws), ("ht", ht), ("wt", wt))}


def _random_logits(tokens: int, shape: Architecture, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hidden states and a head whose logits have the standard deviation LOGIT_DEVIATION."""
    width = shape.hidden_size
    hidden = torch.randn(tokens, width, generator=draw, device=device())
    head = torch.randn(shape.vocab_size, width, generator=draw, device=device())
    return hidden, head.mul_(LOGIT_DEVIATION / width**0.5)
