"""The list of axes that can be pruned, and where it is shown."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from click.testing import CliRunner

from minitron.architecture import AXES, PRUNABLE, Architecture, axes_present, axes_that_differ
from minitron.architecture.architecture import FIXED

DENSE = Architecture(4, 64, 96, 8, 4, 16, 300, True, "llama")
MIXTURE = Architecture(4, 64, 96, 8, 4, 16, 300, True, "mixtral", num_experts=8, experts_per_token=2)


def test_every_field_is_either_prunable_or_fixed():
    assert {*PRUNABLE, *FIXED} == {field.name for field in fields(Architecture)}
    assert not set(PRUNABLE) & set(FIXED)


@pytest.mark.parametrize("axis", AXES, ids=lambda axis: axis.name)
def test_architectures_that_differ_on_one_axis_are_displayed_differently(axis):
    smaller = replace(MIXTURE, **{axis.name: getattr(MIXTURE, axis.name) // 2})
    assert str(smaller) != str(MIXTURE)
    assert smaller.label() != MIXTURE.label()
    assert axes_that_differ([MIXTURE, smaller]) == (axis,)
    assert smaller.label([axis]) != MIXTURE.label([axis])
    assert smaller.sizes != MIXTURE.sizes


def test_a_dense_model_shows_no_experts():
    assert "num_experts" not in DENSE.sizes
    assert DENSE.label() == "4L·64·96·8h·4kv"
    assert MIXTURE.label() == "4L·64·96·8h·4kv·8e"
    assert axes_present([DENSE]) == axes_that_differ([DENSE]) == AXES[:-1]
    assert axes_present([DENSE, MIXTURE]) == AXES


def test_prune_has_an_option_for_every_axis():
    from minitron_platform.cli.prune import prune

    options = [option for parameter in prune.params for option in parameter.opts]
    assert {f"--{name.replace('_', '-')}" for name in PRUNABLE} <= set(options)
    assert CliRunner().invoke(prune, ["--help"]).exit_code == 0
