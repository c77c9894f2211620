"""The loss against float64, and the loop's promises: exact resume, any number of processes, named failures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from torch.nn import functional

from minitron import estimate_importance, linear_kl_div, prune, storage
from minitron.data import Rows, TextSource, pack
from minitron.distill import DistillConfig, LiveTeacher, StoredTeacher, distill, store_hidden
from minitron.distill.schedule import learning_rate
from minitron.errors import NonFiniteError, StorageError
from minitron.models import final_hidden, load_model, load_tokenizer

CONFIG = DistillConfig(steps=12, batch_rows=4, micro_batch_rows=2, peak_lr=2e-3, min_lr=1e-4, warmup_steps=2)


def _reference(hs, ws, ht, wt, temperature):
    student = functional.log_softmax(hs.double() @ ws.double().T / temperature, dim=-1)
    teacher = functional.log_softmax(ht.double() @ wt.double().T / temperature, dim=-1)
    return temperature**2 * functional.kl_div(student, teacher, log_target=True, reduction="batchmean")


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("tokens", [7, 256, 700], ids=["part of a chunk", "one chunk", "chunks and a rest"])
def test_linear_kl_div_equals_float64(tokens, temperature):
    torch.manual_seed(0)
    hs, ws = torch.randn(tokens, 24, requires_grad=True), torch.randn(300, 24, requires_grad=True)
    ht, wt = torch.randn(tokens, 40), torch.randn(300, 40) * 0.3
    loss = linear_kl_div(hs, ws, ht, wt, temperature)
    grads = torch.autograd.grad(3 * loss, [hs, ws])
    expected = _reference(hs, ws, ht, wt, temperature)
    wanted = torch.autograd.grad(3 * expected, [hs, ws])
    assert abs(loss.item() - expected.item()) < 1e-5 * expected.item()
    for actual, reference in zip(grads, wanted, strict=True):
        assert torch.allclose(actual, reference.float(), rtol=1e-3, atol=1e-6)


def test_bf16_gradient_stays_exact_when_the_student_is_close():
    # Rounding the logits to bf16 before the difference of probabilities is what makes this gradient wrong elsewhere.
    torch.manual_seed(0)
    ht, wt = torch.randn(300, 64).bfloat16(), torch.randn(2000, 64).bfloat16() * 0.5
    hs = (ht.float() + 0.02 * torch.randn(300, 64)).bfloat16().requires_grad_(True)
    ws = wt.clone().requires_grad_(True)
    loss = linear_kl_div(hs, ws, ht, wt)
    grads = torch.autograd.grad(loss, [hs, ws])
    d_hs, d_ws = hs.detach().double().requires_grad_(True), ws.detach().double().requires_grad_(True)
    wanted = torch.autograd.grad(_reference(d_hs, d_ws, ht, wt, 1.0), [d_hs, d_ws])
    rounded_student = functional.log_softmax(hs.detach() @ ws.detach().T, -1).float().exp()
    rounded_teacher = functional.log_softmax(ht @ wt.T, -1).float().exp()
    usual = ((rounded_student - rounded_teacher) / 300) @ ws.detach().float()
    error = ((grads[0].double() - wanted[0]).norm() / wanted[0].norm()).item()
    usual_error = ((usual.double() - wanted[0]).norm() / wanted[0].norm()).item()
    assert error < 0.01
    assert ((grads[1].double() - wanted[1]).norm() / wanted[1].norm()).item() < 0.01
    assert usual_error > 8 * error


def test_a_tied_head_gets_the_gradient_of_both_its_uses():
    model, tokens = tiny.model(), tiny.rows(2)
    teacher = tiny.model(seed=5)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        target = final_hidden(teacher, tokens).flatten(0, 1)
    loss = linear_kl_div(final_hidden(model, tokens).flatten(0, 1), head, target, teacher.lm_head.weight.detach())
    (actual,) = torch.autograd.grad(loss, [head])
    logits = model(tokens).logits.flatten(0, 1)
    dense = functional.kl_div(
        functional.log_softmax(logits, -1),
        functional.log_softmax(teacher(tokens).logits.detach().flatten(0, 1), -1),
        log_target=True,
        reduction="batchmean",
    )
    (expected,) = torch.autograd.grad(dense, [head])
    assert torch.allclose(actual, expected, rtol=1e-3, atol=1e-6)


def test_learning_rate_warms_up_and_ends_at_the_minimum():
    rates = [learning_rate(s, total_steps=10, peak=1.0, minimum=0.1, warmup_steps=2) for s in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[2:], rates[3:], strict=False))


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A trained teacher, its rows, its stored targets and its scores."""
    folder = tmp_path_factory.mktemp("distill")
    teacher = tiny.checkpoint(folder / "teacher")
    source = TextSource("jsonl", path=str(tiny.corpus(folder / "text.jsonl")))
    rows = pack(source, load_tokenizer(teacher), str(folder / "rows"), seq_length=32, train_rows=80, heldout_rows=8)
    model = load_model(teacher)
    store_hidden(lambda: model, rows, str(folder / "hidden"), key="k")
    scores = estimate_importance(model, rows.take(range(8)))
    scores.save(folder / "scores.safetensors")
    return folder


