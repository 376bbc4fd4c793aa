"""The quantised linear layer's forward and backward."""
from __future__ import annotations

from dataclasses import dataclass

import torch

from gradmill.formats import Format
from gradmill.ops._registry import forced_backend, native_module, use_backend
from gradmill.ops.matmul import matmul_int8, matmul_packed, matmul_scaled
from gradmill.ops.quant import dequantize, hadamard, quantize_to
from gradmill.recipes import Matmul, Recipe
from gradmill.reference.philox import stream
from gradmill.weight import QuantizedWeight

_EXACT = ("int8", "int7")


def _values(weight):
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight


@dataclass
class Stored:
    """A matrix (rows, columns) in a format; plain floats have no scales."""

    codes: torch.Tensor
    scales: torch.Tensor | None
    zeros: torch.Tensor | None
    format: Format
    columns: int

    @property
    def tensors(self):
        return self.codes, self.scales, self.zeros


def _store(x, format: Format, transpose=False, key=None, stream=0) -> Stored:
    """x, or its transpose, as an operand."""
    columns = x.shape[0 if transpose else 1]
    if format.blocked:
        return Stored(*quantize_to(x, format, transpose, key, stream), format, columns)
    return Stored((x.t() if transpose else x).to(format.code_dtype).contiguous(), None, None, format, columns)


def _multiply(a: Stored, b: Stored, bias, dtype):
    """a b^T (+ bias)."""
    if a.format.code in _EXACT and b.format.code in _EXACT and not a.format.block and not b.format.block:
        return matmul_int8(a.codes, b.codes, a.scales, b.scales, bias, dtype)
    if a.scales is None and b.scales is None and (a.codes.is_cuda or a.codes.device.type == "cpu" and _torch_is_faster()):
        y = torch.nn.functional.linear(a.codes, b.codes).to(dtype)  # sums in fp32 too, but rounds them to 16 bits
        return y if bias is None else y + bias.to(dtype)
    return matmul_scaled(*a.tensors, a.format.code, a.format.block, *b.tensors, b.format.code, b.format.block, b.columns, False, bias, dtype)


def _torch_is_faster():
    return not torch.compiler.is_compiling() and forced_backend() is None and native_module().cpu_has_bf16()


def _over_tokens(x, format: Format, size: int, key, rounding=None) -> Stored:
    """x^T as an operand of dW, through the random Hadamard transform of that size (the same for both operands) where the recipe has one."""
    if not size:
        return _store(x, format, True, rounding, stream(1, "gradient"))
    return _store(hadamard(x, size, True, key, stream(2, "hadamard"), x.dtype), format, False, rounding, stream(1, "gradient"))


