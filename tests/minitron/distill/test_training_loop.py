"""The training loop: schedules, non-finite steps, evaluations, timing, activation checkpointing and compilation."""

from __future__ import annotations

import json
import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.counting import Counting
from helpers.distilling import (
    CHANNELS,
    CONFIG,
    INTERMEDIATE,
    distil,
    live_teacher,
    load_teacher,
    pruned_student,
    stored_teacher,
)

from minitron.architecture import Architecture
from minitron.data import Rows, rows_for_step
from minitron.device import datasheet_flops
from minitron.distill import DistillConfig, Losses, StoredTeacher, distill, offload, preparation
from minitron.distill.schedule import learning_rate
from minitron.distill.timing import Stopwatch
from minitron.errors import InputError, NonFiniteError
from minitron.evaluation import heldout_metrics


def _rates(steps, **options):
    shape = {"total_steps": steps, "peak": 1.0, "minimum": 0.1, "warmup_steps": 2, "schedule": "wsd", **options}
    return [learning_rate(step, **shape) for step in range(steps)]


def test_warmup_stable_decay_does_not_depend_on_the_number_of_steps_before_the_decay():
    short, long = _rates(20), _rates(100)
    assert short[:3] == [0.5, 1.0, 1.0]
    assert short[:16] == long[:16]
    assert short[16:] == pytest.approx([0.775, 0.55, 0.325, 0.1])
    assert long[79:81] == pytest.approx([1.0, 1.0 - 0.9 / 20])
    assert long[-1] == pytest.approx(0.1)
    assert _rates(10, decay_share=0.0) == [0.5, *[1.0] * 9]
    assert _rates(3, decay_share=1.0) == pytest.approx([0.5, 1.0, 0.1])


def test_an_invalid_schedule_is_refused():
    with pytest.raises(InputError, match="schedule: 'linear'"):
        replace(CONFIG, schedule="linear")
    with pytest.raises(InputError, match=r"decay_share: 1\.5"):
        replace(CONFIG, decay_share=1.5)


def test_the_default_settings_are_those_of_the_paper():
    config = DistillConfig(steps=1)
    assert (config.batch_rows, config.peak_lr, config.min_lr, config.warmup_steps) == (1152, 1e-4, 1e-5, 40)


class Poisoned(StoredTeacher):
    """Stored targets that are not finite for some rows."""

    def __init__(self, folder, rows):
        self.__dict__ |= vars(stored_teacher(folder))
        self.rows = set(rows)

    def batch(self, indices, tokens):
        found = super().batch(indices, tokens)
        if self.rows & set(indices):
            found["teacher_hidden"] = found["teacher_hidden"] * float("nan")
        return found


def _broken_rows(folder, steps):
    return [row for step in steps for row in rows_for_step(80, CONFIG.batch_rows, step, CONFIG.seed)[1:2]]


def test_a_step_that_is_not_finite_can_be_skipped(material, tmp_path, caplog):
    config = replace(CONFIG, max_skipped_steps=2, checkpoint_every=4)
    broken = _broken_rows(material, [2, 7])
    losses, student = distil(material, config, Poisoned(material, broken))
    assert [step for step, _ in losses] == [1, 2, 4, 5, 6, 7, 9, 10, 11, 12]
    assert all(torch.isfinite(value).all() for value in student.state_dict().values())
    assert "step skipped, 2 of at most 2" in caplog.text
    # skipped steps are counted across an interruption and do not count as updates
    options = {"checkpoints": str(tmp_path), "key": "k"}
    first, _ = distil(material, config, Poisoned(material, broken), until=6, **options)
    rest, resumed = distil(material, config, Poisoned(material, broken), **options)
    assert first + rest == losses
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), resumed.parameters(), strict=True))


