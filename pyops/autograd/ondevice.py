"""A layer whose weights and activations are INT8 and of which only a part trains."""
from __future__ import annotations

from typing import NamedTuple

import torch

from gradmill.autograd.window import Window
from gradmill.ops._registry import forced_backend, in_forwards_backend
from gradmill.ops.binary import pack_signs
from gradmill.ops.conv import fold_kept, fold_patches
from gradmill.ops.matmul import matmul_int8
from gradmill.ops.quant import dequantize, quantize
from gradmill.reference.conv import patches
from gradmill.weight import QuantizedWeight

#: Bytes of patches worked off at a time (of one image at the least).
PIECE = 1 << 14


class Part(NamedTuple):
    """An INT8 weight, the input channels it sees (int64, or None for all of them), and whether it trains."""

    weight: QuantizedWeight
    channels: torch.Tensor | None
    trains: bool


def _parts(weight, frozen, trained) -> list[Part]:
    """Of a layer with these weights, one of which may be None; trained (in,) bool where both are there."""
    channels = (None, None) if trained is None else (mask.nonzero().flatten() for mask in (trained, ~trained))
    return [Part(w, c, t) for w, c, t in zip((weight, frozen), channels, (True, False)) if w is not None]


def quantize_input(x, scale):
    """x (n, ...) as INT8 of its shape under one static scale (1, 1), and that scale for each sample: nan for one that holds a nan or an inf."""
    flat = x.reshape(len(x), x.shape[1:].numel())
    scales = scale.expand(len(x), 1)
    if flat.numel():
        low, high = flat.aminmax(dim=1, keepdim=True)
        scales = scales + (0 * low + 0 * high).to(torch.float32)
    return quantize(flat, "int8", 0, False, None, 0, scale.expand(len(x), 1))[0].view(x.shape), scales


def _select(codes, part: Part):
    return codes if part.channels is None else codes.index_select(1, part.channels)


