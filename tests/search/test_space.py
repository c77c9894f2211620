"""The space of a search: ranges, limits on inference cost, points, and the time that enumeration takes."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import yaml

from minitron import Architecture
from minitron.errors import InputError
from minitron_platform.recipes.candidates import CandidateSpace
from minitron_platform.recipes.load import load_recipe
from minitron_search import candidates
from minitron_search.limits import Limits
from minitron_search.space import points_in

BASE = Architecture(32, 4096, 14336, 32, 8, 128, 128_256, False)
SPACE = {"num_layers": [16, 24, 32], "hidden_size": [2048, 3072, 4096], "num_kv_heads": [4, 8]}


def _recipe(bench, **member):
    values = yaml.safe_load((bench / "recipe.yaml").read_text())
    values["family"][0] |= member
    (bench / "space.yaml").write_text(yaml.safe_dump(values))
    return load_recipe(str(bench / "space.yaml"))


TEACHER = Architecture(5, 48, 96, 6, 2, 24, 300, True)


def test_a_range_in_a_recipe_is_the_list_of_its_values(bench):
    space = {"num_layers": {"from": 2, "to": 5, "step": 1}, "mlp_ratio": {"from": 1, "to": 2, "step": 0.1}}
    recipe = _recipe(bench, space=space)
    assert recipe.family[0].space["num_layers"] == [2, 3, 4, 5]
    assert recipe.family[0].space["mlp_ratio"] == pytest.approx([1 + 0.1 * i for i in range(11)])
    listed = _recipe(bench, space={axis: list(values) for axis, values in recipe.family[0].space.items()})
    assert listed == recipe


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"from": 2, "to": 5}, "from, to and step"),
        ({"from": 5, "to": 2, "step": 1}, "must go up"),
        ({"from": 2, "to": 5, "step": 0}, "must go up"),
        ({"from": 1, "to": 9e9, "step": 1}, "at most"),
        ({"from": "a", "to": 5, "step": 1}, "must be finite numbers"),
    ],
)
def test_an_invalid_range_is_refused_and_its_key_named(bench, given, said):
    with pytest.raises(InputError, match=f"family.0.space.num_layers: .*{said}"):
        _recipe(bench, space={"num_layers": given})


@pytest.mark.parametrize("name", ["flops_per_token", "kv_cache_bytes", "memory_bytes"])
def test_a_limit_leaves_out_exactly_what_exceeds_it(name):
    free = candidates(BASE, SPACE, 0, 1e12)
    measured = {
        "flops_per_token": lambda a: a.flops_per_token(8192),
        "kv_cache_bytes": lambda a: 2 * 2 * a.num_layers * a.num_kv_heads * a.head_dim * 8192 * 16,
        "memory_bytes": lambda a: 2 * a.num_parameters + 2 * 2 * a.num_layers * a.num_kv_heads * a.head_dim * 8192 * 16,
    }[name]
    limit = sorted(measured(a) for a in free)[len(free) // 2]
    kept = candidates(BASE, SPACE, 0, 1e12, limits=Limits(context=8192, batch=16, **{name: limit}))
    assert kept == [a for a in free if measured(a) <= limit]
    assert 0 < len(kept) < len(free)


def test_limits_that_every_candidate_exceeds_are_refused_with_the_least_that_is_needed(bench):
    recipe = _recipe(bench, limits={"kv_cache_bytes": 1000, "flops_per_token": 1e12})
    least = 2 * 2 * 3 * 2 * 24 * recipe.data.seq_length
    with pytest.raises(InputError, match=rf"family.0.limits: none of .*: kv_cache_bytes is at least {least:,} \(limit"):
        _ = CandidateSpace(recipe, recipe.family[0], TEACHER).candidates


def test_points_come_first_and_may_be_outside_the_grid(bench):
    point = {"num_layers": 3, "hidden_size": 42, "intermediate_size": 60}
    recipe = _recipe(bench, points=[point])
    found = CandidateSpace(recipe, recipe.family[0], TEACHER).candidates
    assert found[0] == replace(TEACHER, **point)
    without = _recipe(bench)
    assert found[1:] == CandidateSpace(without, without.family[0], TEACHER).candidates


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"num_layers": 40}, r"points.0: num_layers: 40 is larger than the model's 32"),
        ({"num_layers": 2}, r"points.0: 2L .* parameters, not 4,000,000,000 to 5,000,000,000"),
        ({"layers": 2}, "points.0.layers: there is no such axis"),
        ({"num_layers": 16}, r"points.0: .*memory_bytes is .* \(limit 9,000,000,000\)"),
    ],
)
def test_an_invalid_point_is_refused_or_skipped(shape, said):
    limits = Limits(context=8192, memory_bytes=9e9)
    with pytest.raises(InputError, match=said):
        points_in(BASE, [shape], 4e9, 5e9, limits=limits)
    if "layers" not in shape:
        assert points_in(BASE, [shape], 4e9, 5e9, limits=limits, skip=True) == []


def test_thousands_of_combinations_are_enumerated_in_a_second():
    space = {
        "num_layers": range(17, 33),
        "num_heads": [16, 24, 32],
        "hidden_size": range(2048, 4097, 256),
        "intermediate_size": range(4096, 14337, 512),
    }  # 9,072
    started = time.process_time()
    found = candidates(BASE, space, 3.9e9, 4.1e9, limits=Limits(context=8192, kv_cache_bytes=1e9))
    assert time.process_time() - started < 1
    assert len(found) > 100
