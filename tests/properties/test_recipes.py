"""Whatever is in a recipe's file or an override, it is read or refused in a sentence."""

from __future__ import annotations

import json
from typing import Any

import yaml
from helpers.odd_values import changed, check_sentence, odd
from hypothesis import example, given
from hypothesis import strategies as st

from minitron.errors import MinitronError
from minitron_platform.recipes.consistency import check_consistency
from minitron_platform.recipes.load import load_recipe, recipe_yaml, shipped_recipes

SOUND: dict[str, Any] = yaml.safe_load(shipped_recipes()["smollm2-135m-cpu"].read_text()) | {
    "losses": {"logits": "forward_kl", "temperature": 1.0, "hidden": ["last:last"]},
    "targets": {"mode": "stored", "top_k": 4},
    "correct": {"method": "lora", "probe_steps": 3},
}


def _keys(value: Any, prefix: str = "") -> list[str]:
    """The names of every value in a recipe, for --set."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [prefix, *(name for key, each in inner for name in _keys(each, f"{prefix}.{key}" if prefix else str(key)))]


def _text(value: Any) -> str:
    try:
        return yaml.safe_dump(value, allow_unicode=True)
    except (yaml.YAMLError, ValueError):
        return json.dumps(value)


def _read_or_refuse(path: Any, overrides: list[str]) -> None:
    try:
        recipe = load_recipe(path, overrides)
        check_consistency(recipe)
    except MinitronError as error:
        check_sentence(error)
        return
    copied = path.with_name("copied.yaml")
    copied.write_text(recipe_yaml(recipe))
    assert load_recipe(copied) == recipe


@given(text=changed(SOUND).map(_text) | st.text(max_size=80) | st.binary(max_size=80))
@example(text="a: &a\n  b: *a\n")
@example(text="<<: [1]\n")
@example(text="? [1]\n: 2\n")
@example(text="a: 2024-02-31\n")
@example(text="a: " + "9" * 5000)
def test_a_recipe_is_read_or_refused(folder, text):
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    _read_or_refuse(path, [])


@given(
    override=st.tuples(st.sampled_from(_keys(SOUND)), odd.map(_text) | st.text(max_size=20)).map("=".join)
    | st.text(max_size=40)
)
@example(override="family.²=1")
@example(override="family.0.space={1: [2]}")
def test_an_override_is_applied_or_refused(folder, override):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(SOUND))
    _read_or_refuse(path, [override])
