"""Imports have no side effects on the process, and a process imports no large library that its work does not need."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers.command import ROOT, environment

IMPORTED_AGAIN = """
import importlib, os, pkgutil, sys, warnings
PACKAGES = ("minitron", "minitron_search", "minitron_platform")

def import_all():
    for name in PACKAGES:
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(package.__path__, f"{name}."):
            if not module.name.endswith(".__main__"):
                importlib.import_module(module.name)

before = dict(os.environ)
import_all()  # imports the libraries too, which do have side effects
for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
    del sys.modules[name]
os.environ.clear()
os.environ.update(before)
filters = list(warnings.filters)
import_all()
assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())
assert warnings.filters == filters, set(warnings.filters) ^ set(filters)
print("nothing changed in", sum(name.partition(".")[0] in PACKAGES for name in sys.modules), "modules")
"""


def test_imports_change_neither_the_environment_nor_the_warning_filters():
    code = [sys.executable, "-c", IMPORTED_AGAIN]
    done = subprocess.run(code, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert "nothing changed in" in done.stdout, done.stderr[-2000:]


# Each takes 0.1 to 2 s of CPU, of which a run starts ten processes.
TORCH = {"torch", "transformers"}
OTHERS = {
    "mlflow",
    "lm_eval",
    "datasets",
    "matplotlib",
    "sklearn",
    "optuna",
    "peft",
    "sqlalchemy",
    "ray.rllib",
    "scipy.stats",
}
FOR_OTHER_MODELS = {"scipy", "torchao"}
LARGE = {"ray", "numpy", "pandas", "pyarrow", "requests", *TORCH, *OTHERS}
STARTS = {
    "a command": ("import minitron_platform.cli.commands", LARGE),
    "the help": (
        "from click.testing import CliRunner; from minitron_platform.cli.commands import main; "
        "assert not CliRunner().invoke(main, ['--help']).exit_code",
        LARGE,
    ),
    "a command for jobs": (
        "from click.testing import CliRunner; from minitron_platform.cli.commands import main; "
        "CliRunner().invoke(main, ['status', '--address', 'http://127.0.0.1:9'])",
        LARGE - {"ray", "requests", "numpy"},
    ),
    "what a trial's worker reads first": ("import minitron_search.running_tune", TORCH | OTHERS),
    "what Ray Train's controller reads": (
        "import minitron_search.torch_trainer, minitron_search.elastic, minitron_platform.workers.policies",
        TORCH | OTHERS,
    ),
    "the actor of calls": (
        "import minitron_platform.workers.calls",
        {"ray.train", "ray.tune", "ray.data", "pandas", *TORCH, *OTHERS},
    ),
    "what a plan reads of a benchmark": (
        "import json, pathlib, tempfile; from minitron.evaluation import Task, check_requirements; "
        "folder = tempfile.TemporaryDirectory(); file = pathlib.Path(folder.name, 'test.jsonl'); "
        "choices = {'text': ['a', 'b'], 'label': ['A', 'B']}; "
        "file.write_text(json.dumps({'question': 'a', 'choices': choices, 'answerKey': 'A'})); "
        "check_requirements(Task('arc_easy', folder.name))",
        {"evaluate", "peft", "lm_eval.models.huggingface", "transformers.pipelines", "mlflow", "ray"},
    ),
    "a worker that trains": (
        "from minitron_search.worker_imports import import_libraries; import_libraries(); "
        "import minitron_search.trial, minitron_platform.training.train",
        OTHERS | FOR_OTHER_MODELS,
    ),
}


@pytest.mark.parametrize("process", STARTS)
def test_a_process_starts_without_the_libraries_that_it_does_not_need(process):
    imports, unwanted = STARTS[process]
    code = f"import sys; {imports}; print(sorted(sys.modules.keys() & {sorted(unwanted)}))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


CALLED_LATER = """
import numpy, sys, torch
from minitron.model_imports import DEFERRED, import_models
import_models()
assert not sys.modules.keys() & DEFERRED.keys()
from transformers.loss import loss_for_object_detection
print([each.tolist() for each in loss_for_object_detection.linear_sum_assignment(numpy.array([[4, 1], [2, 3]]))])
from scipy.optimize import brentq
print(brentq(lambda x: x - 2, 0, 5))
from transformers.quantizers import quantizer_torchao
print(quantizer_torchao.flatten_tensor_state_dict({"a": torch.ones(1)})[0])
"""


def test_libraries_that_wait_for_the_models_that_use_them_are_called_as_if_they_had_been_imported():
    done = subprocess.run(
        [sys.executable, "-c", CALLED_LATER], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines() == ["[[0, 1], [1, 0]]", "2.0", "{'a': tensor([1.])}"], done.stderr