def test_too_many_skipped_steps_stop_the_training_and_their_rows_are_saved(material, tmp_path):
    config, broken = replace(CONFIG, max_skipped_steps=1, checkpoint_every=4), _broken_rows(material, [2, 7])
    options = {"checkpoints": str(tmp_path), "key": "k"}
    distil(material, config, Poisoned(material, broken), until=6, **options)
    with pytest.raises(NonFiniteError, match="step 7, rows"):
        distil(material, config, Poisoned(material, broken), **options)
    saved = [json.loads((tmp_path / f"nonfinite-{step:08d}.json").read_text()) for step in (2, 7)]
    assert [found["rows"] for found in saved] == [rows_for_step(80, 4, step, CONFIG.seed) for step in (2, 7)]


def test_evaluations_get_the_current_student_and_do_not_change_the_training(material):
    expected, _ = distil(material)
    heldout, seen = Rows.open(str(material / "rows"), "heldout").take(range(8)), []

    def evaluate(step, student):
        seen.append((step, heldout_metrics(student, heldout).loss))
        student.train()
        random.random(), np.random.rand(), torch.rand(3)

    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    student = pruned_student(material)  # without random draws
    losses = []
    rows = Rows.open(str(material / "rows"), "train")
    distill(
        student,
        stored_teacher(material),
        rows,
        replace(CONFIG, evaluate_every=4),
        evaluate=evaluate,
        report=lambda step: losses.append((step.step, step.loss)),
    )
    assert losses == expected
    assert [step for step, _ in seen] == [4, 8, 12]
    assert seen[-1][1] < seen[0][1]
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


def test_training_runs_without_dropout(material):
    expected, _ = distil(material)
    student, losses = pruned_student(material), []
    for layer in student.model.layers:
        layer.self_attn.attention_dropout = 0.5
    rows = Rows.open(str(material / "rows"), "train")
    distill(student, stored_teacher(material), rows, CONFIG, report=lambda step: losses.append((step.step, step.loss)))
    assert losses == expected


def test_step_reports_have_the_time_of_each_part_and_the_flop_utilisation(material):
    class Slow(Poisoned):
        def batch(self, indices, tokens):
            time.sleep(0.5)
            return super().batch(indices, tokens)

    student, reports, started = pruned_student(material), [], time.perf_counter()
    rows = Rows.open(str(material / "rows"), "train")
    config = replace(CONFIG, steps=4, report_every=2, peak_flops=1e9)
    distill(student, Slow(material, []), rows, config, report=reports.append)
    elapsed = time.perf_counter() - started
    assert [report.bound_by for report in reports] == ["teacher", "teacher"]
    # two micro-batches, less what is read while the one before is computed
    assert all(report.seconds["teacher"] >= 0.7 for report in reports)
    assert 4 * 1.0 < sum(2 * sum(report.seconds.values()) for report in reports) < elapsed
    own, other = (Architecture.from_config(model.config) for model in (student, load_teacher(material)))
    flops = 3 * own.flops_per_token(32) + 2 * other.vocab_size * other.hidden_size
    assert reports[0].utilisation == pytest.approx(reports[0].tokens_per_second * flops / 1e9)
    live = []
    distill(pruned_student(material), live_teacher(material), rows, replace(config, steps=1), report=live.append)
    flops = 3 * own.flops_per_token(32) + other.flops_per_token(32)
    assert live[0].utilisation == pytest.approx(live[0].tokens_per_second * flops / 1e9)


@pytest.mark.parametrize("report", [None, lambda step: None], ids=["without reports", "with reports"])
def test_the_times_of_a_step_are_not_kept_after_it(material, monkeypatch, report):
    watches = []

    class Kept(Stopwatch):
        def __init__(self, device):
            super().__init__(device)
            watches.append(self)

    monkeypatch.setattr(preparation, "Stopwatch", Kept)
    losses = Losses(logits="none", cross_entropy=1.0)
    rows = Rows.open(str(material / "rows"), "train")
    distill(pruned_student(material), None, rows, replace(CONFIG, steps=3), losses=losses, report=report)
    assert len(watches[0]._marks) <= 2  # events of a GPU


