"""Templates of task definitions, which lm-eval fills in with Jinja: here in Jinja's sandbox.

Without it a template in a YAML file reaches every Python object, and runs code although the file names no function.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from jinja2 import BaseLoader, StrictUndefined
from jinja2.sandbox import SandboxedEnvironment


@contextmanager
def sandboxed_templates() -> Iterator[None]:
    """Inside the context lm-eval's templates reach the fields of a document and their public methods, and nothing else."""
    import lm_eval.utils  # takes a second, which a run with nothing to do does not need

    usual = lm_eval.utils.env
    sandbox = SandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters.update(usual.filters)
    lm_eval.utils.env = sandbox
    try:
        yield
    finally:
        lm_eval.utils.env = usual
