"""The model registry: one version per key, and aliases that only move to weights with the right hashes."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import pytest
import requests
from click.testing import CliRunner
from helpers.command import environment
from helpers.faulty_proxy import faulty_proxy
from helpers.mlflow_server import free_port, mlflow_server
from mlflow import MlflowClient

from minitron.errors import InputError, MinitronError, StorageError
from minitron.storage import committed_folder, manifest, verify
from minitron.storage import ranges as storage_ranges
from minitron_platform.cli.commands import main
from minitron_platform.locations import resolve_locations
from minitron_platform.tracking import version_weights
from minitron_platform.tracking.client import RegistryError, open_registry, registered_version
from minitron_platform.tracking.logged_models import ModelFigures
from minitron_platform.tracking.moves import promote, rollback
from minitron_platform.tracking.registry import check_not_prompts, models, pull, register
from minitron_platform.tracking.server import serve
from minitron_platform.tracking.ui_password import read_password

NAME = "tiny-family"


@pytest.fixture
def uri(tmp_path: Path, empty_database: Path) -> str:
    shutil.copy(empty_database, tmp_path)
    return f"sqlite:///{tmp_path}/mlflow.db"


def weights(folder: Path, content: bytes = b"weights") -> str:
    with committed_folder(str(folder)) as temporary:
        (temporary / "model.safetensors").write_bytes(content)
        (temporary / "tokenizer").mkdir()
        (temporary / "tokenizer" / "vocab.json").write_text("{}")
    return str(folder)


def add(uri: str, folder: Path, key: str, **tags: str) -> str:
    return register(uri, name=NAME, source=weights(folder, key.encode()), run_id=None, tags=tags)


def champion(uri: str) -> list[str]:
    return [row.version for row in models(uri) if "champion" in row.aliases]


def test_registering_twice_creates_one_version(uri: str, tmp_path: Path) -> None:
    assert models(f"sqlite:///{tmp_path}/none.db") == []
    assert not (tmp_path / "none.db").exists()
    assert add(uri, tmp_path / "a", "a", **{"minitron.parameters": "1200"}) == "1"
    assert add(uri, tmp_path / "a", "a", **{"minitron.parameters": "1200", "minitron.heldout_kl": "0.25"}) == "1"
    assert add(uri, tmp_path / "b", "b") == "2"
    assert add(uri, tmp_path / "a", "a") == "1"  # the alias stays at the newer version
    newest, oldest = models(uri)
    assert (newest.version, newest.aliases, newest.parameters) == ("2", ("candidate",), None)
    assert (oldest.version, oldest.aliases, oldest.source) == ("1", (), str(tmp_path / "a"))
    assert (oldest.parameters, oldest.heldout_kl, oldest.heldout_loss) == (1200, 0.25, None)


@pytest.mark.parametrize(("name", "logged"), [(NAME, NAME), ("qwen2.5-3b", "qwen2_5-3b"), ("half%", "half_")])
def test_the_logged_model_of_a_version_has_its_figures_once(uri: str, tmp_path: Path, name: str, logged: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.create_experiment("family")
    run_id = client.create_run(experiment).info.run_id
    source = weights(tmp_path / "a")

    def once(kl: float) -> None:
        figures = ModelFigures(run_id, {"kl": kl, "arc.acc,none": 0.5}, {"teacher": "large"})
        register(uri, name=name, source=source, run_id=run_id, tags={}, figures=figures)

    for kl in (0.25, 0.25, 0.2):  # again after a driver was killed, and after the evaluation was repeated
        once(kl)
    (model,) = client.search_logged_models([experiment])
    assert (model.name, str(model.status), model.params) == (logged, "READY", {"teacher": "large"})
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": name, "version": "1"}]
    shown = {each.key: each.value for each in sorted(model.metrics, key=lambda each: each.timestamp)}
    assert shown == {"arc.acc_none": 0.5, "kl": 0.2}
    assert [point.value for point in client.get_metric_history(run_id, "kl")] == [0.25, 0.2]
    assert models(uri)[0].source == source


def test_the_same_weights_in_another_folder_are_the_same_version(uri: str, tmp_path: Path) -> None:
    assert add(uri, tmp_path / "a", "same") == "1"
    assert add(uri, tmp_path / "copy", "same") == "1"


def test_two_processes_that_register_the_same_weights_create_one_version(uri: str, tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool:
        made = list(pool.map(lambda number: add(uri, tmp_path / str(number), "same"), range(4)))
    assert len(set(made)) == 1
    assert [row.version for row in models(uri)] == made[:1]


def test_a_process_that_is_killed_before_the_alias_is_set_leaves_it_to_the_next(uri: str, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    with committed_folder(str(folder)) as temporary:
        (temporary / "model.safetensors").write_text("weights")
    program = f"""
