"""The plan of a run on a cluster of GPUs: simulated times, idle GPUs, what bounds them, prices, and what is refused."""

from __future__ import annotations

import re

import pytest
from helpers.command import minitron_here

from minitron.architecture import Architecture
from minitron.architecture.published import BASES
from minitron.errors import InputError
from minitron_platform import load_recipe, plan
from minitron_platform.cluster.nodes_at import ClusterNodes
from minitron_platform.cluster.room import trials_at_once
from minitron_platform.estimates.outlook import Outlook
from minitron_platform.estimates.teacher import teacher_cost
from minitron_platform.estimates.work import Alone, DataParallel, Split, Trials
from minitron_platform.planning.cluster import TRIAL_START, Cluster, assumed_cluster
from minitron_platform.planning.simulation import simulate
from minitron_platform.recipes.build import distillation_losses
from minitron_platform.recipes.candidates import family_candidates
from minitron_platform.recipes.resources import resolve
from minitron_platform.stages.order import steps

NEMOTRON = "nemotron-15b-8b-4b-h100x8"
AUTO = ["resources.workers=auto", "resources.gpus_per_worker=auto"]
LONG = ["distill.steps=1_000_000", "distill.batch_rows=4096", "distill.checkpoint_every=0"]
FLOPS = 1e12  # of a GPU in the tests of single parts


def simulated(gpus, overrides=()):
    """The time of every stage of a shipped recipe on a cluster of this size, and all GPU-seconds of computing."""
    recipe = load_recipe(NEMOTRON, [*AUTO, *overrides])
    teacher = Architecture(**BASES["Nemotron-4 15B"], tied=False)
    cluster, resources = assumed_cluster(gpus), resolve(recipe, gpus)
    family = family_candidates(recipe, teacher)
    losses = {model: distillation_losses(recipe, own.architectures[0], teacher)[0] for model, own in family.items()}
    outlook = Outlook(
        recipe=recipe,
        resources=resources,
        teacher=teacher,
        family=family,
        losses=losses,
        teacher_cost=teacher_cost(recipe, teacher, losses, 2, recipe.targets.mode),
        value_bytes=2,
        concurrent_trials=trials_at_once(resources, cluster.node_list),
    )
    estimates = {
        f"{member.model if member else ''} {s.name}".strip(): s.estimate(outlook, member) for s, member in steps(recipe)
    }
    times = {title: simulate(e.parts, e.start_up_seconds, cluster, resources) for title, e in estimates.items()}
    return times, sum(time.busy for time in times.values())


def test_a_larger_cluster_is_faster_until_the_rows_of_a_step_and_the_candidates_are_used_up():
    (on_8, busy), (on_64, busy_64), (on_512, busy_512) = (simulated(gpus) for gpus in (8, 64, 512))
    assert busy == pytest.approx(busy_64) == pytest.approx(busy_512)  # the work is the same
    for title in ("nemotron-8b search", "nemotron-8b distill", "targets"):
        assert on_8[title].seconds > 2 * on_64[title].seconds > 2 * on_512[title].seconds
        assert on_8[title].bound == "GPU compute"
    assert on_512["nemotron-8b distill"].bound == "288 rows in a step"
    assert on_512["nemotron-8b search"].bound == "17 candidates, room for 64 at once"
    assert on_512["teacher"] == on_8["teacher"]  # one worker does it
    # 288 rows on 64 workers: some have 5 rows and some 4, so that the others wait
    work = on_8["nemotron-8b distill"].seconds * 8 / 64
    assert on_64["nemotron-8b distill"].seconds == pytest.approx(work * 5 / 4.5, rel=0.01)


def test_more_workers_of_a_recipe_are_faster():
    seconds = [simulated(64, [f"resources.workers={n}"])[0]["nemotron-8b distill"].seconds for n in (8, 32, 64)]
    assert seconds[0] > 3 * seconds[1] > 3 * seconds[2]


def test_of_a_range_of_workers_as_many_work_as_there_are_gpus(bench):
    ranges = [f"resources.{key}={{min: 1, max: 4}}" for key in ("workers", "workers_per_trial")]
    recipe = load_recipe(str(bench / "recipe.yaml"), ranges)
    for gpus, workers in ((2, 2), (8, 4)):
        planned = plan(recipe, storage_path=bench / "planned", cluster=assumed_cluster(gpus))
        assert (planned.resources.workers, planned.resources.workers_per_trial) == (workers, workers)


def small(part, gpus=4, **resources):
    """The time of one part on nodes of 2 GPUs, without start-up."""
    recipe = load_recipe(
        NEMOTRON, [*AUTO, "resources.workers_per_trial=1", *(f"resources.{k}={v}" for k, v in resources.items())]
    )
    return simulate([part], 0, Cluster(gpus, 2, FLOPS), resolve(recipe, gpus))


