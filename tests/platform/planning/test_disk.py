"""A disk that is too small for a run: what is refused, the settings that are enough, and what a cluster need not have here."""

from __future__ import annotations

import re

import pytest

from minitron.errors import StorageError
from minitron_platform import load_recipe, plan

ONLINE = "targets.mode=online"


@pytest.fixture
def planned(bench, tmp_path):
    return lambda *overrides: plan(load_recipe(str(bench / "recipe.yaml"), overrides), storage_path=tmp_path / "runs")


def refusal(planned, *overrides):
    with pytest.raises(StorageError) as refused:
        planned(*overrides)
    return refused.value


def test_fewer_rows_are_offered_of_an_online_teacher_only_if_they_are_enough(planned, disk):
    many = [ONLINE, "data.train_rows=100000"]
    needed = planned(*many).bytes
    disk(needed - 5_000_000)
    refused = refusal(planned, *many)
    # a row takes its tokens alone, because the teacher's outputs are stored of the search's rows
    rows = int(re.search(r"data\.train_rows to (\d+)", refused.remedy)[1])
    assert rows == 100_000 - -(-5_000_000 // (4 * 32))
    planned(ONLINE, f"data.train_rows={rows}")
    refusal(planned, ONLINE, f"data.train_rows={rows + 1}")


def test_a_disk_that_fewer_rows_do_not_help_is_refused_with_what_takes_the_room(planned, disk):
    disk(planned(ONLINE).bytes // 2)
    refused = refusal(planned, ONLINE)
    assert refused.remedy == "free some space, or choose another location with --storage"
    assert re.search(
        r"needs about [1-9]\d*\.\d MB \(.*search [1-9].*\), and the disk has [1-9]\d*\.\d MB", refused.problem
    )
    assert "training rows fit" not in refused.problem


def test_the_disk_of_this_machine_is_only_a_warning_in_a_plan_for_a_cluster_that_need_not_exist(plan_large, disk):
    disk(80_000_000_000)
    (warning,) = (text for text in plan_large().warnings if "the disk has" in text)
    assert re.search(
        r"needs about 778\.6 GB \(correct 3.*\), and the disk has 80\.0 GB free; give the cluster's", warning
    )
    disk(10**13)
    assert not [text for text in plan_large().warnings if "the disk has" in text]