import os
from minitron_platform.tracking import registry
registry.point_newest = lambda *arguments: os.kill(os.getpid(), 9)
registry.register({uri!r}, name={NAME!r}, source={str(folder)!r}, run_id=None, tags={{"of": "the first"}})
"""
    killed = subprocess.run([sys.executable, "-c", program], env=environment())
    assert killed.returncode == -signal.SIGKILL
    client = MlflowClient(uri)
    assert (client.get_model_version(NAME, "1").tags["of"], client.get_registered_model(NAME).aliases) == (
        "the first",
        {},
    )
    assert register(uri, name=NAME, source=str(folder), run_id=None, tags={"of": "the second"}) == "1"
    assert client.get_model_version_by_alias(NAME, "candidate").tags["of"] == "the second"
    assert len(client.search_model_versions(f"name='{NAME}'")) == 1


def test_weights_are_found_in_a_storage_that_was_moved(uri: str, tmp_path: Path) -> None:
    add(uri, tmp_path / "before" / "student", "a", **{"minitron.storage_path": "student"})
    (tmp_path / "before").rename(tmp_path / "now")
    with pytest.raises(StorageError, match="has no manifest"):
        promote(uri, NAME)
    root = str(tmp_path / "now")
    assert promote(uri, NAME, storage_root=root).version == "1"
    assert models(uri, root)[0].source == f"{root}/student"


def test_promote_and_roll_back(uri: str, tmp_path: Path) -> None:
    for key in "abc":
        add(uri, tmp_path / key, key)
        promoted = promote(uri, NAME)
    assert (promoted.version, promoted.alias, promoted.previous) == ("3", "champion", "2")
    assert promote(uri, NAME).previous == "3"  # nothing changed, so nothing is recorded
    assert rollback(uri, NAME).version == "2"
    assert champion(uri) == ["2"]
    assert promote(uri, NAME, version="3").previous == "2"
    assert [rollback(uri, NAME).version for _ in range(2)] == ["2", "1"]
    assert champion(uri) == ["1"]
    with pytest.raises(InputError, match="version 1 and has no previous version"):
        rollback(uri, NAME)


def test_an_alias_that_was_moved_by_hand_is_part_of_the_history(uri: str, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    for key in "abc":
        add(uri, tmp_path / key, key)
    promote(uri, NAME, version="1")
    MlflowClient(uri).set_registered_model_alias(NAME, "champion", "2")
    promote(uri, NAME, version="3")
    assert [rollback(uri, NAME).version for _ in range(2)] == ["2", "1"]
    history = json.loads(MlflowClient(uri).get_registered_model(NAME).tags["minitron.history.champion"])
    assert [(entry["version"], entry["previous"]) for entry in history] == [
        ("1", None),
        ("3", "2"),
        ("2", "3"),
        ("1", "2"),
    ]


def test_altered_weights_are_not_promoted(uri: str, tmp_path: Path) -> None:
    add(uri, tmp_path / "a", "a")
    promote(uri, NAME)
    add(uri, tmp_path / "b", "b")
    file = tmp_path / "b" / "model.safetensors"
    file.write_bytes(b"x")
    with pytest.raises(StorageError, match=str(file)):
        promote(uri, NAME)
    manifest = (tmp_path / "b" / "manifest.json").read_bytes()
    shutil.rmtree(tmp_path / "b")
    weights(tmp_path / "b", b"replaced, with a manifest that fits")
    assert (tmp_path / "b" / "manifest.json").read_bytes() != manifest
    with pytest.raises(StorageError, match="replaced after they were registered"):
        promote(uri, NAME)
    assert champion(uri) == ["1"]
    add(uri, tmp_path / "c", "c")
    promote(uri, NAME)
    (tmp_path / "a" / "tokenizer" / "vocab.json").unlink()
    with pytest.raises(StorageError, match=r"vocab\.json: missing"):
        rollback(uri, NAME)
    assert champion(uri) == ["3"]


def test_errors_name_the_existing_models_and_versions(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="no model is registered there: check the storage"):
        promote(uri, NAME)
    add(uri, tmp_path / "a", "a")
    with pytest.raises(InputError, match=f"choose one of: {NAME}"):
        promote(uri, "other")
    with pytest.raises(InputError, match="choose one of: 1"):
        promote(uri, NAME, version="7")
    with pytest.raises(InputError, match=r"its aliases are: candidate \(version 1\)"):
        rollback(uri, NAME)
    for alias in ("latest", "Latest", "v1", "V12", "a.b", ""):
        with pytest.raises(InputError, match=f"alias '{alias}' is not allowed"):
            promote(uri, NAME, alias=alias)
        with pytest.raises(InputError, match=f"alias '{alias}' is not allowed"):
            register(uri, name=NAME, source=weights(tmp_path / "new", b"new"), run_id=None, tags={}, alias=alias)
    assert len(models(uri)) == 1  # nothing else was registered
    MlflowClient(uri).register_prompt("greeting", "Hello")
    for name in ("a/b", "a@b", "a\nb", ".", "..a", "minitron-lock-a", "greeting"):
        with pytest.raises(InputError, match=re.escape(f"model name {name!r}")):
            register(uri, name=name, source=str(tmp_path / "a"), run_id=None, tags={})
    with pytest.raises(InputError, match=r"family\.1\.model: 'greeting': MLflow has a prompt of that name") as refusal:
        check_not_prompts(uri, {"family.0.model": NAME, "family.1.model": "greeting"})
    assert refusal.value.remedy == "choose another one, or rename the prompt"
    assert [row.name for row in models(uri)] == [NAME]
    with pytest.raises(StorageError, match=r"has no manifest\.json"):
        register(uri, name=NAME, source=str(tmp_path), run_id=None, tags={})
    with pytest.raises(MinitronError, match=r"127\.0\.0\.1"):
        models(f"http://127.0.0.1:{free_port()}")
    (tmp_path / "text.db").write_text("not a database, but long enough to have a header " * 10)
    with pytest.raises(InputError, match=r"text\.db cannot be opened \(file is not a database\)"):
        models(f"sqlite:///{tmp_path}/text.db")
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(InputError, match="psycopg2 is not installed"):
        promote("postgresql+psycopg2://user:secret@host/mlflow", NAME)


@pytest.fixture(scope="module")
def protected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SplitResult, Path]]:
    """The link that `minitron ui` prints, and the folder of its artifacts."""
    folder = tmp_path_factory.mktemp("ui")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        with mlflow_server(folder, free_port(), auth=True) as link:
            yield urlsplit(link), folder


@pytest.fixture
def signed_in(protected: tuple[SplitResult, Path], monkeypatch: pytest.MonkeyPatch) -> tuple[SplitResult, Path]:
    """`protected`, with the password in MLflow's environment variables."""
    link, _ = protected
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", str(link.username))
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", str(link.password))
    return protected


