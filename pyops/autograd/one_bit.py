"""1-bit fully quantised training of a linear layer, or of a convolution over its patches."""
from __future__ import annotations

import torch

from gradmill.autograd.window import Window, own
from gradmill.ops._registry import forced_backend, in_forwards_backend
from gradmill.ops.binary import gradient_ranges, matmul_binary, matmul_planes, pack_gradient, sample_groups, transpose_bits
from gradmill.ops.conv import fold_kept, pack_image, patch_bits
from gradmill.ops.quant import draw_key
from gradmill.reference.philox import stream

_PIXEL = Window((1, 1), (1, 1), (0, 0), (1, 1), 1)


def prune(ranges: torch.Tensor, magnitudes: torch.Tensor, bits: int, pruning: str, offset: torch.Tensor):
    """Which groups of a gradient are kept, and what each must be multiplied by: (indices, factors).

    "sample": see :func:`gradmill.ops.sample_groups`. "top": those with the largest magnitudes, as they are, as the official code does (biased).
    "none": all.
    """
    groups = len(ranges)
    if pruning == "none" or groups == 0:
        return torch.arange(groups, device=ranges.device), torch.ones(groups, dtype=torch.float32, device=ranges.device)
    if pruning == "sample":
        return sample_groups(ranges, bits, offset)
    count = -(-groups // bits)
    return magnitudes.nan_to_num(torch.inf).topk(count).indices.sort().values, torch.ones(count, dtype=torch.float32, device=ranges.device)


class OneBit(torch.autograd.Function):
    """Y = scale * (sign(X) sign(W)^T) + b; see gradmill.recipes.ONE_BIT_FQT.

    X an image (n, in, h, w) whose patches are the product's rows, zero padding counting as +; W (out, in, kh, kw), scales (out, 1), b (out) or None. Without
    a window X (tokens, in) and W (out, in): images of one pixel. Kept for backward: two bits for each element of X (its sign, whether |X| > 1), and a number for
    each patch and for each element of the window, which say where X is not finite.

    Columns are in the order (kh, kw, in): a patch's bits are then runs of its pixels' bits, the gradient of a patch is added to an image in runs of channels, and no patch
    matrix is kept.
    """

    @staticmethod
    def forward(ctx, x, weight, scales, bias, bits, pruning, dtype, window: Window | None = None):
        image, w = (x, weight) if window is not None else (x[:, :, None, None], weight[:, :, None, None])
        window = window or _PIXEL
        signs, outside, nans, column_nans = pack_image(image, *window[:4])
        over, columns = (image.shape, *window[:4]), w.shape[1:].numel()
        patches, (packed, w_nans, _) = _patches(signs, *over), _pack_weight(w)
        ctx.last = w.shape[2:] == image.shape[2:] == (1, 1) or image.is_contiguous(memory_format=torch.channels_last) and not image.is_contiguous()
        oh, ow = window.output(image.shape)
        if ctx.last:
            y = matmul_binary(patches, packed, columns, nans, w_nans * scales, bias, dtype).view(len(image), oh, ow, len(w)).permute(0, 3, 1, 2)
        else:
            y = matmul_binary(packed, patches, columns, w_nans * scales, nans, bias, dtype, oh * ow).view(len(image), len(w), oh, ow)
        if any(ctx.needs_input_grad):
            offsets = torch.rand(2, dtype=torch.float64, device="cpu")
            ctx.save_for_backward(draw_key(x, weight), offsets, weight, scales, signs, nans, column_nans, outside if ctx.needs_input_grad[0] else None)
        ctx.backend = forced_backend()
        ctx.how, ctx.shape, ctx.x_shape, ctx.x_dtype, ctx.over = (bits, pruning), w.shape, x.shape, x.dtype, over
        ctx.bias_dtype = None if bias is None else bias.dtype
        return own(y if x.dim() == 4 else y.flatten(1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    @in_forwards_backend
    def backward(ctx, dy):
        key, (to_tokens, to_channels), weight, scales, signs, nans, column_nans, outside = ctx.saved_tensors
        (bits, pruning), over, dx, dw, ds, db = ctx.how, ctx.over, None, None, None, None
        out, columns, sizes = len(weight), ctx.shape[1:].numel(), scales.detach().flatten()
        needs_dx, needs_dw, needs_ds = ctx.needs_input_grad[:3]
        dy = dy.to(torch.float32)
        # (images, out, positions); channels last (tokens, out, 1)
        dy = (dy.movedim(1, -1).reshape(len(nans), out, 1) if ctx.last else dy.flatten(2)).contiguous()
        if pruning == "none" or not (needs_dx or needs_dw):  # only their number counts
            tokens, channels = (nans[:, 0], nans[:, 0]), (sizes, sizes)
        else:
            *tokens, range, magnitude = gradient_ranges(dy, sizes)
            channels = range * sizes.abs(), magnitude * sizes.abs()
        if needs_dx or needs_ds:
            w, w_nans, w_column_nans = _pack_weight(weight.view(ctx.shape))
        if needs_dx:  # groups: tokens
            kept, factor = prune(*tokens, bits, pruning, to_tokens)
            planes, steps, offsets = pack_gradient(dy, sizes, kept, bits, key, stream(0, "gradient"))
            part = matmul_planes(planes, transpose_bits(w, columns), out, steps * factor[:, None], offsets * factor[:, None], w_column_nans, torch.float32)
            dx = fold_kept(part, kept if len(kept) < len(nans) else None, outside, *over[0], *over[1:], ctx.x_dtype, ctx.last).view(ctx.x_shape)
        if needs_dw or needs_ds:
            patches = _patches(signs, *over)
        if needs_dw:  # groups: output channels
            kept, factor = prune(*channels, bits, pruning, to_channels)
            factor = factor[:, None] * scales[kept]
            planes, steps, offsets = pack_gradient(dy, None, kept, bits, key, stream(1, "gradient"))
            part = matmul_planes(planes, transpose_bits(patches, columns), len(nans), steps * factor, offsets * factor, column_nans, torch.float32)
            part = part.view(len(kept), *ctx.shape[2:], ctx.shape[1]).permute(0, 3, 1, 2)
            dw = (part if len(kept) == out else part.new_zeros(ctx.shape).index_copy_(0, kept, part)).to(weight.dtype).reshape(weight.shape)
        if needs_ds:
            if ctx.last:
                products = matmul_binary(patches, w, columns, nans, w_nans, None, torch.float32)[:, :, None]
            else:
                products = matmul_binary(w, patches, columns, w_nans, nans, None, torch.float32, dy.shape[2])
            ds = products.mul_(dy).sum(2).sum(0)[:, None].to(scales.dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
            db = dy.sum(2).sum(0).to(ctx.bias_dtype)  # faster than both at once
        return dx, dw, ds, db, None, None, None, None


def _patches(signs, shape, *window):
    """Packed bits of an image's patches."""
    return signs if window == _PIXEL[:4] else patch_bits(signs, *shape, *window)


def _pack_weight(w):
    """Its signs, a row for each output channel, and which rows and columns are not finite: images that are one patch each."""
    window = tuple(w.shape[2:]), (1, 1), (0, 0), (1, 1)
    signs, _, nans, column_nans = pack_image(w, *window)
    return _patches(signs, w.shape, *window), nans, column_nans
