"""Local copies of remote folders: made once by several processes, and no more of them than the limit allows."""

from __future__ import annotations

import os
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from minitron import storage
from minitron.errors import InputError


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
