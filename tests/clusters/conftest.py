"""Fixtures of the tests on clusters."""

from __future__ import annotations

import pytest
from helpers import searching


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Distillation inputs with a trained teacher, the source that students are pruned from, and six candidates."""
    return searching.make_inputs(tmp_path_factory.mktemp("search"))
