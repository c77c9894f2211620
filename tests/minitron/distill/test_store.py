"""Stored teacher outputs: exact, written by several processes, and refused if they do not match."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from helpers import tiny

from minitron import storage
from minitron.data import Rows, TextSource, pack, rows_of_steps
from minitron.distill import (
    DistillConfig,
    LiveTeacher,
    Losses,
    StoredTeacher,
    TopKTeacher,
    distill,
    store_hidden,
    store_top_k,
)
from minitron.distill.inputs import DistillInputs
from minitron.distill.losses.logits import linear_logit_loss
from minitron.distill.losses.objective import Objective
from minitron.distill.teacher.stored import store_key, stored_bytes
from minitron.errors import InputError, StorageError
from minitron.logits import Head
from minitron.models import load_model, load_tokenizer

K = 5
ROW_BYTES = 32 * (48 * 4 + 4)
SHARDS = {"key": "k", "shard_bytes": 64 * ROW_BYTES}  # two of them, of 64 and 16 rows


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A trained teacher, its rows, and its stored hidden states and top-k tokens."""
    folder = tmp_path_factory.mktemp("store")
    teacher = tiny.checkpoint(folder / "teacher")
    source = TextSource("jsonl", path=str(tiny.corpus(folder / "text.jsonl")))
    rows = pack(source, load_tokenizer(teacher), str(folder / "rows"), seq_length=32, train_rows=80, heldout_rows=8)
    store_hidden(lambda: _teacher(folder), rows, str(folder / "hidden"), **SHARDS)
    store_top_k(lambda: _teacher(folder), rows, str(folder / "top"), K, **SHARDS)
    return folder


def _teacher(folder):
    return load_model(folder / "teacher")


def _rows(folder):
    return Rows.open(str(folder / "rows"), "train")


def _stored(folder, name="hidden"):
    return StoredTeacher(str(folder / name), Head.of(_teacher(folder)), "k")


def _never():
    pytest.fail("the teacher was loaded again")


def test_the_stored_log_sum_exp_equals_that_of_the_exact_logits(material):
    model, tokens = _teacher(material), _rows(material).take([3, 70])
    stored = _stored(material).batch([3, 70], tokens)["teacher_log_sum_exp"]
    exact = model(input_ids=tokens).logits.double().logsumexp(-1).flatten()
    assert stored.dtype == torch.float32
    assert (stored - exact).abs().max() < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("logits", ["forward_kl", "reverse_kl", "jensen_shannon", "mse", "cosine"])
def test_a_stored_log_sum_exp_does_not_change_the_loss(material, logits, temperature):
    batch = _stored(material).batch([3, 70], _rows(material).take([3, 70]))
    losses = Losses(logits=logits, temperature=temperature)
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 24, requires_grad=True), torch.randn(len(batch["teacher_head"].weight), 24)
    found = {}
    for known in (True, False):
        if not known:
            del batch["teacher_log_sum_exp"]
        loss = linear_logit_loss(hidden, Head(weight), losses, **batch).loss
        found[known] = loss.item(), torch.autograd.grad(loss, hidden)[0]
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-5)
    assert torch.allclose(found[True][1], found[False][1], rtol=1e-4, atol=1e-8)


def test_the_loss_uses_the_given_log_sum_exp(material):
    batch = _stored(material).batch([3], _rows(material).take([3]))
    hidden, head = batch["teacher_hidden"], batch["teacher_head"]
    right = linear_logit_loss(hidden, head, Losses(), **batch).loss
    batch["teacher_log_sum_exp"] = batch["teacher_log_sum_exp"] - 1.0  # every probability of the teacher times e
    wrong = linear_logit_loss(hidden, head, Losses(), **batch).loss
    assert right.item() == pytest.approx(0.0, abs=1e-6)
    assert wrong.item() == pytest.approx(torch.e, rel=1e-4)


