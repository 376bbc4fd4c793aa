"""scaling: the same jobs over sizes, batches and threads, one case a point; the page draws them as lines. In full runs, or by name."""
from __future__ import annotations

import torch
import torch.nn.functional as F

import gradmill
from gradmill import ops

from .matmul import FEW_ROWS, LARGE, LINEAR, SOME_ROWS, both_ways
from .optim import SETTINGS, BLOCK_SCALE, _coded, _stepper
from .quant import ROWS_WHY, torch_int8
from .runner import Bench, Work, baseline, case, ours, peer, rival


SHARED = "; the limit is of all threads together"


def points(series, varies, values):
    """Registers ``build(ctx, value)`` once per value, as points of one plot."""
    def register(build):
        for value in values:
            def one(ctx, value=value):
                bench = build(ctx, value)
                bench.title, bench.point = f"{series}, {varies} {value:,}", (series, varies, value)
                return bench
            case("scaling", full=True, name=f"{build.__name__}_{value}")(one)
        return build
    return register


def _adamw(ctx, n, **bench):
    rows = max(1, n // 1024)

    def parameters():
        p = torch.nn.Parameter(ctx.randn(rows, min(n, 1024)))
        p.grad = ctx.randn(rows, min(n, 1024))
        return [p]
    return Bench("", Work((16 + 4 * BLOCK_SCALE) * n, 15.0 * n, "update"), [
        ours(lambda: _stepper(gradmill.optim.AdamW(parameters(), **SETTINGS, states="int8")), "gradmill, 8-bit states"),
        rival("gradmill, fp32 states", lambda: _stepper(gradmill.optim.AdamW(parameters(), **SETTINGS))),
        baseline("torch AdamW(fused=True)", lambda: _stepper(torch.optim.AdamW(parameters(), fused=True, **SETTINGS))),
        peer("bitsandbytes", "bitsandbytes AdamW8bit", lambda m: _stepper(m.optim.AdamW8bit(parameters(), **SETTINGS)))],
        "a step costs 30 us or more before its first parameter; large ones are " + _coded(33, 257) + SHARED, **bench)


@points("AdamW step", "parameters", [1 << k for k in (10, 13, 16, 19, 22, 25)])
def adamw_size(ctx, n):
    return _adamw(ctx, ctx.pick(n, 1024))


def _int8(ctx, n, **bench):
    def make():
        (x, s, _), (w, t, _) = (ops.quantize(ctx.randn(n, n), "int8") for _ in range(2))
        return lambda i: ops.matmul_int8(x, w, s, t, None, torch.float32)

    def int_mm():
        x, w = (ops.quantize(ctx.randn(n, n), "int8")[0] for _ in range(2))
        return lambda i: torch._int_mm(x, w.t())

    def plain():
        x, w = ctx.randn(n, n), ctx.randn(n, n)
        return lambda i: F.linear(x, w)
    return Bench("", Work(6.0 * n * n, 2.0 * n ** 3, "int8"), [ours(make), baseline("torch fp32 matmul", plain), rival("torch._int_mm, int32 out", int_mm)],
        "small ones: a call costs 10 us, and both operands are packed; large ones: " + LARGE + SHARED, **bench)


@points("INT8 matmul, operands quantised", "rows and columns", [64, 128, 256, 512, 1024, 2048, 4096])
def int8_size(ctx, n):
    return _int8(ctx, ctx.pick(n, 64))


@points("quantise to INT8, a scale per row of 1024", "rows", [1, 16, 256, 4096, 65536])
def quantize_size(ctx, rows):
    rows = ctx.pick(rows, 4)
    x = ctx.rotate(lambda: ctx.randn(rows, 1024))
    return Bench("", Work(5.0 * rows * 1024, 4.0 * rows * 1024, "copy"), [
        ours(lambda: lambda i: ops.quantize(x(i), "int8")), baseline("torch expression", lambda: lambda i: torch_int8(x(i)))],
        "a call costs 10 us, and a second thread some more; of many rows, " + ROWS_WHY)


@points("INT4 weight-only 4096x4096", "batch", [1, 2, 4, 8, 16, 32, 64, 128])
def weight_only_batch(ctx, batch):
    n, group = ctx.pick(4096, 256), 128
    w = lambda: ctx.randn(n, n) / n ** 0.5
    x, packed, plain = ctx.once(lambda: ctx.randn(batch, n)), ctx.rotate(lambda: ops.quantize(w(), "uint4", group)), ctx.rotate(w)

    def bnb(m):
        ring = ctx.rotate(lambda: m.functional.quantize_4bit(w(), blocksize=group, quant_type="nf4"))
        return torch.no_grad()(lambda i: m.matmul_4bit(x(), ring(i)[0].t(), quant_state=ring(i)[1]))
    return Bench("", Work(n * n / 2 + n * n / group * 5 + 8.0 * batch * n, 2.0 * batch * n * n, "read" if batch == 1 else "fp32"), [
        ours(lambda: lambda i: ops.matmul_packed(x(), *packed(i), "uint4", group, n, False, None, torch.float32)),
        baseline("torch fp32 weight", lambda: lambda i: F.linear(x(), plain(i))), peer("bitsandbytes", "bitsandbytes matmul_4bit (nf4)", bnb)],
        FEW_ROWS if batch <= 4 else SOME_ROWS if batch <= 16 else "W is decoded while it is packed, for few rows to multiply: at 32 that is not yet paid for")


def _linear(ctx, tokens, **bench):
    tokens, width = ctx.pick((tokens, 1024), (64, 64))
    inputs = ctx.once(lambda: (ctx.randn(tokens, width).requires_grad_(), (ctx.randn(width, width) / 32).requires_grad_(), ctx.randn(tokens, width)))
    make = lambda forward: lambda: both_ways(forward, *inputs())
    return Bench("", Work(24.0 * tokens * width, 6.0 * tokens * width * width, "int8"), [
        ours(make(lambda x, w: gradmill.functional.linear(x, w, None, "int8")), "gradmill, recipe int8"), baseline("torch fp32", make(F.linear)),
        rival("gradmill, recipe int7", make(lambda x, w: gradmill.functional.linear(x, w, None, "int7")))], LINEAR + SHARED, **bench)


@points("linear 1024->1024, forward + backward", "tokens", [64, 256, 1024, 4096, 16384])
def linear_tokens(ctx, tokens):
    return _linear(ctx, tokens)


THREADS = sorted({*(1 << k for k in range(torch.get_num_threads().bit_length())), torch.get_num_threads()})


@points("AdamW step, 20M parameters", "threads", THREADS)
def adamw_threads(ctx, threads):
    return _adamw(ctx, ctx.pick(20 << 20, 1024), threads=threads)


@points("INT8 matmul 2048 cubed", "threads", THREADS)
def int8_threads(ctx, threads):
    return _int8(ctx, ctx.pick(2048, 64), threads=threads)


@points("linear 1024->1024, 4096 tokens, forward + backward", "threads", THREADS)
def linear_threads(ctx, threads):
    return _linear(ctx, 4096, threads=threads)
