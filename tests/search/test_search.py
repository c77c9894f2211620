"""The search on Ray Tune, called as a library: forward-only scores, rungs, halving, failures, and a second call."""

from __future__ import annotations

import math
import os
import signal
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.searching import CONFIG, RUNGS, json_files, search_task
from torch.testing._internal.distributed.fake_pg import FakeStore

from minitron import Architecture, storage
from minitron.distill.inputs import DistillInputs
from minitron.errors import InputError, MinitronError, NonFiniteError, StorageError, TakenOverError
from minitron.models import layers_of
from minitron.pruning.source import PruningSource
from minitron_platform.cluster.ray_session import ray_session
from minitron_search import search
from minitron_search.events import (
    Failed,
    Finished,
    Paused,
    Progress,
    Retried,
    RungReached,
    Scored,
    Started,
    Undistilled,
)
from minitron_search.halving import Halving, kept, planned_steps, rung_steps, survivors
from minitron_search.placement import max_concurrent_trials
from minitron_search.pool import Pool
from minitron_search.ranking import pareto
from minitron_search.stability import settled, stability
from minitron_search.tau import kendall_tau
from minitron_search.trial import run_trial
from minitron_search.trial_store import TrialResult, trial_key, trial_result
from minitron_search.trial_student import trial_student


def _pool(folder, share=2, **options):
    """share: CPUs of a trial, by default both, so that one process runs them all."""
    return Pool(str(Path(folder) / "tune"), share={"CPU": share}, **options)


@pytest.fixture(scope="module")
def to_the_end(made, tmp_path_factory):
    """Every candidate distilled to the end: the task, its result, and the events by candidate."""
    events = []
    task = search_task(made, tmp_path_factory.mktemp("trials"))
    with ray_session(None, num_cpus=2):
        found = search(task, made[2], pool=_pool(task.folder, on_event=lambda *event: events.append(event)))
        yield task, found, events


def test_every_candidate_is_measured_at_every_rung(made, to_the_end):
    task, found, events = to_the_end
    assert len(found.ranking) == len(made[2]) == 6
    kls = [candidate.kl for candidate in found.ranking]
    assert kls == sorted(kls)
    for architecture in made[2]:
        result = trial_result(task.folder, architecture)
        assert list(result.rung_kl) == list(RUNGS)
        kl = [result.kl_undistilled, *result.rung_kl.values(), result.kl]
        assert kl == sorted(kl, reverse=True)
        mine = [event for candidate, event in events if candidate == architecture]
        assert [type(event) for event in mine[:2]] == [Started, Undistilled]
        assert [(event.step, event.kl) for event in mine if isinstance(event, RungReached)] == list(
            result.rung_kl.items()
        )
        assert [event.step for event in mine if isinstance(event, Progress)] == list(range(1, 9))
        assert mine[-1] == Finished(8, result.kl, result.loss)
    assert found.saved == 0
    assert found.forward is None
    assert found.stopped == []
    stability_of = {row.measure: row for row in found.stability}
    assert stability_of["KL at step 4"].saved == pytest.approx(1 - (6 * 4 + 3 * 4) / (6 * 8))
    assert all(-1 <= row.tau <= 1 for row in found.stability)


def test_the_table_of_a_search_is_a_data_frame_of_its_ranking(to_the_end):
    _, found, _ = to_the_end
    table = found.table
    assert list(table["architecture"]) == [str(candidate.architecture) for candidate in found.ranking]
    assert list(table["kl"]) == [candidate.kl for candidate in found.ranking]
    assert table[table["winner"]]["num_layers"].tolist() == [found.winner.num_layers]
    assert not {"num_experts", "latency_ms", "memory_bytes"} & set(
        table.columns
    )  # axes and measurements that no candidate has
    assert len(repr(found)) < 400


def test_measuring_at_rungs_does_not_change_the_result_and_a_paused_trial_resumes_bit_for_bit(
    made, to_the_end, tmp_path
):
    task, found, _ = to_the_end
    architecture = found.winner
    whole = trial_result(task.folder, architecture)
    plain = search_task(made, tmp_path / "plain", rungs=())
    run_trial(plain, architecture, lambda event: None)
    paused, reports = search_task(made, tmp_path / "paused"), []
    run_trial(paused, architecture, reports.append, until=6)
    assert trial_result(paused.folder, architecture) is None
    assert reports[-1] == Paused(6)
    run_trial(paused, architecture, lambda event: None)
    for folder in (plain.folder, paused.folder):
        assert trial_result(folder, architecture).per_row_kl == whole.per_row_kl
    assert trial_result(paused.folder, architecture).rung_kl == whole.rung_kl


