"""codebook: weights of packed indices into codebooks against dense ones."""
from __future__ import annotations

import torch
import torch.nn.functional as F

from gradmill import ops

from .matmul import GROUP, both_ways
from .runner import Bench, Work, baseline, case, ours, rival

ROWS = 64  # that share a codebook


def _weight(ctx, n, bits):
    groups = min(-(-n // ROWS), 256)
    indices = torch.randint(0, 256, (n, ops.codebook.row_bytes(n, bits)), dtype=torch.uint8, device=ctx.device)
    return indices, ctx.randn(groups, 1 << bits).sort(1).values, (torch.arange(n, device=ctx.device) * groups // n).to(torch.uint8)


def _product(ctx, bits, batch):
    n = ctx.pick(4096, 256)
    x, packed, plain = ctx.once(lambda: ctx.randn(batch, n)), ctx.rotate(lambda: _weight(ctx, n, bits)), ctx.rotate(lambda: ctx.randn(n, n))
    integers = ctx.rotate(lambda: ops.quantize(ctx.randn(n, n), f"uint{bits}", GROUP))
    bytes = n * n * bits / 8 + n / ROWS * 4 * 2 ** bits + n + 8.0 * batch * n
    return Bench(f"{bits}-bit codebooks, batch {batch}, {n}x{n}", Work(bytes, 2.0 * batch * n * n, "read" if batch == 1 else "fp32"), [
        ours(lambda: lambda i: ops.matmul_codebook(x(), *packed(i), bits, n, False, None, torch.float32)),
        baseline("torch fp32 weight", lambda: lambda i: F.linear(x(), plain(i))),
        *([rival(f"gradmill uint{bits}, groups of {GROUP}", lambda: lambda i: ops.matmul_packed(x(), *integers(i), f"uint{bits}", GROUP, n, False, None, torch.float32))]
          if bits in (2, 3, 4, 8) else [])],
        "16 rows do not pay for packed panels: dot products on rows looked up, an instruction to load for each fma" if batch > 1 else
        "bound by instructions: " + ("256 codewords are many registers' worth of tables, looked up one after the other" if bits > 4 else
                                     f"{'three' if bits == 4 else 'five'} look up and add a vector's worth of weights, whose bytes are read in the time of one"))


@case("codebook", goal=("torch", 3.0))
def four_bits(ctx):
    return _product(ctx, 4, 1)


@case("codebook")
def four_bits_batch_16(ctx):
    return _product(ctx, 4, 16)


@case("codebook")
def two_bits(ctx):
    return _product(ctx, 2, 1)


@case("codebook")
def eight_bits(ctx):
    return _product(ctx, 8, 1)


@case("codebook")
def training(ctx):
    """Forward and backward of a layer, and a step of its indices."""
    from gradmill import codebook

    tokens, n = ctx.pick((1024, 1024), (64, 64))
    dy = ctx.once(lambda: ctx.randn(tokens, n))

    def make(steps):
        def build():
            model = torch.nn.Sequential(torch.nn.Linear(n, n, bias=False, device=ctx.device))
            codebook.fit(model, 4, iterations=1, progress=False)
            indices, x = codebook.Indices(model) if steps else None, ctx.randn(tokens, n).requires_grad_()

            def run(i):
                model.zero_grad()
                x.grad = None
                model(x).backward(dy())
                if steps:
                    indices.step()
                    indices.zero_grad()
            return run
        return build
    return Bench(f"4-bit codebooks forward + backward + step of the indices, {tokens} tokens, {n}->{n}", Work(4.0 * 4 * tokens * n, 6.0 * tokens * n * n, "fp32"), [
        ours(make(True)), rival("gradmill, indices fixed", make(False)),
        baseline("torch fp32", lambda: both_ways(F.linear, ctx.randn(tokens, n).requires_grad_(), ctx.randn(n, n).requires_grad_(), dy()))],
                 "dW is made twice, 256 rows at a time, for the codewords and for the indices' step, so that it never exists whole: four products instead of three; moving "
                 "the indices is the rest")


@case("codebook")
def bct_layer(ctx):
    """An encoder layer in BCT's integers: the products are INT8's, the steps between them plain torch. It saves memory, not time."""
    from gradmill import bct

    tokens, width = ctx.pick((256, 512), (8, 64))
    x = ctx.once(lambda: ctx.randn(1, tokens, width))

    def layer():
        return torch.nn.TransformerEncoderLayer(width, 8, 4 * width, batch_first=True).eval().to(ctx.device)

    def run(model):
        def forward(i):
            with torch.no_grad():
                return model(x())
        return forward
    return Bench(f"BCT's encoder layer of width {width}, {tokens} tokens", Work(6.0 * width * width, 24.0 * tokens * width * width, "int8"), [
        ours(lambda: run(bct.quantize(layer())[0]), "gradmill, bct.quantize"), baseline("torch fp32", lambda: run(layer()))],
                 "its integer products take an eighth; seven tenths are shifts, additions and clamps in torch, about 500 calls, that keep every intermediate in the paper's integers")
