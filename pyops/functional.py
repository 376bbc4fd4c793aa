"""gradmill's functional API."""
from __future__ import annotations

import torch

from gradmill import formats, recipes
from gradmill.autograd.fake_quantize import FakeQuantize
from gradmill.autograd.linear import ExactLinear, QuantizedGroupedLinear, QuantizedLinear
from gradmill.autograd.one_bit import OneBit
from gradmill.autograd.window import Window
from gradmill.ops import _registry, grouped, quant
from gradmill.ops.conv import check_geometry
from gradmill.reference import quant as reference
from gradmill.reference.optim import as_matrix
from gradmill.weight import QuantizedWeight

__all__ = ["conv2d", "fake_quantize", "fake_quantize_parameters", "grouped_linear", "linear"]


def _output_dtype(x: torch.Tensor) -> torch.dtype:
    """Autocast's dtype where autocast is on for x's device, else x's."""
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)  # meta has none; torch 2.9 cannot trace is_autocast_available
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def _require_tensors(function: str, **tensors):
    if not torch.compiler.is_compiling() and _registry.transforming():
        raise RuntimeError(f"gradmill {function}: quantised layers do not run under torch.func's transforms (grad, vmap, jvp, ...): use autograd's backward, or turn the layers "
                           "back with dequantize_()")
    for name, t in tensors.items():
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"gradmill {function}: {name} is a {type(t).__module__}.{type(t).__qualname__}; it must be a torch.Tensor")
        if formats.float_code(t.dtype) is None:
            raise TypeError(f"gradmill {function}: {name} is {t.dtype}; it must be float32, bfloat16 or float16")
        if t.layout is not torch.strided:
            raise TypeError(f"gradmill {function}: {name} has the layout {t.layout}; it must be a dense (strided) tensor")


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, recipe: str | recipes.Recipe = "int8",
           steps: torch.Tensor | None = None, zeros: torch.Tensor | None = None, amax_history: torch.Tensor | None = None) -> torch.Tensor:
    """torch.nn.functional.linear with its three matmuls in a recipe's formats.

    Args:
        x: (..., in) float32, bfloat16 or float16.
        weight: (out, in), plain or a :class:`gradmill.QuantizedWeight`.
        bias: (out) or None.
        recipe: a name or a :class:`gradmill.recipes.Recipe`.
        steps: (out, groups) float32, used instead of a packed weight's scales and trained; weight-only recipes. For one_bit_fqt (out, 1), the scale of
            each output channel. With zeros, of
            the same shape, the parameters of :func:`fake_quantize`: recipes that fake need them, others refuse them.
        amax_history: (3, recipe.history) float32, zeros at first, for recipes with delayed scaling: the largest magnitudes of X, W and
            dY in the steps before, the last step's first. The backward pass adds a step, in place; nan and inf count as 0 there, and
            show in the output.

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
    weight, steps = _prepare("linear", weight, bias, recipe, steps, zeros)
    if (amax_history is None) != (recipe.history == 0):
        raise ValueError(f"gradmill linear: amax_history is {'missing' if amax_history is None else 'given'}; recipe {recipe.name} "
                         f"{f'needs one of shape (3, {recipe.history})' if recipe.history else 'takes none'}")
    if amax_history is not None and (amax_history.dtype != torch.float32 or amax_history.shape != (3, recipe.history)):
        raise ValueError(f"gradmill linear: amax_history is {amax_history.dtype} of shape {tuple(amax_history.shape)}; it must be float32 of shape (3, {recipe.history})")
    matrix = x if x.dim() == 2 else x.flatten(0, -2) if x.dim() > 2 else x[None]  # no number of tokens here that jit.trace would keep
    if recipe.one_bit is not None:
        y = OneBit.apply(matrix, weight, steps, bias, *recipe.one_bit, _output_dtype(x))
    elif recipe.exact is not None and x.is_cpu and not isinstance(weight, QuantizedWeight):
        y = ExactLinear.apply(matrix, weight, bias, recipe, _output_dtype(x))
    else:
        y = QuantizedLinear.apply(matrix, weight, bias, recipe, _output_dtype(x), steps, None, amax_history)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


def _prepare(function, weight, bias, recipe, steps, zeros):
    """Checks what every layer has; the weight as the products see it and the trained steps of a packed one, or None."""
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"gradmill {function}: bias has shape {tuple(bias.shape)}; it must be ({weight.shape[0]},)")
    if (recipe.fake is None) != (zeros is None) or recipe.fake is not None and steps is None:
        raise ValueError(f"gradmill {function}: steps and zeros are {'given' if zeros is not None else 'missing'}; recipe {recipe.name} "
                         f"{'takes no zeros' if recipe.fake is None else 'needs both: see fake_quantize_parameters'}")
    if steps is not None and recipe.fake is None and formats.float_code(steps.dtype):
        steps = steps.to(torch.float32)  # FSDP2's mixed precision hands out all Parameters in 16 bits
    if recipe.one_bit is not None:
        if steps is None or steps.shape != (weight.shape[0], 1) or steps.dtype != torch.float32 or isinstance(weight, QuantizedWeight):
            raise ValueError(f"gradmill {function}: steps is {'missing' if steps is None else (steps.dtype, tuple(steps.shape))}; recipe {recipe.name} needs a plain weight and "
                             f"float32 scales of shape ({weight.shape[0]}, 1), one for each output channel")
        return weight, steps
    if recipe.fake is not None:
        return fake_quantize(weight, steps, zeros, *recipe.fake), None
    if steps is not None:
        if recipe.y is not None or not isinstance(weight, QuantizedWeight):
            raise ValueError(f"gradmill {function}: steps were given; they need a packed weight and a weight-only recipe, not {recipe.name}")
        if steps.dtype != torch.float32 or steps.shape != weight.scales.shape:
            raise ValueError(f"gradmill {function}: steps is {steps.dtype} of shape {tuple(steps.shape)}; it must be float32 of shape {tuple(weight.scales.shape)}")
    return weight, steps


def conv2d(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, stride: int | tuple[int, int] = 1,
           padding: int | tuple[int, int] | str = 0, dilation: int | tuple[int, int] = 1, groups: int = 1,
           recipe: str | recipes.Recipe = "int8", steps: torch.Tensor | None = None, zeros: torch.Tensor | None = None) -> torch.Tensor:
    """torch.nn.functional.conv2d with its three products in a recipe's formats.

    The products are a linear layer's over the image's patches: X (output positions, in / groups * kh * kw) and the weight as
    ``flatten(1)``, so that a format's rows and blocks run over a patch, in dW over the output positions of the whole batch. Each
    group of channels is a layer of its own, worked off one after the other. A product that the recipe leaves in the input's
    precision is torch's own convolution. Kept for backward: of the input and its quantised patches whichever is smaller.

    Args:
        input: (n, in, height, width) or (in, height, width) float32, bfloat16 or float16.
        weight: (out, in / groups, kh, kw), plain or a :class:`gradmill.QuantizedWeight`.
        bias: (out) or None.
        stride, dilation: an integer or one for each of height and width.
        padding: the same, of zeros; "valid" (none) or "same" (the output has the input's size; stride 1 only).
        groups: divides in and out.
        recipe: a name or a :class:`gradmill.recipes.Recipe`.
        steps, zeros: as in :func:`linear`, of the weight as (out, in / groups * kh * kw).

    Returns:
        (n, out, oh, ow), or without n, in autocast's dtype if autocast is on for the device, else in input's; channels last if
        input is.

    Raises:
        TypeError: for a dtype that has no kernel (float64, complex, integers).
        ValueError: for shapes and numbers that do not fit or an unknown recipe.
    """
    recipe = recipes.get(recipe)
    if recipe.history:
        raise ValueError(f"gradmill conv2d: recipe is {recipe.name}; delayed scaling is for linear layers")
    _require_tensors("conv2d", input=input, weight=weight, **({} if bias is None else {"bias": bias}))
    if weight.dim() != 4:
        raise ValueError(f"gradmill conv2d: weight has shape {tuple(weight.shape)}; it must be 4-D (out, in / groups, kh, kw)")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"gradmill conv2d: groups is {groups}; it must be positive and divide {weight.shape[0]}, the weight's out")
    if input.dim() not in (3, 4) or input.shape[-3] != groups * weight.shape[1]:
        raise ValueError(f"gradmill conv2d: input has shape {tuple(input.shape)}; it must be ((n,) {groups * weight.shape[1]}, height, width)")
    kernel, (stride, dilation) = tuple(weight.shape[2:]), (_pair(name, value) for name, value in (("stride", stride), ("dilation", dilation)))
    x = input if input.dim() == 4 else input[None]
    if padding == "same":
        if stride != (1, 1):
            raise ValueError(f"gradmill conv2d: stride is {stride}; with padding 'same' it must be 1")
        total = [d * (k - 1) for k, d in zip(kernel, dilation)]
        padding = tuple(t // 2 for t in total)
        if any(t % 2 for t in total):  # what is left over goes to the bottom and the right, as torch has it
            x = torch.nn.functional.pad(x, (0, total[1] % 2, 0, total[0] % 2))
    elif isinstance(padding, str) and padding != "valid":
        raise ValueError(f"gradmill conv2d: padding is {padding!r}; it must be 'same', 'valid' or integers")
    else:
        padding = (0, 0) if padding == "valid" else _pair("padding", padding)
    check_geometry("conv2d", *x.shape[2:], kernel, stride, padding, dilation)
    weight, steps = _prepare("conv2d", weight, bias, recipe, steps, zeros)
    if recipe.one_bit is not None:
        window = Window(kernel, stride, padding, dilation, 1)
        parts = zip(x.chunk(groups, 1), weight.chunk(groups), steps.chunk(groups), [None] * groups if bias is None else bias.chunk(groups))
        ys = [OneBit.apply(*part, *recipe.one_bit, _output_dtype(x), window) for part in (parts if groups > 1 else [(x, weight, steps, bias)])]
        y = ys[0] if groups == 1 else torch.cat(ys, 1)
        return y if input.dim() == 4 else y[0]
    y = QuantizedLinear.apply(x, weight, bias, recipe, _output_dtype(x), steps, Window(kernel, stride, padding, dilation, groups))
    return y if input.dim() == 4 else y[0]


def _pair(name, value) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) == 1:  # torch takes (2,) too
        pair *= 2
    if len(pair) != 2 or not all(isinstance(v, int) for v in pair):
        raise ValueError(f"gradmill conv2d: {name} is {value!r}; it must be an integer or two")
    return pair


def grouped_recipe(recipe: str | recipes.Recipe) -> recipes.Recipe:
    """The recipe of that name, if a layer per expert can have it. ValueError else."""
    recipe = recipes.get(recipe)
    products = [m for m in (recipe.y, recipe.dx, recipe.dw) if m is not None]
    why = ""
    if recipe.history:
        why = "delayed scaling is for a layer without experts"
    elif recipe.weight is not None or recipe.fake is not None or "forward" in products:
        why = "its weight is stored or seen in few bits, or its operands are kept"
    elif any(m.hadamard for m in products):
        why = "its operands go through a Hadamard transform"
    else:
        for f in (f for m in products for f in (m.left, m.right)):
            if f is None or f.code not in grouped.OPERANDS or f.scale == "e4m3":
                why = "every operand must be int8, int7, e4m3, e5m2 or a plain float with scales of its own"
        if any((m.left.code in formats.FLOAT_DTYPES) != (m.right.code in formats.FLOAT_DTYPES) for m in products if not why):
            why = "a product's operands must be both quantised or both plain floats"
        tokens = [m.left for m in products] + [m.right for m in (recipe.dw,) if m is not None]
        if not why and any(f.rows > 1 or f.rows == 0 and f.block for f in tokens):
            why = "tokens can share a scale with all of their expert's or with none"
    if why:
        raise ValueError(f"recipe is {recipe.name}; grouped_linear and GroupedLinear cannot use it: {why}. They take int8, int8_switchback, int7, "
                         "fp8_tensor, fp8_row, fp8_row_pow2, fp8_block, bf16 and recipes of one's own made of their formats")
    return recipe


def grouped_linear(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor, bias: torch.Tensor | None = None,
                   recipe: str | recipes.Recipe = "int8") -> torch.Tensor:
    """A linear layer per expert of a mixture (MoE), its three matmuls in a recipe's formats: row i of the result is
    ``input[i] @ weight[e].T + bias[e]``, e being token i's expert.

    Args:
        input: (tokens, in) float32, bfloat16 or float16, the tokens sorted by expert.
        weight: (experts, out, in).
        offs: (experts) int32 or int64, where each expert's tokens end: cumulative counts, as torch's ``_grouped_mm`` takes them in int32 and
            ``bincount(experts).cumsum(0)`` makes them in int64. An expert may have none; tokens beyond the last end are nobody's: their rows
            of the result are 0.
        bias: (experts, out) or None.
        recipe: a name or a :class:`gradmill.recipes.Recipe` whose operands are quantised on the fly: int8, int8_switchback, int7,
            fp8_tensor, fp8_row, fp8_row_pow2, fp8_block, bf16. Every expert has the scales that a layer of its own would have.

    Returns:
        (tokens, out) in autocast's dtype if autocast is on for the device, else in input's. Gradients have the dtype of what they are
        gradients of; an expert without tokens gets zeros.

    Raises:
        TypeError: for dtypes. ValueError: for shapes that do not fit, a recipe that experts cannot have, and on CPU for offs that
            decrease or go beyond the tokens.
    """
    recipe = grouped_recipe(recipe)
    _require_tensors("grouped_linear", input=input, weight=weight, **({} if bias is None else {"bias": bias}))
    if weight.dim() != 3 or not weight.shape[0]:
        raise ValueError(f"gradmill grouped_linear: weight has shape {tuple(weight.shape)}; it must be (experts, out, in), one expert at the least")
    if input.dim() != 2 or input.shape[1] != weight.shape[2]:
        raise ValueError(f"gradmill grouped_linear: input has shape {tuple(input.shape)}; it must be (tokens, {weight.shape[2]})")
    if bias is not None and bias.shape != weight.shape[:2]:
        raise ValueError(f"gradmill grouped_linear: bias has shape {tuple(bias.shape)}; it must be {tuple(weight.shape[:2])}")
    if not isinstance(offs, torch.Tensor) or offs.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"gradmill grouped_linear: offs is {offs.dtype if isinstance(offs, torch.Tensor) else type(offs).__name__}; it must be an int32 or int64 tensor")
    if offs.shape != weight.shape[:1]:
        raise ValueError(f"gradmill grouped_linear: offs has shape {tuple(offs.shape)}; it must be ({weight.shape[0]},), an end for each expert")
    if offs.dtype == torch.int64:  # held within int32, so that what is out of bounds stays so
        offs = offs.clamp(-1, 2**31 - 1).to(torch.int32)
    return QuantizedGroupedLinear.apply(input, weight, bias, offs, recipe, _output_dtype(input))


def fake_quantize(weight: torch.Tensor, steps: torch.Tensor, zeros: torch.Tensor, bits: int, group: int = 128) -> torch.Tensor:
    """The values a weight would have in ``bits`` bits, with gradients to the weight, the steps and the zero points.

    Chen et al., "EfficientQAT: Efficient Quantization-Aware Training for Large Language Models", Block-AP: (q - z) s with
    q = clamp(round(W / s) + z, 0, 2^bits - 1). Rounding is straight-through: an element that was not clamped hands its gradient
    to the weight, one that was to its group's zero point; all of them move the step (see gradmill.ops.fake_quantize_backward).

    Args:
        weight: (out, in) float32, bfloat16 or float16; of more dimensions it counts as ``flatten(1)``.
        steps, zeros: (out, ceil(in / group)), as :func:`fake_quantize_parameters` makes them, computed with in float32. Zero points are trained as
            floats, clamped to [0, 2^bits - 1] and rounded before use; a step below 2^-100 counts as 2^-100.
        bits: 2 to 8.
        group: neighbours along a row that share a step and a zero point, even; the last group of a row may be shorter. 0 for a
            whole row.

    Returns:
        Weight's shape, in autocast's dtype if autocast is on for the device, else in weight's. A nan or inf in the weight gives a nan.

    Raises:
        TypeError: for dtypes. ValueError: for shapes, bits and group.
    """
    _require_tensors("fake_quantize", weight=weight, steps=steps, zeros=zeros)
    matrix = as_matrix(weight) if weight.dim() > 2 else weight
    return FakeQuantize.apply(matrix, steps.to(torch.float32), zeros.to(torch.float32), bits, group, _output_dtype(weight)).view(weight.shape)


@torch.no_grad()
def fake_quantize_parameters(weight: torch.Tensor, bits: int, group: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """First steps and zero points of a weight, from the range of each group.

    s = (max - min) / Q and z = clamp(-round(min / s), 0, Q) with Q = 2^bits - 1, the range made to include zero. A group of zeros
    (or of values below 2^-100) gets the step 1e-4; one with a nan or an inf the step nan.

    Args:
        weight: (out, in) float32, bfloat16 or float16; of more dimensions it counts as ``flatten(1)``.
        bits: 2 to 8.
        group: as in :func:`fake_quantize`.

    Returns:
        steps, zeros: float32 (out, ceil(in / group)).

    Raises:
        TypeError: for weight's dtype. ValueError: for its shape, bits and group.
    """
    _require_tensors("fake_quantize_parameters", weight=weight)
    weight = as_matrix(weight) if weight.dim() > 2 else weight
    quant.check_fake("fake_quantize_parameters", weight, bits, group)
    return reference.fake_quantize_parameters(weight, bits, group)  # once a weight: no kernel