def test_a_trial_that_missed_a_rung_is_repeated_with_the_same_result(made, tmp_path):
    architecture = made[2][-1]
    run_trial(search_task(made, tmp_path, rungs=(6,)), architecture, lambda event: None, until=6)
    run_trial(search_task(made, tmp_path), architecture, lambda event: None)  # its checkpoint is past step 4
    found = trial_result(str(tmp_path), architecture)
    assert list(found.rung_kl) == list(RUNGS)
    Path(tmp_path, trial_key(architecture), "result.json").unlink()
    Path(tmp_path, trial_key(architecture), "rung-000004.json").unlink()
    run_trial(search_task(made, tmp_path, rungs=(4,)), architecture, lambda event: None)
    assert trial_result(str(tmp_path), architecture).per_row_kl == found.per_row_kl
    run_trial(search_task(made, tmp_path), architecture, lambda event: None)
    after = trial_result(str(tmp_path), architecture)
    assert after.per_row_kl == found.per_row_kl
    assert list(after.rung_kl) == list(RUNGS)


def test_only_the_best_candidates_are_distilled_and_the_worse_stop_at_a_rung(made, to_the_end, tmp_path):
    whole, (_, all_found, _) = made[2], to_the_end
    task = search_task(made, tmp_path)
    worst = min(whole, key=lambda a: (a.hidden_size, a.intermediate_size))
    options = {"forward_keep": 3, "pinned": [worst], "halving": Halving(keep=0.5, grace=0.75)}
    events = []
    found = search(task, whole, **options, pool=_pool(task.folder, on_event=lambda *event: events.append(event)))
    # the forward-only scores are the KL that full trials measured before training; the three best and the pinned one go on
    assert len(found.forward) == 6
    known = {candidate.architecture: candidate.kl_undistilled for candidate in all_found.ranking}
    for scored in found.forward:
        assert scored.kl_undistilled == pytest.approx(known[scored.architecture])
    assert [scored.kl_undistilled for scored in found.forward] == sorted(s.kl_undistilled for s in found.forward)
    assert found.forward[-1].architecture == worst
    assert [scored.distilled for scored in found.forward] == [True, True, True, False, False, True]
    # candidates are stopped at step 6 alone, because step 4 is in the grace period; two of four continue
    assert len(found.ranking) == len(found.stopped) == 2
    assert {candidate.step for candidate in found.stopped} == {6}
    for candidate in found.stopped:
        assert candidate.kl == trial_result(to_the_end[0].folder, candidate.architecture).rung_kl[6]
        assert trial_result(task.folder, candidate.architecture) is None
        assert not storage.exists(storage.join(task.folder, trial_key(candidate.architecture), "checkpoints"))
    best = {candidate.architecture: candidate.kl for candidate in all_found.ranking}
    assert all(best[candidate.architecture] == candidate.kl for candidate in found.ranking)
    assert found.saved == pytest.approx(1 - (2 * 8 + 2 * 6) / (4 * 8))
    # the workers that scored are kept and train
    pids = {kind: {event.pid for _, event in events if isinstance(event, kind)} for kind in (Scored, Started)}
    assert pids[Scored] <= pids[Started]
    # a second call returns the same and repeats nothing
    before = json_files(tmp_path)
    again = search(task, whole, **options)
    assert json_files(tmp_path) == before
    assert again == found
    # a stopped candidate can still be trained to the end, with the result of one that was never stopped
    stopped = found.stopped[0].architecture
    run_trial(task, stopped, lambda event: None)
    ours, theirs = (trial_result(t.folder, stopped) for t in (task, to_the_end[0]))
    assert ours.per_row_kl == theirs.per_row_kl


