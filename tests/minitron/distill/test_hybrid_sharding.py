"""A student that is split inside a node, with a copy in every node, is trained as by one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.distilling import CHANNELS, CONFIG, INTERMEDIATE, live_teacher, pruned_student
from safetensors.torch import load_file

from minitron.data import Rows
from minitron.distill import distill

PROCESSES, NODE = 4, 2
# 11 rows for 4 processes: three micro-batches, in the last of which one process has no row
CONFIG = replace(CONFIG, steps=4, batch_rows=11, micro_batch_rows=1, shard=True)

WORKER = """
import json, os, sys
sys.path[:0] = json.loads(sys.argv[1])
from collections import Counter
from dataclasses import replace
from pathlib import Path
import torch, torch.distributed as dist
from safetensors.torch import save_file
import test_hybrid_sharding as t
from helpers.counting import Counting
from helpers.forking import fork
from minitron.distill import sharding
sent = Counter()
def sums(rows):
    sent.clear()
    with Counting(sent):
        t.train(folder, replace(t.CONFIG, steps=1, batch_rows=rows))
    return sent["c10d.allreduce_.default"]
folder, out = Path(sys.argv[2]), Path(sys.argv[3])
rank = fork(t.PROCESSES)
os.environ.update(LOCAL_RANK=str(rank % t.NODE), LOCAL_WORLD_SIZE=str(t.NODE))
dist.init_process_group("gloo", rank=rank, world_size=t.PROCESSES)
sharding._gpu_bytes = lambda device: 80_000_000_000
shape = sharding.mesh_shape(torch.device("cpu"), 0)
steps, student = t.train(folder)
save_file(dict(student.named_parameters()), out / f"{rank}.safetensors")
counts = [sums(rows) for rows in (t.PROCESSES, 3 * t.PROCESSES)]
(out / f"{rank}.json").write_text(json.dumps([shape, steps, counts]))
dist.destroy_process_group()
"""


def train(folder, config=CONFIG):
    """The loss and the norm of the gradient in every step, and the student."""
    steps = []
    student = distill(
        pruned_student(folder),
        live_teacher(folder),
        Rows.open(str(folder / "rows"), "train"),
        config,
        losses=INTERMEDIATE,
        channels=CHANNELS,
        report=lambda step: steps.append((step.loss, step.grad_norm)),
    )
    return steps, student


@pytest.mark.long  # half a minute
def test_four_processes_on_two_nodes_train_as_one_process(material, tmp_path, free_port):
    alone, student = train(material)
    paths = json.dumps([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", WORKER, paths, str(material), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    for rank in range(PROCESSES):
        shape, steps, sums = json.loads((tmp_path / f"{rank}.json").read_text())
        assert shape == [PROCESSES // NODE, NODE]
        for one, several in zip(alone, steps, strict=True):
            assert several == pytest.approx(one, rel=1e-5)
        weights = load_file(tmp_path / f"{rank}.safetensors")
        for name, parameter in student.named_parameters():
            assert torch.allclose(weights[name], parameter, atol=1e-4), name
        # the nodes' gradients are summed once in a step, whatever the number of micro-batches
        assert sums[0] == sums[1] > 0
