"""1-bit fully quantised training of a linear layer, or of a convolution over its patches."""
from __future__ import annotations

import contextlib

import torch

from gradmill.autograd.window import Window
from gradmill.formats import Format
from gradmill.ops._registry import forced_backend, use_backend
from gradmill.ops.binary import matmul_binary, matmul_planes, pack_planes, pack_signs
from gradmill.ops.quant import dequantize
from gradmill.reference.philox import stream

SIGN = Format("sign")


def inclusion(ranges: torch.Tensor, count: float) -> torch.Tensor:
    """Probabilities proportional to ``ranges`` (groups,), at most 1, that add up to ``count``, or to all the groups that have a range."""
    ranges = ranges.to(torch.float64)
    ranges = torch.where(ranges.isfinite(), ranges, torch.inf)  # a nan is always kept
    order = ranges.argsort(descending=True)
    sizes, index = ranges[order], torch.arange(len(ranges), device=ranges.device)
    rest = sizes.flip(0).cumsum(0).flip(0)
    factor = (count - index).clamp(min=0) / rest  # if the first `index` are certain, for the others
    fits = sizes * factor <= 1
    certain = torch.where(fits.any(), fits.to(torch.uint8).argmax(), (sizes > 0).sum())
    others = torch.where(sizes > 0, sizes * factor.index_select(0, certain.clamp(max=len(sizes) - 1).view(1)), 0.0)
    return torch.zeros_like(sizes).scatter(0, order, torch.where(index < certain, 1.0, others.clamp(0, 1)))


