"""binary: products of packed signs and bit planes, with and without packing."""
from __future__ import annotations

import torch
import torch.nn.functional as F

import gradmill
from gradmill import biper, ops

from .runner import Bench, Work, baseline, case, ours


#: csrc/cpu/binary.cpp counts.
SIGNS = ("of the instruction's rate 0.76 are left beside loads and columns repacked in words, and a tenth of the time begins and ends the sums, 16 MB of floats (one thread, busy: "
         "k of 2048 and of 8192); packing both operands is another fifth of the time; without VPOPCNTDQ, tables of nibbles: 0.63 of theirs")
GRADIENTS = ("counted as products of signs, which the forward pass alone is: gradients are sums of up to four planes (by table, a third of the rate), a quarter of the groups are kept, "
             "and packing dY, its ranges and folding dX are passes over fp32")


def _work(n, packing=False):
    return Work((8.0 if packing else 0.25) * n * n + 4.0 * n * n, 2.0 * n ** 3, "popcount")   # bits in, fp32 out


def _signs(ctx, goal_packing):
    n = ctx.pick(2048, 128)
    x, w = (ctx.once(lambda: ctx.randn(n, n)) for _ in range(2))
    a, b = (ctx.once(lambda t=t: ops.pack_signs(t())) for t in (x, w))

    def run(i):
        (p, s), (q, t) = (ops.pack_signs(x()), ops.pack_signs(w())) if goal_packing else (a(), b())
        return ops.matmul_binary(p, q, n, s, t, None, torch.float32)
    return Bench(f"binary matmul {n} cubed{', packing both operands' if goal_packing else ', operands packed'}", _work(n, goal_packing),
                 [ours(lambda: run), baseline("torch fp32 matmul", lambda: lambda i: F.linear(x(), w()))], SIGNS)


@case("binary", goal=("torch", 6.5))
def signs(ctx):
    return _signs(ctx, False)


@case("binary", goal=("torch", 4.0))
def signs_packing(ctx):
    return _signs(ctx, True)


@case("binary")
def planes(ctx):
    n = ctx.pick(2048, 128)
    x, w = (ctx.once(lambda: ctx.randn(n, n)) for _ in range(2))
    a, b = ctx.once(lambda: ops.pack_planes(x(), 4)), ctx.once(lambda: ops.pack_signs(w()))
    return Bench(f"4-bit planes x signs {n} cubed, operands packed", _work(n), [
        ours(lambda: lambda i: ops.matmul_planes(a()[0], b()[0], n, *a()[1:], b()[1], torch.float32)),
        baseline("torch fp32 matmul", lambda: lambda i: F.linear(x(), w()))],
                 "counted as one product of signs: four planes are one by table, whose sums reach 60 and are widened every four lookups")


@case("binary", goal=("torch", 2.0))
def tenants(ctx):
    """Eight fine-tunes of one layer, a batch row each: against eight dense layers (BitDelta)."""
    n, count = ctx.pick(4096, 256), 8
    x, base, index = ctx.once(lambda: ctx.randn(count, n)), ctx.once(lambda: ctx.randn(n, n)), torch.arange(count)
    bits = ctx.once(lambda: torch.stack([ops.pack_signs(ctx.randn(n, n))[0] for _ in range(count)]))
    alphas = torch.full((count,), 1e-3, device=ctx.device)
    dense = ctx.once(lambda: [ctx.randn(n, n) for _ in range(count)])

    def run(i):
        y = ops.matmul_scaled(x(), None, None, "fp32", 0, base(), None, None, "fp32", 0, n, False, None, torch.float32)  # as nn.BitDeltaLinear
        return ops.matmul_tenants(x(), y, bits(), alphas, index, n)
    return Bench(f"{count} tenants at batch {count}, {n}x{n}: one dense product and signs", Work(4.0 * n * n + count * n * n / 8, 4.0 * count * n * n, "read"), [
        ours(lambda: run), baseline("torch fp32, a dense layer each", lambda: lambda i: [F.linear(x()[t:t + 1], dense()[t]) for t in range(count)])],
                 "the dense product, 8 rows of fp32, is three fifths of the time, the signs two fifths; 80% of the bytes are its weight")


def _training(ctx, title, products, x, w, ours_forward, torch_forward):
    """Forward and backward of one layer."""
    scales = torch.full((w().shape[0], 1), 0.05, device=ctx.device, requires_grad=True)
    dy = ctx.once(lambda: torch.randn_like(torch_forward(x(), w())))

    def both_ways(forward):
        a, b = x().clone().requires_grad_(), w().clone().requires_grad_()
        return lambda i: torch.autograd.grad(forward(a, b), (a, b), dy())
    return Bench(title, Work(4.0 * 4 * x().numel() + 4.0 * 3 * w().numel(), 6.0 * products, "popcount"), [
        ours(lambda: both_ways(lambda a, b: ours_forward(a, b, scales)), "gradmill, recipe one_bit_fqt"), baseline("torch fp32", lambda: both_ways(torch_forward))], GRADIENTS)


