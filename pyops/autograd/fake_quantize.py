"""Fake quantisation under autograd."""
from __future__ import annotations

import contextlib

import torch

from gradmill.ops import quant
from gradmill.ops._registry import forced_backend, use_backend


class FakeQuantize(torch.autograd.Function):
    """weight, steps, zeros -> the values of the quantised weight, in ``dtype``. Saves nothing but its three inputs: backward
    takes the codes again, which costs a division an element and no memory."""

    @staticmethod
    def forward(ctx, weight, steps, zeros, bits, block, dtype):
        ctx.save_for_backward(weight, steps, zeros)
        ctx.bits, ctx.block = bits, block
        ctx.backend = None if torch.compiler.is_compiling() else forced_backend()  # backward may run in another thread, outside the user's `with use_backend`
        return quant.fake_quantize(weight, steps, zeros, bits, block, dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        with use_backend(ctx.backend) if ctx.backend is not None else contextlib.nullcontext():
            gradients = quant.fake_quantize_backward(grad, *ctx.saved_tensors, ctx.bits, ctx.block)
        return (*(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad)), None, None, None)
