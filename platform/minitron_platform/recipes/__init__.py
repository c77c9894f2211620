"""Recipes: their keys, their files, and what can be derived from a recipe alone."""
