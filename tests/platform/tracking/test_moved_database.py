"""An MLflow database that was moved to another folder: which addresses in it are updated."""

from __future__ import annotations

import logging
import shutil

import pytest
from mlflow import MlflowClient

from minitron_platform.tracking.moved_database import update_addresses


@pytest.fixture
def store(empty_database, tmp_path):
    """A folder with a database that Minitron shares with other tools, and with the artifacts of both."""
    folder = tmp_path / "store"
    (folder / "artifacts" / "tiny").mkdir(parents=True)
    shutil.copy(empty_database, folder / "mlflow.db")
    client = _client(folder)
    for name, address in {
        "tiny": f"{folder}/artifacts/tiny",
        "bucket": "s3://bucket/artifacts/7",
        "team": f"{tmp_path}/team/artifacts/9",
    }.items():
        client.create_experiment(name, artifact_location=address)
    client.create_registered_model("student")
    for place in ("store/student", "runs/student"):
        (tmp_path / place).mkdir(parents=True)
        client.create_model_version("student", f"{tmp_path}/{place}")
    return folder


def _client(folder):
    return MlflowClient(f"sqlite:///{folder}/mlflow.db")


def _addresses(folder):
    client = _client(folder)
    places = {e.name: e.artifact_location for e in client.search_experiments() if e.name != "Default"}
    return places | {str(v.version): v.source for v in client.search_model_versions("name = 'student'")}


def test_addresses_of_moved_artifacts_are_updated_and_others_are_kept(store, tmp_path):
    before = _addresses(store)
    here = store.rename(tmp_path / "elsewhere")
    update_addresses(here / "mlflow.db")
    assert _addresses(here) == before | {"tiny": f"{here}/artifacts/tiny", "1": f"{here}/student"}


def test_weights_that_were_not_moved_keep_their_address(store, tmp_path):
    """Only the database and its artifacts were moved out of the folder of the storage."""
    here = tmp_path / "alone"
    here.mkdir()
    for part in ("mlflow.db", "artifacts"):
        (store / part).rename(here / part)
    update_addresses(here / "mlflow.db")
    after = _addresses(here)
    assert after["tiny"] == f"{here}/artifacts/tiny"
    assert after["1"] == f"{store}/student"


def test_another_path_to_the_same_folder_is_not_a_move(store, tmp_path, caplog):
    before = _addresses(store)
    (tmp_path / "link").symlink_to(store)
    with caplog.at_level(logging.WARNING):
        update_addresses(tmp_path / "link" / "mlflow.db")
    assert _addresses(store) == before
    assert caplog.text == ""


def test_a_moved_database_that_cannot_be_written_is_read_as_it_is(store, tmp_path, caplog):
    """As of a storage that is mounted elsewhere to be read alone."""
    before = _addresses(store)
    here = store.rename(tmp_path / "elsewhere")
    with open(here / "mlflow.db", "r+b") as file:
        file.seek(18)
        file.write(bytes([3]))  # a version of the format that this SQLite reads, but does not write
    with caplog.at_level(logging.WARNING):
        update_addresses(here / "mlflow.db")
    assert "cannot be written: it has addresses in the former folder" in caplog.text
    assert _addresses(here) == before
