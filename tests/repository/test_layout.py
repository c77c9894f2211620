"""The layout of the packages: public names, dependencies, and documentation of every recipe key."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import get_args

from pydantic import BaseModel

from minitron_platform.recipes.schema import HeldoutText, Recipe, Task, Training, WeightedText

ROOT = Path(__file__).resolve().parents[2]


def test_the_platform_folder_never_shadows_the_standard_library():
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert Path(platform.__file__).parent == Path(sysconfig.get_path("stdlib"))
    subprocess.run([sys.executable, "-c", "import uuid, ray"], cwd=ROOT, check=True)


def test_pytest_looks_into_every_folder_of_tests():
    """They are listed in pyproject.toml, those with the longest tests first."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["testpaths"]
    assert set(listed) == {
        f"tests/{path.relative_to(ROOT / 'tests').parts[0]}" for path in ROOT.glob("tests/**/test_*.py")
    }


def test_public_names_are_importable_from_the_top():
    from minitron import (  # noqa: F401
        Architecture,
        ImportanceScores,
        estimate_importance,
        evaluate,
        linear_kl_div,
        prune,
    )
    from minitron_platform import load_recipe, plan, promote, run, submit
    from minitron_search import candidates, search

    for function in (estimate_importance, evaluate, linear_kl_div, prune, candidates, search, load_recipe, plan, run):
        assert callable(function)
        assert function.__doc__
    assert callable(promote)
    assert callable(submit)


def test_the_method_works_where_ray_and_mlflow_are_not_installed():
    program = """
import sys
for name in ("ray", "mlflow", "click", "pydantic"):
    sys.modules[name] = None
from dataclasses import replace
from helpers import tiny
from minitron import estimate_importance, linear_kl_div, prune
model, rows = tiny.model(), tiny.rows()
student = prune(model, replace(tiny.architecture(model), num_layers=4), estimate_importance(model, rows))
from minitron.distill import DistillConfig, LiveTeacher, distill
from minitron.evaluation import heldout_metrics, teacher_targets

class AllRows:
    seq_length = 16
    def __len__(self): return len(rows)
    def take(self, indices): return rows[list(indices)]

config = DistillConfig(steps=2, batch_rows=2, peak_lr=1e-3, min_lr=1e-4, warmup_steps=1)
distill(student, LiveTeacher(model), AllRows(), config)
assert heldout_metrics(student, rows, **teacher_targets(model, rows)).kl > 0
"""
    paths = os.pathsep.join(map(str, [ROOT, ROOT / "tests"]))
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": paths}, check=True)


def test_every_key_of_a_recipe_is_documented():
    page = (ROOT / "docs" / "recipes.md").read_text()

    def keys(model, prefix=""):
        for name, field in model.model_fields.items():
            key = prefix + (field.alias or name)
            inner = next((a for a in (field.annotation, *get_args(field.annotation)) if isinstance(a, type)), None)
            if inner and issubclass(inner, BaseModel) and inner not in (Training, Task, HeldoutText, WeightedText):
                yield from keys(inner, f"{key}.")
            else:
                yield key

    found = set(keys(Recipe)) | {f"distill.{name}" for name in Training.model_fields}
    found |= {f"data.{name}" for name in HeldoutText.model_fields}
    assert WeightedText.model_fields.keys() - HeldoutText.model_fields.keys() == {"weight"}
    assert len(found) > 50
    assert [key for key in sorted(found) if f"`{key}`" not in page] == []
    assert [name for name in Task.model_fields if f"`{name}`" not in page] == []
