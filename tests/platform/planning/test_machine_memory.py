"""The memory that a process may use: the machine's, or the limit of its container, job or service."""

from __future__ import annotations

import pytest

from minitron.architecture import Architecture
from minitron.architecture.published import BASES
from minitron.errors import InputError
from minitron.memory import LIBRARIES, conversion_memory
from minitron_platform import load_recipe, plan
from minitron_platform.estimates.memory import machine_memory

GB = 1 << 30
JOB = "/slurm/job_7"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        (f"0::{JOB}", {f"{JOB}/memory.max": 0.5, "/slurm/memory.max": 0.75}, 0.5),
        (f"0::{JOB}", {f"{JOB}/memory.max": None, "/slurm/memory.max": 0.25}, 0.25),
        ("0::/", {"/memory.max": 0.5, "/slurm/memory.max": 0.25}, 0.5),
        (f"4:cpu:/\n3:memory:{JOB}\n0::/", {f"/memory{JOB}/memory.limit_in_bytes": 0.5}, 0.5),
        ("3:memory:/docker/1\n0::/", {"/memory/memory.limit_in_bytes": 0.5}, 0.5),  # inside a container
        (f"3:cpu,cpuacct:{JOB}\n0::/", {f"{JOB}/memory.max": 0.5}, None),
    ],
    ids=["cgroup 2", "around it", "the container's own", "cgroup 1", "cgroup 1 in a container", "another controller's"],
)
def test_the_lowest_memory_limit_of_a_process_applies(tmp_path, groups, files, expected):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"{groups}\n")
    for name, share in files.items():
        file = tmp_path / f"sys/fs/cgroup{name}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("max\n" if share is None else f"{int(share * GB)}\n")
    whole = machine_memory(tmp_path / "nothing")
    assert machine_memory(tmp_path) == (whole if expected is None else expected * GB)
    assert whole > GB


def test_a_plan_states_the_memory_of_every_stage_with_a_model_and_refuses_the_first_that_does_not_fit(
    bench, tmp_path, monkeypatch
):
    recipe = load_recipe(str(bench / "recipe.yaml"))
    needed = plan(recipe, storage_path=tmp_path).memory
    assert {"teacher", "data", "targets"} <= needed.keys()
    monkeypatch.setattr("minitron_platform.planning.plan.machine_memory", lambda: LIBRARIES)
    with pytest.raises(InputError, match=r"^teacher: needs about .* GB of main memory .*\n.*use a smaller teacher"):
        plan(recipe, storage_path=tmp_path)


@pytest.mark.parametrize(("value_bytes", "measured"), [(2, 4.8), (4, 7.0)])
def test_the_memory_of_a_conversion_is_that_which_a_gguf_file_took(value_bytes, measured):
    """As `python -m benchmarks.conversion_memory` prints it, bytes a parameter."""
    teacher = Architecture(**BASES["Llama 3.1 8B"], tied=False)
    estimate = conversion_memory(teacher, value_bytes).total - LIBRARIES
    assert measured <= estimate / teacher.num_parameters < 1.1 * measured