@case("binary")
def one_bit_linear(ctx):
    tokens, width = ctx.pick((4096, 1024), (64, 64))
    return _training(ctx, f"one_bit_fqt linear forward + backward, {tokens} tokens, {width}->{width}", tokens * width * width,
                     ctx.once(lambda: ctx.randn(tokens, width)), ctx.once(lambda: ctx.randn(width, width)),
                     lambda x, w, s: gradmill.functional.linear(x, w, None, "one_bit_fqt", s), F.linear)


def _conv(ctx, channels, side):
    batch, channels = ctx.pick((128, channels), (2, 8))
    return _training(ctx, f"one_bit_fqt conv forward + backward, {channels} channels, {side}x{side}, batch {batch}", batch * side * side * channels * channels * 9,
                     ctx.once(lambda: ctx.randn(batch, channels, side, side)), ctx.once(lambda: ctx.randn(channels, channels, 3, 3)),
                     lambda x, w, s: gradmill.functional.conv2d(x, w, None, 1, 1, recipe="one_bit_fqt", steps=s), lambda x, w: F.conv2d(x, w, None, 1, 1))


@case("binary", goal=("torch", 3.0))
def one_bit_conv_256(ctx):
    return _conv(ctx, 256, 8)


@case("binary", goal=("torch", 3.0))
def one_bit_conv_512(ctx):
    return _conv(ctx, 512, 4)


def _biper(ctx, title, layer, x, operations):
    """Inference of one packed layer of BiPer."""
    def packed():
        model = torch.nn.Sequential(layer()).to(ctx.device)
        biper.convert(model, filter=lambda *_: True)
        biper.binarize(model)
        biper.pack(model.eval())
        return model

    def run(make):
        model = make()

        def forward(i):
            with torch.no_grad():
                return model(x())
        return forward
    return Bench(title, Work(4.0 * x().numel(), operations, "popcount"), [
        ours(lambda: run(packed), "gradmill, biper.pack"), baseline("torch fp32", lambda: run(lambda: layer().to(ctx.device)))],
        "X is read and Y written in fp32, and X's signs are packed: at this rate of products not hidden behind them")


@case("binary")
def biper_linear(ctx):
    batch, n = ctx.pick((64, 4096), (4, 64))
    return _biper(ctx, f"BiPer's packed linear layer, batch {batch}, {n}->{n}", lambda: torch.nn.Linear(n, n), ctx.once(lambda: ctx.randn(batch, n)), 2.0 * batch * n * n)


@case("binary")
def biper_conv(ctx):
    batch, channels = ctx.pick((128, 256), (2, 8))
    return _biper(ctx, f"BiPer's packed convolution, {channels} channels, 8x8, batch {batch}", lambda: torch.nn.Conv2d(channels, channels, 3, padding=1),
                  ctx.once(lambda: ctx.randn(batch, channels, 8, 8)), 2.0 * batch * 64 * channels * channels * 9)


@case("binary", goal=("torch", 2.0))
def one_bit_vgg(ctx):
    """A VGG-16 for 32x32 images (BatchNorm and Hardtanh behind every convolution), a whole step: all convolutions but the first in one_bit_fqt."""
    batch, widths = ctx.pick((128, (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)), (2, (8, 8, 0, 8, 0)))
    x, labels = ctx.once(lambda: ctx.randn(batch, 3, 32, 32)), torch.arange(batch, device=ctx.device) % 10

    def model():
        layers, channels = [], 3
        for width in widths:
            layers += [torch.nn.Conv2d(channels, width, 3, padding=1), torch.nn.BatchNorm2d(width), torch.nn.Hardtanh(inplace=True)] if width else [torch.nn.MaxPool2d(2)]
            channels = width or channels
        return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.LazyLinear(10)).to(ctx.device)

    def step(recipe):
        network = model()
        network(x()[:2])
        if recipe:
            gradmill.convert(network, recipe)
        optimizer = (gradmill.optim if recipe else torch.optim).SGD(network.parameters(), lr=0.01)

        def run(i):
            optimizer.zero_grad()
            F.cross_entropy(network(x()), labels).backward()
            optimizer.step()
        return run
    products, channels, side = 0, 3, 32
    for width in widths:
        products += batch * channels * width * 9 * side * side
        channels, side = width or channels, side if width else side // 2
    return Bench(f"one_bit_fqt, a step of VGG-16 at 32x32, batch {batch}", Work(0.0, 6.0 * products, "popcount"), [
        ours(lambda: step("one_bit_fqt"), "gradmill, recipe one_bit_fqt"), baseline("torch fp32", lambda: step(None))],
        GRADIENTS + "; BatchNorm, Hardtanh and pooling are torch's")
