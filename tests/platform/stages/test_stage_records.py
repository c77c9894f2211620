"""Records of finished stages: read at the present location of the storage, and refused if they are not records."""

from __future__ import annotations

import json

import pytest
from pydantic import Field

from minitron import storage
from minitron.errors import StorageError
from minitron_platform.stages.stage import ArtifactPath, StageOutput
from minitron_platform.stages.stage_records import RECORD, Record, read_record, write_record

STAGE = "stages/distill/0123456789abcdef"


class Output(StageOutput):
    failures: dict[str, str] = Field(default_factory=dict)
    student: ArtifactPath = ""
    curve: ArtifactPath | None = None


def _record(**outputs):
    return {"outputs": {"summary": "done", **outputs}, "artifacts": [], "seconds": 1.5}


def test_a_message_that_begins_with_a_path_is_not_changed(tmp_path):
    """The reason of a failure may begin with a file of the storage and contain addresses."""
    root = str(tmp_path)
    reason = f"{root}/trials/a: cannot be accessed (no answer from http://127.0.0.1:9/b)\nsee {root}/runs"
    record = Record(Output(summary="done", failures={"3L": reason}), 1.5, [])
    write_record(root, f"{root}/{STAGE}", record)
    assert read_record(root, f"{root}/{STAGE}", Output) == record


def test_a_record_without_a_new_field_or_with_another_type_is_not_used(tmp_path, caplog):
    class Newer(Output):
        metric: float

    root, folder = str(tmp_path), f"{tmp_path}/{STAGE}"
    write_record(root, folder, Record(Output(summary="done"), 1.5, []))
    assert read_record(root, folder, Newer) is None
    assert "outputs.metric: Field required, so the stage runs again" in caplog.text
    storage.write_json(f"{folder}/{RECORD}", _record(failures=[1], removed="since"))
    assert read_record(root, folder, Output) is None
    storage.write_json(f"{folder}/{RECORD}", _record(removed="since"))
    assert read_record(root, folder, Output).output == Output(summary="done")


def test_the_required_paths_of_an_output_are_its_path_fields(tmp_path):
    assert list(Output(summary="see a/b", student="s3://x/y", failures={"a": "c/d"}).artifacts()) == ["s3://x/y"]


@pytest.mark.parametrize(
    "outputs",
    [
        {"student": "storage:../etc"},
        {"student": "storage:stages/../../etc"},
        {"student": "/old/stages/distill/0123456789abcdef/../../../../etc"},
        {"student": "/home/someone"},
        {"student": "s3://another-bucket/model"},
        {"student": "relative"},
        {"curve": "/home/someone/curve.json"},
        {"artifacts": ["/home/someone"]},
    ],
    ids=str,
)
def test_a_record_with_paths_outside_the_storage_is_refused(tmp_path, outputs):
    folder = f"{tmp_path}/{STAGE}"
    record = _record(**{name: value for name, value in outputs.items() if name != "artifacts"})
    record["artifacts"] = outputs.get("artifacts", [])
    storage.write_json(f"{folder}/{RECORD}", record)
    with pytest.raises(StorageError, match=r"stage.json: .* leads out of the storage"):
        read_record(str(tmp_path), folder, Output)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe",
        b"[" * 200_000,
        b"[]",
        b"{}",
        json.dumps(_record() | {"outputs": []}).encode(),
        json.dumps(_record() | {"artifacts": [1]}).encode(),
        json.dumps(_record(summary=None)).encode(),
    ],
)
def test_a_file_that_is_not_a_record_is_named(tmp_path, content):
    folder = f"{tmp_path}/{STAGE}"
    storage.write_bytes(f"{folder}/{RECORD}", content)
    with pytest.raises(StorageError, match=f"{folder}/{RECORD}: not "):
        read_record(str(tmp_path), folder, Output)
