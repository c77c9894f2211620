"""How much of a store is read, and what happens where it is damaged, forged, or was written by an earlier version."""

from __future__ import annotations

import json
import threading
import uuid
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import s3fs
import torch
from helpers.s3_server import s3_server

from minitron import storage
from minitron.data import Rows, rows_for_step
from minitron.data.rows import shard_name
from minitron.distill.teacher import shards as reading
from minitron.distill.teacher.shard_writing import RowModel, write_shards
from minitron.distill.teacher.shards import Shards
from minitron.errors import StorageError

SEQ = 16
WIDTH = 400
ROW_BYTES = SEQ * (WIDTH * 2 + 4)


def _packed(folder, count):
    """`count` rows of numbers, as `pack` writes them."""
    tokens = np.arange(count * SEQ, dtype=np.uint16).reshape(count, SEQ)
    with storage.committed_folder(str(folder)) as place:
        (place / shard_name("train", 0)).write_bytes(tokens.tobytes())
        index = {"format": 1, "seq_length": SEQ, "dtype": "uint16", "vocab_size": 2**16, "shard_rows": count}
        split = {"rows": count, "sha256": storage.sha256(place / shard_name("train", 0))}
        storage.write_json(str(place / "index.json"), {**index, "splits": {"train": split}})
    return Rows.open(str(folder), "train")


def _expected(tokens):
    numbers = tokens[..., None] + torch.arange(WIDTH)
    return {"hidden": (numbers % 251).to(torch.bfloat16), "log_sum_exp": tokens.float()}


def _load():
    return RowModel(torch.nn.Linear(1, 1), _expected, ROW_BYTES)


def _store(rows, folder, rows_per_shard=4, **how):
    return write_shards(_load, rows, folder, key="k", shard_bytes=rows_per_shard * ROW_BYTES, **how)


def _check(shards, rows, indices):
    taken, expected = shards.take(indices), _expected(rows.take(indices))
    assert taken.keys() == expected.keys()
    assert all(torch.equal(taken[name], expected[name]) for name in expected)


