"""Calibrate and evaluate models, in two processes if run: BENCH MATERIAL FOLDER -> files in FOLDER."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from helpers import tiny
from helpers.evaluating import arc_documents, byte_tokenizer, pages, sums, tiny_model, write_jsonl
from helpers.forking import fork_two
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron import estimate_importance, storage
from minitron.data import Rows
from minitron.distill import loading, store_hidden
from minitron.distill.loading import load_split
from minitron.distill.teacher.shard_format import INDEX
from minitron.evaluation import Task, evaluate, heldout_metrics, teacher_targets
from minitron.importance import LayerScoring
from minitron.models import layers_of, load_source
from minitron.processes import wait_for_all

SCORINGS = [LayerScoring(sizes=(2,)), LayerScoring("logit_error", sizes=(1,), iterative=2, rows=3)]


def calibrate(out: str, *arguments, **options) -> None:
    estimate_importance(*arguments, **options).save(Path(out))


def calibrate_all(bench: Path, out: str) -> None:
    for family in tiny.FAMILIES:
        calibrate(out.format(family), tiny.model(family), tiny.rows(5), layers=SCORINGS, batch_rows=2)
    calibrate(out.format("one_row"), tiny.model(), tiny.rows(1), layers=SCORINGS)
    task = LayerScoring("task", sizes=(2,), task=Task("arc_easy", data=str(bench / "arc.jsonl"), limit=5))
    teacher = AutoModelForCausalLM.from_pretrained(bench / "teacher").eval()
    words = AutoTokenizer.from_pretrained(bench / "teacher")
    calibrate(out.format("task"), teacher, tiny.rows(3), layers=task, tokenizer=words)


def begun_alike(words: str, count: int) -> list[dict[str, Any]]:
    """Questions that begin with the same words, which are computed once."""
    return [{**each, "question": f"{words} {each['question']}"} for each in arc_documents(count)]


def evaluate_all(model, folder: Path) -> dict:
    """Scores for each kind of request, with batches that do not divide evenly, and the number of forward passes."""
    alike = begun_alike("Read the question, and choose the answer.", 5)
    documents = {
        "arc_easy": arc_documents(9),
        "arc_challenge": alike,
        "wikitext": [*pages(5, 10), *pages(2, 300)],
        "gsm8k": sums(5),
    }
    tasks = [Task(name, str(write_jsonl(folder / name / "test.jsonl", content))) for name, content in documents.items()]
    passes = []
    handle = model.get_decoder().register_forward_hook(lambda *_: passes.append(1))
    counts = []
    scores = evaluate(
        model,
        byte_tokenizer(),
        tasks,
        batch_size=2,
        progress=lambda *call: counts.append(call),
        together=dist.is_initialized(),
    )
    handle.remove()
    return {"scores": {name: asdict(score) for name, score in scores.items()}, "passes": len(passes), "counts": counts}


def measure_all(model, material: Path, folder: Path, store: Path) -> dict:
    """Importance, outputs, loss and benchmarks of the teacher in the folder `material`, in uneven parts."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    words = AutoTokenizer.from_pretrained(material / "teacher")
    rows = Rows.open(str(material / "rows"), "train")
    folder.mkdir()
    task = Task("arc_easy", str(write_jsonl(folder / "arc" / "test.jsonl", arc_documents(3))))
    layers = [*SCORINGS, LayerScoring("task", sizes=(4,), task=task)]
    calibrate(f"{folder}/scores", model, rows.take(range(5)), layers=layers, tokenizer=words, batch_rows=2)
    bytes_of_8_rows = 8 * 32 * (4 * 48 + 4)
    how = {"key": "k", "rank": rank, "world": world, "shard_bytes": bytes_of_8_rows, "numbers": range(20)}
    file_sizes = storage.file_sizes
    # as if a worker of an earlier driver completed the store after the first process has seen that it is empty
    later = (lambda folder: file_sizes(folder) or {INDEX: 1}) if rank == 1 else file_sizes
    with mock.patch.object(storage, "file_sizes", later):
        stored = store_hidden(lambda: model, rows, str(store), **how)
    heldout = heldout_metrics(
        model, rows.take(range(5)), **teacher_targets(model, rows.take(range(5))), batch_rows=2, together=world > 1
    )
    generation = Task("gsm8k", str(write_jsonl(folder / "sums" / "test.jsonl", sums(3))))
    alike = write_jsonl(folder / "alike" / "test.jsonl", begun_alike(" ".join(tiny.WORDS[:34]), 3))
    tasks = [task, Task("arc_challenge", str(alike)), generation]
    scores = evaluate(model, words, tasks, batch_size=1, together=world > 1)
    return {
        "heldout": asdict(heldout),
        "scores": {name: asdict(score) for name, score in scores.items()},
        "rows": stored,
    }


def main() -> None:
    bench, material, folder = map(Path, sys.argv[1:4])
    rank, world = fork_two(), 2
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    out = f"{folder}/{{}}.{rank}of{world}"
    calibrate_all(bench, out)
    result = evaluate_all(tiny_model(1), folder / f"documents-{rank}of{world}")
    Path(out.format("evaluate.json")).write_text(json.dumps(result))
    others = Task("arc_easy", str(write_jsonl(folder / f"others-{rank}" / "test.jsonl", arc_documents(3, seed=rank))))
    failed: dict[str, str] = {}
    evaluate(
        tiny_model(1),
        byte_tokenizer(),
        [others],
        together=True,
        on_failure=lambda *each: failed.update([map(str, each)]),
    )
    Path(out.format("failed.json")).write_text(json.dumps(failed))
    split = load_split(material / "teacher", torch.float32)
    held = [(parameter.to_local().nbytes, parameter.nbytes) for parameter in layers_of(split).parameters()]
    assert sum(own for own, _ in held) < 0.6 * sum(whole for _, whole in held)
    result = measure_all(split, material, folder / f"split-{rank}of{world}", folder / "split-store")
    Path(out.format("split.json")).write_text(json.dumps(result))
    mixture = tiny.model("mixtral", seed=3)
    if rank == 0:
        mixture.save_pretrained(folder / "mixture")
    wait_for_all()
    split = load_split(folder / "mixture", torch.float32)
    calibrate(out.format("split-mixture"), split, tiny.rows(3), layers=SCORINGS[0], batch_rows=1)
    load_in_turn(folder, rank)
    dist.destroy_process_group()


def load_in_turn(folder: Path, rank: int) -> None:
    """Load a source that has to be converted, onto what stands for a GPU; `loads` says when each process began and ended."""
    pickled = folder / "pickled"
    if rank == 0:
        tiny.model(seed=3).save_pretrained(pickled)
        tiny.tokenizer().save_pretrained(pickled)
        torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
        (pickled / "model.safetensors").unlink()
    wait_for_all()

    def logged(source: str, **options: Any) -> Any:
        with (folder / "loads").open("a") as file:
            file.write(f"begin {rank}\n")
            file.flush()
            loaded = load_source(source, **options)
            file.write(f"end {rank}\n")
        return loaded

    gpu = torch.device("meta")
    with mock.patch.object(loading, "device", return_value=gpu), mock.patch.object(loading, "load_source", logged):
        model, _ = loading.load_source_together(str(pickled), torch.float32, together=True)
    assert model.device == gpu


if __name__ == "__main__":
    main()
