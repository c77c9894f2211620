"""Names in a shared storage are not trusted: nothing is written outside the reader's own cache."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from pathlib import Path

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
    for created in (0o700, 0o755):  # by this function, or by an earlier version
        (tmp_path / "minitron").chmod(created)
        storage.fetch(remote)
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


def test_a_link_of_another_user_to_a_folder_of_ones_own_is_no_cache(remote, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    (tmp_path / "private").mkdir()
    (tmp_path / "shared").mkdir()
    link = tmp_path / "shared" / "minitron"
    link.symlink_to(tmp_path / "private")
    real = Path.lstat

    def lstat(path):  # as if the link were another user's
        status = real(path)
        return os.stat_result([*status[:4], status.st_uid + 1, *status[5:]]) if path == link else status

    monkeypatch.setattr(Path, "lstat", lstat)
    with pytest.raises(StorageError, match="belongs to user"):
        storage.fetch(remote)
    assert list((tmp_path / "private").iterdir()) == []


@pytest.mark.parametrize("damage", ["short", "missing", "another", "forged", "link"])
def test_a_damaged_copy_in_the_cache_is_replaced(remote, tmp_path, damage):
    cache = str(tmp_path / "cache")
    file = storage.fetch(remote, cache=cache) / "a.bin"
    if damage == "short":
        file.write_bytes(b"a")
    elif damage == "missing":
        file.unlink()
    elif damage == "another":
        _replace_manifest(str(file.parent), {})
    elif damage == "forged":  # as many bytes, written at the same time as the true ones
        times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
        file.write_bytes(b"xyz")
        os.utime(file, ns=times)
    else:
        (tmp_path / "elsewhere").write_bytes(b"abc")
        file.unlink()
        file.symlink_to(tmp_path / "elsewhere")
    again = storage.fetch(remote, cache=cache) / "a.bin"
    assert again.read_bytes() == b"abc"
    assert not again.is_symlink()


def test_a_copy_that_was_not_made_here_is_hashed_once_before_it_is_believed(remote, tmp_path, monkeypatch):
    """Whoever knows the address can compute the copy's name, and write a folder with the true manifest beforehand."""
    cache, hashed = tmp_path / "cache", []
    copy = storage.fetch(remote, cache=str(cache))
    (cache / f".{copy.name}.checked.json").unlink()
    original = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: hashed.append(file.name) or original(file, name))
    for _ in range(3):
        assert (storage.fetch(remote, cache=str(cache)) / "a.bin").read_bytes() == b"abc"
    assert hashed == [str(copy / "a.bin")]
    (cache / f".{copy.name}.checked.json").unlink()
    (copy / "a.bin").write_bytes(b"xyz")
    assert (storage.fetch(remote, cache=str(cache)) / "a.bin").read_bytes() == b"abc"


def test_locks_and_temporary_files_follow_no_link(remote, tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("keep me")
    cache = tmp_path / "cache"
    copy = storage.fetch(remote, cache=str(cache))
    lock = cache / f".{copy.name}.lock"
    lock.unlink()
    lock.symlink_to(victim)
    with pytest.raises(StorageError, match="where a lock should be"):
        storage.fetch(remote, cache=str(cache))

    class Guessed:
        hex = "0" * 32

    monkeypatch.setattr(uuid, "uuid4", Guessed)
    (tmp_path / ".report.html.00000000.tmp").symlink_to(victim)
    with pytest.raises(StorageError):
        storage.write_bytes(str(tmp_path / "report.html"), b"overwritten")
    assert victim.read_text() == "keep me"


def test_a_written_file_replaces_a_link_and_a_removed_link_keeps_its_target(tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("keep me")
    for write in (storage.write_bytes, storage.create_bytes):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(victim / "file")
        write(str(tmp_path / "link"), b"new")
    storage.remove(str(tmp_path / "link"))
    (tmp_path / "folder").symlink_to(victim)
    storage.remove(str(tmp_path / "folder"))
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]
    assert (victim / "file").read_text() == "keep me"


def test_publishing_deletes_nothing_that_others_made(tmp_path):
    target = tmp_path / "pruned"
    started = []

    def publish():
        with storage.committed_folder(str(target)) as folder:
            started.append(folder)
            (folder / "a.bin").write_bytes(b"result")
            target.mkdir()  # by someone else, meanwhile
            (target / "thesis.tex").write_text("keep me")

    with pytest.raises(StorageError, match="the result is in") as refusal:
        publish()
    kept = refusal.value.problem.rsplit(" ", 1)[-1]
    storage.verify(kept)
    with pytest.raises(StorageError, match=r"has no manifest\.json"):
        publish()
    assert len(started) == 1  # the second time it is refused before the work
    assert (target / "thesis.tex").read_text() == "keep me"
    assert len(list(tmp_path.iterdir())) == 2