def test_the_ui_asks_everybody_for_the_password_that_its_owner_alone_can_read(
    protected: tuple[SplitResult, Path],
) -> None:
    link, folder = protected
    (file,) = (folder / "cache").rglob("ui-password")
    assert (file.stat().st_mode & 0o777, file.read_text()) == (0o600, link.password)
    address = f"http://{link.hostname}:{link.port}"
    whole_disk = {"name": "root", "artifact_location": "file:///"}  # whose files MLflow would then serve
    requests_of_others = [
        ("GET", "/", None),
        ("POST", "/api/2.0/mlflow/experiments/create", whole_disk),
        ("GET", "/api/2.0/mlflow-artifacts/artifacts", None),
        ("GET", "/get-artifact?path=passwd&run_uuid=0", None),
        ("POST", "/graphql", {"query": "{__typename}"}),
        ("POST", "/v1/traces", {}),
    ]
    for method, path, body in requests_of_others:
        for guess in (None, ("admin", "password"), (link.username, "")):
            assert requests.request(method, address + path, json=body, auth=guess).status_code == 401, path
    mine = (str(link.username), str(link.password))
    assert "<html" in requests.get(f"{address}/", auth=mine).text
    assert requests.post(f"{address}/graphql", json={"query": "{__typename}"}, auth=mine).status_code == 200
    experiments = requests.get(f"{address}/ajax-api/2.0/mlflow/experiments/search?max_results=9", auth=mine).json()
    assert [each["name"] for each in experiments["experiments"]] == ["Default"]


