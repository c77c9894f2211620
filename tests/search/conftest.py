"""Fixtures of the search's tests."""

from __future__ import annotations

import pytest
from helpers import searching


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Inputs of a distillation from a trained teacher, what students are cut from, and six candidates."""
    return searching.make_inputs(tmp_path_factory.mktemp("search"))
