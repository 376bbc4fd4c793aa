"""gradmill's functional API."""
from __future__ import annotations

import torch

from gradmill import formats, recipes
from gradmill.autograd.fake_quantize import FakeQuantize
from gradmill.autograd.linear import QuantizedLinear
from gradmill.ops import quant
from gradmill.reference import quant as reference
from gradmill.weight import QuantizedWeight

__all__ = ["fake_quantize", "fake_quantize_parameters", "linear"]


def _output_dtype(x: torch.Tensor) -> torch.dtype:
    """Autocast's dtype where autocast is on for x's device, else x's."""
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # the meta device has none
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def _require_tensors(function: str, **tensors):
    for name, t in tensors.items():
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"gradmill {function}: {name} is a {type(t).__module__}.{type(t).__qualname__}; it must be a torch.Tensor")
        if formats.float_code(t.dtype) is None:
            raise TypeError(f"gradmill {function}: {name} is {t.dtype}; it must be float32, bfloat16 or float16")


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, recipe: str | recipes.Recipe = "int8",
           steps: torch.Tensor | None = None, zeros: torch.Tensor | None = None) -> torch.Tensor:
    """torch.nn.functional.linear with its three matmuls in a recipe's formats.

    Args:
        x: (..., in) float32, bfloat16 or float16.
        weight: (out, in), plain or a :class:`gradmill.QuantizedWeight`.
        bias: (out) or None.
        recipe: a name or a :class:`gradmill.recipes.Recipe`.
        steps: (out, groups) float32, used instead of a packed weight's scales and trained; weight-only recipes. With zeros, of
            the same shape, the parameters of :func:`fake_quantize`: recipes that fake need them, others refuse them.

    Returns:
        (..., out) in autocast's dtype if autocast is on for the device, else in x's. Gradients have the dtype of
        what they are gradients of.

    Raises:
        TypeError: for a dtype that has no kernel (float64, complex, integers).
        ValueError: for shapes that do not fit or an unknown recipe.
    """
    recipe = recipes.get(recipe)
    _require_tensors("linear", x=x, weight=weight, **({} if bias is None else {"bias": bias}))
    if weight.dim() != 2:
        raise ValueError(f"gradmill linear: weight has shape {tuple(weight.shape)}; it must be 2-D (out, in)")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"gradmill linear: x has shape {tuple(x.shape)}; its last dimension must be {weight.shape[1]}, the weight's in")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"gradmill linear: bias has shape {tuple(bias.shape)}; it must be ({weight.shape[0]},)")
    if (recipe.fake is None) != (zeros is None) or recipe.fake is not None and steps is None:
        raise ValueError(f"gradmill linear: steps and zeros are {'given' if zeros is not None else 'missing'}; recipe {recipe.name} "
                         f"{'takes no zeros' if recipe.fake is None else 'needs both: see fake_quantize_parameters'}")
    if recipe.fake is not None:
        weight, steps = fake_quantize(weight, steps, zeros, *recipe.fake), None
    if steps is not None:
        if recipe.y is not None or not isinstance(weight, QuantizedWeight):
            raise ValueError(f"gradmill linear: steps were given; they need a packed weight and a weight-only recipe, not {recipe.name}")
        if steps.dtype != torch.float32 or steps.shape != weight.scales.shape:
            raise ValueError(f"gradmill linear: steps is {steps.dtype} of shape {tuple(steps.shape)}; it must be float32 of shape {tuple(weight.scales.shape)}")
    y = QuantizedLinear.apply(x.reshape(x.shape[:-1].numel(), x.shape[-1]), weight, bias, recipe, _output_dtype(x), steps)
    return y.view(*x.shape[:-1], weight.shape[0])


def fake_quantize(weight: torch.Tensor, steps: torch.Tensor, zeros: torch.Tensor, bits: int, group: int = 128) -> torch.Tensor:
    """The values a weight would have in ``bits`` bits, with gradients to the weight, the steps and the zero points.

    Chen et al., "EfficientQAT: Efficient Quantization-Aware Training for Large Language Models", Block-AP: (q - z) s with
    q = clamp(round(W / s) + z, 0, 2^bits - 1). Rounding is straight-through: an element that was not clamped hands its gradient
    to the weight, one that was to its group's zero point; all of them move the step (see gradmill.ops.fake_quantize_backward).

    Args:
        weight: (out, in) float32, bfloat16 or float16.
        steps, zeros: (out, ceil(in / group)), as :func:`fake_quantize_parameters` makes them, computed with in float32. Zero points are trained as
            floats, clamped to [0, 2^bits - 1] and rounded before use; a step below 2^-100 counts as 2^-100.
        bits: 2 to 8.
        group: neighbours along a row that share a step and a zero point, even; the last group of a row may be shorter. 0 for a
            whole row.

    Returns:
        (out, in) in autocast's dtype if autocast is on for the device, else in weight's. A nan or inf in the weight gives a nan.

    Raises:
        TypeError: for dtypes. ValueError: for shapes, bits and group.
    """
    _require_tensors("fake_quantize", weight=weight, steps=steps, zeros=zeros)
    return FakeQuantize.apply(weight, steps.to(torch.float32), zeros.to(torch.float32), bits, group, _output_dtype(weight))


@torch.no_grad()
def fake_quantize_parameters(weight: torch.Tensor, bits: int, group: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """First steps and zero points of a weight, from the range of each group.

    s = (max - min) / Q and z = clamp(-round(min / s), 0, Q) with Q = 2^bits - 1, the range made to include zero. A group of zeros
    (or of values below 2^-100) gets the step 1e-4; one with a nan or an inf the step nan.

    Args:
        weight: (out, in) float32, bfloat16 or float16.
        bits: 2 to 8.
        group: as in :func:`fake_quantize`.

    Returns:
        steps, zeros: float32 (out, ceil(in / group)).

    Raises:
        TypeError: for weight's dtype. ValueError: for its shape, bits and group.
    """
    _require_tensors("fake_quantize_parameters", weight=weight)
    quant.check_fake("fake_quantize_parameters", weight, bits, group)
    return reference.fake_quantize_parameters(weight, bits, group)  # once a weight: no kernel
