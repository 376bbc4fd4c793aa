"""The quantised linear layer's forward and backward."""
from __future__ import annotations

import torch

from gradmill.ops._registry import forced_backend, use_backend
from gradmill.ops.matmul import matmul_int8
from gradmill.ops.quant import quantize
from gradmill.recipes import Recipe
from gradmill.reference.philox import stream
from gradmill.weight import QuantizedWeight


def _values(weight):
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight


def _int8(x, transpose=False, key=None, stream=0):
    codes, scales, _ = quantize(x, "int8", 0, transpose, key, stream)
    return codes, scales


class QuantizedLinear(torch.autograd.Function):
    """Y = X W^T + b with each of the three matmuls in its recipe's format.

    X (tokens, in), W (out, in) plain or QuantizedWeight, b (out) or None. A matmul in INT8 quantises both operands
    along the dimension it sums over, so X, W and dY each need two copies: X's and dY's come from one tensor, once by
    rows and once by columns. Saved for dW: the INT8 copy of X by columns (a quarter of fp32), not X.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, recipe: Recipe, dtype):
        w = _values(weight)
        if recipe.y == "int8":
            y = matmul_int8(*_interleave(_int8(x), _int8(w)), bias, dtype)
        else:
            y = torch.nn.functional.linear(x.to(dtype), w.to(dtype), None if bias is None else bias.to(dtype))
        saved_x = ()
        if ctx.needs_input_grad[1]:
            saved_x = _int8(x, transpose=True) if recipe.dw == "int8" else (x,)
        key = None
        if recipe.gradient_rounding == "stochastic":
            key = torch.stack((torch.randint(-2 ** 63, 2 ** 63 - 1, (), dtype=torch.int64, device="cpu"),
                               torch.zeros((), dtype=torch.int64, device="cpu")))
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, key, *saved_x)
        ctx.backend = None if torch.compiler.is_compiling() else forced_backend()  # backward may run in another thread, outside the user's `with use_backend`
        ctx.recipe, ctx.x_dtype, ctx.weight_dtype = recipe, x.dtype, weight.dtype
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
        weight, key, *saved_x = ctx.saved_tensors
        recipe, dx, dw, db = ctx.recipe, None, None, None
        if ctx.needs_input_grad[0]:
            w = _values(weight)
            if recipe.dx == "int8":
                dx = matmul_int8(*_interleave(_int8(dy, False, key, stream(0, "gradient")), _int8(w, transpose=True)), None, ctx.x_dtype)
            else:
                dx = (dy @ w.to(dy.dtype)).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            if recipe.dw == "int8":
                dw = matmul_int8(*_interleave(_int8(dy, True, key, stream(1, "gradient")), saved_x), None, ctx.weight_dtype)
            else:
                dw = (dy.t() @ saved_x[0].to(dy.dtype)).to(ctx.weight_dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            db = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return dx, dw, db, None, None


def _interleave(a, b):
    """(codes, scales), (codes, scales) -> a, b, a_scales, b_scales."""
    return a[0], b[0], a[1], b[1]