def test_trials_start_as_soon_as_there_is_room_and_the_longest_may_come_last():
    work = (0.1, 0.1, 0.1, 0.1, 0.6)
    time = small(Trials(flops=10 * FLOPS, shares=work, workers=1, gpus=1))
    assert time.seconds == pytest.approx(1 + TRIAL_START + 6 + TRIAL_START)
    assert time.bound == "5 candidates, room for 4 at once"
    assert time.busy == pytest.approx(10)
    shared = small(Trials(flops=10 * FLOPS, shares=work, workers=1, gpus=0.5))
    assert shared.seconds == pytest.approx(12 + TRIAL_START)  # room for 8, each at half of the speed
    pairs = small(Trials(flops=10 * FLOPS, shares=work, workers=2, gpus=1, balance=0.5))
    # two at once, as fast as one GPU: 1, 1 | 1, 1 | 6
    assert pairs.seconds == pytest.approx(1 + 1 + 6 + 3 * TRIAL_START)


@pytest.mark.parametrize(
    ("part", "seconds", "bound"),
    [
        (Alone(flops=6 * FLOPS), 6, "one worker"),
        (Alone(reads=10_000_000_000), 5, "storage, one worker"),
        (Alone(reads=10_000_000_000, cpu_seconds=40), 45, "one CPU"),
        (Split(items=100, flops=8 * FLOPS), 2, "GPU compute"),
        (Split(items=3, flops=9 * FLOPS), 3, "3 rows or documents"),
        (Split(items=5, flops=5 * FLOPS), 2, "GPU compute"),  # one of four has two
        (Split(items=100, flops=8 * FLOPS, cpu_seconds=40), 10, "CPUs"),
        (Split(items=100, flops=8 * FLOPS, reads_per_node=40_000_000_000), 22, "storage"),
        (Split(items=100, flops=8 * FLOPS, writes=40_000_000_000), 10, "storage"),
        (DataParallel(flops=80 * FLOPS, steps=10, batch_rows=8), 20, "GPU compute"),
        (DataParallel(flops=80 * FLOPS, steps=10, batch_rows=2), 40, "2 rows in a step"),
        (DataParallel(flops=8 * FLOPS, steps=10, batch_rows=8, between_bytes=40e9), 10, "network between GPUs"),
    ],
)
def test_each_kind_of_work_is_bounded_by_what_takes_longest(part, seconds, bound):
    time = small(part)
    assert (time.seconds, time.bound) == (pytest.approx(seconds), bound)
    assert time.busy == pytest.approx(part.flops / FLOPS)


