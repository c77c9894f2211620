"""Calibrate and evaluate models, in one of several processes if run: BENCH FOLDER RANK WORLD -> FOLDER/NAME.RANKofWORLD."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
from helpers import tiny
from helpers.evaluating import arc_documents, byte_tokenizer, pages, sums, tiny_model, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron import estimate_importance
from minitron.evaluation import Task, evaluate
from minitron.importance import LayerScoring

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


def evaluate_all(model, folder: Path) -> dict:
    """Scores for each kind of request, with batches that do not divide evenly, and the number of forward passes."""
    documents = {"arc_easy": arc_documents(9), "wikitext": [*pages(5, 10), *pages(2, 300)], "gsm8k": sums(5)}
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


def main() -> None:
    bench, folder, rank, world = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    out = f"{folder}/{{}}.{rank}of{world}"
    calibrate_all(bench, out)
    result = evaluate_all(tiny_model(1), folder / f"documents-{rank}of{world}")
    Path(out.format("evaluate.json")).write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