def _teacher(folder):
    return load_model(folder / "teacher")


def _student(folder, seed=0):
    teacher = _teacher(folder)
    from minitron import ImportanceScores

    target = replace(tiny.architecture(teacher), num_layers=4, hidden_size=36, intermediate_size=48)
    return prune(teacher, target, ImportanceScores.load(folder / "scores.safetensors"))


def _stored(folder):
    return StoredTeacher(str(folder / "hidden"), _teacher(folder).get_output_embeddings().weight, "k")


def _run(folder, config=CONFIG, targets=None, **options):
    losses = []
    student = distill(
        _student(folder),
        targets or _stored(folder),
        Rows.open(str(folder / "rows"), "train"),
        config,
        report=lambda step: losses.append((step.step, step.loss)),
        **options,
    )
    return losses, student


def test_stored_targets_are_bit_equal_to_the_live_teacher(material):
    rows = Rows.open(str(material / "rows"), "train")
    live = LiveTeacher(_teacher(material))
    indices = [70, 3, 64, 63]
    tokens = rows.take(indices)
    stored = _stored(material).hidden(indices, tokens)
    by_fours = {i: live.hidden([], rows.take(range(i // 4 * 4, i // 4 * 4 + 4)))[i % 4] for i in indices}
    assert all(torch.equal(stored[n], by_fours[i]) for n, i in enumerate(indices))


def test_distillation_brings_the_student_closer(material):
    losses, _ = _run(material, replace(CONFIG, steps=40))
    assert sum(loss for _, loss in losses[-5:]) < 0.7 * sum(loss for _, loss in losses[:5])


def test_stored_and_live_teacher_train_alike(material):
    stored, _ = _run(material)
    live, _ = _run(material, targets=LiveTeacher(_teacher(material)))
    assert [loss for _, loss in stored] == pytest.approx([loss for _, loss in live], rel=1e-4)


def test_teacher_runs_once_per_row_and_a_killed_store_goes_on(material, tmp_path):
    rows = Rows.open(str(material / "rows"), "train")
    model = _teacher(material)
    folder = str(tmp_path / "hidden")
    assert store_hidden(lambda: model, rows, folder, key="k") == len(rows) == 80
    storage.remove(storage.join(folder, "index.json"))  # as if killed before the end,
    storage.remove(storage.join(folder, "shard-00001"))  # with the last shard missing
    assert store_hidden(lambda: model, rows, folder, key="k") == 16
    assert store_hidden(lambda: pytest.fail("the teacher was loaded again"), rows, folder, key="k") == 0


def test_a_store_of_another_teacher_or_a_damaged_one_is_refused(material, tmp_path):
    head = _teacher(material).get_output_embeddings().weight
    with pytest.raises(StorageError, match="holds the store k, not other"):
        StoredTeacher(str(material / "hidden"), head, "other")
    rows = Rows.open(str(material / "rows"), "train")
    store_hidden(lambda: _teacher(material), rows, str(tmp_path), key="k")
    shard = tmp_path / "shard-00000" / "hidden.safetensors"
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(StorageError, match=r"shard-00000.hidden.safetensors: SHA-256"):
        StoredTeacher(str(tmp_path), head, "k").hidden([0], rows.take([0]))


def test_interrupted_run_is_bit_identical(material, tmp_path):
    whole, expected = _run(material)
    config = replace(CONFIG, checkpoint_every=3)
    # stopped at a different place each time, so checkpoints at 3, 6 and 9 are all resumed from
    pieces = []
    for stop in (4, 8, 11, 99):

        class Stop(Exception):
            pass

        def report(step, stop=stop):
            if step.step > stop:
                raise Stop
            pieces.append((step.step, step.loss))

        try:
            student = distill(
                _student(material),
                _stored(material),
                Rows.open(str(material / "rows"), "train"),
                config,
                checkpoints=str(tmp_path),
                key="k",
                report=report,
            )
        except Stop:
            continue
    assert dict(pieces) == dict(whole)
    for name, value in expected.state_dict().items():
        assert torch.equal(student.state_dict()[name], value)


WORKER = """
import json, os, sys
sys.path[:0] = json.loads(sys.argv[1])
import torch, torch.distributed as dist
from pathlib import Path
from dataclasses import replace
import test_distill as t
folder, out, world, kill = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
torch.set_num_threads(1)
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", rank=rank, world_size=world)
def report(step):
    if rank == 0:
        with open(out + ".jsonl", "a") as file:
            file.write(json.dumps([step.step, step.loss]) + "\\n")
    if kill and step.step == kill and rank == world - 1:
        os.kill(os.getpid(), 9)
t.distill(t._student(folder), t._stored(folder), t.Rows.open(str(folder / "rows"), "train"),
          replace(t.CONFIG, checkpoint_every=3), checkpoints=out, key="k", report=report)
dist.destroy_process_group()
"""


def _processes(material, out, world, port, kill=0):
    """Run the loop in `world` processes; with `kill`, the last one dies by SIGKILL after that step."""
    paths = json.dumps([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, paths, str(material), str(out), str(world), str(kill)],
            env={**environment, "RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(world)
    ]
    codes = []
    for worker in reversed(workers):
        try:
            _, errors = worker.communicate(timeout=20 if codes and codes[0] else 120)
        except subprocess.TimeoutExpired:
            worker.kill()
            errors = worker.communicate()[1]
        codes.append(worker.returncode)
        if not kill:
            assert worker.returncode == 0, errors.decode()
    lines = Path(f"{out}.jsonl").read_text().splitlines()
    return dict(json.loads(line) for line in lines), codes


def test_two_processes_train_as_one_and_survive_a_kill(material, tmp_path, free_port):
    alone, _ = _run(material)
    together, _ = _processes(material, tmp_path / "together", 2, free_port())
    assert list(together) == list(range(1, 13))
    assert list(together.values()) == pytest.approx([loss for _, loss in alone], rel=1e-4)
    # killed with -9 after step 8: goes on from the checkpoint of step 6, bit for bit
    _, codes = _processes(material, tmp_path / "killed", 2, free_port(), kill=8)
    assert codes[0] == -signal.SIGKILL
    resumed, _ = _processes(material, tmp_path / "killed", 2, free_port())
    assert resumed == together
    # and from two processes to one
    _processes(material, tmp_path / "shrunk", 2, free_port(), kill=8)
    shrunk, _ = _processes(material, tmp_path / "shrunk", 1, free_port())
    assert list(shrunk.values()) == pytest.approx(list(together.values()), rel=1e-4)


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(material, tmp_path, caplog):
    config = replace(CONFIG, checkpoint_every=3)
    _run(material, config, checkpoints=str(tmp_path), key="k")
    newest = tmp_path / "step-00000009" / "state-00000.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    steps, _ = _run(material, config, checkpoints=str(tmp_path), key="k")
    assert steps[0][0] == 7
    assert "step-00000009" in caplog.text
    assert "SHA-256" in caplog.text


def test_a_checkpoint_of_something_else_is_not_resumed(material, tmp_path):
    _run(material, replace(CONFIG, checkpoint_every=3), checkpoints=str(tmp_path), key="mine")
    steps, _ = _run(material, replace(CONFIG, checkpoint_every=3), checkpoints=str(tmp_path), key="other")
    assert steps[0][0] == 1


def test_a_loss_that_is_not_finite_stops_at_that_step_and_names_the_rows(material):
    class Poisoned:
        head = _teacher(material).get_output_embeddings().weight.detach()
        stored = _stored(material)
        calls = 0

        def hidden(self, indices, tokens):
            self.calls += 1
            values = self.stored.hidden(indices, tokens)
            return values * float("nan") if self.calls == 5 else values  # two micro-batches a step

    with pytest.raises(NonFiniteError, match=r"step 2, rows \[\d+, \d+, \d+, \d+\]"):
        _run(material, targets=Poisoned())
