"""What a process holds of a model that is split over many, counted on a process group that sends nothing.

The loop, its losses and its files are the real ones.
"""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.distributed as dist
from helpers import tiny
from helpers.live_bytes import LiveBytes
from helpers.reading import Reading
from transformers import AutoConfig

from minitron import Architecture, meta_models
from minitron.distill import DistillConfig, LiveTeacher, Losses, distill, sharding
from minitron.distill.gpu_memory import CONTEXT, gpu_memory
from minitron.distill.trainable import trainable
from minitron.meta_models import open_model, write_model

NEXT_TOKEN = Losses(logits="none", cross_entropy=1.0)
DEEP = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 16, "head_dim": 16}
WIDE = {"vocab_size": 16384, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}


class RandomRows:
    seq_length = 8

    def __len__(self):
        return 4096

    def take(self, indices):
        return tiny.rows(len(list(indices)), self.seq_length)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders of a model of many layers, and of one that is almost only embedding and head, both in bfloat16."""
    folder = tmp_path_factory.mktemp("models")
    for name, shape in (("deep", DEEP), ("wide", WIDE)):
        tiny.model(tied=False, num_key_value_heads=8, **shape).to(torch.bfloat16).save_pretrained(folder / name)
    return folder


def settings(world, micro_batches):
    return DistillConfig(steps=2, batch_rows=micro_batches * world, micro_batch_rows=1, shard=True, max_skipped_steps=2)


def live_teacher(folder):
    """A teacher whose layers are split over the processes, if there are several."""
    model, weights = open_model(folder, torch.bfloat16)
    return LiveTeacher(model, shard=True, device=torch.device("cpu"), weights=weights)


def rehearse(folder, result, world, micro_batches, teacher=None, method="full"):
    """Train for two steps and save to `result`, which only one process has; the peak of each part, and of what is left after
    it, in bytes a parameter. teacher: the folder of a live one; method: of `trainable`."""
    peaks, left = {}, {}
    with LiveBytes().counting() as counted:
        student, weights = open_model(folder, torch.bfloat16)
        size = sum(parameter.numel() for parameter in student.parameters())

        def mark(part):
            peaks[part], left[part] = counted.peak / size, counted.alive / size
            counted.begin_peak()

        counted.begin_peak()
        targets = live_teacher(teacher) if teacher else None
        reading = Reading(weights)
        with trainable(student, method, lora_rank=2, weights=reading) as source:
            distill(
                student,
                targets,
                RandomRows(),
                settings(world, micro_batches),
                losses=Losses() if teacher else NEXT_TOKEN,
                weights=source,
                resumed=lambda _: mark("set-up"),
                evaluate=lambda done, _: mark(f"step {done}"),
                evaluate_at=(1, 2),
            )
        mark("end")
        write_model(student, weights, torch.bfloat16, result)
        mark("saving")
    return peaks, left, reading.values / size


@pytest.mark.parametrize("world", [8, 32, 64])
def test_no_process_holds_more_of_a_split_student_than_its_part(checkpoints, processes, monkeypatch, tmp_path, world):
    processes(world)
    monkeypatch.setattr(meta_models, "FILE_BYTES", 1 << 18)
    peaks, left, read = rehearse(checkpoints / "deep", tmp_path, world, micro_batches=2)
    _check_budgets(peaks, left, read, shards=world)


@pytest.mark.parametrize(("world", "node"), [(8, 0), (32, 8)])
def test_a_process_holds_its_part_of_a_frozen_model_and_of_its_adapters(checkpoints, processes, world, node):
    processes(world, node)
    peaks, left, read = rehearse(checkpoints / "deep", None, world, micro_batches=2, method="lora")
    shards = node or world
    # float32 weights, and of the adapters, 2 % of the parameters, also gradients and moments
    state = 4 / shards + 0.02 * 16 / shards
    assert read == pytest.approx(1 / shards, rel=0.01)
    assert peaks["set-up"] < state + 0.1
    assert peaks["step 1"] < state + 0.9
    assert peaks["step 2"] < state + 0.9
    assert left["step 2"] < state + 0.1
    assert peaks["end"] < state + 0.1  # while adapters are merged
    shape = Architecture.from_config(AutoConfig.from_pretrained(checkpoints / "deep"))
    options = {"processes": world, "node_processes": node, "gpu_bytes": 80_000_000_000, "trained": 0.02}
    estimate = gpu_memory(shape, settings(world, 2), RandomRows.seq_length, **options)
    assert estimate.end - CONTEXT == pytest.approx(peaks["saving"] * shape.num_parameters, rel=0.1)


def test_a_student_split_inside_nodes_is_held_once_in_each_node(checkpoints, processes, monkeypatch, tmp_path):
    processes(32, node=8)
    monkeypatch.setattr(meta_models, "FILE_BYTES", 1 << 18)
    peaks, left, read = rehearse(checkpoints / "deep", tmp_path, 32, micro_batches=2)
    _check_budgets(peaks, left, read, shards=8)
    # 35 B parameters leave too little of 80 GB if only 8 processes share them
    assert sharding.mesh_shape(torch.device("cpu"), 16 * 35_000_000_000) == (32,)


@pytest.mark.parametrize(
    ("student", "teacher", "world", "node"),
    [
        ("wide", None, 1, 0),  # not split
        ("deep", "deep", 1, 0),
        ("wide", None, 32, 0),
        ("deep", "deep", 8, 0),
        ("deep", "deep", 32, 8),  # split inside nodes
    ],
)
def test_writing_a_trained_student_takes_the_estimated_bytes(checkpoints, processes, student, teacher, world, node):
    if world > 1:
        processes(world, node)
    own, other = (name and checkpoints / name for name in (student, teacher))
    peaks, left, _ = rehearse(own, None, world, micro_batches=1, teacher=other)
    shape, theirs = (folder and Architecture.from_config(AutoConfig.from_pretrained(folder)) for folder in (own, other))
    estimate = gpu_memory(
        shape,
        settings(world, 1),
        RandomRows.seq_length,
        teacher=theirs,
        teacher_kept="whole" if world == 1 else "sharded",
        processes=world,
        node_processes=node,
        gpu_bytes=80_000_000_000,
    )
    assert estimate.end - CONTEXT == pytest.approx(peaks["saving"] * shape.num_parameters, rel=0.1)
    # one tensor at a time, and its rounded part
    assert (peaks["saving"] - left["end"]) * shape.num_parameters < 1.2 * 2 * shape.largest_tensor


def test_trainings_one_after_another_use_the_same_groups_of_processes(processes):
    def train():
        teacher = LiveTeacher(tiny.model(num_hidden_layers=2), shard=True)
        config = DistillConfig(steps=1, batch_rows=32, micro_batch_rows=1, shard=True, max_skipped_steps=1)
        distill(tiny.model(num_hidden_layers=2), teacher, RandomRows(), config)

    for _ in range(2):
        processes(32, node=8)
        groups = []
        for _ in range(2):
            train()
            groups.append(set(dist.distributed_c10d._world.pg_map))
        assert len(groups[0]) == 3  # all processes, those of this node, and their like on the other nodes
        assert groups[1] == groups[0]
        # also after all of them have ended and begun anew
        assert set(sharding.mesh_of(torch.device("cpu"), 0).get_all_groups()) < groups[0]
        groups.clear()
        default = weakref.ref(dist.group.WORLD)
        dist.destroy_process_group()
        assert default() is None


def _check_budgets(peaks, left, read, shards):
    """Bytes a parameter: 12 are float32 weights and moments, 4 gradients; a copy of the model takes 2, in float32 4."""
    assert read == pytest.approx(1 / shards, rel=0.01)
    assert peaks["set-up"] < 12 / shards + 0.1
    assert peaks["step 1"] < 16 / shards + 0.9
    assert peaks["step 2"] < 16 / shards + 0.9
    assert left["step 2"] < 12 / shards + 0.1
    assert left["end"] < 4 / shards + 0.1
    assert peaks["saving"] < 4 / shards + 0.3


def test_gradients_of_embedding_and_head_are_split_after_each_micro_batch(checkpoints, processes, tmp_path):
    processes(64)
    peaks, _, _ = rehearse(checkpoints / "wide", tmp_path, 64, micro_batches=3)
    # while the loss is computed: of the head, half of all parameters, its weights, once more in float32, and the float32 sum
    # of its gradient; whole gradients that are kept in float32 between micro-batches would take 4 more
    assert peaks["step 2"] < 5


def test_a_split_teacher_reads_its_layers_parts_and_all_that_is_outside_them(checkpoints, processes):
    processes(32)
    with LiveBytes().counting() as live:
        model, weights = open_model(checkpoints / "deep", torch.bfloat16)
        size = sum(parameter.numel() for parameter in model.parameters())
        reading = Reading(weights)
        live.begin_peak()
        LiveTeacher(model, shard=True, device=torch.device("cpu"), weights=reading)
        outside = 2 * 512 * 128 + 128
        assert reading.values == pytest.approx((size - outside) / 32 + outside, rel=0.01)
        assert live.peak < 2.1 * reading.values + 2 * outside
