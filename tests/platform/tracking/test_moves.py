"""Moves of an alias by several processes at once, and what is kept of them."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from minitron.errors import InputError
from minitron.storage import committed_folder
from minitron_platform.tracking import alias_lock
from minitron_platform.tracking.moves import promote, rollback
from minitron_platform.tracking.registry import models, register

NAME = "tiny-family"


@pytest.fixture
def uri(tmp_path: Path, empty_database: Path) -> str:
    shutil.copy(empty_database, tmp_path)
    return f"sqlite:///{tmp_path}/mlflow.db"


def add(uri: str, folder: Path, alias: str = "candidate") -> str:
    if not folder.exists():
        with committed_folder(str(folder)) as temporary:
            (temporary / "model.safetensors").write_text(folder.name)
    return register(uri, name=NAME, source=str(folder), run_id=None, tags={}, alias=alias)


def history(uri: str) -> list[dict[str, Any]]:
    return json.loads(MlflowClient(uri).get_registered_model(NAME).tags["minitron.history.champion"])


def test_of_promotions_at_the_same_time_one_wins_and_the_others_are_told(uri: str, tmp_path: Path) -> None:
    versions = [add(uri, tmp_path / str(number)) for number in range(8)]

    def attempt(version: str, round_: int) -> str:
        try:
            promote(uri, NAME, version=version, tags={f"round.{round_}": "promoted"})
        except InputError as error:
            return error.problem
        return ""

    with ThreadPoolExecutor(8) as pool:
        said = [answer for round_ in range(8) for answer in pool.map(attempt, versions, [round_] * 8)]
    moves = history(uri)
    chain = [None, *(move["version"] for move in moves)]
    assert [move["previous"] for move in moves] == chain[:-1]
    assert chain[-1] == str(MlflowClient(uri).get_model_version_by_alias(NAME, "champion").version)
    losers = [answer for answer in said if answer]
    assert losers
    assert all("champion was moved to version" in answer for answer in losers)
    marked = sum(len(version.tags) - 1 for version in MlflowClient(uri).search_model_versions(f"name='{NAME}'"))
    assert marked == 64 - len(losers) >= len(moves) >= 8
    assert [model.name for model in MlflowClient(uri).search_registered_models()] == [NAME]  # no lock is left


def test_the_lock_of_a_killed_process_is_removed_by_the_next_and_is_no_model(uri: str, tmp_path: Path, caplog) -> None:
    add(uri, tmp_path / "a")
    client = MlflowClient(uri)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alias_lock, "LEFT_SECONDS", 0.0)
        with alias_lock.alias_lock(client, NAME, "champion"):
            assert [row.name for row in models(uri)] == [NAME]
            assert promote(uri, NAME).version == "1"
    assert "its lock is removed" in caplog.text


def test_a_history_has_room_in_every_database(uri: str, tmp_path: Path) -> None:
    add(uri, tmp_path / "a")
    add(uri, tmp_path / "b")
    moves = [{"version": str(n % 2 + 1), "time": "2026-01-01T00:00:00+00:00", "previous": None} for n in range(80)]
    MlflowClient(uri).set_registered_model_tag(NAME, "minitron.history.champion", json.dumps(moves))
    promote(uri, NAME)
    kept = history(uri)
    assert 40 < len(kept) < 80
    assert kept[-1]["version"] == "2"
    assert len(json.dumps(kept)) <= 5000  # characters that PostgreSQL keeps
    assert rollback(uri, NAME).version == "1"


def test_an_alias_that_is_new_is_set_at_an_older_version_too(uri: str, tmp_path: Path) -> None:
    add(uri, tmp_path / "a")
    add(uri, tmp_path / "b")
    assert add(uri, tmp_path / "a", alias="nightly") == "1"
    assert {row.version: row.aliases for row in models(uri)} == {"1": ("nightly",), "2": ("candidate",)}


def test_of_versions_that_are_registered_at_the_same_time_the_newest_has_the_alias(uri: str, tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool:
        made = list(pool.map(lambda number: add(uri, tmp_path / str(number)), range(4)))
    assert sorted(made) == ["1", "2", "3", "4"]
    assert {row.version: row.aliases for row in models(uri)}["4"] == ("candidate",)