WRITER = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
import test_store as t
from helpers.forking import fork_two
from pathlib import Path
folder, out, rank = Path(sys.argv[2]), sys.argv[3], fork_two()
computed = t.store_hidden(lambda: t._teacher(folder), t._rows(folder), out, **t.SHARDS, rank=rank, world=2)
Path(f"{out}-{rank}").write_text(str(computed))
"""


def test_two_processes_write_one_store_together(material, tmp_path):
    paths, out = json.dumps([str(Path(__file__).parent), *sys.path]), tmp_path / "hidden"
    subprocess.run([sys.executable, "-c", WRITER, paths, str(material), str(out)], check=True, timeout=240)
    computed = [int(Path(f"{out}-{rank}").read_text()) for rank in range(2)]
    assert computed == [64, 16]  # a shard each: 80 rows, each computed once
    for file in ("shard-00000/rows.safetensors", "shard-00001/rows.safetensors", "index.json"):
        assert (out / file).read_bytes() == (material / "hidden" / file).read_bytes()


def test_an_incomplete_store_is_completed_by_another_process(material, tmp_path):
    out, seen, head = str(tmp_path / "hidden"), [], Head.of(_teacher(material))
    assert store_hidden(lambda: _teacher(material), _rows(material), out, **SHARDS, rank=1, world=2) == 16
    with pytest.raises(StorageError, match="not completely written"):
        StoredTeacher(out, head, "k")
    count = store_hidden(lambda: _teacher(material), _rows(material), out, key="k", progress=lambda *n: seen.append(n))
    assert count == 64
    assert (seen[0], seen[-1]) == ((20, 80), (80, 80))
    assert store_hidden(_never, _rows(material), out, key="k") == 0


def test_shards_of_another_teacher_are_not_reused(material, tmp_path):
    out = str(tmp_path / "hidden")
    store_hidden(lambda: _teacher(material), _rows(material), out, **SHARDS, rank=1, world=2)
    with pytest.raises(StorageError, match="shard-00001: holds the store k, not other"):
        store_hidden(_never, _rows(material), out, key="other")
    with pytest.raises(StorageError, match="holds the store k, not other"):
        store_hidden(_never, _rows(material), str(material / "hidden"), key="other")


def test_a_subset_of_rows_is_stored_under_its_row_numbers(material, tmp_path):
    rows, out, head = _rows(material), str(tmp_path / "hidden"), Head.of(_teacher(material))
    config = DistillConfig(steps=3, batch_rows=4, micro_batch_rows=4, peak_lr=1e-3, min_lr=1e-3, warmup_steps=1)
    numbers = rows_of_steps(len(rows), config.batch_rows, config.steps, config.seed)
    assert store_hidden(lambda: _teacher(material), rows, out, key="k", numbers=numbers) == 12
    assert store_hidden(_never, rows, out, key="k", numbers=numbers) == 0
    some, few = StoredTeacher(out, head, "k"), [numbers[7], numbers[0]]
    assert torch.equal(some.hidden(few, rows.take(few)), _stored(material).hidden(few, rows.take(few)))
    distill(_teacher(material).requires_grad_(True), some, rows, config)  # reads no row after those of the last step
    missing = next(row for row in range(80) if row not in numbers)
    with pytest.raises(IndexError, match=f"row {missing} of .*, which has 12 rows, this one not among them"):
        some.batch([missing], rows.take([missing]))
    for other in (numbers[1:], None):
        with pytest.raises(StorageError, match="holds the store k-"):
            store_hidden(_never, rows, out, key="k", numbers=other)
    storage.remove(storage.join(out, "index.json"))  # nor into shards that a kill left behind
    with pytest.raises(StorageError, match="shard-00000: holds the store k-"):
        store_hidden(_never, rows, out, key="k", numbers=numbers[1:])


def test_rows_and_heads_of_a_wrong_shape_are_refused(material):
    tokens = _rows(material).take([0])
    with pytest.raises(StorageError, match=r"hidden states \[1, 32, 48\] where rows and head have \[1, 31, 48\]"):
        _stored(material).batch([0], tokens[:, 1:])
    with pytest.raises(StorageError, match=r"where rows and head have \[1, 32, 40\]"):
        StoredTeacher(str(material / "hidden"), Head(torch.zeros(300, 40)), "k").batch([0], tokens)
    with pytest.raises(IndexError, match=r"row 80 of .*rows 0 to 79"):
        _stored(material).batch([80], tokens)


def test_the_size_of_a_store_is_estimated_and_a_small_disk_refused(material, tmp_path, monkeypatch):
    size = stored_bytes(80, 32, 48, 4)
    files = [storage.size(str(material / "hidden" / f"shard-0000{n}" / "rows.safetensors")) for n in range(2)]
    assert size == 80 * 32 * (48 * 4 + 4)
    assert sum(files) == pytest.approx(size, rel=2e-3)  # headers are not in the estimate
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(0, 0, size // 4 + 1))
    with pytest.raises(StorageError, match=f"storing 80 rows needs {size:,} bytes") as refused:
        store_hidden(lambda: _teacher(material), _rows(material), str(tmp_path / "hidden"), key="k")
    assert refused.value.remedy.startswith("20 rows fit")
    assert list(tmp_path.iterdir()) == []


def _objective_loss(material, targets, losses):
    student = _teacher(material).requires_grad_(True)
    with torch.no_grad():
        for number, parameter in enumerate(student.parameters()):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    indices = [3, 70]
    loss, _ = Objective(student, targets, losses)(indices, _rows(material).take(indices))
    loss.backward()
    return loss.item(), student.model.layers[0].mlp.up_proj.weight.grad


@pytest.mark.parametrize("k", [K, 2])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_stored_top_k_tokens_train_like_a_live_teacher_with_top_k(material, k, temperature):
    losses = Losses(top_k=k, temperature=temperature)
    loss, gradient = _objective_loss(material, TopKTeacher(str(material / "top"), "k"), losses)
    expected, wanted = _objective_loss(material, LiveTeacher(_teacher(material)), losses)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(gradient, wanted, rtol=1e-3, atol=1e-7)


def test_the_probability_outside_the_top_k_tokens_is_reported(material):
    rows = _rows(material)
    probabilities = _teacher(material)(input_ids=rows.take(range(len(rows)))).logits.double().softmax(-1)
    lost = 1 - probabilities.topk(K).values.sum(-1)
    found = TopKTeacher(str(material / "top"), "k").mass_lost()
    assert found.mean == pytest.approx(lost.mean().item(), rel=1e-3)
    assert found.worst == pytest.approx(lost.max().item(), rel=1e-3)


def test_stored_top_k_tokens_are_refused_for_losses_on_all_logits(material):
    targets = TopKTeacher(str(material / "top"), "k")
    for losses in (Losses(), Losses(top_k=K + 1), Losses(logits="mse")):
        with pytest.raises(
            InputError, match=f"top_k: {losses.top_k}, but the teacher's 5 most likely tokens are stored"
        ):
            _objective_loss(material, targets, losses)
    with pytest.raises(InputError, match="k: 301 of a vocabulary of 300"):
        store_top_k(lambda: _teacher(material), _rows(material), str(material / "none"), 301, key="k")
    with pytest.raises(StorageError, match=r"\[1, 32\] tokens where the rows have \[1, 31\]"):
        targets.batch([0], _rows(material).take([0])[:, 1:])


def test_distillation_prefetches_the_rows_of_the_next_step_and_reads_no_row_twice(material):
    class Watched(StoredTeacher):
        read, ahead = [], []

        def batch(self, indices, tokens):
            self.read.append(list(indices))
            return super().batch(indices, tokens)

        def prefetch(self, indices):
            self.ahead.append(list(indices))

    targets = Watched(str(material / "hidden"), Head.of(_teacher(material)), "k")
    config = DistillConfig(steps=3, batch_rows=4, micro_batch_rows=4, peak_lr=1e-3, min_lr=1e-3, warmup_steps=1)
    distill(_teacher(material).requires_grad_(True), targets, _rows(material), config)
    first, second, third = targets.read
    assert targets.ahead == [
        [*first, *second],
        third,
        [],
    ]  # while a step computes, the next one's rows are being loaded


def test_a_process_opens_the_heldout_store_once(material, tmp_path, monkeypatch):
    inputs = DistillInputs(
        teacher=str(material / "teacher"),
        teacher_id="t",
        dtype="float32",
        rows=str(material / "rows"),
        train_targets=str(tmp_path / "train"),
        heldout_targets=str(tmp_path / "heldout"),
    )
    rows = inputs.open_rows("heldout")
    store_hidden(lambda: _teacher(material), rows, inputs.heldout_targets, key=inputs.targets_key("heldout"))
    opened, original = [], storage.manifest

    def manifest(folder):
        opened.append(folder)
        return original(folder)

    monkeypatch.setattr(storage, "manifest", manifest)
    teacher = _teacher(material)
    metrics = [inputs.heldout(teacher, Head.of(teacher)) for _ in range(3)]
    assert metrics[0] == metrics[1] == metrics[2]
    assert metrics[0].kl == pytest.approx(0.0, abs=1e-5)
    assert opened == [storage.join(inputs.heldout_targets, "shard-00000")]


def test_the_key_of_a_store_depends_on_teacher_rows_dtype_and_kind():
    names = [store_key(*what) for what in (("t", "r", "f"), ("u", "r", "f"), ("t", "s", "f"), ("t", "r", "g"))]
    assert len({*names, store_key("t", "r", "f", top_k=5)}) == 5
