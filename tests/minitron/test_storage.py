"""Committed folders are complete or invisible, and storage errors name their cause."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from minitron import storage
from minitron.errors import StorageError
from minitron_platform.locations import resolve_locations


@pytest.fixture(params=["local", "memory"])
def address(request, tmp_path):
    """A local folder, and one that is only accessible through fsspec."""
    return str(tmp_path / "address") if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def test_a_committed_folder_is_read_back_complete(address, tmp_path):
    with storage.committed_folder(address, note={"step": 3}) as folder:
        (folder / "a.bin").write_bytes(b"abc")
        (folder / "inner").mkdir()
        (folder / "inner" / "b.txt").write_text("text")
        assert not storage.is_committed(address)
    assert storage.is_committed(address)
    storage.verify(address)
    assert storage.manifest(address)["note"] == {"step": 3}
    copy = storage.fetch(address, cache=str(tmp_path / "cache"))
    assert (copy / "a.bin").read_bytes() == b"abc"
    assert (copy / "inner" / "b.txt").read_text() == "text"


def test_a_failed_folder_leaves_nothing(tmp_path):
    def fail():
        with storage.committed_folder(str(tmp_path / "address")) as folder:
            (folder / "a.bin").write_bytes(b"abc")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_created_while_it_is_looked_at_is_read(tmp_path, monkeypatch):
    path, stat = str(tmp_path / "beat"), os.stat

    def created_after_the_look(looked_at, *arguments, **options):
        try:
            return stat(looked_at, *arguments, **options)
        finally:
            if looked_at == path:
                (tmp_path / "beat").write_bytes(b"1")

    monkeypatch.setattr(os, "stat", created_after_the_look)
    assert storage.read_bytes_if_exists(path) == b"1"


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda path: path.unlink(), "a.bin: missing"),
        (lambda path: path.write_bytes(b"ab"), "a.bin: has 2 bytes, but 3 were written"),
        (lambda path: path.write_bytes(b"abd"), "a.bin: SHA-256 is"),
    ],
    ids=["missing", "short", "altered"],
)
def test_a_damaged_folder_is_refused_and_the_damage_named(tmp_path, damage, named):
    target = tmp_path / "address"
    with storage.committed_folder(str(target)) as folder:
        (folder / "a.bin").write_bytes(b"abc")
    damage(target / "a.bin")
    with pytest.raises(StorageError, match=named):
        storage.verify(str(target))


@pytest.mark.parametrize("read", [storage.verify, storage.fetch], ids=["verify", "fetch"])
def test_a_file_that_is_deleted_while_its_folder_is_read_is_named(read, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    address = f"memory://{uuid.uuid4().hex}"
    with storage.committed_folder(address) as folder:
        (folder / "a.bin").write_bytes(b"abc")
    opened = MemoryFileSystem._open

    def deleted_before(self, path, mode="rb", *arguments, **options):
        if path.endswith("a.bin"):
            self.store.pop(path, None)
        return opened(self, path, mode, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "_open", deleted_before)
    with pytest.raises(StorageError, match=r"a.bin: missing"):
        read(address)


def test_files_of_a_killed_process_are_cleaned_up(tmp_path):
    target = str(tmp_path / "address")
    program = (
        "import os, signal, sys\n"
        "from minitron import storage\n"
        "with storage.committed_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'half').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, target], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    assert not storage.is_committed(target)
    with storage.committed_folder(target) as folder:
        (folder / "a").write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["address"]


def test_the_first_commit_of_a_folder_wins(address, tmp_path):
    with storage.committed_folder(address) as mine:
        (mine / "a").write_text("mine")
        with storage.committed_folder(address) as theirs:
            (theirs / "a").write_text("theirs")
    assert storage.read_bytes(storage.join(address, "a")) == b"theirs"
    storage.verify(address)
    assert [path.name for path in tmp_path.iterdir()] == (["address"] if storage.is_local(address) else [])


def test_a_folder_is_committed_if_the_one_in_its_way_is_deleted_meanwhile(tmp_path, monkeypatch):
    target, rename = tmp_path / "address", os.rename
    with storage.committed_folder(str(target)) as folder:
        (folder / "a").write_text("old")

    def deleted_afterwards(source, to):
        try:
            rename(source, to)
        except OSError:
            shutil.rmtree(to)
            raise

    with storage.committed_folder(str(target)) as folder:
        (folder / "a").write_text("new")
        monkeypatch.setattr(os, "rename", deleted_afterwards)
    assert (target / "a").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_folder_that_two_processes_copy_to_an_object_store_at_once_is_never_a_mixture(name, monkeypatch):
    address = f"memory://{uuid.uuid4().hex}"
    put, commits = MemoryFileSystem.put_file, ["theirs", "mine"]

    def commit(text):
        with storage.committed_folder(address) as folder:
            for each in "ab":
                (folder / each).write_text(text)

    def put_while_the_other_commits(self, path, target, *arguments, **options):
        put(self, path, target, *arguments, **options)
        if commits and target.endswith(f"/{name}"):
            commit(commits.pop(0))

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_while_the_other_commits)
    commit(commits.pop())
    storage.verify(address)
    assert not commits


def test_removal_deletes_the_manifest_first(address):
    with storage.committed_folder(address) as folder:
        (folder / "a").write_text("x")
    storage.remove(address)
    assert not storage.is_committed(address)
    storage.remove(address)  # removing it again does nothing


def test_a_folder_that_is_made_while_it_is_removed_is_removed(tmp_path, monkeypatch):
    target, unlink = tmp_path / "address", Path.unlink

    def made_meanwhile(self, *arguments, **options):
        if self == target:
            target.mkdir()
        unlink(self, *arguments, **options)

    monkeypatch.setattr(Path, "unlink", made_meanwhile)
    storage.remove(str(target))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_which_another_process_is_writing_is_removed(tmp_path, monkeypatch):
    (tmp_path / "address" / "inner").mkdir(parents=True)
    late, rmdir = [b"1", b"2"], os.rmdir

    def written_meanwhile(path, *arguments, **options):
        if late and os.path.isabs(path):
            (Path(path) / "late").write_bytes(late.pop())
        rmdir(path, *arguments, **options)

    monkeypatch.setattr(os, "rmdir", written_meanwhile)
    storage.remove(str(tmp_path / "address"))
    assert list(tmp_path.iterdir()) == []


def test_the_size_of_a_folder_in_which_files_are_deleted_is_that_of_one_look(address, monkeypatch):
    storage.write_bytes(storage.join(address, "a"), b"abc")
    fs, inner = storage.filesystem(address)
    find = type(fs).find

    def deleted_after_the_look(self, *arguments, **options):
        try:
            return find(self, *arguments, **options)
        finally:
            fs.rm_file(f"{inner}/a")

    monkeypatch.setattr(type(fs), "find", deleted_after_the_look)
    assert storage.size(address) == 3


def test_writing_a_file_replaces_it_atomically(address):
    path = storage.join(address, "value.json")
    storage.write_json(path, {"a": 1})
    storage.write_json(path, {"a": 2})
    assert storage.read_json(path) == {"a": 2}


@pytest.mark.parametrize("path", ["http://host/file", "ftp://host/file", "github://org:repo@main/x"])
def test_unsupported_schemes_are_refused(path):
    with pytest.raises(StorageError, match="is not allowed"):
        storage.filesystem(path)


@pytest.mark.parametrize(
    ("path", "problem", "remedy"),
    [
        ("s3://", "names no bucket", "s3://BUCKET/FOLDER"),
        ("s3:///folder", "names no bucket", "s3://BUCKET/FOLDER"),
        ("s3:/bucket/x", "has two slashes", "write s3://bucket/x"),
        ("gs:bucket", "has two slashes", "write gs://bucket"),
        ("simplecache::s3://bucket/x", "chains several addresses", "without '::'"),
        ("runs::2", "chains several addresses", "without '::'"),
        ("a\0b", "contains a null character", "remove it"),
    ],
)
def test_an_address_that_would_be_read_as_another_one_is_refused(path, problem, remedy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in (storage.filesystem, storage.exists, resolve_locations):
        with pytest.raises(StorageError, match=problem) as refused:
            use(path)
        assert remedy in refused.value.remedy
    assert not list(tmp_path.iterdir())


def test_a_home_folder_of_nobody_is_an_ordinary_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.local_path("~nobody-of-this-name/x") == tmp_path / "~nobody-of-this-name" / "x"


FULL = """
import resource, sys, torch
from safetensors.torch import save_file
from minitron import storage
from minitron.errors import StorageError
from minitron_platform.locations import resolve_locations
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # as if the disk were full after 100 kB
address = sys.argv[1]
writers = {
    "safetensors": lambda folder: save_file({"x": torch.zeros(100_000)}, str(folder / "x.safetensors")),
    "python": lambda folder: (folder / "x.bin").write_bytes(bytes(400_000)),
}
try:
    if sys.argv[2] == "file":
        storage.write_bytes(address + "/file", bytes(400_000))
    else:
        with storage.committed_folder(address + "/folder") as folder:
            writers[sys.argv[2]](folder)
except StorageError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.parametrize("how", ["file", "safetensors", "python"])
def test_a_full_disk_is_reported_and_leaves_no_partial_file(tmp_path, how):
    (tmp_path / "file").write_text("as it was")
    result = subprocess.run([sys.executable, "-c", FULL, str(tmp_path), how], capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert str(tmp_path) in result.stdout
    assert "free some space, or choose another folder" in result.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "as it was"


def test_a_file_system_without_hard_links_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StorageError, match="no hard links"):
        storage.create_bytes(str(tmp_path / "file"), b"1")
    assert list(tmp_path.iterdir()) == []
