"""The training loop: exact resume, any number of processes, and errors that name their cause."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.distilling import (
    CHANNELS,
    CONFIG,
    INTERMEDIATE,
    distil,
    live_teacher,
    load_teacher,
    norms_only,
    pruned_student,
    stored_teacher,
)
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM

from minitron import storage
from minitron.data import Rows
from minitron.distill import LiveTeacher, Losses, StoredTeacher, distill, store_hidden
from minitron.distill.schedule import learning_rate
from minitron.errors import InputError, NonFiniteError, StorageError
from minitron.evaluation import heldout_metrics, teacher_targets
from minitron.logits import Head


def test_learning_rate_warms_up_and_ends_at_the_minimum():
    rates = [learning_rate(s, total_steps=10, peak=1.0, minimum=0.1, warmup_steps=2) for s in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[2:], rates[3:], strict=False))


def test_stored_targets_are_bit_equal_to_the_live_teacher(material):
    rows = Rows.open(str(material / "rows"), "train")
    live = LiveTeacher(load_teacher(material))
    indices = [70, 3, 64, 63]
    tokens = rows.take(indices)
    stored = stored_teacher(material).hidden(indices, tokens)
    by_fours = {i: live.hidden([], rows.take(range(i // 4 * 4, i // 4 * 4 + 4)))[i % 4] for i in indices}
    assert all(torch.equal(stored[n], by_fours[i]) for n, i in enumerate(indices))


def test_distillation_brings_the_student_closer(material):
    losses, _ = distil(material, replace(CONFIG, steps=40))
    assert sum(loss for _, loss in losses[-5:]) < 0.7 * sum(loss for _, loss in losses[:5])


def test_a_stored_and_a_live_teacher_train_the_same_student(material):
    stored, _ = distil(material)
    live, _ = distil(material, targets=LiveTeacher(load_teacher(material)))
    assert [loss for _, loss in stored] == pytest.approx([loss for _, loss in live], rel=1e-4)


def test_the_teacher_runs_once_per_row_and_storing_resumes_after_a_kill(material, tmp_path):
    rows = Rows.open(str(material / "rows"), "train")
    model = load_teacher(material)
    folder = str(tmp_path / "hidden")
    shards = {"key": "k", "shard_bytes": 64 * 32 * (48 * 4 + 4)}  # of 64 rows
    assert store_hidden(lambda: model, rows, folder, **shards) == len(rows) == 80
    storage.remove(storage.join(folder, "index.json"))  # as after a kill before the end,
    storage.remove(storage.join(folder, "shard-00001"))  # with the last shard missing
    assert store_hidden(lambda: model, rows, folder, key="k") == 16
    assert store_hidden(lambda: pytest.fail("the teacher was loaded again"), rows, folder, key="k") == 0


def test_a_store_of_another_teacher_or_with_damage_is_refused(material, tmp_path):
    head = Head.of(load_teacher(material))
    with pytest.raises(StorageError, match="holds the store k, not other"):
        StoredTeacher(str(material / "hidden"), head, "other")
    rows = Rows.open(str(material / "rows"), "train")
    store_hidden(lambda: load_teacher(material), rows, str(tmp_path), key="k")
    shard = tmp_path / "shard-00000" / "rows.safetensors"
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(StorageError, match=r"shard-00000.rows.safetensors: SHA-256"):
        StoredTeacher(str(tmp_path), head, "k").hidden([79], rows.take([79]))


@pytest.mark.parametrize(
    ("losses", "targets"), [(Losses(), stored_teacher), (INTERMEDIATE, live_teacher)], ids=["logits", "all"]
)
def test_an_interrupted_run_is_bit_identical(material, tmp_path, losses, targets):
    whole, expected = distil(material, targets=targets(material), losses=losses, channels=CHANNELS)
    config = replace(CONFIG, checkpoint_every=3)
    # stopped at other steps each time, so that it resumes from each of the checkpoints 3, 6 and 9
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
                pruned_student(material),
                targets(material),
                Rows.open(str(material / "rows"), "train"),
                config,
                losses=losses,
                channels=CHANNELS,
                checkpoints=str(tmp_path),
                key="k",
                report=report,
            )
        except Stop:
            continue
    assert dict(pieces) == dict(whole)
    assert list(student.state_dict()) == list(expected.state_dict())  # without the projection
    for name, value in expected.state_dict().items():
        assert torch.equal(student.state_dict()[name], value)


WORKER = """
import json, os, sys
sys.path[:0] = json.loads(sys.argv[1])
import torch, torch.distributed as dist
from pathlib import Path
from dataclasses import replace
import helpers.distilling as t
from helpers.forking import fork_two
from minitron.distill import distill
folder, out, how = Path(sys.argv[2]), sys.argv[3], sys.argv[4]
rank = fork_two()
dist.init_process_group("gloo", rank=rank, world_size=2)
def report(step):
    if rank == 0:
        with open(out + ".jsonl", "a") as file:
            file.write(json.dumps([step.step, step.loss]) + "\\n")
