"""Target architectures: published ones, the nearest to a number of parameters, and notes on the hardware."""

from __future__ import annotations

from dataclasses import replace

import pytest

from minitron.architecture import Architecture
from minitron.architecture.hardware import hardware_notes
from minitron.architecture.published import PUBLISHED, published
from minitron.architecture.sizing import architecture_for
from minitron.errors import InputError
from minitron.pruning.iterative import shapes_between

LLAMA = Architecture(32, 4096, 14336, 32, 8, 128, 128_256, False)
NEMO = Architecture(40, 5120, 14336, 32, 8, 128, 131_072, False, "mistral")
NEMOTRON = Architecture(32, 6144, 24576, 48, 8, 128, 256_000, False, "nemotron")
PHI = Architecture(32, 3072, 8192, 32, 32, 96, 32_064, False, "phi3", flags=("longrope",))
SMOL = Architecture(30, 576, 1536, 9, 3, 64, 49_152, True)


@pytest.mark.parametrize(
    ("name", "base", "parameters"),
    [  # published as 4.5B, 4.5B, 8.4B, 8.3B, 4.2B
        ("llama-3.1-minitron-4b-width", LLAMA, 4_512_746_496),
        ("llama-3.1-minitron-4b-depth", LLAMA, 4_540_469_248),
        ("mn-minitron-8b", NEMO, 8_414_105_600),
        ("minitron-8b", NEMOTRON, 8_271_699_968),
        ("minitron-4b", NEMOTRON, 4_190_509_056),
        ("minitron-4b", replace(NEMOTRON, hidden_size=4096, intermediate_size=16384), 4_190_509_056),
    ],
)
def test_published_models_have_their_published_size(name, base, parameters):
    assert published(name, base).num_parameters == parameters


def test_a_published_architecture_needs_its_own_base_model():
    with pytest.raises(InputError, match=r"vocab_size \(32000 instead of 128256\)"):
        published("llama-3.1-minitron-4b-width", replace(LLAMA, vocab_size=32_000))
    with pytest.raises(InputError, match=r"Mistral NeMo 12B in family .*llama instead of mistral"):
        published("mn-minitron-8b", LLAMA)
    with pytest.raises(InputError) as caught:
        published("minitron-8B", LLAMA)
    assert "did you mean minitron-8b?" in caught.value.remedy
    assert all(name in caught.value.remedy for name in PUBLISHED)


@pytest.mark.parametrize("how", ["width", "depth", "both"])
@pytest.mark.parametrize(("base", "parameters"), [(LLAMA, 4.5e9), (LLAMA, 6.2e9), (NEMO, 8.4e9), (NEMOTRON, 8e9)])
def test_a_shape_is_near_the_number_of_parameters_in_hardware_multiples(base, parameters, how):
    shape = architecture_for(base, int(parameters), how=how)
    shape.check_inside(base)
    assert abs(shape.num_parameters / parameters - 1) < (0.03 if how == "depth" else 0.02)
    assert shape.hidden_size % 64 == shape.intermediate_size % 64 == 0
    assert (shape.num_heads, shape.num_kv_heads) == (base.num_heads, base.num_kv_heads)
    assert (shape.num_layers == base.num_layers) is (how == "width")
    assert (shape.hidden_size == base.hidden_size) is (how == "depth")
    # hidden size and MLP shrink by the same share, up to one multiple
    assert abs(shape.intermediate_size - base.intermediate_size * shape.hidden_size / base.hidden_size) < 64
    if how == "both":
        assert abs(shape.num_layers - base.num_layers * shape.hidden_size / base.hidden_size) < 1


def test_no_other_multiple_is_nearer():
    chosen = architecture_for(LLAMA, 5_000_000_000)
    for hidden in range(64, 4097, 64):
        other = replace(LLAMA, hidden_size=hidden, intermediate_size=round(3.5 * hidden / 64) * 64)
        assert abs(chosen.num_parameters - 5e9) <= abs(other.num_parameters - 5e9)


def test_a_hidden_size_that_must_be_a_multiple_of_nine_heads_is_found():
    for parameters in (80_000_000, 92_000_000, 100_000_000):
        shape = architecture_for(SMOL, parameters)
        assert shape.hidden_size % 72 == 0  # 9 heads and tensor cores
        assert shape.hidden_size < 576
        assert shape.intermediate_size % 64 == 0
        assert abs(shape.num_parameters / parameters - 1) < 0.05
        ratio = shape.intermediate_size / shape.hidden_size
        assert 0.75 < ratio / (1536 / 576) < 1.25
    free = replace(SMOL, family="mistral")  # without this rule
    assert architecture_for(free, 100_000_000).hidden_size % 32 == 0