def test_stable_halving_stops_candidates_where_the_order_has_not_changed(made, to_the_end):
    stable, before = Halving(grace="stable"), {"a": 1.0, "b": 2.0, "c": 3.0}
    assert stable.stop_rungs(RUNGS, 8) == list(RUNGS)
    assert stable.should_stop(before, {"a": 0.1, "b": 0.2, "c": 0.3})
    assert not stable.should_stop(before, {"a": 0.1, "b": 0.3, "c": 0.2})
    assert stable.should_stop(before, {"a": 0.1, "c": 0.2})  # candidates that have not reached the rung are ignored
    assert Halving(grace=0.0).should_stop(before, {"a": 3.0, "b": 2.0, "c": 1.0})
    # with finished trials the decision is made again from the stored measurements
    task = to_the_end[0]
    results = {a: trial_result(task.folder, a) for a in made[2]}
    going, last, expected = list(results), {a: result.kl_undistilled for a, result in results.items()}, {}
    for step in RUNGS:
        now = {a: results[a].rung_kl[step] for a in going}
        if kendall_tau([last[a] for a in going], list(now.values())) >= 0.9:
            going = sorted(going, key=now.get)[: math.ceil(len(going) / 2)]
            expected |= dict.fromkeys(now.keys() - set(going), step)
        last = now
    found = search(task, made[2], halving=stable)
    assert {candidate.architecture: candidate.step for candidate in found.stopped} == expected
    assert {candidate.architecture for candidate in found.ranking} == set(going)


def test_candidates_that_cannot_be_pruned_are_reported_and_the_search_continues(made, to_the_end, tmp_path):
    good, events = made[2][-1], []
    wide, deep = (replace(good, **{name: 99}) for name in ("intermediate_size", "num_layers"))
    task = search_task(made, tmp_path)
    found = search(task, [wide, good, deep], pool=_pool(tmp_path, on_event=lambda *event: events.append(event)))
    assert found.winner == good
    assert list(found.failures) == [wide, deep]
    assert "intermediate_size: 99 is larger than the model's 96" in found.failures[wide]
    assert {a: event.reason for a, event in events if isinstance(event, Failed)} == found.failures
    assert not [event for _, event in events if isinstance(event, Retried)]
    # the other candidates did not change its result
    alone, before = (trial_result(t.folder, good) for t in (task, to_the_end[0]))
    assert alone.per_row_kl == before.per_row_kl


def _work(folder):
    """Work whose outcome depends on the number of layers, with a file per attempt and at its end; and the check for the end."""

    def work(architecture, report):
        report(Started(os.getpid()))
        attempt = len(list(folder.glob(f"{architecture.num_layers}-*"))) + 1
        (folder / f"{architecture.num_layers}-{attempt}").touch()
        match architecture.num_layers:
            case 1:
                raise ValueError("of two\nlines")
            case 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has less.")
            case 3:
                raise NonFiniteError("loss nan at step 3", "lower the rate")
            case 4:
                os.kill(os.getpid(), signal.SIGKILL)
            case 5 if attempt == 1:
                raise OSError("the network was away")
            case 7:
                raise StorageError("/x: no room left on the disk", "free some space")
            case 8:
                time.sleep(60)
        (folder / f"{architecture.num_layers}.done").touch()

    return work, lambda architecture: (folder / f"{architecture.num_layers}.done").exists()


def test_failures_have_one_line_reasons_and_only_temporary_ones_are_retried(made, to_the_end, tmp_path):
    (work, done), events = _work(tmp_path), []
    kinds = [replace(made[2][0], num_layers=kind) for kind in range(1, 6)]
    pool = _pool(tmp_path, max_failures=1, on_event=lambda *event: events.append(event))
    failures = pool.run(work, kinds, done)
    raised, memory, diverged, killed, passing = kinds
    assert list(failures) == [raised, memory, diverged, killed]
    assert failures[raised] == "ValueError: of two lines"
    assert failures[memory].startswith(
        "out of GPU memory: CUDA out of memory. Tried to allocate 2.00 GiB; lower micro_batch_rows"
    )
    assert failures[diverged] == "loss nan at step 3; lower the rate"
    assert failures[killed].startswith("its process was killed or crashed; ")
    assert [len(list(tmp_path.glob(f"{kind.num_layers}-*"))) for kind in kinds] == [2, 1, 1, 2, 2]
    assert done(passing)
    retried = {architecture: event for architecture, event in events if isinstance(event, Retried)}
    assert set(retried) == {raised, killed, passing}
    assert retried[passing].reason == "OSError: the network was away"
    assert retried[passing].restarts_left == 0
    assert {architecture for architecture, event in events if isinstance(event, Failed)} == set(kinds[:4])


def test_storage_that_cannot_be_used_ends_the_search(made, to_the_end, tmp_path):
    (work, done), started = _work(tmp_path), time.monotonic()
    full, other = (replace(made[2][0], num_layers=kind) for kind in (7, 8))
    with pytest.raises(StorageError, match="no room left") as raised:
        _pool(tmp_path, share=1, max_failures=0).run(work, [full, other], done)
    assert "free some space" in raised.value.remedy
    assert "finished candidates are kept" in raised.value.remedy
    assert time.monotonic() - started < 50  # it did not wait for the other trial