def test_the_command_simulates_a_cluster_and_says_what_it_assumes(bench):
    told = minitron_here(
        "plan", "recipe.yaml", "--gpus", 16, "--gpus-per-node", 4, "--price", 3, "--utilisation", 0.2, "--set",
        "teacher.dtype=auto", "--storage", "planned", cwd=bench,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert "on 16 GPUs, 4 per node" in told.stdout
    assert "Simulated, not measured. It assumes:" in told.stdout
    assert "models reach 20% of the 989 TFLOP/s in the data sheet of an H100" in told.stdout
    assert "up to 16 trials at once" in told.stdout
    assert "compute  bfloat16" in told.stdout
    assert re.search(r"│ distill +│ start-up +│ +3,072 │ +20 s │ +0.1 │ 100% │ +0.27", told.stdout)
    assert "distill GPU-h" in told.stdout
    assert "No price" not in told.stdout


def test_a_plan_without_a_price_says_how_to_get_one(bench):
    told = minitron_here("plan", "recipe.yaml", "--gpus", 4, "--storage", "planned", cwd=bench)
    assert "No price: give what a GPU costs for an hour with --price, or resources.price_per_gpu_hour" in told.stdout
    on_cpus = minitron_here("plan", "recipe.yaml", "--storage", "planned", cwd=bench)
    assert "price" not in on_cpus.stdout


def test_requests_are_shown_for_an_object_store_and_heartbeats_are_in_the_total(bench):
    told = minitron_here("plan", "recipe.yaml", "--storage", "memory://planned", cwd=bench)
    assert told.returncode == 0, told.stderr
    requests = [
        int(count.replace(",", "")) for count in re.findall(r"│ +([\d,]+) │ +[\w. ]+ │$", told.stdout, re.MULTILINE)
    ]
    *stages, total = requests
    assert len(stages) == 9
    assert sum(stages) < total < 1.2 * sum(stages)
    assert f"storage  memory://planned (about {total:,} requests)" in told.stdout
    local = minitron_here("plan", "recipe.yaml", "--storage", "planned", cwd=bench)
    assert "requests" not in local.stdout


def test_a_plan_for_a_cluster_has_its_gpu_hours_and_price(bench):
    recipe = load_recipe(str(bench / "recipe.yaml"), ["resources.price_per_gpu_hour=2"])
    planned = plan(recipe, storage_path=bench / "planned", cluster=assumed_cluster(4))
    assert planned.gpu_hours == pytest.approx(4 * planned.seconds / 3600)
    assert planned.price == pytest.approx(2 * planned.gpu_hours)
    assert 0.99 < planned.idle_share < 1
    assert plan(recipe, storage_path=bench / "planned").price is None  # no GPUs


@pytest.mark.parametrize(
    ("given", "gpus", "cpus", "workers"),
    [
        ({"gpus_per_worker": 3}, (8, 8), 64, 4),  # two on each node; the six GPUs that are left are on two nodes
        ({}, (8,), 5, 5),  # a CPU for each
        ({"workers": "{min: 1, max: 32}"}, (8, 2), 64, 10),
        ({"gpus_per_trial": 5, "workers_per_trial": 4}, (8, 5, 5, 5), 64, 16),
    ],
)
def test_workers_and_trials_are_those_that_the_nodes_of_a_cluster_have_room_for(
    bench, monkeypatch, given, gpus, cpus, workers
):
    nodes = [{"CPU": float(cpus), "GPU": float(number)} for number in gpus]
    monkeypatch.setattr("minitron_platform.planning.machines._nodes_of", lambda address: ClusterNodes(nodes, nodes))
    overrides = [*(f"resources.{key}={value}" for key, value in given.items()), "distill.batch_rows=16"]
    recipe = load_recipe(str(bench / "recipe.yaml"), [*overrides, "search.training.batch_rows=16"])
    planned = plan(recipe, storage_path=bench / "planned", address="10.0.0.1:6379")
    assert planned.resources.workers == workers
    assert planned.seconds > 0
    assert f"{workers} workers with" in planned.resources_text


@pytest.mark.parametrize(
    ("given", "cpus", "idle"),
    [
        (
            {"cpus_per_worker": 16},
            64,
            ["cpus_per_worker: 16 leaves 4 GPUs idle, since the nodes have CPUs for 4 workers; lower it to 8"],
        ),
        ({"cpus_per_worker": 16, "workers": "{min: 1, max: 6}"}, 64, ["cpus_per_worker: 16 leaves 2 GPUs idle, since"]),
        ({"cpus_per_worker": 16, "workers": 4}, 64, []),  # no more are wanted
        ({"cpus_per_worker": 8}, 64, []),
        (
            {"cpus_per_trial": 64},
            64,
            ["cpus_per_trial: 64 leaves 7 GPUs idle in the search, since the nodes have CPUs for 1 trial;"],
        ),
        ({"cpus_per_trial": 16, "gpus_per_trial": 0.5}, 64, ["cpus_per_trial: 16 leaves 6 GPUs idle in the search"]),
        ({"cpus_per_trial": 2, "gpus_per_trial": 0.1}, 144, []),  # eight trials wait, but every GPU has some
        ({}, 5, ["cpus_per_worker: 1 leaves 3 GPUs idle", "cpus_per_trial: 1 leaves 3 GPUs idle"]),
    ],
)
def test_gpus_that_are_idle_for_lack_of_cpus_are_named(bench, monkeypatch, given, cpus, idle):
    nodes = [{"CPU": float(cpus), "GPU": 8.0}]
    monkeypatch.setattr("minitron_platform.planning.machines._nodes_of", lambda address: ClusterNodes(nodes, nodes))
    overrides = [*(f"resources.{key}={value}" for key, value in given.items()), "distill.batch_rows=16"]
    recipe = load_recipe(str(bench / "recipe.yaml"), [*overrides, "search.training.batch_rows=16"])
    warnings = plan(recipe, storage_path=bench / "planned", address="10.0.0.1:6379").warnings
    found = [text for text in warnings if "idle" in text]
    assert len(found) == len(idle)
    for text, expected in zip(found, idle, strict=True):
        assert text.startswith(f"resources.{expected}")
        assert text.endswith(", or use nodes with more CPUs")


def recipe_settings(count, gpus, *, trial=False):
    keys = ("workers_per_trial", "gpus_per_trial") if trial else ("workers", "gpus_per_worker")
    return [f"resources.{key}={value}" for key, value in zip(keys, (count, gpus), strict=True)]


def test_a_plan_without_the_nodes_assumes_as_many_as_the_processes_need(bench, free_port):
    def assumed(*overrides):
        recipe = load_recipe(str(bench / "recipe.yaml"), overrides)
        found = plan(recipe, storage_path=bench / "planned", address=f"127.0.0.1:{free_port()}").cluster
        return found.gpus, found.gpus_per_node

    assert assumed(*recipe_settings(4, 3), *recipe_settings(1, 16, trial=True)) == (16, 16)
    # two on a node; on the 4 GPUs that 12 leave on the second node only one would have room
    assert assumed(*recipe_settings(4, 3), *recipe_settings(4, 3, trial=True)) == (14, 8)


def test_fewer_workers_than_gpus_bound_a_step_that_has_rows_for_more():
    part = DataParallel(flops=80 * FLOPS, steps=10, batch_rows=3)
    assert small(part, workers=2).bound == "2 workers"
    assert small(part).bound == "3 rows in a step"


def test_a_process_computes_on_one_of_its_gpus(bench):
    one = small(Trials(flops=10 * FLOPS, shares=(1.0,), workers=1, gpus=1))
    two = small(Trials(flops=10 * FLOPS, shares=(1.0,), workers=1, gpus=2))
    assert one.seconds == two.seconds == pytest.approx(10 + TRIAL_START)


def test_the_gpus_that_a_recipe_names_for_a_cluster_decide_the_time(bench, free_port):
    def hours(workers):
        settings = {"workers": workers, "gpus_per_worker": 1, "gpus_per_trial": 1}
        overrides = [f"resources.{key}={value}" for key, value in settings.items()]
        recipe = load_recipe(str(bench / "recipe.yaml"), [*overrides, *LONG])
        planned = plan(recipe, storage_path=bench / "planned", address=f"127.0.0.1:{free_port()}")
        return {cost.stage: cost.seconds for cost in planned.costs}["distill"]

    assert hours(1) > 3 * hours(4)


@pytest.mark.parametrize(
    ("overrides", "cluster", "refusal"),
    [
        (["resources.workers=8"], {"gpus": 4}, r"resources.workers: 8 need 8 GPUs, and --gpus says 4"),
        (["resources.gpus_per_trial=0"], {"gpus": 4}, r"resources.gpus_per_trial: without a GPU for each trial"),
        (
            ["resources.gpus_per_trial=4"],
            {"gpus": 4, "gpus_per_node": 2},
            r"resources.gpus_per_trial: 4 GPUs on one node, and nodes have 2\n.*larger nodes with --gpus-per-node",
        ),
        (
            ["resources.workers=5", "resources.gpus_per_worker=3"],
            {"gpus": 16},
            r"resources.workers: 5 with 3 GPUs each, and 16 GPUs on nodes of 8 are enough for 4\n.*lower .* to 4",
        ),
        (
            ["resources.gpus_per_worker=16"],
            {"gpus": 16},
            r"resources.gpus_per_worker: 16 GPUs on one node, and nodes have 8",
        ),
        (
            ["resources.workers_per_trial=4"],
            {"gpus": 2},
            r"resources.workers_per_trial: 4 need 4 GPUs, and --gpus says 2",
        ),
        ([], {"gpus": 0}, r"gpus: 0\n.*give a number from 1 to 100,000"),
        ([], {"gpus": 1, "gpus_per_node": 0}, r"gpus-per-node: 0\n.*give a number from 1"),
        ([], {"gpus": 1, "utilisation": 40}, r"utilisation: 40\n.*give a share above 0, up to 1"),
        ([], {"gpus": 1, "gpu": "Z9"}, r"gpu: no data sheet is known of 'Z9'\n.*H100"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused(bench, overrides, cluster, refusal):
    recipe = load_recipe(str(bench / "recipe.yaml"), overrides)
    with pytest.raises(InputError, match=refusal):
        plan(recipe, storage_path=bench / "planned", cluster=assumed_cluster(**cluster))


def test_workers_with_two_gpus_each_are_half_as_many_on_a_node(plan_large):
    planned = plan_large("resources.workers=8", "resources.gpus_per_worker=2", "correct=null", gpus=16)
    student = planned.candidates["llama-3.1-4b-width"][0]
    fit = planned.gpu_memory["llama-3.1-4b-width distill"]
    assert fit.memory.masters == 4 * student.num_parameters // 4  # a copy in each node, split over its four workers
    assert planned.node_memory["llama-3.1-4b-width distill"].processes == 4


def test_workers_that_no_step_has_a_row_for_are_named(bench):
    def warnings(workers):
        recipe = load_recipe(str(bench / "recipe.yaml"), [f"resources.workers={workers}", "distill.batch_rows=4"])
        return plan(recipe, storage_path=bench / "planned", cluster=assumed_cluster(8)).warnings

    assert not any("batch_rows" in warning for warning in warnings(4))
    (warning,) = (warning for warning in warnings(6) if "batch_rows" in warning)
    assert warning.startswith("resources.workers: 6, but the smallest batch_rows of a training is 4, so that 2 of them")
    assert warning.endswith("lower it to 4")
