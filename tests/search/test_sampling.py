"""The sampler of a search: its proposals are reproducible, within the limits, and better than random draws."""

from __future__ import annotations

import math
import statistics

import pytest
import yaml

from minitron import Architecture
from minitron.errors import InputError
from minitron_platform import plan
from minitron_platform.recipes.candidates import CandidateSpace
from minitron_platform.recipes.load import load_recipe
from minitron_search import candidates
from minitron_search.limits import Limits
from minitron_search.sampling import Space, draw, round_size, sample

BASE = Architecture(32, 4096, 14336, 32, 8, 128, 128_256, False)
AXES = {
    "num_layers": range(12, 33),
    "hidden_size": range(1536, 4097, 128),
    "intermediate_size": range(3072, 14337, 256),
    "num_heads": [16, 24, 32],
    "num_kv_heads": [4, 8],
}
LOW, HIGH = 3.9e9, 4.1e9
LIMITS = Limits(context=8192, kv_cache_bytes=0.9e9)
SPACE = Space(BASE, AXES, LOW, HIGH, LIMITS)
COUNT = 30


def _loss(architecture):
    """A made-up loss in which layers matter most and heads least; within the budget one axis is traded for another."""
    weights = {"num_layers": 3.0, "hidden_size": 2.0, "intermediate_size": 0.7, "num_heads": 0.4, "num_kv_heads": 0.1}
    return sum(w * (1 - getattr(architecture, axis) / getattr(BASE, axis)) ** 2 for axis, w in weights.items())


def _losses(proposed):
    return {architecture: _loss(architecture) for architecture in proposed}


def test_the_sampler_finds_better_candidates_than_the_same_number_of_random_draws():
    space = Space(BASE, AXES, LOW, HIGH)
    runs = [(sample(_losses, space, 50, seed=seed), draw(space, 50, seed)) for seed in range(4)]
    sampled, drawn = ([min(map(_loss, found)) for found in side] for side in zip(*runs, strict=True))
    assert all(len(found) == 50 for pair in runs for found in pair)
    assert statistics.fmean(sampled) < statistics.fmean(drawn)
    assert sum(a < b for a, b in zip(sampled, drawn, strict=True)) >= 3
    # not by luck: later proposals are better than the first
    for found, _ in runs:
        first, last = found[: round_size(50)], found[-20:]
        assert statistics.fmean(map(_loss, last)) < 0.9 * statistics.fmean(map(_loss, first))


def test_points_are_scored_first_and_then_new_candidates_of_the_space():
    calls = []
    points = candidates(BASE, {"num_layers": [32], "hidden_size": [2560], "intermediate_size": [9000]}, 0, 1e12)

    def score(proposed):
        calls.append(list(proposed))
        return _losses(proposed)

    found = sample(score, SPACE, COUNT, points=points)
    assert calls[0][:1] == points == found[:1]
    assert found == [a for call in calls for a in call]
    assert len(set(found)) == len(found) == COUNT
    for architecture in found[1:]:
        assert LOW <= architecture.num_parameters <= HIGH
        assert not LIMITS.exceeded(architecture)
        assert all(getattr(architecture, axis) in values for axis, values in AXES.items())
    assert found[1 : 1 + round_size(COUNT)] == draw(SPACE, round_size(COUNT), 0)


def test_a_sample_is_the_same_for_the_same_seed_and_after_a_kill():
    whole = sample(_losses, SPACE, COUNT, seed=3)
    stored, computed = {}, []

    def score(proposed):
        for architecture in proposed:
            if architecture not in stored:
                if len(computed) == 23:
                    computed.append(None)
                    raise KeyboardInterrupt
                stored[architecture] = _loss(architecture)
                computed.append(architecture)
        return {architecture: stored[architecture] for architecture in proposed}

    with pytest.raises(KeyboardInterrupt):
        sample(score, SPACE, COUNT, seed=3)
    assert sample(score, SPACE, COUNT, seed=3) == whole
    assert [a for a in computed if a] == whole
    assert sample(_losses, SPACE, COUNT, seed=4) != whole


