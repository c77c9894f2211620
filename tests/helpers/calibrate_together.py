"""Calibrate models in one of several processes: BENCH FOLDER RANK WORLD -> FOLDER/NAME.RANKofWORLD."""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist
from helpers import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron import estimate_importance
from minitron.evaluation import Task
from minitron.importance import LayerScoring

bench, folder, rank, world = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)


def calibrate(name: str, *arguments, **options) -> None:
    estimate_importance(*arguments, **options).save(folder / f"{name}.{rank}of{world}")


SCORINGS = [LayerScoring(sizes=(2,)), LayerScoring("logit_error", sizes=(1,), iterative=2, rows=3)]
for family in tiny.FAMILIES:
    calibrate(family, tiny.model(family), tiny.rows(5), layers=SCORINGS, batch_rows=2)
calibrate("one_row", tiny.model(), tiny.rows(1), layers=SCORINGS)
task = LayerScoring("task", sizes=(2,), task=Task("arc_easy", data=str(bench / "arc.jsonl"), limit=5))
teacher = AutoModelForCausalLM.from_pretrained(bench / "teacher").eval()
calibrate("task", teacher, tiny.rows(3), layers=task, tokenizer=AutoTokenizer.from_pretrained(bench / "teacher"))
if world > 1:
    dist.destroy_process_group()