class QuantizedLinear(torch.autograd.Function):
    """Y = X W^T + b with each of the three matmuls in its recipe's formats.

    X (tokens, in), W (out, in) plain or QuantizedWeight, b (out) or None. A quantised product has both operands quantised
    along the dimension it sums over, so X, W and dY each need two copies: X's and dY's come from one tensor, once by rows
    and once by columns. Saved for dW: the quantised X that dW needs, not X. ``steps`` (out, groups), or None: the scales
    of a packed weight as a trained Parameter; their gradient is the sum of dW (q - z) over each group (Chen et al.,
    "EfficientQAT", E2E-QP).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, recipe: Recipe, dtype, steps):
        y_recipe, dw_recipe = recipe.y, recipe.dw
        kept_x = kept_w = None
        if isinstance(y_recipe, Matmul):
            kept_x, kept_w = _store(x, y_recipe.left), _store(_values(weight), y_recipe.right)
            y = _multiply(kept_x, kept_w, bias, dtype)
        elif isinstance(weight, QuantizedWeight):
            y = matmul_packed(x, *_packed(weight, steps), False, bias, dtype)
        else:
            y = torch.nn.functional.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        random = recipe.gradient_rounding == "stochastic" or isinstance(dw_recipe, Matmul) and dw_recipe.hadamard
        key = None
        if random:
            key = torch.stack((torch.randint(-2 ** 63, 2 ** 63 - 1, (), dtype=torch.int64, device="cpu"),
                               torch.zeros((), dtype=torch.int64, device="cpu")))
        saved_x = ()
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[5]:
            if dw_recipe == "forward":
                saved_x = kept_x.tensors
            elif dw_recipe is not None:
                saved_x = _over_tokens(x, dw_recipe.right, dw_recipe.hadamard, key).tensors
            else:
                saved_x = (x,)
        saved_w = ()
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[5]:
            saved_w = kept_w.tensors if recipe.dx == "forward" else (weight,)
        ctx.lengths = len(saved_w), len(saved_x)
        ctx.save_for_backward(key, steps, *saved_w, *saved_x)
        ctx.backend = None if torch.compiler.is_compiling() else forced_backend()  # backward may run in another thread, outside the user's `with use_backend`
        ctx.recipe, ctx.x_dtype, ctx.weight_dtype, ctx.shape = recipe, x.dtype, weight.dtype, weight.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        if ctx.backend is None:
            return QuantizedLinear._backward(ctx, dy)
        with use_backend(ctx.backend):
            return QuantizedLinear._backward(ctx, dy)

    @staticmethod
    def _backward(ctx, dy):
        key, steps, *saved = ctx.saved_tensors
        saved_w, saved_x = saved[:ctx.lengths[0]], saved[ctx.lengths[0]:]
        recipe, dx, dw, db, dsteps = ctx.recipe, None, None, None, None
        rounding = key if recipe.gradient_rounding == "stochastic" else None
        columns = ctx.shape[1]
        if ctx.needs_input_grad[0]:
            if recipe.dx == "forward":
                format = recipe.y.right
                dx = matmul_packed(dy, *saved_w, format.code, format.block, columns, True, None, ctx.x_dtype)
            elif recipe.dx is not None:
                left = _store(dy, recipe.dx.left, False, rounding, stream(0, "gradient"))
                dx = _multiply(left, _store(_values(saved_w[0]), recipe.dx.right, transpose=True), None, ctx.x_dtype)
            elif isinstance(saved_w[0], QuantizedWeight):
                dx = matmul_packed(dy, *_packed(saved_w[0], steps), True, None, ctx.x_dtype)
            else:
                dx = (dy @ saved_w[0].to(dy.dtype)).to(ctx.x_dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[5]:
            if recipe.dw == "forward":
                format = recipe.y.left
                dw = matmul_packed(dy.t(), *saved_x, format.code, format.block, columns, True, None, ctx.weight_dtype)
            elif recipe.dw is not None:
                left = _over_tokens(dy, recipe.dw.left, recipe.dw.hadamard, key, rounding)
                dw = _multiply(left, Stored(*saved_x, recipe.dw.right, left.columns), None, ctx.weight_dtype)
            else:
                dw = (dy.t() @ saved_x[0].to(dy.dtype)).to(ctx.weight_dtype)
        if ctx.needs_input_grad[5]:
            dsteps = _step_gradient(dw, saved_w[0])
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            db = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return dx, dw if ctx.needs_input_grad[1] else None, db, None, None, dsteps


def _packed(weight: QuantizedWeight, steps):
    """matmul_packed's arguments for a stored weight."""
    scales = weight.scales if steps is None else steps.detach()
    return weight.codes, scales, weight.zeros, weight.format.code, weight.format.block, weight.shape[1]


def _step_gradient(dw, weight: QuantizedWeight):
    """The sum of dW (q - z) over each group: (out, groups) fp32."""
    format, columns = weight.format, weight.shape[1]
    units = dequantize(weight.codes, torch.ones_like(weight.scales), weight.zeros, format.code, format.block, columns, torch.float32)
    block = format.block or columns
    product = torch.nn.functional.pad(units.mul_(dw), (0, -columns % block))
    return product.view(dw.shape[0], -1, block).sum(-1)
