"""Processor time of an evaluation outside the model, in ms per document and by part.

    python -m benchmarks.evaluation_host --data benchmarks/ [--before CHECKOUT] [--limit 1000] [--rounds 3]

The model is a Llama of one layer of width 8 with the vocabulary of SmolLM2, whose tokenizer reads the documents. What it
computes, with the logits and what is taken from them, is left out: on a GPU that is not the host's time. Of texts that it
writes (GSM8K, 256 tokens each, as it never ends one) the loop of transformers around the model counts. The folder has one
folder for each task; tasks without one are left out. CHECKOUT: another checkout of Minitron, measured in turns with this one.
One thread tokenises texts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent.parent
TASKS = ("hellaswag", "arc_challenge", "winogrande", "piqa", "mmlu", "gsm8k")
SUBJECTS = {"mmlu": 57}  # of a group, each of which has a limit
PARTS = ("documents read", "prompts, grades, results", "tokens", "batches, answers", "all but reading")
BATCH_SIZE = 64


class Clock:
    """Adds up the processor seconds of functions by name; those of one inside another of that name count once."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: set[str] = set()

    def watch(self, owner: Any, function: str, name: str) -> None:
        usual: Callable[..., Any] = getattr(owner, function)

        def timed(*arguments: Any, **options: Any) -> Any:
            if name in self._running:
                return usual(*arguments, **options)
            self._running.add(name)
            started = time.process_time()
            try:
                return usual(*arguments, **options)
            finally:
                self.seconds[name] += time.process_time() - started
                self._running.remove(name)

        setattr(owner, function, timed)


def measure(data: Path, name: str, limit: int) -> dict[str, float]:
    """ms per document of a task by part, in this process, which has measured no other: that changes what memory costs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.materials import MODEL
    from minitron import logits
    from minitron.evaluation import Task, continuations, evaluate_documents, harness
    from minitron.evaluation.scorer import Scorer
    from minitron.models import source_tokenizer

    torch.set_num_threads(1)
    tokenizer = source_tokenizer(MODEL)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=8192, tie_word_embeddings=True, **sizes)
    model = LlamaForCausalLM(config).eval()
    clock = Clock()
    for owner, function in (
        (model.model, "forward"),
        (model.lm_head, "forward"),
        (logits.Head, "logits"),
        (torch.Tensor, "gather"),
        (torch.Tensor, "argmax"),
        (torch, "argmax"),
        (torch.Tensor, "to"),  # of the logits, to float32
        (continuations, "logsumexp"),
    ):
        clock.watch(owner, function, "model")
    clock.watch(harness, "_prepared", "prepared")
    clock.watch(Scorer, "loglikelihood", "answered")
    clock.watch(Scorer, "_loglikelihood_tokens", "scored")
    clock.watch(Scorer, "generate_until", "written")
    for function in ("tok_encode", "tok_batch_encode", "tok_decode"):
        clock.watch(Scorer, function, "tokens")
    task = Task(name, str(data / name), limit=max(1, limit // SUBJECTS.get(name, 1)))
    evaluate_documents(model, tokenizer, [Task(name, task.data, limit=1)], batch_size=BATCH_SIZE)  # imports
    clock.seconds.clear()
    started = time.process_time()
    result = evaluate_documents(model, tokenizer, [task], batch_size=BATCH_SIZE)[name]
    whole, of = time.process_time() - started, clock.seconds
    answered = of["answered"] + of["written"]
    tokens = of["tokens"] if of["written"] else of["answered"] - of["scored"]
    seconds = (
        of["prepared"],
        whole - of["prepared"] - answered,
        tokens,
        answered - tokens - of["model"],
        whole - of["prepared"] - of["model"],
    )
    return {part: 1e3 * each / result.score.num_documents for part, each in zip(PARTS, seconds, strict=True)}


def measured(data: Path) -> list[str]:
    """The tasks whose documents are there."""
    return [name for name in TASKS if (data / name).exists()]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evaluation_host",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--before", type=Path, help="another checkout")
    parser.add_argument("--limit", type=int, default=1000, help="documents of each task")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--inner", metavar="TASK", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not measured(given.data):
        parser.error(f"--data {given.data}: it has no folder of {', '.join(TASKS)}")
    if given.inner:
        print(json.dumps(measure(given.data, given.inner, given.limit)))
        return
    from benchmarks.measure import machine, markdown, spread

    checkouts = ({"before": given.before.resolve()} if given.before else {}) | {"now": HERE}
    print(f"{machine()}; {given.rounds} rounds in turns\n")
    for task in measured(given.data):
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
        inner = ["--inner", task, "--data", str(given.data.resolve()), "--limit", str(given.limit)]
        for _ in range(given.rounds):
            for name, folder in checkouts.items():
                environment = os.environ | {"PYTHONPATH": str(folder), "RAYON_NUM_THREADS": "1"}
                command = [sys.executable, str(Path(__file__).resolve()), *inner]
                done = subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True)
                runs[name].append(json.loads(done.stdout.splitlines()[-1]))
        columns = [
            {"": name} | {part: spread([run[part] for run in of]) for part in PARTS} for name, of in runs.items()
        ]
        print("\n".join([*markdown(f"{task}, ms per document, median (lowest to highest)", ["", *PARTS], columns), ""]))


if __name__ == "__main__":
    main()
