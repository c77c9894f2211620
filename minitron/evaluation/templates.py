"""Templates of task definitions, which lm-eval fills in with Jinja: here in Jinja's sandbox.

Without it a template in a YAML file reaches every Python object, and runs code although the file names no function.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jinja2 import BaseLoader, StrictUndefined, Template
from jinja2.sandbox import SandboxedEnvironment

from minitron.replaced import replaced

KEPT = 1000  # compiled templates


class _Templates(SandboxedEnvironment):
    """Compiles each template once; lm-eval asks for it again for every document."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._compiled: dict[str, Template] = {}

    def from_string(self, source: Any, globals: Any = None, template_class: Any = None) -> Template:
        if globals is not None or template_class is not None or not isinstance(source, str):
            return super().from_string(source, globals, template_class)
        if source not in self._compiled:
            if len(self._compiled) >= KEPT:
                self._compiled.clear()
            self._compiled[source] = super().from_string(source)
        return self._compiled[source]


class NullError(ValueError):
    """A null of a document would be written into a question, as the text "None"."""


def _not_null(value: Any) -> Any:
    if value is None:
        raise NullError
    return value


@contextmanager
def sandboxed_templates(*, refuse_null: bool = False) -> Iterator[None]:
    """Inside the context lm-eval's templates reach the fields of a document and their public methods, and nothing else.

    refuse_null: whether NullError is raised where a template writes None."""
    import lm_eval.utils  # takes a second, which a run with nothing to do does not need

    sandbox = _Templates(
        loader=BaseLoader(),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        finalize=_not_null if refuse_null else None,
    )
    sandbox.filters.update(lm_eval.utils.env.filters)
    with replaced(lm_eval.utils, env=sandbox):
        yield
