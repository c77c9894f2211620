"""Whatever is in a manifest, a text or a tag of the registry, it is read, left out, or refused in a sentence."""

from __future__ import annotations

import gzip
import json
import shutil
import sqlite3
from contextlib import closing
from typing import Any

import pytest
from helpers.examples import SLOWEST
from helpers.odd_values import ODD, changed, check_sentence, damaged
from hypothesis import example, given
from hypothesis import strategies as st

from minitron import storage
from minitron.data import TextSource, documents
from minitron.errors import MinitronError
from minitron_platform.tracking.moves import rollback
from minitron_platform.tracking.registry import models

NAME = "family"


@pytest.fixture(scope="module")
def manifest(folder) -> dict[str, Any]:
    with storage.committed_folder(str(folder / "sound"), {"a": 1}) as inner:
        (inner / "a.bin").write_bytes(b"abc")
        (inner / "b").mkdir()
        (inner / "b" / "c.bin").write_bytes(b"def")
    return json.loads((folder / "sound" / "manifest.json").read_text())


@given(data=st.data())
def test_a_manifest_is_read_or_refused(folder, manifest, data):
    shutil.copytree(folder / "sound", folder / "changed", dirs_exist_ok=True)
    content = data.draw(changed(manifest).map(json.dumps).map(str.encode) | damaged(json.dumps(manifest).encode()))
    (folder / "changed" / "manifest.json").write_bytes(content)
    for use in (storage.manifest, storage.verify, storage.fetch):
        try:
            use(str(folder / "changed"))
        except MinitronError as error:
            check_sentence(error)
    assert sorted(path.name for path in folder.iterdir()) == ["changed", "sound"]


ROWS = [{"text": "a text", "number": 1}] * 3


def _as_lines(rows: Any) -> bytes:
    return "\n".join(json.dumps(row) for row in (rows if isinstance(rows, list) else [rows])).encode()


LINES = b"".join(json.dumps({"text": f"a text {n}", "more": [n]}).encode() + b"\n" for n in range(3))


@given(
    content=damaged(LINES) | st.binary(max_size=60) | changed(ROWS).map(_as_lines),
    kind=st.sampled_from(("text", "jsonl", "csv")),
    packed=st.booleans(),
    key=st.sampled_from(("text", "more", "", "a.b")),
)
@example(content=b"[" * 100_000, kind="jsonl", packed=False, key="text")
@example(content=b'{"text": ' + b"9" * 5000 + b"}", kind="jsonl", packed=False, key="text")
@example(content=b"\xff\xfe\x00", kind="text", packed=False, key="text")
def test_a_text_is_read_or_refused(folder, content, kind, packed, key):
    file = folder / ("text.jsonl.gz" if packed else "text.jsonl")
    file.write_bytes(gzip.compress(content)[: None if content[:1] != b"c" else -5] if packed else content)
    try:
        for document in documents(TextSource(kind, str(file), key=key)):
            assert document.text.strip()
    except MinitronError as error:
        check_sentence(error)
    finally:
        file.unlink()


@pytest.fixture(scope="module")
def registry(folder, empty_database):
    """The address of a registry with three versions, and a connection to its database."""
    from mlflow import MlflowClient

    shutil.copy(empty_database, folder / "mlflow.db")
    uri = f"sqlite:///{folder}/mlflow.db"
    client = MlflowClient(uri)
    client.create_registered_model(NAME)
    with storage.committed_folder(str(folder / "weights")) as inner:
        (inner / "model.safetensors").write_bytes(b"weights")
    for _ in range(3):
        client.create_model_version(NAME, str(folder / "weights"), tags={"minitron.parameters": "12"})
    client.set_registered_model_alias(NAME, "champion", "3")
    client.set_registered_model_tag(NAME, "minitron.history.champion", "[]")
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        yield uri, database


HISTORY = [{"version": "1", "time": "2026-01-01", "previous": None}, {"version": "3", "time": "", "previous": "1"}]
TAGS = (
    "minitron.parameters",
    "minitron.heldout_loss",
    "minitron.heldout_kl",
    "minitron.storage_path",
    "minitron.task.a",
)
texts = st.sampled_from([str(value).encode("utf-8", "replace").decode() for value in ODD]) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20
)


@given(
    history=changed(HISTORY).map(json.dumps) | texts,
    tags=st.dictionaries(st.sampled_from(TAGS), texts, max_size=3),
    name=st.just(NAME) | texts.filter(bool),
)
@SLOWEST
@example(history="[" * 10_000, tags={}, name=NAME)
@example(history='["1"]', tags={"minitron.parameters": "many"}, name="bob's model")
@example(history="[]", tags={"minitron.parameters": "inf", "minitron.heldout_kl": "nan"}, name='"')
def test_the_registry_is_listed_and_rolled_back_or_refuses(folder, registry, history, tags, name):
    uri, database = registry
    for table, column in (
        ("registered_models", "name"),
        ("model_versions", "name"),
        ("registered_model_tags", "name"),
        ("registered_model_aliases", "name"),
        ("model_version_tags", "name"),
    ):
        database.execute(f"UPDATE {table} SET {column} = ?", (name[:200],))
    database.execute("UPDATE registered_model_tags SET value = ?", (history,))
    database.execute("DELETE FROM model_version_tags")
    for key, value in tags.items():
        database.execute(
            "INSERT INTO model_version_tags (name, version, key, value) VALUES (?, 3, ?, ?)", (name[:200], key, value)
        )
    database.commit()
    assert len(_tried(lambda: models(uri, str(folder))) or [1] * 3) == 3
    _tried(lambda: rollback(uri, name[:200], storage_root=str(folder)))


def _tried(action: Any) -> Any:
    try:
        return action()
    except MinitronError as error:
        check_sentence(error)
        return None