def test_a_hidden_size_that_longrope_fixes_is_kept():
    for how in ("width", "both"):
        shape = architecture_for(PHI, int(PHI.num_parameters * 0.9), how=how)
        shape.check_inside(PHI)
        assert shape.hidden_size == 3072
        assert abs(shape.num_parameters / PHI.num_parameters - 0.9) < 0.05
    with pytest.raises(InputError, match="cannot be reached by width") as caught:
        architecture_for(PHI, PHI.num_parameters // 2)
    nearest = int(caught.value.remedy.split()[1].strip(","))
    architecture_for(PHI, nearest).check_inside(PHI)


def test_the_whole_model_is_its_own_nearest_shape():
    for how in ("width", "depth", "both"):
        assert architecture_for(LLAMA, LLAMA.num_parameters, how=how) == LLAMA


def test_parameters_out_of_reach_are_refused_with_the_nearest():
    few = replace(SMOL, num_layers=2)
    one = replace(few, num_layers=1).num_parameters
    with pytest.raises(InputError, match="cannot be reached by depth; the nearest is") as caught:
        architecture_for(few, int(one * 0.9), how="depth")
    assert str(one) in caught.value.remedy
    with pytest.raises(InputError, match="9,000,000,000"):
        architecture_for(LLAMA, 9_000_000_000)
    with pytest.raises(InputError, match="sideways"):
        architecture_for(LLAMA, 4_000_000_000, how="sideways")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_get_no_hardware_notes(name):
    base = {"l": LLAMA, "m": NEMOTRON}[name[0]] if name != "mn-minitron-8b" else NEMO
    target = published(name, base)
    notes = hardware_notes(base, target)
    assert all(note.startswith("num_heads: 24") and "KV cache" in note for note in notes)
    assert len(notes) == (name == "minitron-4b")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"hidden_size": 560}, ["hidden_size: 560 fills as many tiles of 64 as 576", "better 512, or keep 576"]),
        ({"hidden_size": 508}, ["hidden_size: 508 is not a multiple of 8", "better 504 or 512"]),
        ({"intermediate_size": 1534}, ["not a multiple of 8", "1528 or 1536", "as many tiles of 64 as 1536"]),
        ({"num_heads": 6}, ["num_kv_heads is still 3", "KV cache"]),
    ],
)
def test_sizes_that_waste_hardware_get_a_note(change, expected):
    text = " ".join(hardware_notes(replace(SMOL, family="mistral"), replace(SMOL, family="mistral", **change)))
    for part in expected:
        assert part in text


def test_an_expert_width_that_transformers_refuses_gets_a_note():
    base = Architecture(4, 512, 512, 8, 2, 64, 1000, False, "mixtral", num_experts=4, experts_per_token=2)
    assert "refuses 250" in " ".join(hardware_notes(base, replace(base, intermediate_size=250)))
    assert hardware_notes(base, replace(base, intermediate_size=256)) == []


def test_hardware_multiples_can_be_set():
    base, target = LLAMA, replace(LLAMA, hidden_size=4000)
    assert hardware_notes(base, target) == []
    assert "as many tiles of 128" in hardware_notes(base, target, tile=128)[0]
    assert "not a multiple of 64" in hardware_notes(base, target, alignment=64)[0]


def test_kv_heads_that_do_not_divide_over_gpus_get_a_note():
    notes = hardware_notes(NEMO, replace(NEMO, num_heads=12, num_kv_heads=3))
    assert any("num_kv_heads: 3 does not divide over 2 GPUs" in note and "better 2 or 4" in note for note in notes)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 180, "intermediate_size": 700, "num_layers": 11},
        {"num_heads": 3, "hidden_size": 300},
        {"num_heads": 2, "num_kv_heads": 1, "hidden_size": 574},
    ],
)
def test_intermediate_shapes_shrink_evenly_to_the_target(change, steps):
    target = replace(SMOL, **change)
    shapes = [SMOL, *shapes_between(SMOL, target, steps)]
    assert shapes[-1] == target
    for before, after in zip(shapes, shapes[1:], strict=False):
        after.check_inside(before)
    if "num_heads" not in change:
        assert len(shapes) == steps + 1
        for step, shape in enumerate(shapes):
            assert abs(shape.num_layers - (30 - step * 19 / steps)) <= 0.5
            assert abs(shape.hidden_size - (576 - step * 396 / steps)) <= 9


@pytest.mark.parametrize("steps", [2, 3, 4, 7])
@pytest.mark.parametrize("target", [(1536, 16, 16), (2400, 25, 25), (1066, 11, 11), (1824, 19, 19)], ids=str)
def test_intermediate_shapes_keep_the_ratio_that_longrope_fixes(target, steps):
    hidden, heads, groups = target
    shapes = [PHI, *shapes_between(PHI, replace(PHI, hidden_size=hidden, num_heads=heads, num_kv_heads=groups), steps)]
    for before, after in zip(shapes, shapes[1:], strict=False):
        after.check_inside(before)


def test_an_invalid_number_of_steps_is_refused():
    with pytest.raises(InputError, match="steps: 0"):
        list(shapes_between(SMOL, SMOL, 0))
