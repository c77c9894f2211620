"""Why something in a worker failed, without Ray's own errors around it."""

from __future__ import annotations

import importlib

import pytest
import ray
import torch.distributed as dist
from ray.exceptions import RayError
from ray.train import ControllerError

from minitron_search.failures import first_cause, not_retryable, reason


@ray.remote
def _imports():
    raise ModuleNotFoundError("No module named 'helper'")


def test_the_cause_of_an_error_of_ray_trains_controller_is_named_first(ray_here):
    with pytest.raises(RayError) as raised:
        ray.get(_imports.remote())
    said = reason(ControllerError(raised.value))
    assert (
        said == "a worker's node lacks the Python package helper; install the same packages on all nodes of the cluster"
    )


class _NeedsMore:
    """Its reader needs a package that is nowhere."""

    def __reduce__(self):
        return importlib.import_module, ("absent.part",)


@ray.remote
def _takes(value):
    return value


def test_a_worker_that_lacks_a_package_to_read_what_it_is_sent_fails_for_good(ray_here):
    """A group of workers would start again as often as it may, for minutes."""
    with pytest.raises(RayError) as raised:
        ray.get(_takes.remote(_NeedsMore()))
    ranks, found = first_cause({0: raised.value})
    assert ranks == [0]
    assert isinstance(found, not_retryable())
    assert "lacks the Python package absent" in found.problem


@pytest.mark.parametrize("of_the_group", [RuntimeError, dist.DistBackendError, dist.DistNetworkError])
def test_collectives_that_end_because_another_process_failed_are_not_the_cause(of_the_group):
    """Gloo raises RuntimeError, NCCL its subclasses."""
    ranks, found = first_cause({0: of_the_group("aborted"), 1: KeyError("rows"), 2: of_the_group("aborted")})
    assert (ranks, type(found)) == ([1], KeyError)
