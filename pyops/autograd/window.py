"""How a convolution is a product of matrices: its window, and the patches it sees."""
from __future__ import annotations

from typing import NamedTuple

import torch

from gradmill.formats import Format
from gradmill.ops.conv import fold_kept, fold_patches, quantize_patches
from gradmill.recipes import Matmul, Recipe
from gradmill.reference.conv import output_size, patches


def own(y: torch.Tensor) -> torch.Tensor:
    """y, with the same memory and strides, as no view: of a custom Function's output that is one, torch refuses changes in place (a ReLU(inplace=True) behind
    the layer)."""
    return torch.ops.aten._unsafe_view(y, y.shape)


class Window(NamedTuple):
    """A convolution's geometry: (vertical, horizontal) each, padding the same on both sides."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def output(self, shape) -> tuple[int, int]:
        """Height and width of what comes of an image of that shape (n, channels, height, width)."""
        return output_size(*shape[2:], *self[:4])

    def rows(self, y, group: int):
        """A group's channels of y (n, out, oh, ow) as the matrix (n oh ow, out / groups)."""
        size = y.shape[1] // self.groups
        y = y.narrow(1, group * size, size)
        if y.is_contiguous(memory_format=torch.channels_last):
            return y.permute(0, 2, 3, 1).reshape(y.numel() // size if size else 0, size)
        return y.transpose(0, 1).reshape(size, y[:, 0].numel() if size else 0).t()  # copies runs of oh ow

    def points(self, y, group: int) -> "Patches":
        """What ``rows`` gives, as patches of a window of one pixel: quantised from where they lie."""
        size = y.shape[1] // self.groups
        return Patches(y.narrow(1, group * size, size).flatten(2)[:, :, None], _POINT)

    def patches(self, x, group: int) -> "Patches":
        """Those of a group's channels of x (n, in, h, w)."""
        size = x.shape[1] // self.groups
        return Patches(x.narrow(1, group * size, size), self)

    def image(self, rows, shape, like):
        """The matrix (n oh ow, out) as (n, out, oh, ow), in the memory layout of ``like``."""
        y = rows.view(shape[0], *self.output(shape), rows.shape[1]).permute(0, 3, 1, 2)
        last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
        return own(y if last else y.contiguous())

    def kept_format(self, recipe: Recipe, shape) -> Format | None:
        """The format of X in dW, if it treats all elements of an image of that shape alike, so that the image can be kept in it instead
        of patches: plain floats, and one scale for everything where every pixel is in some patch."""
        format = recipe.dw.right if isinstance(recipe.dw, Matmul) and not recipe.dw.hadamard else recipe.y.left if recipe.dw == "forward" else None
        if format is None or not format.blocked:
            return format
        covered = self.groups == 1 and all(d == 1 and s <= k and (o - 1) * s + k >= p + size
                      for size, o, k, s, p, d in zip(shape[2:], self.output(shape), *self[:4]))
        return format if covered and format.block == 0 and format.rows == 0 and format.scale == "fp32" else None

    def saved_bytes(self, recipe: Recipe, shape, itemsize: int) -> tuple[int, bool]:
        """(bytes of X that forward keeps for dW: exact, for an image of that shape and item size; whether they are patches). Of the
        quantised patches and the image whichever is smaller."""
        n, channels, height, width = shape
        if recipe.frozen:
            return 0, False
        if recipe.one_bit is not None:
            oh, ow = self.output(shape)
            each = channels // self.groups  # signs of the image; a number for each patch and each element of the window
            return self.groups * (n * height * width * -(-each // 8) + 4 * (n * oh * ow + each * self.kernel[0] * self.kernel[1])), False
        format = self.kept_format(recipe, shape)
        image = n * channels * height * width * itemsize if format is None else format.nbytes(n, channels * height * width)
        if recipe.dw is None:
            return image, False
        oh, ow = self.output(shape)
        quantised = self.groups * recipe.saved_bytes(n * oh * ow, channels // self.groups * self.kernel[0] * self.kernel[1], itemsize)
        return min(quantised, image), quantised < image


_POINT = Window((1, 1), (1, 1), (0, 0), (1, 1), 1)


class Patches:
    """The patches of an image (n, c, h, w) as a matrix (n oh ow, c kh kw) that is not made before a format asks for it."""

    def __init__(self, image, window: Window):
        self.image, self.window, self.dtype, self.device = image, window, image.dtype, image.device
        n, channels = image.shape[:2]
        oh, ow = window.output(image.shape)
        self.shape = n * oh * ow, channels * window.kernel[0] * window.kernel[1]

    def matrix(self):
        return patches(self.image, *self.window[:4])

    def quantize(self, format: Format, transpose: bool):
        """(codes, scales, zeros) in a format whose blocks share no scales; of a plain one empty scales and zeros."""
        return quantize_patches(self.image, *self.window[:4], format.code, format.block, transpose)

    def split(self, dim: int, whole: bool) -> list["Patches"]:
        """Pieces whose matrices are of a size to keep at hand, along the images (0) or the channels (1)."""
        length, numel = self.image.shape[dim], self.shape[0] * self.shape[1]
        limit = CHUNK if self.image.is_cuda or torch.compiler.is_compiling() else IN_CACHE
        step = length if whole else max(1, length * limit // max(numel, 1))
        return [self] if step >= length else [Patches(part, self.window) for part in self.image.split(step, dim)]

    def fold(self, d, dtype, by_pixel: bool):
        """The gradient of the image, given that of this matrix, or with ``by_pixel`` of one whose columns are (window, channels)."""
        if by_pixel:
            last = self.image.is_contiguous(memory_format=torch.channels_last)
            return fold_kept(d, None, None, *self.image.shape, *self.window[:4], dtype, last and not self.image.is_contiguous())
        return fold_patches(d, *self.image.shape, *self.window[:4], dtype)


#: Elements of a patch matrix worked off at a time: where a call costs little beside them, or each is a node of a graph.
CHUNK = 1 << 23
#: On CPU: dX's fp32 patches are read again before they leave the cache. 128 channels of 16x16, batch 32: 38 ms forward and backward, 43 with CHUNK.
IN_CACHE = 5 << 18
