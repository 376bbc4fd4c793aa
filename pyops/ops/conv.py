"""conv: a convolution's patches."""
from __future__ import annotations


def check_geometry(function: str, height: int, width: int, kernel, stride, padding, dilation):
    """ValueError for numbers that make no convolution."""
    for name, value, least in (("kernel", kernel, 1), ("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if min(value) < least:
            raise ValueError(f"gradmill {function}: {name} is {tuple(value)}; it must be at least {least}")
    for size, k, p, d in zip((height, width), kernel, padding, dilation):
        if size + 2 * p < d * (k - 1) + 1:
            raise ValueError(f"gradmill {function}: kernel is {tuple(kernel)}, dilation {tuple(dilation)}; they must fit into the padded image, "
                             f"{height} x {width} with padding {tuple(padding)}")
