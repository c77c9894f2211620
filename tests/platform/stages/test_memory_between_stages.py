"""What a stage or trial leaves on a GPU is given back to those who compute there next."""

from __future__ import annotations

import weakref

import torch

from minitron_platform import load_recipe, pipeline, run
from minitron_platform.workers import models
from minitron_search.memory import release_memory


class Cycle:
    """An object that only the garbage collector frees, as an exception with its frames."""

    def __init__(self):
        self.itself = self


def test_memory_on_a_gpu_is_given_back_with_what_reference_cycles_hold(monkeypatch):
    emptied, left = [], weakref.ref(Cycle())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(left() is None))
    release_memory()
    assert emptied == [True]  # after the collection, or the cycle's memory would not be free yet


def test_every_stage_gives_its_memory_back(bench, tmp_path, monkeypatch):
    released = []
    monkeypatch.setattr(pipeline, "release_memory", lambda: released.append(True))
    recipe = load_recipe(str(bench / "recipe.yaml"))
    run(recipe, storage_path=str(tmp_path), until="data")
    assert len(released) == 2  # after teacher and data


def test_evaluate_never_holds_three_models(copied, monkeypatch):
    alive, most, load = weakref.WeakSet(), [], models.load

    def loaded(*arguments):
        model = load(*arguments)
        alive.add(model)
        most.append(len(alive))
        return model

    monkeypatch.setattr(models, "load", loaded)
    recipe = load_recipe(str(copied / "recipe.yaml"), ["evaluate.tasks=[]", "evaluate.prompts=['The']"])
    run(recipe, storage_path=str(copied / "runs"), until="evaluate")
    assert len(most) == 6  # teacher, pruned and distilled student: their measurements, and their completions
    assert max(most) <= 2
