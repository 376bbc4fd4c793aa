"""Recipes: which format each of a linear layer's three matmuls uses, and how its weight is stored.

A new recipe is data: construct a :class:`Recipe` and pass it wherever a recipe's name is taken.
"""
from __future__ import annotations

from dataclasses import dataclass

from gradmill import formats
from gradmill.formats import Format

__all__ = ["Recipe", "INT8", "INT8_WEIGHTS", "RECIPES", "get"]


@dataclass(frozen=True)
class Recipe:
    """What a linear layer's matmuls compute in.

    Args:
        name: how users call it.
        y, dx, dw: "int8" (both operands quantised along the contracted dimension: one scale per row of each, int32
            sums) or None (the input's precision) for Y = X W^T, dX = dY W, dW = dY^T X.
        weight: format the trainable weight is stored in (a :class:`gradmill.QuantizedWeight`); None keeps the Parameter.
        gradient_rounding: "nearest" or "stochastic" rounding of dY.
    """

    name: str
    y: str | None = None
    dx: str | None = None
    dw: str | None = None
    weight: Format | None = None
    gradient_rounding: str = "nearest"

    def __post_init__(self):
        for field in ("y", "dx", "dw"):
            if getattr(self, field) not in (None, "int8"):
                raise ValueError(f"{field} is {getattr(self, field)!r}; it must be None or 'int8'")
        if self.gradient_rounding not in ("nearest", "stochastic"):
            raise ValueError(f"gradient_rounding is {self.gradient_rounding!r}; it must be 'nearest' or 'stochastic'")


#: Row-wise dynamic INT8 in all three matmuls (torchao's INT8 mixed-precision training). The weight stays a float Parameter.
INT8 = Recipe("int8", y="int8", dx="int8", dw="int8")
#: INT8 matmuls over a weight that is itself stored in INT8, groups of 256 with a zero point (Zhang et al., "Q-GaLore").
INT8_WEIGHTS = Recipe("int8_weights", y="int8", dx="int8", dw="int8", weight=formats.FORMATS["int8"])

RECIPES = {r.name: r for r in (INT8, INT8_WEIGHTS)}


def get(recipe: str | Recipe) -> Recipe:
    """The recipe of that name, or ``recipe`` itself. ValueError for an unknown name."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise ValueError(f"recipe is {recipe!r}; it must be a gradmill.recipes.Recipe or one of {', '.join(RECIPES)}")
    return RECIPES[recipe]
