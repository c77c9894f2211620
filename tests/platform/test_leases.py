"""Leases let one driver work at a time, on a shared folder and on an object store: waiting, taking over and stopping."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import fsspec
import pytest
from helpers.command import ROOT, command, environment
from helpers.s3_server import s3_server

from minitron import storage
from minitron.errors import InputError, StorageError
from minitron_platform import leases, load_recipe
from minitron_platform.fence import Fence, Holder, LeaseLostError, create_epoch, newest_epoch
from minitron_platform.leases import lease
from minitron_platform.locations import Locations
from minitron_platform.pipeline import run
from minitron_platform.planning.checks import check_machine
from minitron_platform.stages.finished import run_key
from minitron_platform.tracking.spool import Spool


class Said:
    """A console that records what is printed."""

    def __init__(self):
        self.lines, self.waits = [], threading.Event()

    def say(self, line):
        self.lines.append(line)

    def status(self, text):
        self.waits.set()


@pytest.fixture(scope="module")
def s3():
    with s3_server() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
        fsspec.config.conf.clear()
        yield "s3://bucket"


@pytest.fixture(params=["local", "s3"])
def where(request, tmp_path):
    root = str(tmp_path / "runs") if request.param == "local" else f"{request.getfixturevalue('s3')}/{uuid.uuid4().hex}"
    return Locations(root, str(tmp_path / "local"), "sqlite:///unused.db")


def _hold(where, console=None, run="run-1", **options):
    return lease(where, "work", "the work", run=run, console=console or Said(), **options)


def _elsewhere(where, ttl, run="run-1"):
    """Acquire the lease as a driver on another machine; returns its fence."""
    folder = storage.join(where.storage, "leases", "work")
    holder = replace(Holder.this_process(run, ttl), user="alice", host="head-1", pid=4711)
    epoch = newest_epoch(storage.names(folder)) + 1
    assert create_epoch(folder, epoch, holder)
    return Fence(folder, epoch, "the work")


def test_a_second_driver_waits_until_the_first_is_done(where):
    order, console = [], Said()

    def second():
        with _hold(where, console):
            order.append("second")

    with _hold(where) as fence:
        thread = threading.Thread(target=second)
        thread.start()
        assert console.waits.wait(30)
        order.append("first")
        fence.check()
    thread.join(30)
    assert order == ["first", "second"]
    assert f"@{socket.gethostname()}, process {os.getpid()}" in console.lines[0]
    assert "--take-over" in console.lines[0]
    assert len(console.lines) == 1


def test_a_driver_that_two_others_have_overtaken_waits_for_the_second(where, monkeypatch):
    """The second removes the files of the first, so that there is room for the one that the slow driver creates."""
    console, others, got = Said(), ExitStack(), []

    def late(folder, epoch, holder):
        monkeypatch.setattr(leases, "create_epoch", create_epoch)
        with _hold(where):
            pass
        others.enter_context(_hold(where))
        return create_epoch(folder, epoch, holder)

    monkeypatch.setattr(leases, "create_epoch", late)

    def slow():
        with _hold(where, console) as fence:
            fence.check()
            got.append(fence.epoch)

    thread = threading.Thread(target=slow)
    thread.start()
    try:
        assert console.waits.wait(30)
    finally:
        others.close()
        thread.join(30)
    assert got == [3]


def test_only_one_of_many_drivers_has_the_lease_at_a_time(where):
    inside, most = [], []

    def work():
        with _hold(where) as fence:
            inside.append(1)
            fence.check()
            most.append(len(inside))
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == [1] * 6


def test_the_lease_of_a_driver_without_heartbeats_is_taken_over_and_the_driver_notices(where):
    stalled = _elsewhere(where, ttl=1.0)
    stalled.check()
    console = Said()
    began = time.monotonic()
    with _hold(where, console):
        assert time.monotonic() - began >= 1.0
        with pytest.raises(LeaseLostError, match=r"the work was taken over by .*, process \d+"):
            stalled.check()
    assert "taken over from alice@head-1, process 4711" in console.lines[-1]
    assert "no heartbeat for 1 s" in console.lines[-1]


def test_take_over_does_not_wait_and_works_for_the_same_run_alone(where):
    other = _elsewhere(where, ttl=1.0, run="run-2")
    console = Said()
    with _hold(where, console, take_over="as --take-over says"):  # waits, because the lease is that of another run
        assert "Waiting for it to end" in console.lines[0]
        assert "--take-over" not in console.lines[0]
    with pytest.raises(LeaseLostError):
        other.check()
    _elsewhere(where, ttl=86_400.0)
    console = Said()
    with _hold(where, console, take_over="as --take-over says"):
        assert console.lines == [line for line in console.lines if "as --take-over says" in line] != []


HOLDER = """
import signal, sys, time
from minitron_platform.console import Console
from minitron_platform.locations import Locations
from minitron_platform.fence import LeaseLostError
from minitron_platform.leases import lease
signal.signal(signal.SIGINT, signal.default_int_handler)
where = Locations(sys.argv[1], sys.argv[1], "sqlite:///unused.db")
try:
    with lease(where, "work", "the work", run="run-1", console=Console()) as fence:
        print("held", flush=True)
        time.sleep(120)
