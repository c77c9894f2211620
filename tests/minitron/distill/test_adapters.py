"""The teacher's correction by adapters: their initial values, what is trained, and their merge into models that are whole, on
the meta device, or sharded over processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.distilling import CONFIG, load_teacher
from helpers.reading import Reading
from helpers.tiny import DENSE, FAMILIES, architecture, model
from peft import LoraConfig
from peft.tuners.lora import LoraModel

from minitron.data import Rows
from minitron.distill import Losses, distill
from minitron.distill.trainable import trainable, trained_parameters
from minitron.errors import NonFiniteError
from minitron.meta_models import open_model, write_model
from minitron.models import final_hidden, load_model

NEXT_TOKEN = Losses(logits="none", cross_entropy=1.0)
RANK = 5  # which two processes share unequally
LORA = replace(
    CONFIG, steps=6, batch_rows=5, micro_batch_rows=1, peak_lr=5e-3, shard=True, checkpoint_every=2, evaluate_every=6
)


def correct(folder, result=None, from_files=True, config=LORA, dtype=torch.float32, **options):
    """Correct the teacher by adapters; returns the losses by step, the outputs before the adapters were merged, the number of
    values that were read from its files, and the corrected model. result: the folder to write it to."""
    losses, tokens = {}, Rows.open(str(folder / "rows"), "heldout").take(range(2))
    evaluated = {}
    weights = None
    if from_files:
        model, weights = open_model(folder / "teacher", dtype)
    else:
        model = load_model(folder / "teacher", dtype)
    reading = Reading(weights) if weights else None

    def evaluate(done, working):
        evaluated[done] = final_hidden(working, tokens)

    with trainable(model, "lora", lora_rank=RANK, weights=reading) as source:
        distill(
            model,
            None,
            Rows.open(str(folder / "rows"), "train"),
            config,
            losses=NEXT_TOKEN,
            key="k",
            report=lambda step: losses.update({step.step: step.loss}),
            evaluate=evaluate,
            weights=source,
            **options,
        )
    if weights:
        write_model(model, weights, dtype, result)
    return losses, evaluated, reading and reading.values, model


WORKER = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
import torch.distributed as dist
from pathlib import Path
import test_adapters as t
from helpers.forking import fork_two
from minitron.processes import is_sharded
folder, out = Path(sys.argv[2]), Path(sys.argv[3])
rank = fork_two()
dist.init_process_group("gloo", rank=rank, world_size=2)
(out / "result").mkdir(exist_ok=True)
begun, _, read, _ = t.correct(folder, checkpoints=str(out / "both"), until=3)
ended, _, _, model = t.correct(folder, out / "result" if rank == 0 else None, checkpoints=str(out / "both"))
assert is_sharded(model)
rest, _, _, _ = t.correct(folder, checkpoints=str(out / "one-two"))
(out / f"{rank}.json").write_text(json.dumps([begun, ended, rest, read]))
dist.destroy_process_group()
"""


def _two_processes(folder, out, port):
    paths = json.dumps([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", WORKER, paths, str(folder), str(out)]
    workers = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert workers.returncode == 0, workers.stderr
    said = [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]
    return [(*({int(step): loss for step, loss in curve.items()} for curve in curves), read) for *curves, read in said]


def test_the_processes_of_a_sharded_model_train_the_same_adapters_as_one(material, tmp_path, free_port):
    alone, _, _, corrected = correct(material, from_files=False)
    (tmp_path / "one").mkdir()
    assert correct(material, tmp_path / "one")[0] == alone  # bit for bit
    _same(load_model(tmp_path / "one"), corrected, atol=0)
    correct(material, checkpoints=str(tmp_path / "one-two"), until=3)
    size = sum(parameter.numel() for parameter in corrected.parameters())
    for begun, ended, rest, read in _two_processes(material, tmp_path, free_port()):
        assert begun | ended == pytest.approx(alone, rel=1e-5)
        assert list(ended) == [4, 5, 6]
        assert rest == pytest.approx({step: alone[step] for step in (4, 5, 6)}, rel=1e-5)  # went on with one process's
        assert read == pytest.approx(size / 2, rel=0.02)
    _same(load_model(tmp_path / "result"), corrected, atol=1e-4)


def _same(model, expected, atol):
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in expected.named_parameters()]
    for name, parameter in expected.named_parameters():
        assert torch.allclose(model.get_parameter(name), parameter, rtol=0, atol=atol), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_layers_matrices_change_and_the_merged_model_computes_the_same(material, dtype):
    before = load_teacher(material).to(dtype)
    config = replace(LORA, steps=12, peak_lr=2e-2)
    losses, evaluated, _, model = correct(material, from_files=False, config=config, dtype=dtype)
    assert losses[12] < losses[1]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert changed == {name for name, p in before.model.layers.named_parameters("model.layers") if p.ndim == 2}
    assert all(parameter.dtype == dtype and parameter.requires_grad for parameter in model.parameters())
    tokens = Rows.open(str(material / "rows"), "heldout").take(range(2))
    with torch.no_grad():
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
        assert torch.allclose(final_hidden(model, tokens), evaluated[12], atol=tolerance)


def test_adapters_begin_with_the_values_of_pefts_initialisation(material):
    expected = load_teacher(material)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names, lora_dropout=0.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LoraModel(expected, config, "correction")
    model, state = load_teacher(material), torch.get_rng_state()
    with trainable(model, "lora", lora_rank=RANK):
        _same(model, expected, atol=1e-7)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == {
            name for name, p in expected.named_parameters() if p.requires_grad
        }
    assert torch.equal(torch.get_rng_state(), state)
    _same(model, load_teacher(material), atol=0)


def test_after_an_error_adapters_are_dropped(material):
    model = load_teacher(material)
    with pytest.raises(NonFiniteError):
        _diverge(model)
    _same(model, load_teacher(material), atol=0)


def _diverge(model):
    with trainable(model, "lora", lora_rank=RANK):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(torch.nan)
        raise NonFiniteError("loss nan", "lower the learning rate")


def trained(of, method, **settings):
    """Number of parameters that require a gradient."""
    with trainable(of, method, **settings):
        return sum(parameter.numel() for parameter in of.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_number_of_trained_parameters_is_known_without_a_model(family):
    own = model(family)
    shape = architecture(own)
    assert trained_parameters(shape, "full") == trained(own, "full")
    assert trained_parameters(shape, "norms") == trained(own, "norms")
    for rank in (2, 16) if family in DENSE else ():
        assert trained_parameters(shape, "lora", lora_rank=rank) == trained(own, "lora", lora_rank=rank)