def test_an_error_of_whoever_follows_the_events_ends_the_search_as_it_is(made, to_the_end, tmp_path):
    """Ray Tune would raise another one, with its text."""
    refused = StorageError("/x/trial.txt: the disk is full", "free some space")

    def on_event(_, event):
        raise refused

    work, done = _work(tmp_path)
    with pytest.raises(StorageError) as raised:
        _pool(tmp_path, max_failures=0, on_event=on_event).run(work, [replace(made[2][0], num_layers=3)], done)
    assert raised.value is refused


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc, which only Linux has")
def test_a_worker_releases_the_memory_of_a_finished_trial(made, to_the_end, tmp_path):
    """Every trial frees memory that the C library's allocator keeps for the trial's thread, if it is not released."""
    used = defaultdict(list)  # by process

    def seen(_, event):
        used[event.metrics["process"]].append(event.metrics["memory"])

    def work(architecture, report):
        for _ in range(2):  # the allocator keeps later allocations after the first were freed
            parts = [torch.ones(1 << 20) for _ in range(64)]
            del parts
        megabytes = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
        report(Progress(1, {"memory": megabytes, "process": os.getpid()}))
        (tmp_path / f"{architecture.num_layers}.done").touch()

    pool = _pool(tmp_path, on_event=seen)
    pieces = [replace(made[2][0], num_layers=number) for number in range(1, 6)]
    pool.run(work, pieces, lambda architecture: (tmp_path / f"{architecture.num_layers}.done").exists())
    longest = max(used.values(), key=len)
    assert len(longest) > 2
    assert max(longest) - longest[0] < 300, used  # megabytes; otherwise it grows by 256 per trial


def test_a_trial_that_fits_on_no_node_is_refused(made, to_the_end, tmp_path):
    with pytest.raises(InputError, match="nodes have"):
        search(search_task(made, tmp_path), made[2], pool=_pool(tmp_path, share=100))


def test_the_number_of_concurrent_trials_depends_on_what_fits_on_each_node():
    cpu, gpu = {"CPU": 16, "memory": 64e9}, {"CPU": 16, "GPU": 8, "memory": 64e9}
    assert max_concurrent_trials([cpu, cpu], {"CPU": 3}) == 10  # five on each node, not 32 / 3
    assert max_concurrent_trials([cpu, gpu], {"CPU": 1, "GPU": 1}) == 8
    assert max_concurrent_trials([gpu], {"CPU": 1, "GPU": 0.6}) == 8  # no trial uses parts of two GPUs
    assert max_concurrent_trials([gpu], {"CPU": 1, "GPU": 0.1}) == 16
    assert max_concurrent_trials([gpu, gpu], {"CPU": 1, "GPU": 1}, workers=3) == 5
    assert max_concurrent_trials([gpu, gpu], {"CPU": 1, "GPU": 8}, workers=2) == 1
    assert max_concurrent_trials([gpu, gpu], {"CPU": 1, "GPU": 1}, workers=6, least=4) == 3  # of 6, 6 and 4 workers
    assert max_concurrent_trials([gpu], {"CPU": 1, "GPU": 1}, workers=16, least=4) == 1
    assert max_concurrent_trials([gpu], {"CPU": 1, "GPU": 1}, workers=16, least=9) == 0
    assert max_concurrent_trials([cpu], {"CPU": 1, "memory": 20e9}) == 3
    # memory is reserved for the processes that start the workers
    assert max_concurrent_trials([cpu], {"CPU": 1, "memory": 64e9}) == 0
    assert max_concurrent_trials([cpu], {"CPU": 1, "GPU": 1}) == 0


def _counting(inputs, folder):
    """The same inputs, which write to `folder` how many forward passes each process makes in a measurement. It must equal the
    measurement of one process to the last digit."""

    class Counting(DistillInputs):
        def heldout(self, model, *arguments, together=False):
            passes = []
            with model.get_decoder().register_forward_hook(lambda *_: passes.append(1)):
                measured = DistillInputs.heldout(self, model, *arguments, together=together)
            with Path(folder, f"passes-{dist.get_rank()}").open("a") as file:
                file.write(f"{len(passes)} ")
            assert measured == DistillInputs.heldout(self, model, *arguments)
            return measured

    return Counting(**vars(inputs))


