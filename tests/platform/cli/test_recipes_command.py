"""`minitron recipes`: the list, and a recipe to copy."""

from __future__ import annotations

from helpers.command import minitron_here

from minitron_platform.recipes.load import load_recipe, shipped_recipes


def test_a_recipe_that_ships_is_printed_to_be_copied(tmp_path):
    listed = minitron_here("recipes", cwd=tmp_path).stdout
    for name in shipped_recipes():
        assert name in listed
    printed = minitron_here("recipes", "minimal", cwd=tmp_path)
    (tmp_path / "mine.yaml").write_text(printed.stdout)
    copied = load_recipe(tmp_path / "mine.yaml")
    assert copied == load_recipe("minimal")
    assert len(copied.family) == 1
    unknown = minitron_here("recipes", "minimum", cwd=tmp_path)
    assert unknown.returncode == 2
    assert "'minimum' is not a recipe that ships" in unknown.stderr
    assert "minimal" in unknown.stderr
