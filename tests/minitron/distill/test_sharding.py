"""A student that is sharded over processes: its training, its communication, and its checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.distilling import (
    CHANNELS,
    CONFIG,
    INTERMEDIATE,
    live_teacher,
    pruned_student,
)
from helpers.graphs import counted_graphs
from safetensors.torch import load_file

from minitron import storage
from minitron.data import Rows
from minitron.distill import LiveTeacher, Losses, distill
from minitron.errors import InputError
from minitron.evaluation import heldout_metrics
from minitron.meta_models import open_model
from minitron.models import load_model

# 5 rows for 2 processes: unequal parts, with which collective operations have to work
SHARDED = replace(CONFIG, batch_rows=5, micro_batch_rows=1, shard=True, evaluate_every=5, checkpoint_every=3)


def train(folder, config=SHARDED, from_files=False, **options):
    """Train with every loss; returns the losses by step, the held-out losses and the student.

    from_files: no process has a whole student or teacher in memory.
    """
    losses, heldout = {}, {}
    rows = Rows.open(str(folder / "rows"), "heldout")
    if from_files:
        student, options["weights"] = open_model(folder / "student", torch.float32)
        teacher, weights = open_model(folder / "teacher", torch.float32)
        targets = LiveTeacher(teacher, shard=True, device=torch.device("cpu"), weights=weights)
    else:
        student, targets = pruned_student(folder), live_teacher(folder)
    student = distill(
        student,
        targets,
        Rows.open(str(folder / "rows"), "train"),
        config,
        losses=INTERMEDIATE,
        channels=CHANNELS,
        key="k",
        report=lambda step: losses.update({step.step: step.loss}),
        evaluate=lambda done, model: heldout.update({done: _heldout(model, rows).loss}),
        **options,
    )
    return losses, heldout, student


def train_with_fp8(folder):
    """Train the teacher itself, in bfloat16 and with FP8 products; returns the losses by step."""
    losses = {}
    distill(
        load_model(folder / "teacher").to(torch.bfloat16),
        None,
        Rows.open(str(folder / "rows"), "train"),
        replace(SHARDED, steps=3, fp8="tensorwise"),
        losses=Losses(logits="none", cross_entropy=1.0),
        report=lambda step: losses.update({step.step: step.loss}),
    )
    return losses


def train_compiled(folder):
    """Train in compiled layers, some of which is computed again; returns the losses by step and the number of graphs."""
    config = replace(SHARDED, steps=2, evaluate_every=0, compile=True, activation_checkpointing="selective")
    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        graphs = counted_graphs(patch)
        losses, _, _ = train(folder, config, from_files=True)
    return losses, len(graphs)


def _heldout(model, rows, together=None):
    """On three batches, of which two processes have an unequal number."""
    together = dist.is_initialized() if together is None else together
    return heldout_metrics(model, rows.take(range(8)), batch_rows=3, together=together)


WORKER = """
import json, os, sys
sys.path[:0] = json.loads(sys.argv[1])
import torch, torch.distributed as dist
from pathlib import Path
from dataclasses import replace
from safetensors.torch import save_file
from collections import Counter
import test_sharding as t
from helpers.counting import Counting
from helpers.forking import fork_two
from helpers.step_counts import StepCounts
from minitron.distill import sharding
from minitron.meta_models import open_model, write_model
sent = Counter()
folder, out, until = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
rank = fork_two()
dist.init_process_group("gloo", rank=rank, world_size=2)
part, _, _ = t.train(folder, from_files=True, checkpoints=out, until=until)
results = [part]
if until < t.SHARDED.steps:
    whole, heldout, student = t.train(folder)
    save_file(dict(student.named_parameters()), f"{out}-{rank}.safetensors")
    rows = t.Rows.open(str(folder / "rows"), "heldout")
    measured, runs = t._heldout(student, rows, together=False), []
    handle = student.get_decoder().register_forward_hook(lambda *_: runs.append(1))
    assert t._heldout(student, rows) == measured  # bit for bit
    assert len(runs) == (2, 1)[rank]  # of the three batches
    handle.remove()
    with Counting(sent):
        t.train(folder, replace(t.SHARDED, steps=1, batch_rows=6, evaluate_every=0), checkpoints=f"{out}-counted")
    counts = {name: count for name, count in sent.items() if name.startswith("c10d.")}
    fp8 = t.train_with_fp8(folder)
    compiled, graphs = t.train_compiled(folder)
    with StepCounts() as steps:
        t.train(folder, replace(t.SHARDED, steps=2, evaluate_every=0))
    optimizer = steps.moved[1]["optimizer"] / sum(parameter.numel() for parameter in student.parameters())
    waits = steps.waits[1].total()
    # as on two nodes of one process each, with a copy of the student in either
    sharding.mesh_shape = lambda device, size: (2, 1)
    copies, _, student = t.train(folder, from_files=True, checkpoints=f"{out}-copies")
    result = Path(f"{out}-{rank}-result")
    if rank == 0:
        result.mkdir()
    weights = open_model(folder / "student", torch.float32).weights
    write_model(student, weights, torch.float32, result if rank == 0 else None)
    results += [whole, heldout, copies, fp8, compiled, counts, optimizer, waits, graphs]
