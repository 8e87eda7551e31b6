"""How x_T is inferred and decoded: recipes, and samplers as pure functions."""

from .recipe import RECIPES, Recipe
from .reuse import Reuse

__all__ = ["RECIPES", "Recipe", "Reuse"]