def prune(ranges: torch.Tensor, magnitudes: torch.Tensor, bits: int, pruning: str, offset: torch.Tensor):
    """Which groups of a gradient are kept, and what each must be multiplied by: (indices, factors).

    "sample": 1 / bits of the groups, each with a probability p proportional to its range, times 1 / p. The paper draws each for itself; here one random
    number in [0, 1), ``offset``, places a comb over the running sum of the p (systematic sampling): the same probabilities, and a number of groups that
    is known before, ceil(groups / bits); the last of them may have the factor 0.
    "top": those with the largest magnitudes, as they are, as the official code does (biased). "none": all.
    """
    groups = len(ranges)
    if pruning == "none" or groups == 0:
        return torch.arange(groups, device=ranges.device), torch.ones(groups, device=ranges.device)
    count = -(-groups // bits)
    if pruning == "top":
        kept = magnitudes.nan_to_num(torch.inf).topk(count).indices.sort().values
        return kept, torch.ones(count, device=ranges.device)
    p = inclusion(ranges, max(groups / bits, 1.0))
    steps = torch.floor(torch.where(p < 1, p, 0.0).cumsum(0) + offset)
    hit = (p >= 1) | (steps != torch.nn.functional.pad(steps, (1, 0))[:-1])
    kept = hit.to(torch.uint8).topk(count).indices.sort().values
    return kept, torch.where(hit, 1 / p, 0.0)[kept].to(torch.float32)


def _ranges(x, dim: int):
    """Range of each group, made to include zero (a group that is not all zero has one, so that sampling is unbiased), and its largest magnitude."""
    low, high = x.amin(dim).clamp(max=0), x.amax(dim).clamp(min=0)
    return high - low, torch.maximum(high, -low)


class OneBit(torch.autograd.Function):
    """Y = scale * (sign(X) sign(W)^T) + b; see gradmill.recipes.ONE_BIT_FQT.

    X (tokens, in), or with a window an image (n, in, h, w) whose patches are X, zero padding counting as +; W (out, in) or (out, in, kh, kw), scales
    (out, 1), b (out) or None. Kept for backward: three bits for each element of X (its signs by rows and by columns, where |X| > 1).
    """

    @staticmethod
    def forward(ctx, x, weight, scales, bias, bits, pruning, dtype, window: Window | None = None):
        def signs_of(transpose):  # of a convolution straight from the image
            return pack_signs(x, transpose) if window is None else window.patches(x, 0).quantize(SIGN, transpose)[:2]

        columns = weight.shape[1:].numel()
        signs, nans = signs_of(False)
        w, w_nans = pack_signs(weight.reshape(weight.shape[0], columns))
        y = matmul_binary(signs, w, columns, nans, w_nans * scales, bias, dtype)
        if any(ctx.needs_input_grad):
            offsets = torch.rand(2, dtype=torch.float64, device="cpu")
            key = torch.stack((torch.randint(-2 ** 63, 2 ** 63 - 1, (), dtype=torch.int64, device="cpu"), torch.zeros((), dtype=torch.int64, device="cpu")))
            outside = pack_signs(1 - x.reshape(len(x), x.shape[1:].numel()).abs())[0] if ctx.needs_input_grad[0] else None
            ctx.save_for_backward(key, offsets, weight, scales, signs, nans, *signs_of(True), outside)
        ctx.backend = None if torch.compiler.is_compiling() else forced_backend()  # backward may run in another thread, outside the user's `with use_backend`
        ctx.how, ctx.x_shape, ctx.x_dtype, ctx.tokens, ctx.window = (bits, pruning), x.shape, x.dtype, len(signs), window
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y if window is None else window.image(y, x.shape, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        with use_backend(ctx.backend) if ctx.backend is not None else contextlib.nullcontext():
            return (*OneBit._backward(ctx, dy), None, None, None, None)

    @staticmethod
    def _backward(ctx, dy):
        key, (to_rows, to_channels), weight, scales, signs, nans, over_tokens, over_nans, outside = ctx.saved_tensors
        (bits, pruning), window, dx, dw, ds, db = ctx.how, ctx.window, None, None, None, None
        dy = (dy if window is None else window.rows(dy, 0)).to(torch.float32)
        columns, out, sizes = weight.shape[1:].numel(), weight.shape[0], scales.flatten()
        matrix = weight.reshape(out, columns)
        if ctx.needs_input_grad[0]:  # groups: samples
            g = dy * sizes
            kept, factor = prune(*_ranges(g, 1), bits, pruning, to_rows)
            planes, steps, offsets = pack_planes(g[kept], bits, False, key, stream(0, "gradient"))
            part = matmul_planes(planes, *_pair(pack_signs(matrix, transpose=True), out, steps * factor[:, None], offsets * factor[:, None]), torch.float32)
            some = len(kept) < ctx.tokens
            if window is not None:
                dx = window.patches(part.new_empty(ctx.x_shape), 0).fold(part, torch.float32, kept if some else None)
            else:
                dx = part.new_zeros((ctx.tokens, columns)).index_copy_(0, kept, part) if some else part
            half, none = dx.new_full((ctx.x_shape[0], 1), 0.5), torch.empty(0, dtype=torch.uint8, device=dx.device)
            inside = dequantize(outside, half, none, "sign", 0, ctx.x_shape[1:].numel(), torch.float32).add_(0.5).view(ctx.x_shape)  # 1 where |X| <= 1, else 0
            dx = (dx * inside).to(ctx.x_dtype)  # a product, so that a nan shows outside, too
        if ctx.needs_input_grad[1]:  # groups: output channels
            ranges, magnitudes = _ranges(dy, 0) if len(dy) else (dy.new_zeros(out), dy.new_zeros(out))
            kept, factor = prune(ranges * sizes.abs(), magnitudes * sizes.abs(), bits, pruning, to_channels)
            factor = factor[:, None] * scales[kept]
            planes, steps, offsets = pack_planes(dy[:, kept], bits, True, key, stream(1, "gradient"))
            part = matmul_planes(planes, *_pair((over_tokens, over_nans), ctx.tokens, steps * factor, offsets * factor), torch.float32)
            dw = (part if len(kept) == out else part.new_zeros((out, columns)).index_copy_(0, kept, part)).to(weight.dtype).view(weight.shape)
        if ctx.needs_input_grad[2]:
            w, w_nans = pack_signs(matrix)
            ds = (dy * matmul_binary(signs, w, columns, nans, w_nans, None, torch.float32)).sum(0)[:, None].to(scales.dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
            db = dy.sum(0).to(ctx.bias_dtype)
        return dx, dw, ds, db


def _pair(packed, columns, steps, offsets):
    """matmul_planes' arguments after its planes."""
    signs, nans = packed
    return signs, columns, steps.contiguous(), offsets.contiguous(), nans
