"""Main memory of nodes with GPUs in a plan: the bytes that processes hold there, and what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny
from helpers.command import minitron_here

from minitron import host_memory
from minitron.architecture import Architecture
from minitron.architecture.published import BASES
from minitron.distill import DistillConfig
from minitron.errors import InputError
from minitron.host_memory import pinned_bytes, training_host_memory
from minitron.memory import LIBRARIES
from minitron_platform import load_recipe, plan
from minitron_platform.cluster.nodes_at import ClusterNodes
from minitron_platform.estimates import node_memory
from minitron_platform.estimates.gpu import distillation_on_gpus, trials_on_gpus
from minitron_platform.estimates.node_memory import GpuNode, conversion_work, targets_work, training_work
from minitron_platform.planning.cluster import assumed_cluster
from minitron_platform.recipes.build import distillation_losses
from minitron_platform.recipes.candidates import family_candidates
from minitron_platform.recipes.resources import resolve

LLAMA = "llama-3.1-8b-to-4b-h100x8"
TEACHER = Architecture(**BASES["Llama 3.1 8B"], tied=False)
STORED = ["targets.mode=stored", "losses.hidden=[]"]
OFFLOADED = [*STORED, "distill.optimizer=adamw-offload", "distill.shard=false", "distill.micro_batch_rows=1"]
PROCESSES = 4
SETTINGS = {
    "split": {"shard": True},
    "whole": {},
    "offloaded": {"optimizer": "adamw-offload"},
}
COUNT = """
import json
import sys

sys.path[:0] = json.loads(sys.argv[4])
import torch
import torch.distributed as dist
from helpers import tiny
from helpers.forking import fork

from minitron.distill import DistillConfig, Losses, checkpoints, distill
from minitron.distill.state import TrainingState
from minitron.meta_models import open_model
from minitron.sharded_tensors import own_part

folder, processes, settings = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])


class RandomRows:
    seq_length = 8

    def __len__(self):
        return 64

    def take(self, indices):
        return tiny.rows(len(list(indices)), self.seq_length)


torch.set_num_threads(1)
rank = fork(processes)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
copy, copied, states = checkpoints._copy, [], []


def counted(tensors, earlier):
    copy(tensors, earlier)
    copied.append(sum(own_part(tensor).nbytes for tensor in earlier.values()))
    return {name: earlier[name] for name in tensors}


def update(state, rate):
    staged = state.offloaded.staging_bytes if state.offloaded else 0
    states.append(staged + sum(own_part(tensor).nbytes for tensor in state.tensors().values()))
    return first_update(state, rate)


checkpoints._copy, first_update, TrainingState.update = counted, TrainingState.update, update
found = {}
for name, values in settings.items():
    student, weights = open_model(f"{folder}/model", torch.bfloat16)
    config = DistillConfig(steps=2, batch_rows=8, micro_batch_rows=1, checkpoint_every=1, **values)
    losses = Losses(logits="none", cross_entropy=1.0)
    distill(student, None, RandomRows(), config, losses=losses, weights=weights, checkpoints=f"{folder}/{name}", key="k")
    found[name] = {"copied": max(copied), "state": max(states)}
    copied.clear()
    states.clear()
