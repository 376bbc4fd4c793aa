"""conv: convolutions in a recipe, at the size of VGG-16's middle layers."""
from __future__ import annotations

import torch
import torch.nn.functional as F

import gradmill

from .matmul import both_ways
from .runner import Bench, Work, baseline, case, ours, rival


def _layer(ctx, channels):
    batch, side = ctx.pick(32, 2), ctx.pick(16, 4)
    channels = ctx.pick(channels, 8)
    inputs = ctx.once(lambda: (ctx.randn(batch, channels, side, side).requires_grad_(), (ctx.randn(channels, channels, 3, 3) / 30).requires_grad_(),
                               ctx.randn(batch, channels, side, side)))
    image, ops = 4.0 * batch * channels * side * side, 6.0 * batch * side * side * 9 * channels * channels

    def make(name):
        return lambda: both_ways(lambda x, w: gradmill.functional.conv2d(x, w, padding=1, recipe=name), *inputs())
    return Bench(f"conv2d forward + backward, batch {batch}, {channels}->{channels}, 3x3, {side}x{side}", Work(6 * image, ops, "int8"), [
        ours(make("int8"), "gradmill, recipe int8"), baseline("torch fp32", lambda: both_ways(lambda x, w: F.conv2d(x, w, padding=1), *inputs())),
        *(rival(f"gradmill, recipe {name}", make(name)) for name in ("int7", "bf16"))],
        "a third of the time makes codes: every patch row has a scale of its own, so a pixel is divided and rounded nine times by rows and nine times by columns; "
        "dX's patches are written and added up in fp32")


@case("conv")
def vgg_128(ctx):
    return _layer(ctx, 128)


@case("conv")
def vgg_256(ctx):
    return _layer(ctx, 256)


@case("conv")
def on_device(ctx):
    batch, channels, side = ctx.pick((8, 64, 16), (2, 4, 5))
    x, dy = ctx.once(lambda: ctx.randn(batch, channels, side, side).requires_grad_()), ctx.once(lambda: ctx.randn(batch, channels, side, side))
    plain = ctx.once(lambda: torch.nn.Conv2d(channels, channels, 3, padding=1, device=ctx.device))
    ops = 6.0 * batch * side * side * 9 * channels * channels

    def run(make):
        layer = make()
        return lambda i: torch.autograd.grad(layer(x()), (x(), *layer.parameters()), dy())
    return Bench(f"nn.Int8Conv2d forward + backward, batch {batch}, {channels}->{channels}, 3x3, {side}x{side}", Work(24.0 * dy().numel(), ops, "int8"), [
        ours(lambda: run(lambda: gradmill.nn.Int8Conv2d(plain(), 0.05)), "gradmill, all INT8"), baseline("torch fp32", lambda: run(plain))],
        "made for memory (docs/results/ondevice.md), and time is what it pays with: patches are made 16 KB at a time, so an image here is a piece of its own, eight times three "
        "products of 0.1 ms with a dozen small torch calls (unfold, copies, slices) around each")