student = t.pruned_student(folder)
targets, losses = t.stored_teacher(folder), t.Losses()
if how == "norms":
    t.norms_only(student)
    targets, losses = t.live_teacher(folder), t.INTERMEDIATE
distill(student, targets, t.Rows.open(str(folder / "rows"), "train"), replace(t.CONFIG, checkpoint_every=3),
          losses=losses, channels=t.CHANNELS, checkpoints=out, key="k", report=report)
dist.destroy_process_group()
"""


def _together(material, out, port, how="logits"):
    """Losses by step of the loop in two processes."""
    paths = json.dumps([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", WORKER, paths, str(material), str(out), how]
    workers = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert workers.returncode == 0, workers.stderr
    return dict(json.loads(line) for line in Path(f"{out}.jsonl").read_text().splitlines())


@pytest.mark.long
def test_two_processes_train_like_one(material, tmp_path, free_port):
    alone, _ = distil(material)
    together = _together(material, tmp_path / "together", free_port())
    assert list(together) == list(range(1, 13))
    assert list(together.values()) == pytest.approx([loss for _, loss in alone], rel=1e-4)


def test_only_parameters_with_gradients_and_the_projection_are_trained_on_any_number_of_processes(
    material, tmp_path, free_port
):
    student, before, losses = pruned_student(material), pruned_student(material).state_dict(), []
    norms_only(student)
    rows, options = Rows.open(str(material / "rows"), "train"), {"losses": INTERMEDIATE, "channels": CHANNELS}
    distill(student, live_teacher(material), rows, CONFIG, **options, report=lambda step: losses.append(step.loss))
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "norm" in name}
    together = _together(material, tmp_path / "together", free_port(), how="norms")
    assert list(together.values()) == pytest.approx(losses, rel=1e-4)


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank adapter, as peft adds it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, values):
        return self.base(values) + self.up(self.down(values))


def test_only_adapters_are_trained(material):
    student = pruned_student(material).requires_grad_(False)
    for layer in student.model.layers:
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)
    rows, losses = Rows.open(str(material / "rows"), "train"), []
    config, report = replace(CONFIG, steps=30, peak_lr=1e-2), lambda step: losses.append(step.loss)
    distill(student, live_teacher(material), rows, config, losses=INTERMEDIATE, channels=CHANNELS, report=report)
    assert sum(losses[-5:]) < sum(losses[:5])
    assert {name for name, p in student.named_parameters() if p.requires_grad} == {
        f"model.layers.{layer}.self_attn.q_proj.{part}.weight" for layer in range(4) for part in ("down", "up")
    }


def test_a_student_without_trainable_parameters_is_refused(material):
    rows = Rows.open(str(material / "rows"), "train")
    with pytest.raises(InputError, match="no parameter that requires a gradient"):
        distill(pruned_student(material).requires_grad_(False), stored_teacher(material), rows, CONFIG)


def test_intermediate_losses_bring_hidden_states_closer(material):
    parts, student = [], pruned_student(material)
    distill(
        student,
        live_teacher(material),
        Rows.open(str(material / "rows"), "train"),
        replace(CONFIG, steps=40),
        losses=INTERMEDIATE,
        channels=CHANNELS,
        report=parts.append,
    )
    for first, last in ((parts[0].intermediate, parts[-1].intermediate), (parts[0].kl, parts[-1].kl)):
        assert last < 0.7 * first
    # cross-entropy has its weight, and α · L_is = L_logits
    assert parts[0].loss == pytest.approx(2 * parts[0].kl + 0.2 * parts[0].cross_entropy, rel=1e-4)


def test_the_micro_batch_size_does_not_change_the_result(material):
    rows, options = Rows.open(str(material / "rows"), "train"), {"losses": INTERMEDIATE, "channels": CHANNELS}
    steps = {size: [] for size in (4, 3, 1)}  # 3 gives micro-batches of unequal size
    for size, reports in steps.items():
        config = replace(CONFIG, steps=4, micro_batch_rows=size)
        distill(pruned_student(material), live_teacher(material), rows, config, **options, report=reports.append)
    for size in (3, 1):
        for name in ("loss", "kl", "cross_entropy", "intermediate", "grad_norm"):
            expected = [getattr(step, name) for step in steps[4]]
            assert [getattr(step, name) for step in steps[size]] == pytest.approx(expected, rel=1e-4)


def test_intermediate_losses_need_a_live_teacher(material):
    with pytest.raises(InputError, match="a StoredTeacher has only the teacher's final hidden states"):
        distil(material, losses=INTERMEDIATE)


def test_cross_entropy_alone_needs_no_teacher(material):
    parts = []
    rows = Rows.open(str(material / "rows"), "train")
    losses = Losses(logits="none", cross_entropy=1.0)
    student = distill(
        pruned_student(material), None, rows, replace(CONFIG, steps=40), losses=losses, report=parts.append
    )
    assert parts[-1].loss < 0.8 * parts[0].loss
    assert [parts[0].kl, parts[0].cross_entropy, parts[0].intermediate] == [None, parts[0].loss, None]
    first = rows.take(range(4))
    assert heldout_metrics(student, first).loss == pytest.approx(parts[-1].loss, rel=0.3)
    with pytest.raises(InputError, match="the losses need a teacher"):
        distill(student, None, rows, CONFIG)


def test_a_run_can_be_paused_and_resumed(material, tmp_path):
    whole, expected = distil(material)
    first, looked_at = distil(material, checkpoints=str(tmp_path), key="k", until=5)
    rest, student = distil(material, checkpoints=str(tmp_path), key="k", until=12)
    assert first + rest == whole  # with the schedule of the whole training
    assert len(first) == 5
    assert not torch.equal(looked_at.lm_head.weight, student.lm_head.weight)
    assert torch.equal(student.lm_head.weight, expected.lm_head.weight)
    again, same = distil(material, checkpoints=str(tmp_path), key="k", until=12)
    assert again == []
    assert torch.equal(same.lm_head.weight, expected.lm_head.weight)
    with pytest.raises(InputError, match="until: 5 without checkpoints"):
        distil(material, until=5)


def test_a_soft_capped_model_distils(material):
    values = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    config = Gemma2Config(**values, intermediate_size=48, num_key_value_heads=2, final_logit_softcapping=2.0)
    torch.manual_seed(0)
    teacher, student = (Gemma2ForCausalLM(config) for _ in range(2))
    with torch.no_grad():
        teacher.lm_head.weight.mul_(20)  # so that the soft-capping takes effect
        for mine, theirs in zip(student.parameters(), teacher.parameters(), strict=True):
            mine.copy_(theirs + 0.05 * torch.randn_like(theirs))
    rows = Rows.open(str(material / "rows"), "train")
    parts = []
    distill(student, LiveTeacher(teacher), rows, replace(CONFIG, steps=40, peak_lr=5e-3), report=parts.append)
    assert parts[-1].kl < 0.5 * parts[0].kl
    heldout = rows.take(range(4))
    dense = [model(heldout).logits[:, :-1].double().log_softmax(-1) for model in (teacher, student)]
    expected = (dense[0].exp() * (dense[0] - dense[1])).sum(-1).mean().item()
    assert heldout_metrics(student, heldout, **teacher_targets(teacher, heldout)).kl == pytest.approx(
        expected, rel=1e-4
    )


def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(material, tmp_path, caplog):
    config = replace(CONFIG, checkpoint_every=3)
    distil(material, config, checkpoints=str(tmp_path), key="k")
    newest = tmp_path / "step-00000009" / "shard-00001.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    steps, _ = distil(material, config, checkpoints=str(tmp_path), key="k")
    assert steps[0][0] == 7
    assert "step-00000009" in caplog.text
    assert "SHA-256" in caplog.text


def test_a_checkpoint_of_another_training_is_refused(material, tmp_path):
    distil(material, replace(CONFIG, checkpoint_every=3), checkpoints=str(tmp_path), key="mine")
    steps, _ = distil(material, replace(CONFIG, checkpoint_every=3), checkpoints=str(tmp_path), key="other")
    assert steps[0][0] == 1


def test_a_loss_that_is_not_finite_stops_at_that_step_and_names_the_rows(material):
    class Poisoned(StoredTeacher):
        calls = 0

        def batch(self, indices, tokens):
            self.calls += 1
            values = super().batch(indices, tokens)
            if self.calls == 5:  # each step has two micro-batches
                values["teacher_hidden"] = values["teacher_hidden"] * float("nan")
            return values

    with pytest.raises(NonFiniteError, match=r"step 2, rows \[\d+, \d+, \d+, \d+\]"):
        distil(material, targets=Poisoned(str(material / "hidden"), Head.of(load_teacher(material)), "k"))
