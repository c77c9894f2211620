"""Recipes: their keys, reading them, and what follows from a recipe alone."""
