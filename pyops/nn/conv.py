"""nn.Conv2d whose products run in a recipe."""
from __future__ import annotations

import math

import torch

from gradmill import functional, recipes
from gradmill.autograd.window import Window
from gradmill.nn._layer import RecipeLayer


class Conv2d(RecipeLayer, torch.nn.Conv2d):
    """torch.nn.Conv2d with its three products, and where the recipe says so its weight, in low precision: see
    :func:`gradmill.functional.conv2d`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as in
            torch.nn.Conv2d.
        recipe: a name (see ``gradmill.recipes.RECIPES``) or a :class:`gradmill.recipes.Recipe`.

    Parameters and ``state_dict`` are as :class:`gradmill.nn.Linear`'s, the weight seen as ``flatten(1)``: steps and zero points
    are (out, groups of in / groups * kh * kw).

    Raises:
        ValueError: for a recipe that there is not or that is for linear layers (``fp8_delayed``); from ``forward``,
            which takes float32, bfloat16 or float16, for a shape (TypeError: a dtype).
    """

    _plain = torch.nn.Conv2d

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True, padding_mode="zeros",
                 device=None, dtype=None, recipe="int8"):
        recipe = recipes.get(recipe)
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device=device, dtype=dtype)
        self._adopt(recipe)

    @classmethod
    def from_conv2d(cls, conv: torch.nn.Conv2d, recipe="int8") -> "Conv2d":
        """The same layer: parameters (the same objects, unless the recipe stores weights in low precision), hooks,
        training mode and any attributes set on it are kept."""
        return cls._from(conv, recipe)

    def _adopt(self, recipe: recipes.Recipe):
        if recipe.history:
            raise ValueError(f"recipe is {recipe.name}; its delayed scaling is for linear layers")
        super()._adopt(recipe)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self._look(input)
        padding = self.padding
        if self.padding_mode != "zeros":
            input = torch.nn.functional.pad(input, self._reversed_padding_repeated_twice, self.padding_mode)
            padding = 0
        return functional.conv2d(input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups, self.recipe, **self._steps)

    @property
    def measured_as(self) -> tuple[int, ...]:
        """The shape by which gradmill.speeds knows the layer: of groups, whose products are smaller, none."""
        return (self.in_channels, *self.kernel_size, self.out_channels) if self.groups == 1 else ()

    def kept_bytes(self) -> tuple[int, int]:
        """Bytes of an image's input kept for backward, of whatever size gives an output of 32 x 32 positions: by torch.nn.Conv2d,
        by this layer."""
        padding = (0, 0)  # only zeros are not kept
        if self.padding_mode == "zeros":
            left, _, top, _ = self._reversed_padding_repeated_twice
            padding = top, left
        window, size = Window(self.kernel_size, self.stride, padding, self.dilation, self.groups), self.weight.dtype.itemsize
        shape = (1, self.in_channels, *(max(1, 31 * s + d * (k - 1) + 1 - 2 * p) for k, s, p, d in zip(*window[:4])))
        return math.prod(shape) * size, window.saved_bytes(self.recipe, shape, size)[0] if self.weight.requires_grad else 0
