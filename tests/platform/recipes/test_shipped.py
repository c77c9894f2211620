"""The shipped recipes: each loads, and those for the papers' models contain the papers' architectures."""

from __future__ import annotations

import pytest

from minitron.architecture import Architecture
from minitron.architecture.published import BASES, published
from minitron_platform.recipes.candidates import family_candidates
from minitron_platform.recipes.consistency import check_consistency
from minitron_platform.recipes.load import load_recipe, shipped_recipes

# for each recipe the published base model and, for each model of its family, a published architecture
PAPERS = {
    "llama-3.1-8b-to-4b-h100x8": (
        "Llama 3.1 8B",
        {"llama-3.1-4b-width": "llama-3.1-minitron-4b-width", "llama-3.1-4b-depth": "llama-3.1-minitron-4b-depth"},
    ),
    "nemotron-15b-8b-4b-h100x8": ("Nemotron-4 15B", {"nemotron-8b": "minitron-8b", "nemotron-4b": "minitron-4b"}),
}


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_is_valid_and_states_the_hardware_on_which_it_has_run(name):
    recipe = load_recipe(name)
    check_consistency(recipe)
    assert recipe.name == name
    assert ("not run yet" in recipe.description) == (name in PAPERS)
    assert ("NOT RUN" in shipped_recipes()[name].read_text()) == (name in PAPERS)


@pytest.mark.parametrize("name", PAPERS)
def test_the_published_architectures_are_among_the_candidates(name):
    base, models = PAPERS[name]
    teacher = Architecture(**BASES[base], tied=False)
    family = family_candidates(load_recipe(name), teacher)
    for model, shape in models.items():
        assert published(shape, teacher) in family[model].architectures
    assert family.keys() == models.keys()