@pytest.mark.long
def test_two_workers_with_a_sharded_student_train_like_one_and_share_its_measurements(made, to_the_end, tmp_path):
    whole, events = to_the_end[0], []
    task = search_task(made, tmp_path, config=replace(CONFIG, shard=True, micro_batch_rows=2, checkpoint_every=5))
    task = replace(task, materials=_counting(task.materials, tmp_path))
    pool = _pool(tmp_path, share=1, workers=2, on_event=lambda _, event: events.append(event))
    found = search(task, made[2][-1:], pool=pool)
    ours, theirs = (trial_result(t.folder, found.winner) for t in (task, whole))
    assert ours.per_row_kl == pytest.approx(theirs.per_row_kl, rel=1e-4)
    assert ours.per_row_kl != theirs.per_row_kl  # sums over two processes round differently
    assert ours.rung_kl == pytest.approx(theirs.rung_kl, rel=1e-4)
    assert ours.kl_undistilled == theirs.kl_undistilled
    # of three batches before training, at two rungs and at the end; layers are gathered for equally many by both
    assert [(tmp_path / f"passes-{rank}").read_text().split() for rank in range(2)] == [["2"] * 4] * 2
    # only rank 0 reports, in order
    assert [event.step for event in events if isinstance(event, Progress)] == list(range(1, 9))
    assert not [path for name in ("checkpoints", "pruned", "weights") for path in tmp_path.glob(f"*/{name}")]


def _lease(taken, folder):
    """(what files there are in `folder`, what takes the lease, what raises once it is taken). Half-written files, which nobody
    else sees, are left out. The first process that learns of it leaves a list of the files there. Workers cannot import this
    file, but get functions that a function has made."""

    def files():
        whole = [path for path in folder.rglob("*") if not any(part.endswith(".tmp") for part in path.parts)]
        return sorted(f"{path} {path.stat().st_mtime_ns}" for path in whole if path.is_file())

    def take():
        taken.write_text("\n".join(files()))

    def check():
        if taken.exists():
            with suppress(FileExistsError), taken.with_name("seen").open("x") as file:
                file.write("\n".join(files()))
            raise TakenOverError("the trials were taken over", "follow the other driver")

    return files, take, check


def _measuring(inputs, after):
    """The inputs of a search that call `after` with the number of each measurement."""
    numbers = count(1)

    class Measuring(DistillInputs):
        def heldout(self, *arguments, **options):
            measured = DistillInputs.heldout(self, *arguments, **options)
            after(next(numbers))
            return measured

    return Measuring(**vars(inputs))


# an event, or a measurement: before training, at the two rungs, and at the end
MOMENTS = [1, 2, 3, 4, Started, Undistilled, (RungReached, 4), (Progress, 8), Finished]


@pytest.mark.parametrize("moment", MOMENTS, ids=str)
def test_a_trial_of_a_driver_that_was_replaced_writes_and_deletes_nothing(made, tmp_path, moment):
    """At every moment after which it would."""
    taken, folder = tmp_path / "taken", tmp_path / "trials"
    files, take, check = _lease(taken, folder)

    def measured(number):
        if number == moment:
            manifest = folder / trial_key(architecture) / "checkpoints/step-00000004/manifest.json"
            while number > 2 and not manifest.exists():  # a checkpoint that was begun before
                time.sleep(0.01)
            take()

    def report(event):
        if moment in (type(event), (type(event), getattr(event, "step", None))):
            take()

    config = replace(CONFIG, checkpoint_every=4)
    task = search_task(made, folder, config=config, keep_weights=True, before_commit=check)
    task = replace(task, materials=_measuring(task.materials, measured))
    architecture = made[2][-1]
    with pytest.raises(TakenOverError):
        run_trial(task, architecture, report)
    assert files() == taken.read_text().splitlines()


@pytest.mark.long
def test_workers_of_a_trial_whose_driver_was_replaced_stop_writing_and_are_not_restarted(made, to_the_end, tmp_path):
    """Two of them, whose own process does not wait for the driver."""
    taken, folder, events = tmp_path / "taken", tmp_path / "trials", []
    files, take, check = _lease(taken, folder)
    config = replace(CONFIG, steps=100_000, checkpoint_every=5)
    task = search_task(made, folder, config=config, rungs=(), before_commit=check)

    def on_event(_, event):
        events.append(event)
        if isinstance(event, Progress) and event.step >= 12 and not taken.exists():
            take()

    with pytest.raises(MinitronError, match=r"no candidate of the search finished(.|\n)*the trials were taken over"):
        search(task, made[2][-1:], pool=_pool(tmp_path, share=1, workers=2, on_event=on_event))
    assert not [event for event in events if isinstance(event, Retried)]
    assert files() == (tmp_path / "seen").read_text().splitlines()


