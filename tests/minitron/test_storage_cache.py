"""Local copies of remote folders: made once by several processes, and no more of them than the limit allows."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from minitron import storage
from minitron.errors import InputError, StorageError
from minitron.storage import cache_room


def _remote(content=b"abc"):
    target = f"memory://{uuid.uuid4().hex}"
    with storage.committed_folder(target) as folder:
        (folder / "a.bin").write_bytes(content)
    return target


def test_of_several_that_fetch_a_folder_at_once_one_copies_it(tmp_path, monkeypatch):
    target, copied, another = _remote(), [], threading.Event()
    original = MemoryFileSystem.get_file

    def get_file(self, path, *arguments, **named):
        copied.append(path)
        if len(copied) == 1:
            another.wait(0.3)  # which is what a second copy would end
        else:
            another.set()
        return original(self, path, *arguments, **named)

    monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
    with ThreadPoolExecutor(4) as pool:
        copies = set(pool.map(lambda _: storage.fetch(target, cache=str(tmp_path)), range(4)))
    assert len(copies) == len(copied) == 1
    assert (copies.pop() / "a.bin").read_bytes() == b"abc"


def test_copies_that_were_not_used_for_long_make_room_for_new_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("MINITRON_CACHE_GB", "2500e-9")  # two copies of the three
    remotes = [_remote(bytes([number]) * 1000) for number in range(4)]
    first, second, third = (storage.fetch(remote, cache=str(tmp_path)) for remote in remotes[:3])
    assert first.exists()  # though there are too many: all were used in the last hour
    for copy, hours in ((first, 2), (second, 3)):
        used = time.time() - hours * 3600
        os.utime(copy / "manifest.json", (used, used))
    assert storage.fetch(remotes[0], cache=str(tmp_path)) == first  # used again
    fourth = storage.fetch(remotes[3], cache=str(tmp_path))
    assert [copy.exists() for copy in (first, second, third, fourth)] == [True, False, True, True]
    assert storage.fetch(remotes[1], cache=str(tmp_path)) == second
    monkeypatch.setenv("MINITRON_CACHE_GB", "much")
    with pytest.raises(InputError, match="MINITRON_CACHE_GB: 'much' is not a number"):
        storage.fetch(_remote(), cache=str(tmp_path))


@pytest.fixture
def full(tmp_path, monkeypatch):
    """A copy in the cache `tmp_path` that was not used for hours, and must make room for any other."""
    monkeypatch.setenv("MINITRON_CACHE_GB", "1500e-9")
    copy = storage.fetch(_remote(bytes(1000)), cache=str(tmp_path))
    used = time.time() - 7200
    os.utime(copy / "manifest.json", (used, used))
    return copy


def test_a_copy_that_another_process_uses_while_room_is_made_is_kept(full, tmp_path, monkeypatch):
    locked = cache_room.locked

    @contextmanager
    def used_before(copy, *, wait=True):
        os.utime(copy / "manifest.json")
        with locked(copy, wait=wait) as free:
            yield free

    monkeypatch.setattr(cache_room, "locked", used_before)
    storage.fetch(_remote(bytes(1001)), cache=str(tmp_path))
    assert (full / "a.bin").exists()


def test_copies_that_another_process_deletes_while_room_is_made_do_not_hinder(full, tmp_path, monkeypatch):
    glob = Path.glob

    def deleted_meanwhile(self, pattern):
        for path in list(glob(self, pattern)):
            if path.parent == full:
                shutil.rmtree(full)
            yield path

    monkeypatch.setattr(Path, "glob", deleted_meanwhile)
    assert (storage.fetch(_remote(bytes(1001)), cache=str(tmp_path)) / "a.bin").exists()
    assert not full.exists()


def test_what_killed_processes_left_in_the_cache_is_deleted_and_what_others_are_making_is_kept(full, tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, made = (tmp_path / f".{'a' * 16}.{socket.gethostname()}-{pid}.0.tmp" for pid in (dead.pid, os.getpid()))
    for folder in (left, made):
        shutil.copytree(full, folder)
        os.utime(folder / "manifest.json", (0, 0))
    storage.fetch(_remote(bytes(1001)), cache=str(tmp_path))
    assert [folder.exists() for folder in (left, made, full)] == [False, True, False]


def test_a_copy_whose_manifest_is_damaged_is_made_again_and_does_not_hinder_others(full, tmp_path):
    remote = _remote()
    copy = storage.fetch(remote, cache=str(tmp_path))
    for each in (copy, full):
        (each / "manifest.json").write_text("")
    assert storage.fetch(remote, cache=str(tmp_path)) == copy
    assert (copy / "a.bin").read_bytes() == b"abc"
    storage.verify(str(copy))


@pytest.mark.parametrize("names", [["a"], ["a", "b"]], ids=["file", "files"])
def test_a_listed_file_that_is_replaced_while_it_is_copied_is_refused(names, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target = f"memory://{uuid.uuid4().hex}"
    for name in names:
        storage.write_bytes(f"{target}/{name}", b"old")
    listed = storage.listed_files(target)
    storage.write_bytes(f"{target}/a", b"new")
    with pytest.raises(StorageError, match="/a: was replaced while it was copied"):
        storage.fetch_listed(target, listed)
    listed = storage.listed_files(target)
    assert (storage.fetch_listed(target, listed) / "a").read_bytes() == b"new"
    assert len(list((tmp_path / "minitron").glob("*/manifest.json"))) == 1


@pytest.mark.parametrize("where", ["local", "memory"])
def test_a_file_that_changes_while_it_is_uploaded_is_not_kept_under_the_name_of_its_old_content(
    where, tmp_path, monkeypatch
):
    root = str(tmp_path / "uploads") if where == "local" else f"memory://{uuid.uuid4().hex}"
    path, copyfile = tmp_path / "text", shutil.copyfile
    path.write_text("old")

    def changed_before(source, target):
        path.write_text("new")
        return copyfile(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", changed_before)
        with pytest.raises(InputError, match="text: changed while it was uploaded"):
            storage.upload_files({"text": path}, root)
    path.write_text("old")
    assert storage.read_bytes(f"{storage.upload_files({'text': path}, root)}/text") == b"old"