def _pieces(n: int, size: int, groups: int, limit: int = PIECE):
    """Ranges of images that take ``limit`` bytes of patches, where each takes ``size``; 4 times that in many groups."""
    step = max(1, limit // max(1, size * (4 if groups > 1 else 1)))
    return [(first, min(first + step, n)) for first in range(0, n, step)]


def _products(a, b, a_scales, b_scales):
    """(a b^T * a_scales) * b_scales in fp32 for each group: a (groups, m, k), b (groups, n, k) int8. Of many groups, which are small, one batched product."""
    if len(a) > 1 and not a.is_cuda:  # sums of int32: the same bits as matmul_int8's
        return torch.bmm(a.to(torch.int32), b.to(torch.int32).mT).to(torch.float32).mul_(a_scales).mul_(b_scales.mT)
    products = [matmul_int8(*(t.contiguous() for t in group), None, torch.float32) for group in zip(a, b, a_scales, b_scales)]
    return products[0][None] if len(products) == 1 else torch.stack(products)


def _grouped(x, groups: int):
    """A matrix's rows in groups of neighbours."""
    return x.view(groups, len(x) // groups, x.shape[1])


def _patches(codes, window: Window):
    """(groups, tokens, k): every group's patches, a view of codes or of their padded copy."""
    p = patches(codes, *window[:4])
    return p.view(len(p), window.groups, p.shape[1] // window.groups).transpose(0, 1)


def _turned(dy, groups: int):
    """dy (n, out, oh, ow) as (groups, out / groups, tokens)."""
    return _grouped(dy.transpose(0, 1).reshape(dy.shape[1], dy[:, 0].numel()), groups)


def _product(codes, scales, weight, channels, bias, window: Window | None, y=None):
    """X W^T + b in fp32, from the codes of the channels that the weight sees (None: all there are); with ``y``, which has the bias, added to it. Piece by piece, so that a second
    part needs no second output."""
    if window is None:
        product = matmul_int8(codes if channels is None else codes.index_select(1, channels), weight.codes, scales, weight.scales, bias if y is None else None, torch.float32)
        return product if y is None else y.add_(product)
    n, (oh, ow), out, groups, first_part = len(codes), window.output(codes.shape), weight.shape[0], window.groups, y is None
    y = torch.empty((n, out, oh, ow), dtype=torch.float32, device=codes.device) if first_part else y
    for first, last in _pieces(n, oh * ow * max(weight.shape[1:].numel() * groups, 2 * out), groups):  # of few channels the product is what is large
        rows, piece = scales[first:last].repeat_interleave(oh * ow, 0), codes[first:last] if channels is None else codes[first:last].index_select(1, channels)
        part = _products(_patches(piece, window), _grouped(weight.codes, groups), rows.expand(groups, -1, 1), _grouped(weight.scales, groups))
        part = part.transpose(1, 2).reshape(out, last - first, oh, ow).transpose(0, 1)
        if first_part:
            y[first:last] = part
        else:
            y[first:last] += part
    return y if bias is None or not first_part else y.add_(bias.view(-1, 1, 1))


def _input_gradient(dy, part: Part, dx, window: Window | None):
    """dY W in fp32, of a part's channels into dx, which is returned: the weight's scales go into dY, whose rows are then quantised to INT8."""
    weight, own = part.weight, slice(None) if part.channels is None else part.channels
    if window is None:
        codes, scales, _ = quantize(dy * weight.scales.view(1, -1), "int8", 0)
        product = matmul_int8(codes, weight.codes.t().contiguous(), scales, scales.new_ones((weight.codes.shape[1], 1)), None, torch.float32)
        if part.channels is None:
            return product
        dx[:, own] = product
        return dx
    groups, columns = window.groups, weight.codes.shape[1]
    shape = dx.shape[0], dx.shape[1] if part.channels is None else len(part.channels), *dx.shape[2:]
    by_pixel = groups == 1 and dy.device.type == "cpu"  # columns (window, channels): fold_kept adds up runs of channels
    codes = weight.codes.view(len(weight.codes), shape[1], -1).transpose(1, 2).reshape(weight.codes.shape) if by_pixel else weight.codes
    right, ones = _grouped(codes, groups).mT.contiguous(), dy.new_ones((groups, columns, 1))
    for first, last in _pieces(len(dy), dy.shape[2] * dy.shape[3] * 4 * max(groups * columns, 2 * dy.shape[1]), 1):  # dY is copied twice
        d = _turned(dy[first:last] * weight.scales.view(-1, 1, 1), groups).mT  # (groups, tokens, out / groups)
        tokens = d.shape[1]
        codes, scales, _ = quantize(d.reshape(groups * tokens, d.shape[2]), "int8", 0)
        d = _products(_grouped(codes, groups), right, _grouped(scales, groups), ones).transpose(0, 1).reshape(tokens, groups * columns)
        size = last - first, *shape[1:], *window[:4], torch.float32
        dx[first:last, own] = fold_kept(d, None, None, *size, False) if by_pixel else fold_patches(d, *size)
    return dx


def _weight_gradient(dy, codes, x_scale, shape, window: Window | None):
    """dY^T X in fp32 of that shape, from the kept codes of X: every row of dY^T is quantised to INT8."""
    columns = shape[1:].numel()
    scales = x_scale.expand(columns, 1).contiguous()
    if window is None:
        left = quantize(dy, "int8", 0, True)
        return matmul_int8(left[0], codes.t().contiguous(), left[1], scales, None, torch.float32)
    dw, groups = None, window.groups
    for first, last in _pieces(len(dy), dy.shape[2] * dy.shape[3] * max(groups * columns, 2 * dy.shape[1]), groups, max(PIECE, 4 * shape.numel())):  # patches may take what the gradient takes
        left, left_scales, _ = quantize(_turned(dy[first:last], groups).flatten(0, 1), "int8", 0)
        part = _products(_grouped(left, groups), _patches(codes[first:last], window).mT, _grouped(left_scales, groups), scales.expand(groups, -1, 1)).view(shape)
        dw = part if dw is None else dw.add_(part)
    return dy.new_zeros(shape) if dw is None else dw


def _inside(y, cap: float):
    """Bits of where 0 < y < cap, of y (n, ...) held to 0 .. cap already."""
    rows = y.view(len(y), y.shape[1:].numel())
    parts = rows.split(max(1, PIECE // max(1, 4 * rows.shape[1])))
    return torch.cat([pack_signs(part.neg() if cap == torch.inf else torch.where(part < cap, part.neg(), 0.0))[0] for part in parts])


class OnDevice(torch.autograd.Function):
    """Y = min(max(X W^T + b, 0), cap), or without a cap X W^T + b, X under a static scale s_x, W under one for each output channel, both INT8; products are sums of integers.

    X (n, in), or with a window an image (n, in, h, w). The weight comes as one or two parts: the input channels that train and those that do not. Kept for
    backward: the INT8 codes of X, of the channels that train only; with a cap (inf for a ReLU) one bit of each output element; neither where nothing needs it. dY is quantised to
    INT8 by rows for dX and by columns for dW (to nearest). Rounding X is straight-through, saturated elements included.

    ``qas``: Lin et al., "On-Device Training Under 256KB Memory", 3.1. A step of SGD on the integers themselves uses their gradients, which are s_W dW and
    s_W s_x db and so are s_W^2 and (s_W s_x)^2 too small beside the integers; QAS divides by these. What is returned is in the units of the weight's values: a step by it
    moves W by -lr dW with QAS, by -lr s_W^2 dW without.
    """

    @staticmethod
    def forward(ctx, x, weight, frozen, bias, trained, x_scale, window: Window | None, cap: float | None, qas: bool):
        parts = _parts(weight, frozen, trained)
        codes, scales = quantize_input(x, x_scale)
        needs_x, needs_w, needs_b = (ctx.needs_input_grad[i] for i in (0, 1, 3))
        y, kept = None, None
        for i, part in enumerate(parts):
            if part.trains and needs_w:
                kept = _select(codes, part)
            mine, channels = (kept, None) if part.trains and needs_w else (codes, part.channels)
            y = _product(mine, scales, part.weight, channels, None if bias is None else bias.to(torch.float32), window, y)
        inside = None
        if cap is not None:
            y = y.clamp_(0, cap)  # keeps nan
            if needs_x or needs_w or needs_b:
                inside = _inside(y, cap)
        ctx.save_for_backward(kept, inside, x_scale, trained, weight if needs_x or needs_w else None, frozen if needs_x else None)
        ctx.backend = forced_backend()
        ctx.x_shape, ctx.x_dtype, ctx.window, ctx.qas, ctx.bias_dtype = x.shape, x.dtype, window, qas, None if bias is None else bias.dtype
        ctx.row_scales = None if not needs_b or qas else parts[0].weight.scales.detach()
        return y.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @in_forwards_backend
    def backward(ctx, dy):
        kept, inside, x_scale, trained, weight, frozen = ctx.saved_tensors
        window, dx, dw, db, dy = ctx.window, None, None, None, dy.to(torch.float32)
        if inside is not None:
            half, none = dy.new_full((len(dy), 1), -0.5), torch.empty(0, dtype=torch.uint8, device=dy.device)
            dy = dequantize(inside, half, none, "sign", 0, dy.shape[1:].numel(), torch.float32).add_(0.5).view(dy.shape).mul_(dy)
        if ctx.needs_input_grad[0]:
            parts = _parts(weight, frozen, trained)
            if window is not None or len(parts) > 1:
                dx = torch.empty(ctx.x_shape, dtype=torch.float32, device=dy.device)
            for part in parts:
                dx = _input_gradient(dy, part, dx, window)
            dx = dx.to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            dw = _weight_gradient(dy, kept, x_scale, weight.shape, window).to(weight.dtype)
            if not ctx.qas:
                dw *= weight.scales.view(-1, *[1] * (dw.dim() - 1)).square()
        if ctx.needs_input_grad[3]:
            db = dy.sum([d for d in range(dy.dim()) if d != 1])
            if not ctx.qas:
                db *= (ctx.row_scales * x_scale).square().view(-1)
            db = db.to(ctx.bias_dtype)
        return dx, dw, None, db, None, None, None, None, None