def test_a_process_that_shares_a_student_has_neither_it_nor_its_source_in_memory(made, tmp_path, monkeypatch):
    monkeypatch.setattr(PruningSource, "load", None)
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        student = trial_student(search_task(made, tmp_path, config=replace(CONFIG, shard=True)), made[2][-1])
        assert all(parameter.is_meta for parameter in student.model.parameters())
        layers = list(layers_of(student.untrained()).parameters())
        assert sum(p.to_local().numel() for p in layers) < sum(p.numel() for p in layers) / 6
    finally:
        dist.destroy_process_group()


def test_halving_without_a_rung_after_the_grace_period_is_refused(made, tmp_path):
    with pytest.raises(InputError, match="no rung"):
        search(search_task(made, tmp_path, rungs=(4,)), made[2], halving=Halving())


def test_rungs_are_shares_of_the_steps_rounded_up():
    assert rung_steps([0.5, 0.75], 14) == (7, 11)
    assert rung_steps([0.7, 0.1], 10) == (1, 7)
    assert rung_steps([0.5, 0.75, 0.6], 3) == (2,)
    assert rung_steps([0.5], 1) == ()
    assert Halving(grace=0.75).stop_rungs((7, 11), 14) == [11]


def test_halving_keeps_the_best_share_rounded_up():
    kl = {"a": 3.0, "b": 1.0, "c": 2.0, "d": 5.0, "e": 4.0}
    assert survivors(kl, 0.5) == ["b", "c", "a"]
    assert survivors(kl, 0.2) == ["b"]
    assert kept(1, 0.01) == 1
    # 27 candidates, a third of them kept after steps 1 and 3 of 9: 27 + 9·2 + 3·6
    assert planned_steps(27, 9, [1, 3], 1 / 3) == 63
    assert planned_steps(8, 400, [], 0.5) == 3200


def test_kendall_tau_follows_its_definition():
    assert kendall_tau([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert kendall_tau([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    assert kendall_tau([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)
    assert kendall_tau([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / 3)  # a tie counts in neither direction
    assert math.isnan(kendall_tau([1], [1]))


def _result(final, rungs, undistilled, parameters):
    return TrialResult(
        architecture=Architecture(2, 8, 8, 1, 1, 8, 100, True),
        parameters=parameters,
        kl_undistilled=undistilled,
        loss_undistilled=undistilled + 1,
        rung_kl=dict(zip((4, 6, 7), rungs, strict=True)),
        kl=final,
        loss=final,
        top1_agreement=0.5,
        per_row_kl=(final,),
        tokens=1,
        config={"steps": 8},
        seconds=1.0,
    )


def test_the_stability_table_shows_what_stopping_early_would_cost():
    results = [  # the winner is last undistilled, third at step 4, and first from step 6 on
        _result(1.0, [1.7, 1.2, 1.1], 9.0, 100),
        _result(1.1, [1.5, 1.3, 1.2], 2.0, 110),
        _result(1.2, [1.6, 1.4, 1.3], 3.0, 130),
        _result(1.5, [1.9, 1.8, 1.7], 4.0, 120),
    ]
    rows = stability(results, (4, 6, 7))
    by_measure = {row.measure: row for row in rows}
    assert by_measure["KL undistilled"].tau == 0
    assert by_measure["KL undistilled"].regret_kept == pytest.approx(0.1)
    at_4, at_6 = by_measure["KL at step 4"], by_measure["KL at step 6"]
    assert at_4.tau == pytest.approx(2 / 6)
    assert at_4.regret == at_4.regret_kept == pytest.approx(0.1)
    assert (at_6.tau, at_6.regret, at_6.regret_kept) == (1, 0, 0)
    assert at_6.saved == pytest.approx(0.5 * 2 / 8)
    assert by_measure["size"].regret == pytest.approx(0.2)
    assert by_measure["size"].step is None
    assert settled(rows) == 6
    assert settled(stability([_result(r.kl, [1, 1, 1], 1, 1) for r in results], (4, 6, 7))) is None
    assert settled(stability(results[:1], (4, 6, 7))) is None  # one candidate has no order


def test_the_pareto_front_has_the_candidates_that_no_other_beats_in_both():
    assert pareto([3, 1, 2, 2, 4], [1.0, 5.0, 3.0, 4.0, 1.0]) == [1, 2, 0]
