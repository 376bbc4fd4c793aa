"""overhead: what a call costs before it computes anything: 16 elements. The goal is torch's own call for the job and 10 us more."""
from __future__ import annotations

import torch
import torch.nn.functional as F

import gradmill
from gradmill import ops

from .matmul import both_ways
from .optim import SETTINGS
from .runner import LATER, UNCOUNTED, Bench, baseline, case, ours, rival

N = 16
GOAL = (LATER, 10e-6)


CALL = "checks and choice of backend in Python, one call into C++, a tensor for each result: five to twelve us; torch's call is one of C++"


def _overhead(title, mine, theirs, label, *more, why=CALL):
    """A case of one call against torch's; ``more`` entries beside them. A call on 16 elements is no work for two threads."""
    return Bench(f"{title}, {N} elements", UNCOUNTED, [ours(mine), baseline(label, theirs), *more], why, threads=1)


@case("overhead", goal=GOAL)
def quantize(ctx):
    x = ctx.once(lambda: ctx.randn(1, N))
    return _overhead("quantize to INT8", lambda: lambda i: ops.quantize(x(), "int8"),
                     lambda: lambda i: torch.quantize_per_tensor(x(), 0.02, 0, torch.qint8), "torch.quantize_per_tensor, scale given")


@case("overhead", goal=GOAL)
def dequantize(ctx):
    def make():
        stored = ops.quantize(ctx.randn(1, N), "int8")
        return lambda i: ops.dequantize(*stored, "int8", 0, N, torch.float32)

    def theirs():
        q = torch.quantize_per_tensor(ctx.randn(1, N), 0.02, 0, torch.qint8)
        return lambda i: q.dequantize()
    return _overhead("dequantize INT8", make, theirs, "Tensor.dequantize")


@case("overhead", goal=GOAL)
def matmul_int8(ctx):
    def make():
        (a, s, _), (b, t, _) = (ops.quantize(ctx.randn(N, N), "int8") for _ in range(2))
        return lambda i: ops.matmul_int8(a, b, s, t, None, torch.float32)

    def theirs():
        a, b = (torch.ones(N, N, dtype=torch.int8, device=ctx.device) for _ in range(2))
        return lambda i: torch._int_mm(a, b.t())
    return _overhead(f"INT8 matmul {N}x{N}", make, theirs, "torch._int_mm")


@case("overhead", goal=GOAL)
def matmul_packed(ctx):
    x = ctx.once(lambda: ctx.randn(1, N))

    def make():
        stored = ops.quantize(ctx.randn(N, N), "uint4", N)
        return lambda i: ops.matmul_packed(x(), *stored, "uint4", N, N, False, None, torch.float32)

    def theirs():
        w = ctx.randn(N, N)
        return lambda i: F.linear(x(), w)
    return _overhead("product with a packed INT4 weight", make, theirs, "torch linear, fp32")


@case("overhead", goal=GOAL)
def hadamard(ctx):
    x = ctx.once(lambda: ctx.randn(1, N))
    return _overhead("Hadamard transform", lambda: lambda i: ops.hadamard(x(), N), lambda: lambda i: x().abs(), "torch.abs")


def _linear(ctx, backward):
    def tensors():
        return ctx.randn(1, N).requires_grad_(backward), ctx.randn(N, N).requires_grad_(backward), ctx.randn(1, N)

    def make(forward):
        def made():
            x, w, dy = tensors()
            return both_ways(forward, x, w, dy) if backward else lambda i: forward(x, w)
        return made
    recipe = lambda name: make(lambda x, w: gradmill.functional.linear(x, w, None, name))
    return _overhead(f"linear layer, {'forward + backward' if backward else 'forward'}", recipe("int8"), make(F.linear), "torch linear, fp32",
                     rival("gradmill, recipe bf16", recipe("bf16")), why="an autograd function in Python, and operands that become codes, three times with the backward, where torch's layer is C++")


@case("overhead")
def linear(ctx):
    """A layer, not an op: X and W are quantised and multiplied, in one call. No goal."""
    return _linear(ctx, False)


@case("overhead")
def linear_backward(ctx):
    """Three quantised products where torch has two plain ones: no goal."""
    return _linear(ctx, True)


def _step(ctx, name, torch_name, **options):
    def parameters():
        p = torch.nn.Parameter(ctx.randn(N))
        p.grad = ctx.randn(N)
        return [p]
    settings = {"lr": 1e-3, **options}

    def make(cls, **more):
        def made():
            step = cls(parameters(), **settings, **more).step
            return lambda i: step()
        return made
    theirs = getattr(torch.optim, torch_name)
    return _overhead(f"{name} step, one parameter", make(getattr(gradmill.optim, name)), make(theirs, fused=True), f"torch {torch_name}(fused=True)",
                     rival(f"torch {torch_name}", make(theirs)), why="a step costs as much whatever the rule, 30 to 36 us (busy), as torch's fused AdamW, 31; torch's SGD has less to do: 19 to 24")


@case("overhead", goal=GOAL)
def adamw_step(ctx):
    return _step(ctx, "AdamW", "AdamW", betas=SETTINGS["betas"], weight_decay=SETTINGS["weight_decay"])


@case("overhead", goal=GOAL)
def sgd_step(ctx):
    return _step(ctx, "SGD", "SGD", momentum=0.9)
