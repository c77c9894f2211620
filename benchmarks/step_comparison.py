"""Trainers that are measured one after the other or in turns, each in a process of its own."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.materials import Materials
from benchmarks.measure import kind_of_seconds, markdown, on_gpu
from benchmarks.settings import Settings, Wanted, settings_to_try
from benchmarks.step_results import About, Outcome, columns_of, step_flops_per_token
from benchmarks.trainers import CONTENDERS, OURS
from benchmarks.workers import EndedEarly, Worker
from minitron.architecture import Architecture

LARGEST_MICRO_BATCH = 1024
OUT_OF_MEMORY = "out of memory"


def tries_of(
    name: str, options: argparse.Namespace, teacher: Architecture, student: Architecture, gpu_bytes: int
) -> list[Settings]:
    """The settings to try for the trainer of this name."""
    wanted = Wanted(options.batch, options.micro_batch, options.recompute, options.optimizer, options.fp8)
    ours = CONTENDERS[name].package == "minitron"
    return settings_to_try(wanted, teacher, student, options.sequence, gpu_bytes, ours=ours, live=name != OURS)


class Comparison:
    """options: of the command line. folder: what the preparation has written. names: of the trainers."""

    def __init__(self, options: argparse.Namespace, folder: Path, about: About, names: list[str]) -> None:
        self.options, self.folder, self.about, self.names = options, folder, about, names
        self.teacher, self.student = Materials(folder).architectures()
        self.outcomes: dict[str, Outcome] = {}

    @property
    def failed(self) -> bool:
        """Whether a trainer ended early, for another reason than memory."""
        return any(outcome.failure not in ("", OUT_OF_MEMORY) for outcome in self.outcomes.values())

    def measure(self) -> None:
        """Measure all: on a GPU each in its turn with all its rounds, on a CPU in alternating rounds."""
        rounds = self.options.rounds
        if on_gpu():
            for name in self.names:
                worker = self._start(name)
                for number in range(rounds):
                    self._turn(name, number, worker)
                worker and worker.close()  # before the next one begins, which needs its memory
        else:
            workers = {name: self._start(name) for name in self.names}
            for number in range(rounds):
                for name, worker in workers.items():
                    self._turn(name, number, worker)
            for worker in workers.values():
                worker and worker.close()

    def table(self) -> list[str]:
        options = self.options
        flops = {name: step_flops_per_token(name, self.teacher, self.student, options.sequence) for name in self.names}
        tokens = options.batch * options.sequence * options.steps
        for name, outcome in self.outcomes.items():
            if outcome.shares:
                shares = ", ".join(f"{part} {share:.1f} %" for part, share in outcome.shares.items())
                print(f"{name}, last steps of the rounds: {shares}", flush=True)
        sizes = " -> ".join(f"{shape.num_parameters / 1e9:.2f}B" for shape in (self.teacher, self.student))
        title = (
            f"{options.shapes}, {sizes}, {self.teacher.num_layers} layers; {options.batch} rows of {options.sequence} tokens "
            f"a step{_compiled(options.compile)}{_own(options)}; {kind_of_seconds()}; "
            f"{options.rounds} rounds of {options.steps} {'after each other' if on_gpu() else 'in alternation'}, "
            "median (lowest to highest)"
        )
        return markdown(title, ["", *self.names], columns_of(self.outcomes, tokens, flops, self.about))

    def largest(self) -> list[str]:
        """The largest micro-batch of each with the settings that it was measured with, by doubling."""
        column = {"": "rows at a time"}
        for name in self.names:
            size, fits = 1, 0
            while size <= LARGEST_MICRO_BATCH:
                settings = replace(self.outcomes[name].settings, micro_batch_rows=size)
                try:
                    worker = self._worker(name, settings, batch=size)
                except EndedEarly as ended:
                    if not ended.out_of_memory:
                        raise
                    break
                worker.close()
                size, fits = 2 * size, size
            column[name] = str(fits)
        title = f"Largest power of two of rows of {self.options.sequence} tokens that a step fits in memory"
        return markdown(title, ["", *self.names], [column])

    def _start(self, name: str) -> Worker | None:
        """Its process with the first settings that do not run out of memory, warmed up; None if there are none."""
        for settings in tries_of(name, self.options, self.teacher, self.student, self.about.gpu_bytes):
            self.outcomes[name] = Outcome(settings)
            _say(f"{name}: {settings}")
            try:
                return self._worker(name, settings, batch=self.options.batch)
            except EndedEarly as ended:
                self._failed(name, ended)
                if not ended.out_of_memory:
                    break
        return None

    def _turn(self, name: str, number: int, worker: Worker | None) -> None:
        outcome = self.outcomes[name]
        if worker is None or outcome.failure:
            return
        try:
            answer = worker.turn()
        except EndedEarly as ended:
            self._failed(name, ended)
            return
        outcome.answers.append(answer)
        tokens = self.options.batch * self.options.sequence * self.options.steps
        _say(f"round {number + 1}, {name}: {tokens / answer['seconds']:,.0f} tokens/s")

    def _failed(self, name: str, ended: EndedEarly) -> None:
        self.outcomes[name].failure = OUT_OF_MEMORY if ended.out_of_memory else "failed"
        _say(f"{name}: {ended}")

    def _worker(self, name: str, settings: Settings, *, batch: int) -> Worker:
        options = self.options
        given = {"materials": self.folder, "contender": name, "batch": batch, "optimizer": settings.optimizer}
        given |= {"micro-batch": settings.micro_batch_rows, "recompute": settings.recompute, "shapes": options.shapes}
        given |= {"fp8": options.fp8, "warm-up": options.warm_up, "steps": options.steps, "rounds": options.rounds}
        ours = CONTENDERS[name].package == "minitron"
        flags = ["--compile"] * (options.compile == "all" or (options.compile == "minitron" and ours))
        flags += ["--cuda-graphs"] * (options.cuda_graphs and ours)
        return Worker([*command(**given), *flags], self.folder / f"{name.replace(' ', '-')}.log")


def command(**options: object) -> list[str]:
    """The command line of `benchmarks.whole_step` with these options."""
    parts = [sys.executable, "-m", "benchmarks.whole_step"]
    for key, value in options.items():
        parts += [f"--{key}", str(value)]
    return parts


def _compiled(what: str | None) -> str:
    return f", compiled{'' if what == 'all' else ' in minitron'}" if what else ""


def _own(options: argparse.Namespace) -> str:
    """What minitron has besides."""
    fp8 = "" if options.fp8 == "none" else f", FP8 {options.fp8} in minitron"
    return fp8 + (", CUDA graphs in minitron" if options.cuda_graphs else "")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