except LeaseLostError as error:
    print(error, flush=True)
"""


@pytest.fixture
def holder(where, monkeypatch):
    """Another process that holds the lease."""
    monkeypatch.setenv("MINITRON_LEASE_SECONDS", "2")
    paths = os.pathsep.join(path for path in sys.path if path)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, where.storage],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_lease_of_a_killed_driver_is_taken_over_immediately(where, holder, monkeypatch):
    monkeypatch.setenv("MINITRON_LEASE_SECONDS", "86400")
    holder.kill()
    holder.wait()
    console = Said()
    with _hold(where, console):
        assert "its process has ended" in console.lines[-1]


def test_a_driver_with_heartbeats_keeps_its_lease_for_any_time(where, holder):
    console, got = Said(), threading.Event()

    def wait():
        with _hold(where, console):
            got.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert console.waits.wait(30)
    assert not got.wait(4)  # twice the time after which a driver without heartbeats counts as dead
    holder.kill()
    holder.wait()
    assert got.wait(30)
    thread.join()


def test_a_driver_whose_lease_was_taken_over_stops_in_the_middle_of_its_work(where, holder):
    with _hold(where, take_over="as --take-over says"):
        said, _ = holder.communicate(timeout=30)  # it would have slept for two minutes
    assert "the work was taken over by" in said
    assert f"process {os.getpid()}" in said


def test_a_lease_that_is_seen_to_be_lost_when_its_work_ends_is_lost(where, monkeypatch):
    monkeypatch.setenv("MINITRON_LEASE_SECONDS", "1")
    checks, check = threading.Event(), Fence.check

    def until_the_work_has_ended(fence):
        checks.set()
        threading.current_thread()._stop_now.wait(30)
        check(fence)

    monkeypatch.setattr(Fence, "check", until_the_work_has_ended)
    with pytest.raises(LeaseLostError), _hold(where):  # noqa: PT012
        assert checks.wait(30)
        _elsewhere(where, ttl=1.0)


def test_leases_of_earlier_drivers_are_removed(where):
    for _ in range(3):
        with _hold(where):
            pass
    folder = storage.join(where.storage, "leases", "work")
    assert storage.names(folder) == ["00000003.beat", "00000003.end", "00000003.json"]
    assert [name for name in storage.names(storage.join(where.storage, "leases")) if name != "work"] == []


@pytest.mark.parametrize("ttl", ['"long"', "null", "[]"])
def test_a_damaged_lease_is_named(tmp_path, ttl):
    where = Locations(str(tmp_path), str(tmp_path), "sqlite:///unused.db")
    path = _elsewhere(where, ttl=7.5).folder + "/00000001.json"
    storage.write_bytes(path, storage.read_bytes(path).replace(b"7.5", ttl.encode()))
    with pytest.raises(StorageError, match=f"{path}: not a lease"), _hold(where):
        pass


def test_storage_that_ignores_conditional_writes_is_refused(tmp_path, monkeypatch):
    fs = SimpleNamespace(pipe_file=lambda path, data, mode: None, exists=lambda path: False)
    monkeypatch.setattr("minitron.storage.files.filesystem", lambda path: (fs, path.split("://")[1]))
    with (
        pytest.raises(StorageError, match="overwrites an existing file although the write is conditional"),
        _hold(Locations(f"s3://{uuid.uuid4().hex}", str(tmp_path), "sqlite:///unused.db")),
    ):
        pass


OUTAGE = """
import logging, threading
import fsspec
from minitron.errors import StorageError
from minitron_platform.console import Console
from minitron_platform.locations import Locations
from minitron_platform.leases import lease
from helpers.s3_server import s3_server
said, missed = [], threading.Event()
class Handler(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())
        if "no heartbeat could be written" in said[-1]:
            missed.set()
