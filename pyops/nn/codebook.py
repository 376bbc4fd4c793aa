"""A linear layer whose weight is packed indices into codebooks, both of which train."""
from __future__ import annotations

import torch

from gradmill import functional
from gradmill.autograd.codebook import ROWS, CodebookProduct
from gradmill.nn._layer import KeepsFloat32
from gradmill.ops.codebook import MAX_GROUPS, row_bytes
from gradmill.reference.codebook import values
from gradmill.reference.quant import pack_bits, unpack_bits


class CodebookLinear(KeepsFloat32, torch.nn.Module):
    """torch.nn.Linear whose weight is indices of 1 to 8 bits into a codebook for each group of rows; :func:`gradmill.codebook.fit` makes it of one.

    "Joint Learning of Codebooks and Mappings" (JLCM): rows are grouped by the distribution of their weights and nothing is stored for a group
    but its codebook, or one scale. What a weight of (out, in) takes is exactly out * ceil(in * bits / 8) bytes of ``indices``, out bytes of
    ``row_groups`` and 4 * 2^bits a group of ``codebooks`` (``shared``: 4 * 2^bits once and 4 a group of ``scales``).

    Args:
        in_features, out_features, bias, device, dtype: as in torch.nn.Linear; dtype is the bias's, and that of :meth:`dequantize_`.
        bits: of an index. groups: at most 256. shared: one codebook for all groups, times a scale for each.

    Parameters ``codebooks`` (groups, 2^bits), or (1, 2^bits) and ``scales`` (groups, 1), float32, and ``bias``; they train with any optimizer,
    indices with :class:`gradmill.codebook.Indices`. Buffers ``indices`` (out, ceil(in * bits / 8)) and ``row_groups`` (out), uint8: ``state_dict``
    holds the packed form. A new layer's weight is zero. Raises ValueError for bits and groups.
    """

    _float32 = ("codebooks", "scales")

    def __init__(self, in_features, out_features, bias=True, bits=4, groups=1, shared=False, device=None, dtype=None):
        super().__init__()
        if bits not in range(1, 9):
            raise ValueError(f"bits is {bits!r}; it must be 1 to 8")
        if not 1 <= groups <= MAX_GROUPS:
            raise ValueError(f"groups is {groups!r}; it must be 1 to {MAX_GROUPS}, because a row keeps its group's number in a byte")
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.codebooks = torch.nn.Parameter(torch.zeros((1 if shared else groups, 1 << bits), dtype=torch.float32, device=device))
        self.register_parameter("scales", torch.nn.Parameter(torch.ones((groups, 1), dtype=torch.float32, device=device)) if shared else None)
        self.register_parameter("bias", torch.nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None)
        self.register_buffer("indices", torch.zeros((out_features, row_bytes(in_features, bits)), dtype=torch.uint8, device=device))
        self.register_buffer("row_groups", torch.zeros(out_features, dtype=torch.uint8, device=device))
        self.dtype = dtype or torch.get_default_dtype()
        self.kept: list | None = None  # what gradmill.codebook.Indices steps on: X and dY of every backward pass since its last step

    @property
    def groups(self) -> int:
        return len(self.codebooks if self.scales is None else self.scales)

    def books(self) -> torch.Tensor:
        """The codebook of each group, (groups, 2^bits)."""
        return self.codebooks if self.scales is None else self.codebooks * self.scales

    def nbytes(self) -> int:
        """Exact bytes of the weight as it is stored."""
        return sum(t.nbytes for t in (self.indices, self.row_groups, self.codebooks, self.scales) if t is not None)

    @torch.no_grad()
    def dequantize(self) -> torch.Tensor:
        """The weight (out, in) in this layer's dtype."""
        return values(self.indices, self.books(), self.row_groups, self.bits, self.in_features).to(self.dtype)

    @property
    def weight(self) -> torch.Tensor:
        """:meth:`dequantize`'s values, decoded at every read, for models that look at a layer's weight: T5 compares its dtype with the input's."""
        return self.dequantize()

    def dequantize_(self) -> torch.nn.Linear:
        """This layer as torch's plain one with the same values; the bias stays the Parameter that it is."""
        new = torch.nn.Linear(self.in_features, self.out_features, False, device="meta", dtype=self.dtype)
        new.weight = torch.nn.Parameter(self.dequantize(), self.codebooks.requires_grad)
        new.bias = self.bias
        return new.train(self.training)

    @torch.no_grad()
    def sort_(self) -> "CodebookLinear":
        """Codewords in ascending order, as steps of the indices want them, after training has moved one past another. No value of the weight changes."""
        if (self.codebooks.diff(dim=1) < 0).any():
            codebooks, order = self.codebooks.sort(dim=1, stable=True)
            ranks = order.argsort(1)
            for first in range(0, self.out_features, ROWS):
                rows = slice(first, first + ROWS)
                book = self.row_groups[rows].to(torch.int64) if self.scales is None else torch.zeros_like(self.row_groups[rows], dtype=torch.int64)
                q = unpack_bits(self.indices[rows], self.bits, self.in_features, False)
                self.indices[rows] = pack_bits(ranks[book].gather(1, q), self.bits)
            self.codebooks.copy_(codebooks)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) float32, bfloat16 or float16 -> (..., out) in autocast's dtype if autocast is on for the device, else in x's."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"CodebookLinear: x has shape {tuple(x.shape)}; its last dimension must be {self.in_features}")
        y = CodebookProduct.apply(x.reshape(x.shape[:-1].numel(), self.in_features), self.books(), self.bias, self.indices, self.row_groups, self.bits,
                                  functional._output_dtype(x), self.kept)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, bits={self.bits}, groups={self.groups}"
                f"{', shared' * (self.scales is not None)}")
