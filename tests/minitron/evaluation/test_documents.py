"""Files with a benchmark's documents: compressed, with a byte-order mark, and damaged ones."""

from __future__ import annotations

import codecs
import gzip
import json

import pyarrow
import pytest
from helpers.evaluating import arc_documents, write_jsonl

from minitron.errors import InputError
from minitron.evaluation import Task, check_tasks
from minitron.evaluation.document_splits import count_documents, read_split
from minitron.evaluation.documents import find_splits

LINES = b'{"a": 1}\n\n{"a": 2}'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("test.jsonl", codecs.BOM_UTF8 + LINES),
        ("test.jsonl", LINES.replace(b"\n", b"\r\n")),
        ("test.jsonl.gz", gzip.compress(codecs.BOM_UTF8 + LINES)),
        ("test-00000-of-00001.jsonl.gz", gzip.compress(LINES)),
        ("test.jsonl.zst", pyarrow.compress(codecs.BOM_UTF8 + LINES, "zstd", asbytes=True)),
    ],
)
def test_a_byte_order_mark_and_compression_change_nothing(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    for place in (tmp_path, tmp_path / name):
        splits = find_splits(place)
        assert list(splits) == ["test"]
        assert read_split(splits["test"])["a"] == [1, 2]
        assert count_documents(splits["test"]) == 2


DAMAGED = {
    "other types": ('{"a": 1}\n{"a": "text"}', "its documents cannot be read as one table"),
    "deep": ("[" * 100_000, "line 1: not JSON"),
    "long numbers": ('{"a": ' + "9" * 5_000 + "}", "line 1: not JSON"),
    "large numbers": ('{"a": ' + "9" * 400 + "}", "its documents cannot be read as one table"),
    "not UTF-8": (b'{"a": 1}\n{"a": "\xff\xfe"}', "line 2: not UTF-8"),
    "not objects": ("[1]", "line 1: not a JSON object"),
    "nothing": ("\n", "contains no documents"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_documents_that_are_none_are_refused_by_file_and_line(tmp_path, case):
    content, problem = DAMAGED[case]
    (tmp_path / "test.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=problem) as refused:
        read_split([tmp_path / "test.jsonl"])
    assert len(refused.value.problem) < 500


def test_a_file_that_is_cut_off_and_files_of_other_fields_are_refused(tmp_path):
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 1000)[:-9])
    (tmp_path / "test.jsonl.zst").write_bytes(pyarrow.compress(b"{}\n" * 1000, "zstd", asbytes=True)[:-9])
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    shards = [tmp_path / f"b-0000{number}-of-00002.jsonl" for number in range(2)]
    shards[0].write_text(json.dumps({"b": [1]}))
    shards[1].write_text(json.dumps({"b": "x"}))
    with pytest.raises(InputError, match=r"test\.jsonl\.gz: cannot be unpacked"):
        read_split([tmp_path / "test.jsonl.gz"])
    with pytest.raises(InputError, match=r"test\.jsonl\.zst: cannot be unpacked"):
        read_split([tmp_path / "test.jsonl.zst"])
    with pytest.raises(InputError, match=r"a\.parquet: its documents cannot be read"):
        read_split([tmp_path / "a.parquet"])
    with pytest.raises(InputError, match="different fields"):
        read_split(shards)


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["test.jsonl"], None),
        (["test-00000-of-00001.jsonl"], None),
        ([f"test-0000{number}-of-00003.jsonl" for number in range(3)], None),
        (["test.jsonl", "test.jsonl.gz"], "would count several times"),
        (["test.jsonl", "test-00000-of-00001.jsonl"], "would count several times"),
        (["test-00000-of-00002.jsonl", "test-00001-of-00002.jsonl.gz"], "would count several times"),
        (["test-00000-of-00001.jsonl", "test-00000-of-00002.jsonl", "test-00001-of-00002.jsonl"], "several times"),
        (["test-00000-of-00002.jsonl"], "of 2 shards .* there are 1, without number 1"),
        (["test-00001-of-00002.jsonl"], "of 2 shards .* there are 1, without number 0"),
        (["test-00000-of-00002.jsonl", "test-0-of-2.jsonl", "test-00001-of-00002.jsonl"], "of 2 shards .* there are 3"),
    ],
)
def test_a_split_is_one_file_or_all_of_its_shards(tmp_path, names, problem):
    for name in names:
        text = json.dumps(arc_documents(1)[0]).encode()
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    write_jsonl(tmp_path / "train-00000-of-00009.jsonl", arc_documents(1))  # which no task here reads
    task = Task("arc_easy", str(tmp_path))
    if problem is None:
        check_tasks([task])
        assert count_documents(find_splits(tmp_path)["test"]) == len(names)
        assert len(read_split(find_splits(tmp_path)["test"])) == len(names)
        return
    with pytest.raises(InputError, match=problem):
        check_tasks([task])
    with pytest.raises(InputError, match=problem):
        read_split(find_splits(tmp_path)["test"])
