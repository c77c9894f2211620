"""What would make the host wait for a GPU in a training step, found on a CPU."""

from __future__ import annotations

import traceback
from collections import Counter

import pytest
import torch
from helpers.distilling import CHANNELS, INTERMEDIATE, distil, live_teacher, stored_teacher
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minitron.distill import DistillConfig, Losses

WITH_LABELS = Losses(cross_entropy=0.5)
# operations whose result's value or size the host reads
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive"}
INDEXING = {"index", "index_put", "index_put_"}  # with a mask


class HostWaits(TorchDispatchMode):
    """Counts operations that wait, by the line of this package that they come from."""

    def __init__(self):
        super().__init__()
        self.lines = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        name = function._schema.name.split("::")[1]
        masks = [leaf for leaf in tree_leaves(arguments[1:2]) if isinstance(leaf, torch.Tensor)]
        if name in WAITS or (name in INDEXING and any(mask.dtype == torch.bool for mask in masks)):
            own = [
                frame
                for frame in traceback.extract_stack()
                if "/minitron/" in frame.filename and "/tests/" not in frame.filename
            ]
            self.lines[f"{name} from {own[-1].filename}:{own[-1].lineno}"] += 1
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize(
    ("teacher", "options"),
    [
        (stored_teacher, {"losses": WITH_LABELS}),
        (live_teacher, {"losses": WITH_LABELS}),
        (live_teacher, {"losses": INTERMEDIATE, "channels": CHANNELS}),
    ],
    ids=["stored", "live", "layers"],
)
def test_no_micro_batch_makes_the_host_wait(material, teacher, options):
    waits = {}
    for micro_batch_rows in (1, 4):
        config = DistillConfig(steps=1, batch_rows=4, micro_batch_rows=micro_batch_rows, warmup_steps=0)
        with HostWaits() as mode:
            distil(material, config, teacher(material), **options)
        waits[micro_batch_rows] = mode.lines
    # one step has four micro-batches or one; what waits once a step, such as the norm of the gradient, is in both
    assert waits[1] == waits[4]
