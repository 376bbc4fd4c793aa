"""gradmill's functional API."""
from __future__ import annotations

import torch

from gradmill import formats, recipes
from gradmill.autograd.linear import QuantizedLinear
from gradmill.weight import QuantizedWeight

__all__ = ["linear"]


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, recipe: str | recipes.Recipe = "int8",
           steps: torch.Tensor | None = None) -> torch.Tensor:
    """torch.nn.functional.linear with its three matmuls in a recipe's formats.

    Args:
        x: (..., in) float32, bfloat16 or float16.
        weight: (out, in), plain or a :class:`gradmill.QuantizedWeight`.
        bias: (out) or None.
        recipe: a name or a :class:`gradmill.recipes.Recipe`.
        steps: (out, groups) float32, used instead of a packed weight's scales and trained; weight-only recipes.

    Returns:
        (..., out) in autocast's dtype if autocast is on for the device, else in x's. Gradients have the dtype of
        what they are gradients of.

    Raises:
        TypeError: for a dtype that has no kernel (float64, complex, integers).
        ValueError: for shapes that do not fit or an unknown recipe.
    """
    recipe = recipes.get(recipe)
    for name, t in (("x", x), ("weight", weight)) + ((("bias", bias),) if bias is not None else ()):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"gradmill linear: {name} is a {type(t).__module__}.{type(t).__qualname__}; it must be a torch.Tensor")
        if formats.float_code(t.dtype) is None:
            raise TypeError(f"gradmill linear: {name} is {t.dtype}; it must be float32, bfloat16 or float16")
    if weight.dim() != 2:
        raise ValueError(f"gradmill linear: weight has shape {tuple(weight.shape)}; it must be 2-D (out, in)")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"gradmill linear: x has shape {tuple(x.shape)}; its last dimension must be {weight.shape[1]}, the weight's in")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"gradmill linear: bias has shape {tuple(bias.shape)}; it must be ({weight.shape[0]},)")
    if steps is not None:
        if recipe.y is not None or not isinstance(weight, QuantizedWeight):
            raise ValueError(f"gradmill linear: steps were given; they need a packed weight and a weight-only recipe, not {recipe.name}")
        if steps.dtype != torch.float32 or steps.shape != weight.scales.shape:
            raise ValueError(f"gradmill linear: steps is {steps.dtype} of shape {tuple(steps.shape)}; it must be float32 of shape {tuple(weight.scales.shape)}")
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # the meta device has none
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    y = QuantizedLinear.apply(x.reshape(x.shape[:-1].numel(), x.shape[-1]), weight, bias, recipe, dtype, steps)
    return y.view(*x.shape[:-1], weight.shape[0])
