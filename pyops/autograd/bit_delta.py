"""A dense product plus a delta of packed signs for each row."""
from __future__ import annotations

import torch

from gradmill.ops._registry import forced_backend, in_forwards_backend
from gradmill.ops.binary import matmul_tenants
from gradmill.ops.matmul import matmul_packed


class BitDelta(torch.autograd.Function):
    """Y = base + alpha_t X sign_t^T, base (tokens, out) computed by the caller, t the tenant of each row. Backward hands dY to base, and
    with G = dY_t sign_t, one packed product a tenant, alpha_t G to X and the sum of X * G to alpha_t."""

    @staticmethod
    def forward(ctx, x, base, bits, alphas, tenants):
        ctx.save_for_backward(x, bits, alphas, tenants)
        ctx.backend = forced_backend()
        return matmul_tenants(x, base, bits, alphas, tenants, x.shape[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    @in_forwards_backend
    def backward(ctx, dy):
        x, bits, alphas, tenants = ctx.saved_tensors
        dx, dalphas = torch.zeros_like(x, dtype=torch.float32), torch.zeros_like(alphas)
        ones, none = alphas.new_ones((bits.shape[1], 1)), torch.empty(0, dtype=torch.uint8, device=x.device)
        for t in tenants.unique().tolist() if ctx.needs_input_grad[0] or ctx.needs_input_grad[3] else ():
            if t >= 0:
                rows = (tenants == t).nonzero().flatten().to(x.device)
                g = matmul_packed(dy[rows], bits[t], ones, none, "sign", 0, x.shape[1], True, None, torch.float32)
                dx[rows] = alphas[t] * g
                dalphas[t] = (x[rows].to(torch.float32) * g).sum()
        needs = ctx.needs_input_grad
        return dx.to(x.dtype) if needs[0] else None, dy if needs[1] else None, None, dalphas if needs[3] else None, None
