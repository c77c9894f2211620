"""Problems that would keep the results of a run out of MLflow are reported before the run starts."""

from __future__ import annotations

import http.server
import re
import shutil
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from helpers.mlflow_server import free_port
from helpers.serving import serving

from minitron.errors import InputError, MinitronError, StorageError
from minitron_platform import load_recipe, plan
from minitron_platform.addresses import check_jobs_address
from minitron_platform.stages.finished import run_key
from minitron_platform.tracking.check import BEST_EFFORT, check_tracking
from minitron_platform.tracking.moves import promote


@pytest.fixture
def database(tmp_path, empty_database):
    return Path(shutil.copy(empty_database, tmp_path))


def test_a_valid_or_missing_database_passes(database):
    assert check_tracking(f"sqlite:///{database}", "tiny") is None
    missing = database.with_name("none.db")
    assert check_tracking(f"sqlite:///{missing}", "tiny") is None
    assert not missing.exists()


def test_plan_refuses_a_file_that_is_not_a_database(bench, tmp_path):
    (tmp_path / "mlflow.db").write_text("not a database, but long enough to have a header " * 10)
    recipe = load_recipe(str(bench / "recipe.yaml"))
    with pytest.raises(InputError, match=r"mlflow\.db cannot be opened \(file is not a database\)"):
        plan(recipe, storage_path=str(tmp_path / "runs"), tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")


def test_a_database_that_can_only_be_read_is_refused(database):
    content = bytearray(database.read_bytes())
    content[18] = 3  # "file format write version": SQLite only reads what a later version writes, as without permission
    database.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot be written \(attempt to write a readonly database\)"):
        check_tracking(f"sqlite:///{database}", "tiny")
    assert "readonly database" in check_tracking(f"sqlite:///{database}", "tiny", BEST_EFFORT)
    assert database.read_bytes() == content


def test_a_database_that_cannot_be_created_is_refused():
    with pytest.raises(InputError, match=r"/proc/mlflow\.db cannot be created \(") as refused:
        check_tracking("sqlite:////proc/mlflow.db", "tiny")
    assert "check the permissions of /proc" in refused.value.remedy


def test_a_folder_in_the_place_of_the_database_is_refused(tmp_path):
    (tmp_path / "mlflow.db").mkdir()
    with pytest.raises(InputError, match=r"mlflow\.db cannot be opened \(unable to open database file\)"):
        check_tracking(f"sqlite:///{tmp_path}/mlflow.db", "tiny")


def test_a_database_that_another_process_writes_to_is_a_warning_for_a_run_and_an_error_for_a_promotion(
    database, monkeypatch
):
    monkeypatch.setattr("minitron_platform.tracking.check.LOCK_SECONDS", 0.1)
    uri = f"sqlite:///{database}"
    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert "is locked by another process" in check_tracking(uri, "tiny")
        with pytest.raises(MinitronError, match="is locked by another process"):
            promote(uri, "tiny")


@pytest.mark.parametrize("uri", ["postgresql://user@host:port/name", "mysql+pymysql://[::1", "sqlite+x://"])
def test_an_address_that_is_none_is_refused(uri):
    with pytest.raises(InputError):
        check_tracking(uri, "tiny")


@pytest.mark.parametrize("address", ["http://[::1", "http://host:port", "http://:8265", "https://host:99999"])
def test_an_address_of_a_jobs_api_that_is_none_is_refused(address):
    with pytest.raises(InputError, match="not the address of a Jobs API"):
        check_jobs_address(address)


def test_tables_of_another_mlflow_version_are_refused_with_the_command_that_upgrades_them(database):
    with sqlite3.connect(database) as store:
        store.execute("UPDATE alembic_version SET version_num = 'b7c8d543074c'")
    with pytest.raises(InputError, match="tables of another version") as refused:
        check_tracking(f"sqlite:///{database}", "tiny")
    assert "mlflow db upgrade" in refused.value.remedy


def test_a_deleted_experiment_is_refused_with_the_command_that_restores_it(database):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{database}")
    client.delete_experiment(client.create_experiment("tiny"))
    with pytest.raises(StorageError, match="was deleted in MLflow") as refused:
        check_tracking(f"sqlite:///{database}", "tiny")
    assert "experiments restore" in refused.value.remedy


@pytest.mark.parametrize(
    ("driver", "remedy"),
    [
        ("psycopg2", "pip install 'minitron[postgres]', and write postgresql+psycopg:// in the address"),
        ("psycopg", "pip install 'minitron[postgres]'"),
        ("pymysql", "pip install pymysql"),
    ],
)
def test_a_missing_database_driver_is_named_with_its_package(monkeypatch, driver, remedy):
    monkeypatch.setitem(sys.modules, driver, None)
    scheme = "mysql" if driver == "pymysql" else "postgresql"
    with pytest.raises(InputError, match=f"package {driver} is not installed") as refused:
        check_tracking(f"{scheme}+{driver}://user:secret@127.0.0.1/mlflow", "tiny")
    assert refused.value.remedy == remedy
    assert "secret" not in str(refused.value)


@pytest.fixture(scope="module")
def guarded():
    """The address of a server that refuses everybody."""

    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(401)
            self.end_headers()

        def log_message(self, *_):
            pass

    with serving(http.server.HTTPServer(("127.0.0.1", 0), Refuses)) as server:
        yield f"http://user:secret@127.0.0.1:{server.server_port}"


@pytest.mark.parametrize(
    ("problem", "reason", "remedy"),
    [
        ("password", "refuses this user", "MLFLOW_TRACKING_PASSWORD"),
        ("scheme", "is not supported", "use sqlite:///"),
        ("driver", r"package psycopg2? is not installed", "minitron[postgres]"),
        ("away", r"does not answer \(Connection refused\)", "start it or correct its address"),
    ],
)
def test_the_recipe_decides_whether_a_run_starts_without_mlflow(
    bench, tmp_path, monkeypatch, guarded, problem, reason, remedy
):
    for driver in ("psycopg", "psycopg2"):  # which of them is the default depends on SQLAlchemy's version
        monkeypatch.setitem(sys.modules, driver, None)
    uri = {
        "password": guarded,
        "scheme": "oracle://user:secret@127.0.0.1/mlflow",
        "driver": "postgresql://user:secret@127.0.0.1/mlflow",
        "away": f"http://user:secret@127.0.0.1:{free_port()}",
    }[problem]

    def planned(*settings):
        recipe = load_recipe(str(bench / "recipe.yaml"), settings)
        return plan(recipe, storage_path=str(tmp_path), tracking_uri=uri).warnings

    with pytest.raises(InputError, match=reason) as refused:
        planned("tracking=required")
    assert remedy in refused.value.remedy
    assert "secret" not in str(refused.value)
    (warning,) = planned("tracking=best-effort")
    assert re.search(reason, warning)
    assert "minitron sync" in warning
    assert "secret" not in warning
    if problem == "away":
        assert list(planned()) == [warning]
    else:
        assert remedy in warning
        with pytest.raises(InputError, match=reason):
            planned()


def test_the_tracking_of_a_recipe_does_not_change_its_run(bench):
    keys = {run_key(load_recipe(str(bench / "recipe.yaml"), settings)) for settings in ((), ("tracking=required",))}
    assert len(keys) == 1


def test_a_port_with_the_digits_of_a_status_is_none():
    taken = {connection.laddr.port for connection in psutil.net_connections("tcp") if connection.laddr}
    port = next(port for port in range(40100, 40200) if port not in taken)
    warning = check_tracking(f"http://127.0.0.1:{port}", "tiny")
    assert warning is not None
    assert "does not answer" in warning
