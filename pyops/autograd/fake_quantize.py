"""Fake quantisation under autograd."""
from __future__ import annotations

import torch

from gradmill.ops import quant
from gradmill.ops._registry import forced_backend, in_forwards_backend


class FakeQuantize(torch.autograd.Function):
    """weight, steps, zeros -> the values of the quantised weight, in ``dtype``. Saves nothing but its three inputs: backward
    takes the codes again, which costs a division an element and no memory."""

    @staticmethod
    def forward(ctx, weight, steps, zeros, bits, block, dtype):
        ctx.save_for_backward(weight, steps, zeros)
        ctx.bits, ctx.block = bits, block
        ctx.backend = forced_backend()
        return quant.fake_quantize(weight, steps, zeros, bits, block, dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @in_forwards_backend
    def backward(ctx, grad):
        gradients = quant.fake_quantize_backward(grad, *ctx.saved_tensors, ctx.bits, ctx.block)
        return (*(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad)), None, None, None)