def test_failed_candidates_are_counted_and_omitted_ones_are_not():
    failed, left_out = [], []

    def score(proposed):
        scores = _losses(proposed)
        failed.extend(proposed[:1])
        left_out.extend(proposed[1:2])
        return {a: math.nan if a in failed else scores[a] for a in proposed if a not in left_out}

    found = sample(score, SPACE, COUNT)
    assert len(found) == COUNT
    assert set(failed) <= set(found)
    assert not set(left_out) & set(found)
    proposed = []
    assert sample(lambda some: proposed.extend(some) or {}, SPACE, COUNT) == []
    assert len(proposed) == len(set(proposed)) == 10 * COUNT


def test_sampling_a_small_space_returns_all_its_candidates():
    axes = {"num_layers": [29, 30, 31, 32], "intermediate_size": [7168, 8192, 9216]}
    everything = candidates(BASE, axes, 5.2e9, 6e9)
    assert 1 < len(everything) < 12
    assert set(sample(_losses, Space(BASE, axes, 5.2e9, 6e9), COUNT)) == set(everything)


LARGE = {
    "num_layers": [3, 4, 5],
    "hidden_size": [36, 42, 48],
    "mlp_ratio": {"from": 0.5, "to": 2, "step": 0.001},
    "num_heads": [2, 4, 6],
    "num_kv_heads": [1, 2],
}
TEACHER = Architecture(5, 48, 96, 6, 2, 24, 300, True)


def _recipe(bench, search=None, **member):
    values = yaml.safe_load((bench / "recipe.yaml").read_text())
    values["family"][0] |= member
    values["search"] |= search or {}
    (bench / "sampled.yaml").write_text(yaml.safe_dump(values))
    return load_recipe(str(bench / "sampled.yaml"))


def test_a_space_that_is_too_large_to_enumerate_needs_a_sampler(bench):
    with pytest.raises(InputError, match=r"family.0.space: 81,054 combinations .*50,000.*\n.*search.sampler"):
        plan(_recipe(bench, space=LARGE), storage_path=str(bench / "planned"))
    sampler = {"sampler": {"candidates": 25}, "forward": {"keep": 4}}
    made = plan(_recipe(bench, sampler, space=LARGE), storage_path=str(bench / "planned"))
    assert len(made.candidates["tiny-student"]) == 25
    assert made.sampled == {"tiny-student"}
    (cost,) = [cost for cost in made.costs if cost.stage == "search"]
    assert "25 candidates scored of 81,054 combinations, 4 distilled" in cost.estimate.what


def test_a_space_that_the_sampler_would_score_completely_is_enumerated(bench):
    recipe = _recipe(bench, {"sampler": {"candidates": 500}, "forward": {"keep": 4}})
    assert CandidateSpace(recipe, recipe.family[0], TEACHER).sampled is None
    plain = _recipe(bench)
    whole = CandidateSpace(plain, plain.family[0], TEACHER).candidates
    assert CandidateSpace(recipe, recipe.family[0], TEACHER).candidates == whole


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({"sampler": {"candidates": 5}}, "search.sampler: needs search.forward"),
        (
            {"sampler": {"candidates": 5}, "forward": {"keep": 6}},
            "search.forward.keep: 6 is more than search.sampler.candidates = 5",
        ),
        ({"evaluate": {"tasks": [{"name": "arc_eazy"}]}}, "lm-eval has no such task"),
    ],
)
def test_contradicting_search_settings_are_refused(bench, search, said):
    with pytest.raises(InputError, match=said):
        plan(_recipe(bench, search), storage_path=str(bench / "planned"))


def test_a_budget_that_no_sample_meets_is_refused(bench):
    search = {"sampler": {"candidates": 5}, "forward": {"keep": 2}}
    recipe = _recipe(bench, search, space=LARGE, limits={"kv_cache_bytes": 1})
    with pytest.raises(
        InputError, match=r"none of 100,000 combinations, drawn at random from 81,054, has .*within the limits"
    ):
        _ = CandidateSpace(recipe, recipe.family[0], TEACHER).candidates
