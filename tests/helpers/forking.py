"""Several processes from one, so that what takes seconds to import is imported once."""

from __future__ import annotations

import os
import sys
from importlib import import_module

from minitron_search.worker_imports import import_libraries

# what else a training with a model of `tiny` imports when it needs it
LATER = (
    "torch._dynamo",
    "torch.distributed.checkpoint.hf_storage",
    "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama",
)


def import_before_fork() -> None:
    """Import what the processes would each import."""
    import_libraries()
    for name in LATER:
        import_module(name)


def fork_two() -> int:
    """Fork this process twice; returns 0 in one of the two and 1 in the other. This one waits for both and ends as they do."""
    return fork(2)


def fork(count: int) -> int:
    """The same for `count` processes, which get 0 to count - 1."""
    import_before_fork()
    children = []
    for rank in range(count):
        child = os.fork()
        if not child:
            return rank
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(f"the exit codes of the processes are {codes}" if any(codes) else 0)
