"""What files a checkpoint has, how much of them each process reads, and checkpoints of the layout that came before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from contextlib import contextmanager

import pytest
import s3fs
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers.s3_server import s3_server
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from minitron import storage
from minitron.distill import checkpoint_files
from minitron.distill.checkpoint_files import PiecesWriter
from minitron.distill.checkpoints import Checkpoints
from minitron.errors import StorageError

SHAPES = {f"layers.{number}.weight": (130, 6) for number in range(40)} | {"norm": (3,), "scalar": ()}


def _whole():
    return {
        name: torch.arange(float(torch.Size(shape).numel())).view(shape) + len(name) for name, shape in SHAPES.items()
    }


@contextmanager
def _fake_processes(rank, world):
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _split(whole, placements, mesh):
    """This process's part of the tensors of two dimensions, as FSDP has them."""
    state = {}
    for name, tensor in whole.items():
        if tensor.dim() < 2:
            state[name] = tensor
            continue
        parts = tensor.chunk(mesh.size(mesh.ndim - 1))
        number = mesh.get_local_rank(mesh.ndim - 1)
        local = parts[number] if number < len(parts) else tensor[:0]
        state[name] = DTensor.from_local(
            local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
    return state


@pytest.mark.parametrize("shape", [(64,), (8, 8)], ids=["sharded", "replicated and sharded"])
def test_sixty_four_processes_write_a_file_each_which_one_process_reads(tmp_path, shape):
    whole, plans, planners = _whole(), [], []
    placements = [Replicate()] * (len(shape) - 1) + [Shard(0)]
    for rank in range(64):
        with _fake_processes(rank, 64):
            state = _split(whole, placements, init_device_mesh("cpu", shape))
            mine = {
                n: t for number, (n, t) in enumerate(state.items()) if isinstance(t, DTensor) or number % 64 == rank
            }
            planner = DefaultSavePlanner()
            planner.set_up_planner(mine, is_coordinator=rank == 0)
            plans.append(planner.create_local_plan())
            planners.append(planner)
    with _fake_processes(0, 64):
        plans, metadata = planners[0].create_global_plan(plans)
    target = str(tmp_path / "step-00000003")
    folder = storage.staging_folder(target)
    writers = [PiecesWriter(folder, rank) for rank in range(64)]
    results = [
        writer.write_data(planner.finish_plan(plan), planner).wait()
        for writer, planner, plan in zip(writers, planners, plans, strict=True)
    ]
    writers[0].finish(metadata, results)
    known = {name: entry for writer in writers for name, entry in writer.entries.items()}
    entries = storage.upload(folder, target, known=known)
    assert len(entries) <= 64 + 1
    storage.publish(folder, target, entries, {"key": "k", "step": 3})
    storage.verify(target)
    found = {name: torch.full_like(tensor, -1.0) for name, tensor in whole.items()}
    with Checkpoints(str(tmp_path), key="k") as saver:
        assert saver.load(found)["step"] == 3
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


WORKER = """
import json, sys
import torch, torch.distributed as dist
from pathlib import Path
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from helpers.forking import fork_two
from minitron.distill.checkpoints import Checkpoints
rank = fork_two()
dist.init_process_group("gloo", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
def state(value):
    return {
        name: DTensor.from_local(torch.full((2048, 1024), value + rank), mesh, [Shard(0)], run_check=False)
        for name in "abc"
    }
def bytes_read():
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])
with Checkpoints(sys.argv[1], key="k") as saver:
    saver.save(3, state(1.0), {})
    saver.wait()
    found = state(-9.0)
    before = bytes_read()
    assert saver.load(found)["step"] == 3
    read = bytes_read() - before
    assert all(bool((tensor.to_local() == 1.0 + rank).all()) for tensor in found.values())
    dist.barrier()
    if rank == 0:  # damage what process 1 reads
        with open(f"{sys.argv[1]}/step-00000003/shard-00002.safetensors", "r+b") as file:
            file.seek(-4, 2)
            file.write(b"????")
    dist.barrier()
    assert saver.load(found) is None
    assert all(bool((tensor.to_local() == 1.0 + rank).all()) for tensor in found.values())
sys.stdout.write(f"{read}\\n")  # in one piece: both processes write to one pipe
dist.destroy_process_group()
"""


def test_each_process_reads_its_own_part_and_no_other_and_one_s_damage_is_everyone_s(tmp_path, free_port):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    processes = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert processes.returncode == 0, processes.stderr
    own = 3 * 2048 * 1024 * 4
    read = [int(line) for line in processes.stdout.splitlines()]
    assert len(read) == 2
    assert all(2 * own <= count < 2.1 * own for count in read)  # once to check it, once to load it
    assert sorted(storage.manifest(str(tmp_path / "step-00000003"))["files"]) == [
        "layout.json",
        "shard-00001.safetensors",
        "shard-00002.safetensors",
    ]


def _write_as_before(folder, tensors):
    """A checkpoint of the version before, with several files for each process."""
    with (
        storage.committed_folder(str(folder), note={"key": "k", "step": 3}) as place,
        warnings.catch_warnings(action="ignore"),
    ):
        files = {name: 1 + number % 3 for number, name in enumerate(tensors)}
        writer = HuggingFaceStorageWriter(str(place), fqn_to_index_mapping=files, save_distributed=True)
        dcp.save(tensors, storage_writer=writer, no_dist=True)


def test_a_checkpoint_of_the_layout_before_is_resumed_from_unless_it_is_damaged(tmp_path, caplog):
    whole = _whole()
    _write_as_before(tmp_path / "step-00000003", whole)
    found = {name: torch.full_like(tensor, -1.0) for name, tensor in whole.items()}
    with Checkpoints(str(tmp_path), key="k") as saver:
        assert saver.load(found)["step"] == 3
        assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
        file = sorted((tmp_path / "step-00000003").glob("*.safetensors"))[1]
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        assert saver.load(found) is None
    assert f"{file.name}: SHA-256 is" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        lambda pieces: pieces[0].update(start=2**40),
        lambda pieces: pieces[0].update(offsets=[1, 0]),
        lambda pieces: pieces[0].update(shape=[130, 2**40]),
        lambda pieces: pieces[0].update(shape=[-130, -6]),
        lambda pieces: pieces[0].update(file="../secret"),
        lambda pieces: pieces.clear(),
        lambda pieces: pieces.append(dict(pieces[0])),
    ],
)
def test_a_layout_that_leads_out_of_its_files_is_not_read(tmp_path, change, caplog):
    with Checkpoints(str(tmp_path), key="k") as saver:
        saver.save(3, _whole(), {})
    folder = tmp_path / "step-00000003"
    layout, manifest = (json.loads((folder / name).read_text()) for name in ("layout.json", "manifest.json"))
    change(layout["tensors"]["layers.7.weight"]["pieces"])
    (folder / "layout.json").write_text(json.dumps(layout))
    manifest["files"]["layout.json"] = {
        "bytes": (folder / "layout.json").stat().st_size,
        "sha256": storage.sha256(folder / "layout.json"),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with Checkpoints(str(tmp_path), key="k") as saver:
        assert saver.load(_whole()) is None
    assert "layout.json: not a checkpoint's layout" in caplog.text


def test_a_remote_checkpoint_is_read_by_range_and_never_copied(tmp_path, monkeypatch):
    requests = Counter()
    original = s3fs.S3FileSystem._call_s3

    async def counted(self, method, *arguments, **named):
        requests[method] += 1
        return await original(self, method, *arguments, **named)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with s3_server() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        storage.filesystem("s3://bucket")[0].mkdir("bucket")
        state = {"a": torch.arange(1000.0), "b": torch.ones(10)}
        with Checkpoints("s3://bucket/checkpoints", key="k") as saver:
            saver.save(3, state, {})
            saver.wait()
            found = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
            monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", counted)
            assert saver.load(found)["step"] == 3
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert requests["get_object"] <= 7  # the manifest three times, the layout, one part, two tensors
    assert list(tmp_path.iterdir()) == []


def test_a_failure_after_the_check_is_no_reason_to_start_again(tmp_path, monkeypatch):
    with Checkpoints(str(tmp_path), key="k") as saver:
        saver.save(3, _whole(), {})

    def fail(path, ranges):
        raise StorageError(f"{path}: the network is gone")

    monkeypatch.setattr(checkpoint_files, "read_ranges", fail)
    with Checkpoints(str(tmp_path), key="k") as saver, pytest.raises(StorageError, match="the network is gone"):
        saver.load(_whole())


def test_the_thread_that_writes_uses_the_gpu_of_its_process(tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with Checkpoints(str(tmp_path), key="k") as saver:
        saver.save(3, {"a": torch.ones(3)}, {})
    assert used == [3]
