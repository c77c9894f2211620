"""Names in a shared storage are not trusted: nothing is written outside the reader's own cache."""

from __future__ import annotations

import hashlib
import json
import os
import uuid

import fsspec
import pytest

from minitron import storage
from minitron.errors import StorageError

HOSTILE = ["../planted", "inner/../../planted", "/{root}/planted", "a//b", "a\\..\\b", "a\n", "", "manifest.json"]


@pytest.fixture
def remote():
    """A committed folder in a storage to which others may write."""
    target = f"memory://{uuid.uuid4().hex}/folder"
    with storage.committed_folder(target) as folder:
        (folder / "a.bin").write_bytes(b"abc")
    return target


def _replace_manifest(target, files):
    fs, inner = fsspec.url_to_fs(target)
    fs.pipe_file(f"{inner}/manifest.json", json.dumps({"files": files, "note": {}}).encode())


@pytest.mark.parametrize("name", HOSTILE, ids=map(repr, HOSTILE))
def test_a_manifest_with_files_outside_its_folder_is_refused_and_nothing_written(remote, tmp_path, name):
    name = name.format(root=tmp_path)
    fs, inner = fsspec.url_to_fs(remote)
    if name:
        fs.pipe_file(f"{inner}/{name}", b"planted")
    _replace_manifest(remote, {name: {"bytes": 7, "sha256": hashlib.sha256(b"planted").hexdigest()}})
    cache = tmp_path / "cache"
    for read in (lambda: storage.fetch(remote, cache=str(cache)), lambda: storage.verify(remote)):
        with pytest.raises(StorageError, match="manifest"):
            read()
    assert not cache.exists()
    assert not (tmp_path / "planted").exists()


def test_a_name_that_leads_out_of_the_folder_through_a_link_is_refused(tmp_path):
    from minitron.names import inside

    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(tmp_path)
    with pytest.raises(StorageError, match="leads out of"):
        inside(tmp_path / "folder", "link/planted", "manifest.json")


def test_the_cache_is_private_to_the_user(remote, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    copy = storage.fetch(remote)
    assert copy.parent == tmp_path / "minitron"
    assert (tmp_path / "minitron").stat().st_mode & 0o777 == 0o700
    (tmp_path / "minitron").chmod(0o777)
    with pytest.raises(StorageError, match="other users may write"):
        storage.fetch(remote)


def test_a_cache_that_another_user_created_is_not_used(remote, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    storage.fetch(remote)
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(StorageError, match=f"belongs to user {owner}"):
        storage.fetch(remote)


@pytest.mark.parametrize("damage", ["short", "missing", "another"])
def test_a_damaged_copy_in_the_cache_is_replaced(remote, tmp_path, damage):
    cache = str(tmp_path / "cache")
    file = storage.fetch(remote, cache=cache) / "a.bin"
    if damage == "short":
        file.write_bytes(b"a")
    elif damage == "missing":
        file.unlink()
    else:
        _replace_manifest(str(file.parent), {})
    assert (storage.fetch(remote, cache=cache) / "a.bin").read_bytes() == b"abc"
