"""Why something in a worker failed, without Ray's own errors around it."""

from __future__ import annotations

import pytest
import ray
from ray.exceptions import RayError
from ray.train import ControllerError

from minitron_search.failures import reason


@ray.remote
def _imports():
    raise ModuleNotFoundError("No module named 'helper'")


def test_the_cause_of_an_error_of_ray_trains_controller_is_named_first(ray_here):
    with pytest.raises(RayError) as raised:
        ray.get(_imports.remote())
    said = reason(ControllerError(raised.value))
    assert said == "ModuleNotFoundError: No module named 'helper'"
