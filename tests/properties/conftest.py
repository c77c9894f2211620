"""The settings of the properties, and the folder that they may write to."""

from __future__ import annotations

import os
import resource
import sys

import pytest
from helpers.examples import EVERY
from hypothesis import settings

GIGABYTE = 2**30

settings.register_profile("minitron", EVERY)
settings.load_profile("minitron")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The only folder that the property may write to; the working folder stays empty and memory bounded."""
    folder = tmp_path_factory.mktemp("property")
    outside = tmp_path_factory.mktemp("outside")
    before = _peak_bytes()
    here = os.getcwd()
    os.chdir(outside)
    try:
        yield folder
    finally:
        os.chdir(here)
    assert not list(outside.iterdir())
    assert _peak_bytes() < before + GIGABYTE


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