open(f"{folder}/{rank}.json", "w").write(json.dumps(found))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """Bytes of the copies for checkpoints and of the state in each of the processes, by what they train, and the model."""
    folder = tmp_path_factory.mktemp("counted")
    model = tiny.model(tied=False, vocab_size=512, hidden_size=64, intermediate_size=256, num_hidden_layers=4)
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    arguments = [str(folder), str(PROCESSES), json.dumps(SETTINGS), json.dumps(sys.path)]
    done = subprocess.run([sys.executable, "-c", COUNT, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]
    return found, Architecture.from_config(model.config)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_estimated_copies_of_a_node_are_the_bytes_that_its_processes_hold(counted, monkeypatch, name):
    found, student = counted
    monkeypatch.setattr(host_memory, "pinned_bytes", lambda size: size)  # nothing is pinned without a GPU
    config = DistillConfig(steps=2, batch_rows=8, micro_batch_rows=1, checkpoint_every=1, **SETTINGS[name])
    each = training_host_memory(student, config, 8, processes=PROCESSES)
    copied = sum(process[name]["copied"] for process in found)
    assert PROCESSES * each.checkpoint == pytest.approx(copied, rel=0.02)
    if name == "offloaded":
        assert each.optimizer == pytest.approx(found[0][name]["state"], rel=0.001)
    else:
        assert each.optimizer == 0  # on the GPU


def test_pinned_memory_comes_in_powers_of_two():
    assert [pinned_bytes(size) for size in (0, 1, 4096, 4097, 100_000_000)] == [0, 1, 4096, 8192, 1 << 27]


def training(what="distill", overrides=()):
    recipe = load_recipe(LLAMA, overrides)
    resources, member = resolve(recipe, 8), recipe.family[0]
    own = family_candidates(recipe, TEACHER)[member.model]
    largest = own.architectures[0]
    if what == "search":
        return trials_on_gpus(recipe, TEACHER, own.space.base, largest, 2, resources)
    losses = distillation_losses(recipe, largest, TEACHER)[0]
    return distillation_on_gpus(recipe, member, TEACHER, largest, 2, resources, losses)


def test_offloaded_state_is_in_every_process_of_a_node_and_refused_where_the_node_is_too_small():
    work = training_work(training(overrides=OFFLOADED))
    memory = work.on(8)
    assert memory.processes == 8
    assert memory.each.optimizer == pytest.approx(12 * training().student.num_parameters, rel=0.05)
    work.check("distill of x", [GpuNode(8, 600_000_000_000)])
    work.check("distill of x", [GpuNode(8, 100_000_000_000), GpuNode(8, 600_000_000_000)])  # one of them is enough
    work.check("distill of x", [])  # not known
    with pytest.raises(InputError) as refused:
        work.check("distill of x", [GpuNode(8, 256_000_000_000)])
    assert re.match(r"distill of x: a node needs 5\d\d\.\d GB: 8 processes of 6\d", refused.value.problem)
    assert refused.value.problem.endswith("and has 256.0 GB")
    assert "set distill.optimizer=adamw and distill.shard=true, which takes" in refused.value.remedy
    again = [text for text in OFFLOADED if "optimizer" not in text and "shard" not in text]
    training_work(training(overrides=[*again, "distill.shard=true"])).check("distill", [GpuNode(8, 256_000_000_000)])


def test_one_large_node_does_not_hide_small_ones_that_workers_are_placed_on():
    large, small = GpuNode(8, 600_000_000_000), GpuNode(8, 256_000_000_000)  # three of the eight processes
    work = training_work(training(overrides=OFFLOADED))
    work.check("distill of x", [large, small])
    warning = work.warning("distill of x", [large, small])
    assert re.search(
        r"GB: 8 processes of .*, 1 of 2 nodes has less \(256.0 GB\), and Ray may place processes there", warning
    )
    assert "set distill.optimizer=adamw and distill.shard=true, which takes" in warning
    assert work.warning("distill of x", [large, large]) is None
    several = training_work(replace(training(overrides=OFFLOADED), processes=24))
    several.check("distill of x", [large])  # any number of such nodes
    several.check("distill of x", [large, large, large, small])
    with pytest.raises(InputError, match=r"2 of 3 nodes have less \(256.0 GB\), so that there is room for 1\d of 24"):
        several.check("distill of x", [large, small, small])
    # a node that no process has room on neither helps nor hinders
    whole = replace(several, share=4)
    whole.check("distill of x", [*[large] * 12, GpuNode(2, 1)])
    assert whole.warning("distill of x", [*[large] * 12, GpuNode(2, 1)]) is None
    with pytest.raises(InputError, match="a node needs"):
        whole.check("distill of x", [GpuNode(8, 10**9), GpuNode(2, 10**13)])
    trials = training_work(
        training("search", ["resources.workers_per_trial=1", "resources.gpus_per_trial=1"]), trials=40
    )
    trials.check("search", [GpuNode(8, 10**13), GpuNode(8, 10**9)])  # one at a time at least
    assert "search: a node needs" in trials.warning("search", [GpuNode(8, 10**13), GpuNode(8, 10**9)])


def test_a_plan_goes_by_the_memory_of_each_node_of_a_cluster(bench, tmp_path, monkeypatch):
    def planned(*gigabytes):
        nodes = [{"CPU": 8.0, "GPU": 1.0, "memory": size * 1e9} for size in gigabytes]
        monkeypatch.setattr("minitron_platform.planning.machines._nodes_of", lambda address: ClusterNodes(nodes, nodes))
        recipe = load_recipe(str(bench / "recipe.yaml"), ["resources.workers=4"])
        found = plan(recipe, storage_path=tmp_path / "planned", address="10.0.0.1:6379")
        return [text for text in found.warnings if "of main memory" in text]

    assert planned(9, 9, 9, 9) == []
    (warning,) = planned(9, 9, 9, 9, 1, 1)
    assert "2 of 6 nodes have less (1.0 GB), and Ray may place processes there" in warning
    with pytest.raises(
        InputError, match=r"3 of 6 nodes have less \(1.0 GB\), so that there is room for 3 of 4 processes"
    ):
        planned(9, 9, 9, 1, 1, 1)


def test_workers_on_several_nodes_share_the_copies_of_checkpoints():
    on_one, on_four = (
        training_work(replace(training(), processes=processes)).on(8).each.checkpoint for processes in (8, 32)
    )
    assert on_four == pytest.approx(on_one, rel=0.3)  # split inside nodes, each of which has all of it
    whole = replace(training(overrides=OFFLOADED), processes=32)
    assert training_work(whole).on(8).each.checkpoint == pytest.approx(12 * whole.student.num_parameters / 32, rel=0.01)


def test_trials_that_share_gpus_are_counted_and_those_that_wait_at_rungs_keep_a_copy():
    shared = ["resources.workers_per_trial=1", "resources.gpus_per_trial=0.25", "search.rungs=[0.5]"]
    trial = training("search", shared)
    assert training_work(trial, trials=40).on(8).processes == 32
    assert training_work(trial, trials=5).on(8).processes == 5
    assert training_work(trial).on(8).each.checkpoint == 0
    halved = training("search", [*shared, "search.halving={keep: 0.5}"])
    assert training_work(halved).on(8).each.checkpoint > 12 * halved.student.num_parameters
    offloaded = [f"search.training.{text}" for text in ("optimizer=adamw-offload", "shard=false", "micro_batch_rows=1")]
    with pytest.raises(InputError, match=r"set resources\.gpus_per_trial=1, which takes 4\d\d\.\d GB"):
        training_work(training("search", [*shared, *offloaded]), trials=40).check(
            "search", [GpuNode(8, 600_000_000_000)]
        )


def test_shards_that_are_written_take_two_pinned_buffers_and_a_conversion_the_model():
    recipe = load_recipe(LLAMA)
    resources = resolve(recipe, 8)
    targets = targets_work(TEACHER, 2, 10**12, resources).on(8)
    assert targets.each.rows == 2 * (256 << 20)
    assert targets.processes == 8
    converted = conversion_work(recipe, TEACHER, 2, resources).on(8)
    assert converted.file == 2 * TEACHER.num_parameters
    gguf = conversion_work(load_recipe(LLAMA, ["teacher.model=/x/y.gguf"]), TEACHER, 2, resources).on(8)
    assert gguf.file == 6 * TEACHER.num_parameters


def test_no_stage_but_checkpoints_needs_more_than_1_3_copies_of_the_largest_model():
    """70B on a node of 8: besides what processes without a model take."""
    teacher = Architecture(80, 8192, 28_672, 64, 8, 128, 128_256, tied=False)
    recipe = load_recipe(LLAMA)
    resources = resolve(recipe, 8)
    copy = 2 * teacher.num_parameters
    works = [
        conversion_work(recipe, teacher, 2, resources),
        node_memory.forward_work([teacher], 2, resources),
        targets_work(teacher, 2, 10**12, resources),
    ]
    for work in works:
        memory = work.on(8)
        assert memory.total - 8 * LIBRARIES - 8 * host_memory.CONTEXT < 1.3 * copy


@pytest.fixture
def gpu(monkeypatch):
    """Makes this process see one GPU of 80 GB, which torch cannot compute on."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    found = SimpleNamespace(total_memory=80_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: found)


def test_a_plan_states_the_memory_of_a_node_and_refuses_what_the_recipes_nodes_do_not_have(bench, tmp_path):
    def planned(*overrides):
        recipe = load_recipe(str(bench / "recipe.yaml"), overrides)
        return plan(recipe, storage_path=tmp_path / "planned", cluster=assumed_cluster(16, 8))

    memory = planned().node_memory
    assert {"teacher", "targets", "tiny-student search", "tiny-student distill"} <= memory.keys()
    assert memory["targets"].processes == 4
    with pytest.raises(InputError, match=r"(?s)a node needs .* of main memory, and has 2\.0 GB"):
        planned("resources.node_memory_bytes=2e9")
    planned("resources.node_memory_bytes=200e9")
    here = plan(load_recipe(str(bench / "recipe.yaml")), storage_path=tmp_path / "planned")
    assert here.node_memory == {}  # no GPUs


def test_a_cluster_that_is_to_be_started_gets_a_warning_if_its_nodes_lack_the_memory(bench, tmp_path):
    def warnings(*options):
        nodes = ("--nodes", 2, "--gpus", 2, "--recipe", bench / "recipe.yaml", "--storage", "/shared")
        done = minitron_here("cluster", "render", "slurm", *nodes, *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return [line for line in done.stderr.splitlines() if "a node needs" in line]

    (warning,) = warnings("--memory", 4)
    assert re.search(r"^warning: .*: 2 processes of .* of main memory, and has 4\.3 GB; .*\(--memory\)", warning)
    assert warnings("--memory", 16) == []
    assert warnings("--memory", 4, "--set", "teacher.model=/on/the/nodes") == []  # a teacher that is not here


def test_the_command_prints_it(bench):
    told = minitron_here("plan", "recipe.yaml", "--gpus", 8, "--storage", "planned", cwd=bench)
    assert re.search(r"each node distill: \d+\.\d GB: 4 processes of 2\.6 \(context 2\.0, libraries 0\.6", told.stdout)
    assert "Ray and driver 1.2" in told.stdout


def test_the_memory_of_this_machine_counts_if_it_has_the_gpus(bench, tmp_path, gpu, monkeypatch):
    monkeypatch.setattr("minitron_platform.planning.machines.machine_memory", lambda: 3_000_000_000)
    with pytest.raises(InputError, match=r"(?s)a node needs .* and has 3\.0 GB"):
        plan(load_recipe(str(bench / "recipe.yaml")), storage_path=tmp_path / "planned")