def test_a_password_that_others_can_read_or_wrote_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = read_password()
    assert read_password() == made
    file = tmp_path / "minitron" / "ui-password"
    file.chmod(0o640)
    with pytest.raises(StorageError, match="not a password that only you know"):
        read_password()
    file.rename(tmp_path / "moved")
    (tmp_path / "moved").chmod(0o600)
    file.symlink_to(tmp_path / "moved")
    with pytest.raises(StorageError, match="not a password that only you know"):
        read_password()


def test_a_server_gets_the_weights_uploaded(
    signed_in: tuple[SplitResult, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, served = signed_in
    address = f"http://{link.hostname}:{link.port}"
    source = weights(tmp_path / "weights", b"w" * 100_000)
    steps: list[tuple[int, int]] = []
    from mlflow import MlflowClient
    from mlflow.artifacts import download_artifacts

    client = MlflowClient(address)
    run_id = client.create_run(client.create_experiment("family")).info.run_id
    Path(source, "README.md").write_text("card")

    def once() -> str:
        return register(
            address,
            name=NAME,
            source=source,
            run_id=run_id,
            tags={},
            figures=ModelFigures(run_id, {"kl": 0.25}),
            progress=lambda done, total: steps.append((done, total)),
        )

    assert once() == "1"
    assert steps[-1] == (100_002, 100_002)
    assert once() == "1"
    (model,) = client.search_logged_models([client.get_experiment_by_name("family").experiment_id])
    assert [(metric.key, metric.value) for metric in model.metrics] == [("kl", 0.25)]
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": NAME, "version": 1}]
    assert promote(address, NAME).version == "1"
    (row,) = models(address)
    assert (row.run_id, row.aliases) == (run_id, ("candidate", "champion"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)  # models:/ addresses are resolved there
    assert pull(address, NAME, str(tmp_path / "pulled")) == "1"
    assert manifest(str(tmp_path / "pulled"))["files"] == manifest(source)["files"]
    verify(str(tmp_path / "pulled"))
    assert version_weights.read_card(client, client.get_model_version(NAME, "1"), None) == "card"
    got = download_artifacts(f"models:/{NAME}@champion")
    assert (Path(got) / "model.safetensors").read_bytes() == b"w" * 100_000
    assert (Path(got) / "tokenizer" / "vocab.json").read_text() == "{}"
    (stored,) = (served / "served").rglob("model.safetensors")
    stored.write_bytes(b"x" * 100_000)
    for use in (lambda: promote(address, NAME), lambda: pull(address, NAME, str(tmp_path / "new"))):
        with pytest.raises(StorageError, match=r"version 1 of model 'tiny-family': model\.safetensors: SHA-256 is"):
            use()
    assert not (tmp_path / "new").exists()
    (listed,) = (served / "served").rglob("manifest.json")
    listed.write_text(listed.read_text().replace("model.safetensors", "../../planted"))
    with pytest.raises(StorageError, match="weights were replaced"):
        pull(address, NAME, str(tmp_path / "new"))
    client.delete_model_version_tag(NAME, "1", "minitron.manifest_sha256")  # as any client can
    with pytest.raises(StorageError, match=r"does not say which weights were registered"):
        pull(address, NAME, str(tmp_path / "new"))
    with pytest.raises(StorageError, match=r"planted"):
        pull(address, NAME, str(tmp_path / "new"), unverified=True)
    listed.write_bytes((tmp_path / "weights" / "manifest.json").read_bytes())
    stored.write_bytes(b"cut")
    with pytest.raises(StorageError, match=r"model\.safetensors has 3 bytes"):
        promote(address, NAME, unverified=True)


def test_a_model_is_found_by_its_name_and_all_are_listed_at_once(
    signed_in: tuple[SplitResult, Path], tmp_path: Path
) -> None:
    """A server of a company holds thousands of models."""
    link, folder = signed_in
    assert link.port
    with faulty_proxy(link.port) as proxy:

        def added(name: str) -> str:
            source = weights(tmp_path / name, name.encode())
            return register(proxy.address, name=name, source=source, run_id=None, tags={})

        def requests_of_a_list() -> int:
            before = len(proxy.asked)
            assert {"mine"} <= {row.name for row in models(proxy.address)}
            return len(proxy.asked) - before

        for _ in range(2):
            assert added("mine") == "1"
        promote(proxy.address, "mine")
        pull(proxy.address, "mine", str(tmp_path / "pulled"))
        assert not [path for path in proxy.asked if "registered-models/search" in path]
        of_one = requests_of_a_list()
        for name in ("another", "a third"):
            added(name)
        assert requests_of_a_list() == of_one
    # of no run, so that they are in MLflow's experiment `Default`
    assert len(list((folder / "artifacts" / "Default").rglob("model.safetensors"))) == 3


def test_a_version_whose_recorded_hash_was_deleted_is_promoted_only_unverified(uri: str, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    add(uri, tmp_path / "a", "a")
    MlflowClient(uri).delete_model_version_tag(NAME, "1", "minitron.manifest_sha256")
    with pytest.raises(StorageError, match="does not say which weights were registered") as refused:
        promote(uri, NAME)
    assert "--unverified" in refused.value.remedy
    assert champion(uri) == []
    assert promote(uri, NAME, unverified=True).version == "1"


def test_models_pull_copies_and_compares_the_weights_of_an_alias(uri: str, tmp_path: Path) -> None:
    add(uri, tmp_path / "a", "a")
    promote(uri, NAME)
    add(uri, tmp_path / "b", "b")
    (tmp_path / "a" / "README.md").write_text("card")
    out = tmp_path / "out"

    def command(*arguments: str) -> str:
        answer = CliRunner().invoke(main, ["models", "pull", *arguments, "--tracking-uri", uri])
        assert (answer.exit_code == 0) == (answer.stderr == ""), answer.output
        return answer.output

    assert command(NAME, str(out)) == f"{NAME} version 1, verified, is in {out}\n"
    assert command(f"{NAME}@candidate", str(tmp_path / "two")).startswith(f"{NAME} version 2")
    assert (out / "model.safetensors").read_bytes() == b"a"
    assert (out / "README.md").read_text() == "card"
    assert (tmp_path / "two" / "model.safetensors").read_bytes() == b"b"
    written = (out / "model.safetensors").stat().st_mtime_ns
    assert command(NAME, str(out)) == f"{NAME} version 1, verified, is in {out}\n"  # it is there already
    assert (out / "model.safetensors").stat().st_mtime_ns == written
    assert "other weights than those of version 2" in command(f"{NAME}@candidate", str(out))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    assert "there are files in it" in command(NAME, str(tmp_path / "full"))
    (tmp_path / "a" / "model.safetensors").write_bytes(b"x")
    assert "SHA-256 is" in command(NAME, str(tmp_path / "altered"))
    assert not (tmp_path / "altered").exists()
    listing = CliRunner().invoke(main, ["models", "--tracking-uri", uri])
    assert f"{NAME} 1 (champion)" in listing.output


@pytest.mark.parametrize("left", ["a part", "other bytes"])
def test_models_pull_goes_on_in_the_middle_of_a_file(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    content = bytes(range(256)) * 40
    with committed_folder(str(tmp_path / "weights")) as folder:
        (folder / "model.safetensors").write_bytes(content)
    register(uri, name=NAME, source=str(tmp_path / "weights"), run_id=None, tags={})
    monkeypatch.setattr(version_weights, "PIECE", 128)
    read: list[tuple[int, int]] = []
    broken_at = 5000  # bytes: then the connection is lost

    def read_ranges(path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes | bytearray]:
        if ranges[-1][1] > broken_at:
            raise StorageError("no answer", "try again")
        read.extend(ranges)
        return storage_ranges.read_ranges(path, ranges)

    monkeypatch.setattr(version_weights, "read_ranges", read_ranges)
    out = tmp_path / "out"
    with pytest.raises(StorageError, match="no answer"):
        pull(uri, NAME, str(out), alias="candidate")
    assert not out.exists()
    (part,) = tmp_path.glob(".out.*.part")
    if left == "other bytes":
        (part / "model.safetensors").write_bytes(b"x" * (part / "model.safetensors").stat().st_size)
    read.clear()
    broken_at = len(content)
    pull(uri, NAME, str(out), alias="candidate")
    assert (out / "model.safetensors").read_bytes() == content
    first = 4096  # whole groups of requests below 5000
    assert sum(end - start for start, end in read) == len(content) - first + (len(content) if left != "a part" else 0)


def test_two_copies_of_a_model_to_one_folder_at_once_do_not_spoil_each_other(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        add(uri, tmp_path / name, name)
    out = tmp_path / "out"
    refused: list[str] = []
    started: list[str] = []

    def read_ranges(path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes | bytearray]:
        if not started:
            started.append(path)
            with pytest.raises(StorageError) as caught:
                pull(uri, NAME, str(out), version="2")
            refused.append(caught.value.problem)
            pull(uri, NAME, str(out), version="1")  # other weights, which are there first
        return storage_ranges.read_ranges(path, ranges)

    monkeypatch.setattr(version_weights, "read_ranges", read_ranges)
    with pytest.raises(StorageError, match="someone else has made this folder meanwhile; the result is in") as caught:
        pull(uri, NAME, str(out), version="2")
    assert refused == [f"{out}: another process is copying the same weights to it"]
    kept = caught.value.problem.rsplit(" ", 1)[1]
    for folder, source in ((out, "one"), (kept, "two")):
        verify(str(folder))
        assert manifest(str(folder))["files"] == manifest(str(tmp_path / source))["files"]
    assert not list(tmp_path.glob(".out.*"))


def test_a_change_in_a_database_that_cannot_be_written_says_so(uri: str, tmp_path: Path) -> None:
    add(uri, tmp_path / "one", "one")
    database = tmp_path / "read-only.db"
    content = bytearray(Path(uri.removeprefix("sqlite:///")).read_bytes())
    content[18] = 3  # a version of the format that this SQLite reads, but does not write
    database.write_bytes(content)
    with open_registry(f"sqlite:///{database}") as client:
        assert registered_version(client, NAME, "1").version == 1
    for change in (
        lambda client: client.delete_model_version(NAME, "1"),
        lambda client: client.set_registered_model_alias(NAME, "champion", "1"),
    ):
        refused = pytest.raises(RegistryError, match="attempt to write a readonly database")
        with refused as caught, open_registry(f"sqlite:///{database}") as client:
            change(client)
        assert "check that this user can write the file" in caught.value.remedy


def test_the_ui_refuses_other_machines_and_ports_in_use(uri: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"(?s)0\.0\.0\.0.*--insecure"):
        serve(uri, str(tmp_path), host="0.0.0.0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match="--port"):
            serve(uri, str(tmp_path), port=taken.getsockname()[1])
    said: list[str] = []
    assert serve("http://tracking.example:5000", str(tmp_path), say=said.append) == 0
    assert said == ["MLflow is at http://tracking.example:5000/#/experiments?workflowType=machine_learning"]


def test_models_and_tags_that_others_wrote_are_listed_and_can_be_promoted(uri: str, tmp_path: Path, caplog) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    weights(tmp_path / "a")
    for name in ("bob's model", 'the "other" model', "Modèle %_\\"):
        client.create_registered_model(name)
        tags = {"minitron.parameters": "many", "minitron.heldout_kl": "nan", "minitron.heldout_loss": "2.5"}
        tags["minitron.storage_path"] = "../elsewhere"
        client.create_model_version(name, str(tmp_path / "a"), tags=tags)
        assert promote(uri, name, version="1", unverified=True).version == "1"
    client.create_registered_model("empty")
    rows = models(uri, str(tmp_path))
    assert [row.name for row in rows] == sorted(["bob's model", 'the "other" model', "Modèle %_\\"])
    assert {(row.parameters, row.heldout_kl, row.heldout_loss) for row in rows} == {(None, None, 2.5)}
    assert "the tag minitron.parameters is not a number: 'many'" in caplog.text


@pytest.mark.parametrize("history", ["not JSON", "3", '[{"version": 1}]', "[" * 10_000, '["1"]'])
def test_a_history_that_is_none_is_left_out_and_reported(uri: str, tmp_path: Path, history: str, caplog) -> None:
    from mlflow import MlflowClient

    for key in ("a", "b"):
        add(uri, tmp_path / key, key)
    promote(uri, NAME, version="1")
    MlflowClient(uri).set_registered_model_tag(NAME, "minitron.history.champion", history)
    with pytest.raises(InputError, match="has no previous version"):
        rollback(uri, NAME)
    assert "is not a history of moves" in caplog.text
    promote(uri, NAME, version="2")
    assert rollback(uri, NAME).version == "1"


def test_a_version_that_was_deleted_while_it_was_champion_is_rolled_back_from(uri: str, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    for key in ("a", "b", "c"):
        add(uri, tmp_path / key, key)
        promote(uri, NAME)
    client = MlflowClient(uri)
    client.delete_model_version(NAME, "3")
    assert champion(uri) == []
    client.delete_model_version(NAME, "2")
    assert rollback(uri, NAME).version == "1"
    with pytest.raises(InputError, match="has no previous version"):
        rollback(uri, NAME)


@pytest.mark.parametrize("name", ["a b#c", "100%", "it's", "[1]*", "é;&="])
def test_mlflows_database_is_in_the_storage_whatever_its_name(tmp_path: Path, empty_database: Path, name: str) -> None:
    locations = resolve_locations(tmp_path / name)
    (tmp_path / name).mkdir()
    shutil.copy(empty_database, tmp_path / name)
    add(locations.tracking_uri, tmp_path / name / "a", "a")
    assert [row.version for row in models(locations.tracking_uri, locations.storage)] == ["1"]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_storage_whose_name_would_end_the_address_of_mlflows_database_is_refused(tmp_path: Path) -> None:
    for name, part in (("runs?x=1", r"'\?'"), ("a%20b", "'%20'")):
        with pytest.raises(InputError, match=f"contains {part}") as refused:
            resolve_locations(tmp_path / name)
    assert "--tracking-uri" in refused.value.remedy
    assert resolve_locations(tmp_path / "runs?x=1", "http://127.0.0.1:5000").storage == f"{tmp_path}/runs?x=1"


def test_a_mistyped_storage_is_refused_and_creates_nothing(tmp_path: Path) -> None:
    runner = CliRunner()
    for command in (["promote", NAME], ["rollback", NAME], ["ui"], ["models"]):
        done = runner.invoke(main, [*command, "--storage", str(tmp_path / "mistyped")])
        if command != ["models"]:
            assert done.exit_code == 2
        assert f"{tmp_path}/mistyped/mlflow.db" in done.output
        assert not list(tmp_path.iterdir())
