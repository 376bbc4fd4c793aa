"""conv reference: a convolution's patches as a matrix, and back."""
from __future__ import annotations

import torch

from gradmill.formats import FLOAT_DTYPES
from gradmill.reference import binary, quant


def output_size(height, width, kernel, stride, padding, dilation):
    """(oh, ow), each floor((size + 2 padding - dilation (kernel - 1) - 1) / stride) + 1."""
    return tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in zip((height, width), kernel, stride, padding, dilation))


def patches(x, kernel, stride, padding, dilation):
    """im2col: x (n, c, h, w) -> (n oh ow, c kh kw), columns in the order of ``weight.flatten(1)``, rows in that of the output
    positions; a transposed view: the memory is (c kh kw, n oh ow), whose rows are runs of the image's."""
    if any(padding):
        x = torch.nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    for dim in (0, 1):
        x = x.unfold(2 + dim, dilation[dim] * (kernel[dim] - 1) + 1, stride[dim])[..., ::dilation[dim]]
    n, c, oh, ow, kh, kw = x.shape
    return x.permute(1, 4, 5, 0, 2, 3).reshape(c * kh * kw, n * oh * ow).t()


def quantize_patches(x, kernel, stride, padding, dilation, code, block=0, transpose=False):
    matrix = patches(x, kernel, stride, padding, dilation)
    if code in FLOAT_DTYPES:
        return ((matrix.t() if transpose else matrix).to(FLOAT_DTYPES[code]).contiguous(),
                *(x.new_empty((0,), dtype=dtype) for dtype in (torch.float32, torch.uint8)))
    if code == "sign":
        return (*binary.pack_signs(matrix, transpose), x.new_empty((0,), dtype=torch.uint8))
    return quant.quantize(matrix, code, block, transpose)


def fold_patches(d, n, channels, height, width, kernel, stride, padding, dilation, dtype, kept=None):
    """col2im, the transpose of ``patches``: every element of d (n oh ow, c kh kw) is added to the pixel it came from. Sums in
    fp32, kernel positions in order. With ``kept`` d has only these of its rows; the others are zeros."""
    oh, ow = output_size(height, width, kernel, stride, padding, dilation)
    if kept is not None:
        d = d.new_zeros((n * oh * ow, d.shape[1])).index_copy_(0, kept, d)
    out = d.new_zeros((n, channels, height + 2 * padding[0], width + 2 * padding[1]), dtype=torch.float32)
    d = d.to(torch.float32).reshape(n, oh, ow, channels, *kernel).permute(0, 3, 4, 5, 1, 2)
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            top, left = i * dilation[0], j * dilation[1]
            out[:, :, top:top + (oh - 1) * stride[0] + 1:stride[0], left:left + (ow - 1) * stride[1] + 1:stride[1]] += d[:, :, i, j]
    return out[:, :, padding[0]:padding[0] + height, padding[1]:padding[1] + width].to(dtype).contiguous()