def test_step_reports_have_the_utilisation_of_the_data_sheets_peak_too(material, monkeypatch):
    monkeypatch.setattr("minitron.device.processor", lambda: "NVIDIA H100 80GB HBM3")
    reports, dtypes = [], (torch.bfloat16, torch.float32)
    rows = Rows.open(str(material / "rows"), "train")
    for dtype in dtypes:
        student = pruned_student(material).to(dtype)
        config = replace(CONFIG, steps=1, peak_flops=1e9)
        distill(student, stored_teacher(material), rows, config, report=reports.append)
    assert reports[0].datasheet_utilisation == pytest.approx(reports[0].utilisation * 1e9 / 989e12)
    assert reports[1].datasheet_utilisation is None


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("AMD EPYC", None),
    ],
)
def test_the_data_sheets_peak_follows_from_the_name_of_the_gpu(name, teraflops):
    assert datasheet_flops(torch.bfloat16, name) == (teraflops and teraflops * 1e12)


def test_activation_checkpointing_recomputes_and_does_not_change_the_result(material):
    options = {"losses": INTERMEDIATE, "channels": CHANNELS}
    runs = {}
    for how in ("none", "selective", "full"):
        config = replace(CONFIG, steps=3, activation_checkpointing=how)
        with Counting() as counting:
            losses, student = distil(material, config, live_teacher(material), **options)
        assert all("forward" not in vars(layer) for layer in student.model.layers)
        runs[how] = losses, counting.calls["aten.addmm.default"], counting.calls["aten.silu.default"]
    assert runs["none"][0] == runs["selective"][0] == runs["full"][0]
    products, activations = ({how: run[number] for how, run in runs.items()} for number in (1, 2))
    assert products["none"] == products["selective"] < products["full"]
    assert activations["none"] < activations["selective"] == activations["full"]
    with pytest.raises(InputError, match="activation_checkpointing: 'some'"):
        replace(CONFIG, activation_checkpointing="some")


def test_an_offloaded_optimizer_trains_the_same_and_resumes_from_either(material, monkeypatch, tmp_path):
    monkeypatch.setattr(offload, "SLICE_VALUES", 256)
    offloaded = replace(CONFIG, optimizer="adamw-offload")
    losses, student = distil(material)
    own, same = distil(material, offloaded)
    distil(material, CONFIG, checkpoints=str(tmp_path), key="k", until=6)
    rest, resumed = distil(material, offloaded, checkpoints=str(tmp_path), key="k")
    assert own == losses
    assert rest == losses[6:]
    for other in (same, resumed):
        assert all(torch.equal(a, b) for a, b in zip(student.parameters(), other.parameters(), strict=True))
    with pytest.raises(InputError, match="adamw-offload with shard"):
        replace(offloaded, shard=True)


def test_a_trained_student_supports_gradients_like_any_other_model(material):
    _, student = distil(material, replace(CONFIG, steps=1))
    student(input_ids=torch.zeros(1, 4, dtype=torch.int64)).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_compiled_layers_train_the_same_student(material, monkeypatch):
    compile_ = torch.compile  # without C++, whose compilation takes the time
    monkeypatch.setattr(torch, "compile", lambda forward, **options: compile_(forward, backend="aot_eager", **options))
    torch._dynamo.utils.counters.clear()
    options = {"targets": live_teacher(material), "losses": INTERMEDIATE, "channels": CHANNELS}
    config = replace(CONFIG, steps=3, activation_checkpointing="selective")
    compiled, _ = distil(material, replace(config, compile=True), **options)
    # the losses use outputs inside all layers but one of the student and two of the teacher
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    eager, _ = distil(material, config, **options)
    assert [loss for _, loss in compiled] == pytest.approx([loss for _, loss in eager], rel=1e-4)
