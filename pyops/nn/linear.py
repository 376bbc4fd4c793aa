"""nn.Linear whose matmuls run in a recipe."""
from __future__ import annotations

import torch

from gradmill import functional, recipes
from gradmill.weight import QuantizedWeight


class Linear(torch.nn.Linear):
    """torch.nn.Linear with its three matmuls, and where the recipe says so its weight, in low precision.

    Args:
        in_features, out_features, bias, device, dtype: as in torch.nn.Linear.
        recipe: a name (see ``gradmill.recipes.RECIPES``) or a :class:`gradmill.recipes.Recipe`.

    ``state_dict`` keeps torch.nn.Linear's names; loading a float ``weight`` into a quantised layer packs it.
    """

    def __init__(self, in_features, out_features, bias=True, recipe="int8", device=None, dtype=None):
        recipe = recipes.get(recipe)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._adopt(recipe)

    def _adopt(self, recipe: recipes.Recipe):
        self.recipe = recipe
        if recipe.weight is not None and not isinstance(self.weight, QuantizedWeight):
            requires_grad = self.weight.requires_grad and not recipe.frozen
            self.weight = torch.nn.Parameter(QuantizedWeight.quantize(self.weight.detach(), recipe.weight), requires_grad)

    @classmethod
    def from_linear(cls, linear: torch.nn.Linear, recipe="int8") -> "Linear":
        """The same layer: parameters (the same objects, unless the recipe stores weights in low precision), hooks,
        training mode and any attributes set on it are kept."""
        new = cls.__new__(cls)
        new.__dict__ = linear.__dict__.copy()
        for name in ("_parameters", "_buffers", "_modules"):
            new.__dict__[name] = linear.__dict__[name].copy()
        new._adopt(recipes.get(recipe))
        return new

    def train_steps_(self, mode: bool = True) -> "Linear":
        """Makes the step sizes (scales) of a packed weight a Parameter ``steps`` (out, groups) fp32, or packs them back:
        the end-to-end phase of Chen et al., "EfficientQAT". ValueError unless the recipe is weight-only."""
        if not (self.recipe.frozen and isinstance(self.weight, QuantizedWeight)):
            raise ValueError(f"recipe is {self.recipe.name}; only the step sizes of a weight-only recipe (w8, w4, w3, w2) can train")
        if mode and self._parameters.get("steps") is None:
            self.steps = torch.nn.Parameter(self.weight.scales.clone())
        elif not mode and self._parameters.get("steps") is not None:
            self.weight.scales.copy_(self.steps.detach())
            del self.steps
        return self

    def dequantize_(self) -> torch.nn.Linear:
        """This layer as a plain torch.nn.Linear, sharing what it can."""
        new = torch.nn.Linear.__new__(torch.nn.Linear)
        if self._parameters.get("steps") is not None:
            self.train_steps_(False)
        new.__dict__ = {k: v for k, v in self.__dict__.items() if k != "recipe"}
        new._parameters = self._parameters.copy()
        if isinstance(self.weight, QuantizedWeight):
            new._parameters["weight"] = torch.nn.Parameter(self.weight.dequantize(), self.weight.requires_grad)
        return new

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias, self.recipe, self._parameters.get("steps"))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.recipe.name}"
