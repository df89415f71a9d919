"""Recipes and the stages of a run."""
