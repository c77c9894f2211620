"""Text, models and benchmarks behind symbolic links, as in the hub cache: the target of a link counts."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from datasets import Features, Image, Value
from pyarrow import parquet

from minitron import models
from minitron.data import TextSource, documents, hub, source_identity
from minitron.errors import InputError, StorageError
from minitron.evaluation.documents import documents_identity

STAMP = 1_700_000_000


def _write(path: Path, text: str, time: int = STAMP) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"text": text}) + "\n")
    os.utime(path, (time, time))
    return path


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A folder as in the hub cache: links to two files elsewhere with the texts "one" and "two", and a link to a folder with
    the text "three"."""
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for name, blob, text in (("a.jsonl", "0a", "one"), ("b.jsonl", "0b", "two")):
        _write(tmp_path / "blobs" / blob, text)
        (folder / name).symlink_to(Path("..", "blobs", blob))
    _write(tmp_path / "more" / "c.jsonl", "three")
    (folder / "deep").symlink_to(tmp_path / "more")
    return folder


SOURCES: dict[str, tuple[Callable[[Path], TextSource], list[str]]] = {
    "file": (lambda folder: TextSource("jsonl", f"{folder}/a.jsonl"), ["one"]),
    "file address": (lambda folder: TextSource("jsonl", f"file://{folder}/a.jsonl"), ["one"]),
    "folder": (lambda folder: TextSource("jsonl", str(folder)), ["one", "three", "two"]),
    "glob": (lambda folder: TextSource("jsonl", f"{folder}/*.jsonl"), ["one", "two"]),
    "deep glob": (lambda folder: TextSource("jsonl", f"{folder}/**/*.jsonl"), ["one", "three", "two"]),
    "folder glob": (lambda folder: TextSource("jsonl", f"{folder.parent}/snap*/[ad]*/c.jsonl"), ["three"]),
}


@pytest.mark.parametrize("way", SOURCES)
def test_text_behind_links_is_read_and_a_changed_target_changes_the_identity(snapshot: Path, way: str) -> None:
    make, texts = SOURCES[way]
    source = make(snapshot)
    assert sorted(document.text for document in documents(source)) == texts
    before = source_identity(source)
    assert source_identity(source) == before == json.loads(json.dumps(before))
    target = snapshot.parent / ("more/c.jsonl" if texts == ["three"] else "blobs/0a")
    _write(target, "six", STAMP + 1)  # the same size
    assert source_identity(source) != before
    _write(target, texts[0], STAMP)
    assert source_identity(source) == before


def test_a_link_to_another_file_of_the_same_size_and_time_changes_the_identity(snapshot: Path) -> None:
    source = TextSource("jsonl", str(snapshot))
    before = source_identity(source)
    (snapshot / "a.jsonl").unlink()
    (snapshot / "a.jsonl").symlink_to(Path("..", "blobs", "0b"))
    assert source_identity(source) != before


def test_a_folder_without_links_has_the_same_identity_behind_a_link(tmp_path: Path) -> None:
    _write(tmp_path / "real" / "a.jsonl", "one")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    files = source_identity(TextSource("jsonl", str(tmp_path / "link")))["files"]
    assert files == [[f"{tmp_path}/link/a.jsonl", 16, f"{float(STAMP)}"]], "existing storages have this form"


@pytest.mark.parametrize("way", SOURCES)
def test_a_broken_link_is_named(snapshot: Path, way: str) -> None:
    source = SOURCES[way][0](snapshot)
    target = snapshot.parent / ("more/c.jsonl" if way == "folder glob" else "blobs/0a")
    link = target if way == "folder glob" else snapshot / "a.jsonl"
    target.unlink()
    if way == "folder glob":
        link.symlink_to("nowhere")
    for look in (source_identity, lambda source: list(documents(source))):
        with pytest.raises(StorageError, match=rf"{link.name}: a symbolic link to '.*', which cannot be read") as error:
            look(source)
        assert error.value.remedy


def test_a_broken_link_that_is_not_to_text_is_ignored(snapshot: Path) -> None:
    (snapshot / ".#lock").symlink_to("nowhere")
    (snapshot / "notes.md").symlink_to("nowhere")
    assert len(list(documents(TextSource("jsonl", str(snapshot))))) == 3