def _bytes_read():
    """What this process has read from files since it began, by the kernel's count."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@pytest.fixture
def small_read_ahead(monkeypatch):
    """In proportion to a row as it is to one of 8,192 tokens of 4,096 bfloat16 values."""
    monkeypatch.setattr(reading, "READ_AHEAD_BYTES", 3 * ROW_BYTES)


def test_before_the_first_step_eight_processes_read_less_than_a_percent_of_a_large_store(tmp_path, small_read_ahead):
    count, processes, micro_batch, batch = 12_000, 8, 4, 1152  # of 0.8 TB, if rows had 8,192 tokens of 4,096 values
    rows, folder = _packed(tmp_path / "rows", count), str(tmp_path / "store")
    _store(rows, folder, rows_per_shard=8)
    indices, following = (rows_for_step(count, batch, step, seed=0) for step in range(2))
    before = _bytes_read()
    readers = [Shards(folder, "k") for _ in range(processes)]
    for rank, shards in enumerate(readers):
        shards.prefetch([*indices[rank::processes], *following[rank::processes]])
        for start in (0, micro_batch):  # the second is read while the first is computed
            _check(shards, rows, indices[rank::processes][start : start + micro_batch])
    for shards in readers:
        shards._readers.shutdown(wait=True)
    read = _bytes_read() - before
    assert 2 * processes * micro_batch * ROW_BYTES < read < 0.01 * count * ROW_BYTES


def test_over_whole_steps_each_row_is_read_once(tmp_path, small_read_ahead):
    rows, folder = _packed(tmp_path / "rows", 64), str(tmp_path / "store")
    _store(rows, folder)
    shards, before = Shards(folder, "k"), _bytes_read()
    for step in range(4):
        indices = rows_for_step(64, 16, step, seed=0)
        following = rows_for_step(64, 16, step + 1, seed=0) if step < 3 else []
        shards.prefetch([*indices, *following])
        for start in range(0, 16, 4):
            _check(shards, rows, indices[start : start + 4])
    assert _bytes_read() - before < 1.2 * 64 * ROW_BYTES


def _as_before(folder):
    """What an earlier version wrote: 64 rows a shard, one SHA-256 for all of it."""
    for path in Path(folder).glob("shard-*/manifest.json"):
        manifest = json.loads(path.read_text())
        del manifest["files"]["rows.safetensors"]["parts"], manifest["note"]["rows_per_shard"]
        path.write_text(json.dumps(manifest))


def test_a_store_of_an_earlier_version_is_read_and_completed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rows, folder = _packed(tmp_path / "rows", 160), str(tmp_path / "store")
    _store(rows, folder, rows_per_shard=64, rank=1, world=2)
    _as_before(folder)
    assert _store(rows, folder) == 96  # in two shards of 64 and 32 rows
    assert len(list(Path(folder).glob("shard-*"))) == 3
    remote = f"memory://{uuid.uuid4().hex}"
    storage.filesystem(remote)[0].put(folder, storage.filesystem(remote)[1], recursive=True)
    for place in (folder, remote):
        _check(Shards(place, "k"), rows, [3, 100, 159, 3])
    _damage(Path(folder) / "shard-00001" / "rows.safetensors", -1)
    with pytest.raises(StorageError, match=r"shard-00001/rows.safetensors: SHA-256"):
        Shards(folder, "k").take([64])


def _damage(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_a_damaged_row_is_refused_when_it_is_read_and_the_others_are_not(tmp_path):
    rows, folder = _packed(tmp_path / "rows", 8), str(tmp_path / "store")
    _store(rows, folder)
    file = Path(folder) / "shard-00001" / "rows.safetensors"
    _damage(file, -1)  # the last row's hidden states
    shards = Shards(folder, "k")
    _check(shards, rows, range(7))
    with pytest.raises(StorageError, match=r"shard-00001/rows.safetensors: SHA-256 of bytes \d+ to \d+ is"):
        shards.take([7])
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StorageError, match=r"shard-00001/rows.safetensors: ends before byte"):
        shards.take([7])
    file.unlink()
    with pytest.raises(StorageError, match=r"shard-00001/rows.safetensors: missing"):
        shards.take([5])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("index.json", lambda index: index.update(rows_per_shard=0)),
        ("index.json", lambda index: index.update(num_rows=True)),
        ("index.json", lambda index: index.update(numbers=[0, 2])),
        ("index.json", lambda index: index.update(rows_per_shard=8)),
        ("shard-00000/manifest.json", lambda manifest: manifest["files"].clear()),
        ("shard-00000/manifest.json", lambda manifest: manifest["files"]["rows.safetensors"].update(bytes=-1)),
        ("shard-00000/manifest.json", lambda manifest: manifest["files"]["rows.safetensors"]["parts"]["ends"].pop()),
        (
            "shard-00000/manifest.json",
            lambda manifest: manifest["files"]["rows.safetensors"]["parts"]["ends"].reverse(),
        ),
    ],
)
def test_numbers_that_cannot_be_are_refused(tmp_path, name, change):
    rows, folder = _packed(tmp_path / "rows", 8), tmp_path / "store"
    _store(rows, str(folder))
    value = json.loads((folder / name).read_text())
    change(value)
    (folder / name).write_text(json.dumps(value))
    with pytest.raises(StorageError, match=str(folder)):
        Shards(str(folder), "k").take([0])


@pytest.mark.parametrize(
    "described",
    [
        {"dtype": "BF16", "shape": [4, SEQ, WIDTH], "data_offsets": [0, 2**40]},
        {"dtype": "BF16", "shape": [4, 2**40], "data_offsets": [0, 2**43]},
        {"dtype": "BF16", "shape": [4, -1], "data_offsets": [0, -8]},
        {"dtype": "BF16", "shape": [3, 8], "data_offsets": [0, 48]},
        {"dtype": "PICKLE", "shape": [4, 8], "data_offsets": [0, 64]},
        {"dtype": "BF16", "shape": [4, 8], "data_offsets": [-64, 0]},
        [],
    ],
)
def test_a_header_that_leads_out_of_its_file_is_refused(tmp_path, described):
    rows, folder = _packed(tmp_path / "rows", 4), tmp_path / "store"
    _store(rows, str(folder))
    header = json.dumps({"hidden": described}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(256)
    file = folder / "shard-00000" / "rows.safetensors"
    file.write_bytes(content)
    manifest = json.loads((folder / "shard-00000" / "manifest.json").read_text())
    manifest["files"] = {file.name: {"bytes": len(content), "sha256": storage.sha256(file)}}
    (folder / "shard-00000" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StorageError, match=rf"{file}: (not a safetensors file|has .* where 4 rows)"):
        Shards(str(folder), "k").take([0])


def test_a_shard_is_written_while_the_next_is_computed(tmp_path, monkeypatch):
    rows, folder = _packed(tmp_path / "rows", 12), str(tmp_path / "store")
    computing = threading.Semaphore(0)

    def compute(tokens):
        computing.release()
        return _expected(tokens)

    def publish(place, target, *rest, original=storage.publish):
        for _ in range(2 if target.endswith("shard-00000") else 0):  # its own rows, and the next shard's
            assert computing.acquire(timeout=30), "the next shard was not begun"
        original(place, target, *rest)

    monkeypatch.setattr(storage, "publish", publish)
    load = lambda: RowModel(torch.nn.Linear(1, 1), compute, ROW_BYTES)  # noqa: E731
    assert write_shards(load, rows, folder, key="k", shard_bytes=4 * ROW_BYTES) == 12
    _check(Shards(folder, "k"), rows, range(12))


def test_what_writing_refuses_is_raised_and_leaves_no_staging_folder(tmp_path, monkeypatch):
    def publish(*_):
        raise StorageError("no")

    rows, folder = _packed(tmp_path / "rows", 12), tmp_path / "store"
    monkeypatch.setattr(storage, "publish", publish)
    with pytest.raises(StorageError, match="no"):
        _store(rows, str(folder))
    assert list(folder.iterdir()) == []


def test_an_object_store_is_asked_for_little(tmp_path, monkeypatch):
    rows = _packed(tmp_path / "rows", 16)
    requests = Counter()
    original = s3fs.S3FileSystem._call_s3

    async def counted(self, method, *arguments, **named):
        requests[method] += 1
        return await original(self, method, *arguments, **named)

    with s3_server() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        fs = storage.filesystem("s3://bucket")[0]
        fs.mkdir("bucket")
        monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", counted)
        _store(rows, "s3://bucket/store")
        written = dict(requests)
        requests.clear()
        shards = Shards("s3://bucket/store", "k")
        _check(shards, rows, [1, 2, 9])
        read = dict(requests)
    assert written.pop("put_object") == 2 * 4 + 1  # four shards, each with its manifest, and the index
    assert sum(written.values()) <= 3  # of one listing, as long as there is nothing
    # the index, two shards' manifests and headers, two tensors of rows 1 and 2 together and of row 9
    assert read == {"get_object": 1 + 2 * 2 + 2 * 2}