Path(f"{out}-{until}-{rank}.json").write_text(json.dumps(results))
dist.destroy_process_group()
"""


def _two_processes(folder, out, until, port):
    """Train a sharded student in two processes until a step; returns what each has written, of which the first is the losses by
    step. If the training is not at its end, each has also done what `WORKER` does then."""
    paths = json.dumps([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", WORKER, paths, str(folder), str(out), str(until)]
    workers = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert workers.returncode == 0, workers.stderr
    return [json.loads(Path(f"{out}-{until}-{rank}.json").read_text()) for rank in range(2)]


def _bytes(checkpoint):
    return sum(entry["bytes"] for entry in storage.manifest(checkpoint)["files"].values())


def test_a_sharded_student_trains_the_same_and_its_checkpoints_load_in_any_number_of_processes(
    material,
    tmp_path,
    free_port,
):
    pruned_student(material).save_pretrained(material / "student")
    alone, heldout, student = train(material)
    assert train(material, from_files=True)[:2] == (alone, heldout)  # bit for bit
    out = tmp_path / "checkpoints"
    first = _two_processes(material, out, 5, free_port())
    written = load_model(f"{out}-0-result")
    rounded = train_with_fp8(material)
    for rank, (part, whole, measured, copies, fp8, compiled, counts, optimizer, waits, graphs) in enumerate(first):
        assert list(whole.values()) == pytest.approx(list(alone.values()), rel=1e-5)
        assert list(measured.values()) == pytest.approx(list(heldout.values()), rel=1e-5)
        assert part == {step: whole[step] for step in map(str, range(1, 6))}  # bit for bit
        assert list(copies.values()) == pytest.approx(list(alone.values()), rel=1e-5)
        assert list(fp8.values()) == pytest.approx(list(rounded.values()), rel=1e-3)
        assert list(compiled.values()) == pytest.approx([alone[1], alone[2]], rel=1e-5)
        assert graphs == 2  # of the student's layers and of the teacher's
        weights = load_file(f"{out}-{rank}.safetensors")
        for name, parameter in student.named_parameters():
            assert torch.allclose(weights[name], parameter, atol=1e-4)
            assert torch.allclose(written.get_parameter(name), parameter, atol=1e-4)
        # in each of three micro-batches the four layers, the projection, and the tied embedding with the last norm, of which
        # the latter are kept for the backward pass
        assert counts["c10d._reduce_scatter_base_.default"] == 3 * 6
        assert counts["c10d._allgather_base_.default"] == 3 * (2 * 5 + 1)
        # a half of AdamW's 32 bytes per parameter, of 4 for the norm of the gradient and of 8 for clipping
        assert optimizer == pytest.approx(22, rel=0.05)
        assert waits == 1
    # of copies one is saved, and any number of processes reads it
    losses, _, resumed = train(material, checkpoints=f"{out}-copies")
    assert not losses  # it was complete
    for name, parameter in resumed.named_parameters():
        assert torch.equal(written.get_parameter(name), parameter)
    assert _bytes(f"{out}-copies/step-00000012") == pytest.approx(_bytes(f"{out}/step-00000005"), rel=0.1)
    # both processes wrote a part of the state
    files = storage.manifest(str(out / "step-00000005"))["files"]
    assert list(files) == ["layout.json", "shard-00001.safetensors", "shard-00002.safetensors"]
    sizes = [entry["bytes"] for name, entry in files.items() if name.startswith("shard")]
    assert max(sizes) < 1.1 * min(sizes)
    # from two processes to one and back to two
    middle, _, _ = train(material, checkpoints=str(out), until=8)
    for (last,) in _two_processes(material, out, 12, free_port()):
        rest = {int(step): loss for step, loss in last.items()}
        assert list(middle) + list(rest) == list(range(6, 13))
        for step, loss in (middle | rest).items():
            assert loss == pytest.approx(alone[step], rel=1e-5)


def test_sharding_a_student_of_several_dtypes_is_refused(material):
    from minitron.distill.losses.objective import Objective
    from minitron.distill.sharding import shard_

    student = pruned_student(material)
    student.model.norm.to(torch.bfloat16)
    with pytest.raises(InputError, match=r"torch.bfloat16 and torch.float32"):
        shard_(Objective(student, live_teacher(material), INTERMEDIATE, CHANNELS), torch.device("cpu"))