@pytest.mark.timeout(20)
def test_links_in_a_circle_are_followed_once(snapshot: Path) -> None:
    (snapshot / "up").symlink_to(snapshot.parent)
    (snapshot / "again").symlink_to(snapshot)
    (snapshot.parent / "more" / "back").symlink_to(snapshot)
    assert {document.text for document in documents(TextSource("jsonl", str(snapshot)))} == {"one", "two", "three"}
    assert len(list(documents(TextSource("jsonl", f"{snapshot}/**/c.jsonl")))) >= 1
    assert hub.commit(str(snapshot), None) == hub.commit(str(snapshot), None)
    assert documents_identity(str(snapshot)) == documents_identity(str(snapshot))
    (snapshot / "self.jsonl").symlink_to("self.jsonl")
    with pytest.raises(StorageError, match=r"self\.jsonl: a symbolic link to 'self\.jsonl'"):
        source_identity(TextSource("jsonl", str(snapshot)))


@pytest.mark.parametrize(
    "identity",
    [
        lambda folder: hub.commit(str(folder), None),
        lambda folder: documents_identity(str(folder)),
        lambda folder: models.source_identity(str(folder)),
    ],
    ids=["hub", "benchmark", "model"],
)
def test_the_identity_of_a_folder_of_links_changes_with_their_targets(
    snapshot: Path, identity: Callable[[Path], object]
) -> None:
    (snapshot / "config.json").write_text("{}")
    before = identity(snapshot)
    assert identity(snapshot) == before
    _write(snapshot.parent / "blobs" / "0a", "six", STAMP + 1)
    assert identity(snapshot) != before
    (snapshot.parent / "blobs" / "0a").unlink()
    with pytest.raises(StorageError, match=r"a\.jsonl: a symbolic link to"):
        identity(snapshot)


@pytest.mark.parametrize("identity", [lambda f: hub.commit(f, None), documents_identity], ids=["hub", "benchmark"])
def test_files_in_a_linked_folder_are_part_of_the_identity(snapshot: Path, identity: Callable[[str], object]) -> None:
    before = identity(str(snapshot))
    _write(snapshot.parent / "more" / "c.jsonl", "seven", STAMP + 1)
    assert identity(str(snapshot)) != before


@pytest.mark.parametrize("identity", [lambda f: hub.commit(f, None), documents_identity], ids=["hub", "benchmark"])
def test_the_same_files_in_another_split_have_another_identity(
    snapshot: Path, identity: Callable[[str], object]
) -> None:
    (snapshot / "test").mkdir()
    _write(snapshot / "test" / "data.arrow", "eight", STAMP)
    before = identity(str(snapshot))
    (snapshot / "test").rename(snapshot / "validation")
    assert identity(str(snapshot)) != before


def test_a_dataset_reads_no_file_and_no_address_outside_itself(tmp_path: Path) -> None:
    """The library follows whatever its README and its links name."""
    secret = tmp_path / "home/id.txt"
    secret.parent.mkdir()
    secret.write_text("private key")
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    (dataset / "own.txt").write_text("own\n")
    source = TextSource("hub", str(dataset))

    def readme(config: str) -> None:
        (dataset / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  {config}\n---\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        http = f"http://127.0.0.1:{server.getsockname()[1]}/x.txt"
        for files in (str(secret), "../home/*.txt", f"file://{secret}", http, f"zip://x.txt::{http}"):
            readme(f'data_files: "{files}"')
            with pytest.raises(InputError, match="not its own"):
                list(documents(source))
        for folder in (str(secret.parent), "../home"):
            readme(f'data_dir: "{folder}"')
            with pytest.raises(InputError, match="not its own"):
                list(documents(source))
        readme('data_files: "own.txt"')
        assert [document.text for document in documents(source)] == ["own"]
        (dataset / "README.md").unlink()
        (dataset / "link.txt").symlink_to(secret)
        with pytest.raises(InputError, match=r"a link to .*id\.txt"):
            list(documents(source))
        (dataset / "link.txt").unlink()
        (dataset / "own.txt").unlink()
        features = Features({"text": Value("string"), "picture": Image()})
        pictures = [{"bytes": None, "path": http}]
        table = pyarrow.table({"text": ["own"], "picture": pictures}, schema=features.arrow_schema)
        parquet.write_table(table, dataset / "train.parquet")
        assert [document.text for document in documents(source)] == ["own"]
        with pytest.raises(TimeoutError):  # nobody has connected
            server.accept()
