"""nn.GroupedLinear: a linear layer per expert of a mixture, its matmuls in a recipe."""
from __future__ import annotations

import math

import torch

from gradmill import functional, recipes


class GroupedLinear(torch.nn.Module):
    """``num_experts`` linear layers whose tokens come sorted by expert, their three matmuls in low precision.

    Args:
        num_experts, in_features, out_features, bias, device, dtype: of every expert as in torch.nn.Linear.
        recipe: a name or a :class:`gradmill.recipes.Recipe`, one that :func:`gradmill.functional.grouped_linear` takes.

    Parameters ``weight`` (num_experts, out_features, in_features) and ``bias`` (num_experts, out_features) or None, initialised as
    torch.nn.Linear's. ``forward(input, offs)``: see :func:`gradmill.functional.grouped_linear`.

    Raises:
        ValueError: for a recipe that there is not or that grouped layers do not take; from ``forward``,
            which takes float32, bfloat16 or float16, for a shape (TypeError: a dtype).
    """

    def __init__(self, num_experts, in_features, out_features, bias=True, recipe="int8", device=None, dtype=None):
        super().__init__()
        self.recipe: recipes.Recipe = functional.grouped_recipe(recipe)
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        self.weight = torch.nn.Parameter(torch.empty((num_experts, out_features, in_features), device=device, dtype=dtype))
        self.register_parameter("bias", torch.nn.Parameter(torch.empty((num_experts, out_features), device=device, dtype=dtype)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self):
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        for parameter in self.parameters():
            torch.nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        return functional.grouped_linear(input, self.weight, offs, self.bias, self.recipe)

    def extra_repr(self) -> str:
        return (f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
                f"recipe={self.recipe.name}")
