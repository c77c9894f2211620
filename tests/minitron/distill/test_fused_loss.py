"""The fused logit loss compared with float64, on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers.command import ROOT, environment
from helpers.fused_cases import CASES


def _in_a_process(module, **variables):
    """Run a helper in a process of its own, because Triton decides once whether to interpret; returns its JSON output."""
    env = {**environment(), **variables}
    env["PYTHONPATH"] += os.pathsep + str(ROOT / "tests")
    done = subprocess.run([sys.executable, "-m", module], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def errors():
    """The errors of every case, by name."""
    return _in_a_process("helpers.fused_cases", **({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}))


@pytest.mark.parametrize("case", CASES)
def test_the_fused_loss_and_its_gradients_equal_float64(case, errors):
    found, most = errors[case], 5e-5
    if CASES[case].close:  # most divergences are then differences of logarithms that are smaller than rounding errors
        found, most = {name: found[name] for name in ("hidden_grad", "head_grad")}, 1e-2
    assert {name: error for name, error in found.items() if not error < most} == {}


def test_the_kernel_of_every_divergence_compiles_for_an_h100(tmp_path):
    # the interpreter accepts code that the compiler refuses, such as a variable that changes its shape in a loop
    sizes = _in_a_process("helpers.fused_compiled", TRITON_CACHE_DIR=str(tmp_path))
    assert set(sizes) == {"forward_kl", "reverse_kl", "jensen_shannon", "mse", "cosine", "top_k", "none"}
    assert all(sizes.values())
