"""Files with a benchmark's documents: compressed, with a byte-order mark, and damaged ones."""

from __future__ import annotations

import codecs
import gzip
import json

import pyarrow
import pytest

from minitron.errors import InputError
from minitron.evaluation.documents import count_documents, find_splits, read_split

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
    "not UTF-8": (b'{"a": 1}\n{"a": "\xff\xfe"}', "line 2: not JSON"),
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
    (tmp_path / "b.jsonl").write_text(json.dumps({"b": [1]}))
    (tmp_path / "c.jsonl").write_text(json.dumps({"b": "x"}))
    with pytest.raises(InputError, match=r"test\.jsonl\.gz: cannot be unpacked"):
        read_split([tmp_path / "test.jsonl.gz"])
    with pytest.raises(InputError, match=r"test\.jsonl\.zst: cannot be unpacked"):
        read_split([tmp_path / "test.jsonl.zst"])
    with pytest.raises(InputError, match=r"a\.parquet: its documents cannot be read"):
        read_split([tmp_path / "a.parquet"])
    with pytest.raises(InputError, match="different fields"):
        read_split([tmp_path / "b.jsonl", tmp_path / "c.jsonl"])