logging.getLogger("minitron_platform.leases").addHandler(Handler())
with s3_server() as environment:
    import os
    os.environ.update(environment, AWS_MAX_ATTEMPTS="1", MINITRON_LEASE_SECONDS="1")
    fsspec.filesystem("s3").mkdir("bucket")
    block = lease(Locations("s3://bucket/x", "", "sqlite:///unused.db"), "search", "the search", run="run-1", console=Console())
    fence = block.__enter__()
assert missed.wait(60)
assert "minitron-lease" in [thread.name for thread in threading.enumerate()], "heartbeats are tried again"
try:
    fence.check()
except StorageError as error:
    print(error)
block.__exit__(None, None, None)
print(*said, sep="\\n")
"""


def test_heartbeats_continue_while_the_storage_server_is_unreachable_and_an_error_names_it():
    paths = os.pathsep.join([str(ROOT / "tests"), environment()["PYTHONPATH"]])
    driver = subprocess.run(
        [sys.executable, "-c", OUTAGE], env={**environment(), "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert driver.returncode == 0, driver.stderr
    assert "s3://bucket/x/leases/search: the storage does not answer (EndpointConnectionError" in driver.stdout
    assert (
        "the search: the lease was not released (s3://bucket/x/leases/search/00000001.end: the storage" in driver.stdout
    )


def test_a_write_that_the_client_repeated_counts_as_successful(monkeypatch):
    """S3 clients repeat a write if the answer to the first was lost; the second is then refused."""
    address = f"memory://{uuid.uuid4().hex}"
    fs = storage.filesystem(address)[0]

    def put_twice(path, data, mode):
        for _ in range(2):
            type(fs).pipe_file(fs, path, data, mode=mode)

    monkeypatch.setattr(fs, "pipe_file", put_twice)
    assert storage.create_bytes(f"{address}/a", b"mine")
    assert not storage.create_bytes(f"{address}/a", b"theirs")
    assert storage.read_bytes(f"{address}/a") == b"mine"


def test_a_write_is_refused_if_the_file_in_its_way_is_removed_meanwhile(monkeypatch):
    address = f"memory://{uuid.uuid4().hex}"
    fs = storage.filesystem(address)[0]
    storage.write_bytes(f"{address}/a", b"theirs")

    def refused(path, data, mode):
        try:
            type(fs).pipe_file(fs, path, data, mode=mode)
        finally:
            fs.rm_file(path)

    monkeypatch.setattr(fs, "pipe_file", refused)
    assert not storage.create_bytes(f"{address}/a", b"mine")


def test_a_listing_shows_what_was_written_before_it_while_another_thread_lists_the_same_folder(s3, monkeypatch):
    folder, kind = f"{s3}/{uuid.uuid4().hex}", type(storage.filesystem(s3)[0])
    storage.write_bytes(f"{folder}/a", b"1")
    listed, go_on = threading.Event(), threading.Event()
    list_pages, forget = kind._iterdir, kind.invalidate_cache

    async def list_slowly(*args, **options):
        async for entry in list_pages(*args, **options):
            yield entry
        while not go_on.is_set():
            listed.set()
            await asyncio.sleep(0.01)

    def forget_before_the_other_ends(*args):
        forget(*args)
        if threading.current_thread() is threading.main_thread():  # that of an earlier test may still remove a file
            go_on.set()
            slow.join(30)

    slow = threading.Thread(target=storage.names, args=(folder,))
    monkeypatch.setattr(kind, "_iterdir", list_slowly)
    slow.start()
    assert listed.wait(30)
    fsspec.filesystem("s3", skip_instance_cache=True).pipe_file(f"{folder}/b", b"2")
    monkeypatch.setattr(kind, "invalidate_cache", forget_before_the_other_ends)
    assert storage.names(folder) == ["a", "b"]


def test_whether_a_file_exists_does_not_depend_on_an_earlier_listing(s3):
    folder, other = f"{s3}/{uuid.uuid4().hex}", fsspec.filesystem("s3", skip_instance_cache=True)
    storage.write_bytes(f"{folder}/a", b"1")
    assert storage.names(folder) == ["a"]
    other.pipe_file(f"{folder}/b", b"22")
    other.rm_file(f"{folder}/a")
    assert storage.exists(f"{folder}/b")
    assert not storage.exists(f"{folder}/a")
    assert storage.size(folder) == 2


@pytest.mark.parametrize("text", ["soon", "0", "1e9"])
def test_the_duration_of_a_lease_must_be_a_number_of_seconds(monkeypatch, text):
    monkeypatch.setenv("MINITRON_LEASE_SECONDS", text)
    with pytest.raises(InputError, match="MINITRON_LEASE_SECONDS"):
        leases.lease_seconds()


def test_a_driver_whose_lease_was_taken_over_does_not_end_records_of_the_new_driver(bench, tmp_path, monkeypatch):
    recipe = load_recipe(str(bench / "recipe.yaml"))
    key, root = run_key(recipe), str(tmp_path / "runs")
    spool = Locations(root, root, "").spool(key)

    def taken_over(self, context, folder):
        fence = context.held[0]
        assert create_epoch(fence.folder, fence.epoch + 1, Holder.this_process(key, 60.0))
        raise KeyboardInterrupt

    monkeypatch.setattr("minitron_platform.stages.teacher.Teacher.run", taken_over)
    with pytest.raises((KeyboardInterrupt, LeaseLostError)):
        run(recipe, storage_path=root, until="teacher")
    for name in (key, f"{key}.teacher"):
        assert Spool(spool).status(name) == "RUNNING"


def test_two_drivers_of_one_run_on_an_object_store_do_the_work_once(bench, s3, tmp_path):
    root = f"{s3}/{uuid.uuid4().hex}"
    options = ["run", "recipe.yaml", "--storage", root, "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    options += ["--until", "correct"]
    key = run_key(load_recipe(str(bench / "recipe.yaml")))
    homes = [{**environment(), "XDG_CACHE_HOME": str(tmp_path / name), "HOME": str(tmp_path / name)} for name in "ab"]
    for home in homes:  # as on separate machines
        os.makedirs(home["HOME"])
    with lease(Locations(root, str(tmp_path), ""), f"run-{key}", "the run", run=key, console=Said()):
        drivers = [
            subprocess.Popen(command(*options), cwd=bench, env=home, stdout=subprocess.PIPE, text=True)
            for home in homes
        ]
        for driver in drivers:  # both are ready before either starts
            assert any("Waiting for it to end" in line for line in driver.stdout)
    said = [driver.communicate(timeout=300)[0] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0]
    assert sorted(text.count("already done") for text in said) == [0, 3]


def test_drivers_that_check_the_same_storage_do_not_disturb_each_other(s3):
    root = f"{s3}/{uuid.uuid4().hex}"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: check_machine(None, root, elsewhere=True), range(64)))
    assert not storage.exists(root)


def test_a_driver_that_waits_lists_the_lease_and_reads_little_else(where, monkeypatch):
    _elsewhere(where, ttl=60)
    asked, waited = Counter(), []
    for name in ("names", "read_bytes_if_exists"):
        method = getattr(storage, name)

        def counted(path, name=name, method=method):
            asked[name] += 1
            return method(path)

        monkeypatch.setattr(storage, name, counted)

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt), _hold(where):
        pass
    assert (asked["names"], asked["read_bytes_if_exists"]) == (20, 1)  # the heartbeat is looked at every 7.5 s
