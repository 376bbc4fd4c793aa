"""Layers of block-wise compressed transformers (BCT): weights of a few bits and integer arithmetic with power-of-two scales, forward only.

See :mod:`gradmill.bct`, which makes them of torch's, and :mod:`gradmill.reference.shifted` for the arithmetic. Each ``forward`` takes and gives
floats; ``integers`` takes and gives (q, e), q * 2^e with an exponent for each row, which is how BctEncoderLayer runs from its input to its output.
"""
from __future__ import annotations

import functools
import math

import torch

from gradmill.nn.biper import Infers
from gradmill.ops.grouped import matmul_grouped
from gradmill.ops.matmul import matmul_int8
from gradmill.ops.quant import dequantize
from gradmill.reference import shifted
from gradmill.reference.quant import pack_bits, unpack_bits

__all__ = ["BctActivation", "BctAttention", "BctEmbedding", "BctEncoderLayer", "BctLinear", "BctNorm", "BctSoftmax", "ShiftMatrix", "ShiftVector"]

ACTIVATIONS_BITS, STREAM_BITS = 8, 16  # of a product's operands; of everything between
CODES = {2: "int2", 3: "int3", 4: "int4", 8: "int8"}
FARTHEST = 16  # a row's exponent is at most so far below the matrix's largest


class ShiftMatrix(torch.nn.Module):
    """A matrix (rows, columns) of ``bits`` = 2, 3, 4 or 8 a value: q * 2^(a row's exponent + its block's offset).

    Offsets are 0 to 3 (8 bits: always 0), so that codes shifted by them fit int8 and a row is one operand of an exact integer product. Exponents and
    offsets are chosen by the least squared error, ``energy`` (columns) weighing the columns; values beyond the range are clipped where that is
    better. Exactly rows * ceil(columns * bits / 8) bytes of codes, a byte a row, and a quarter of a byte a block.
    """

    def __init__(self, weight: torch.Tensor, bits: int, block: int, energy: torch.Tensor | None = None):
        super().__init__()
        w = weight.detach().to("cpu", torch.float64)
        self.bits, (self.rows, self.columns) = bits, w.shape
        self.block = min(block or self.columns, self.columns) or 1
        top, reach = (1 << bits - 1) - 1, 0 if bits == 8 else 3
        spare = -self.columns % self.block
        blocks = torch.nn.functional.pad(w, (0, spare)).view(self.rows, -1, self.block)
        load = torch.nn.functional.pad(torch.ones(self.columns, dtype=torch.float64) if energy is None else energy.cpu().to(torch.float64), (0, spare)).view(1, -1, self.block)
        _, exponent = torch.frexp(w.abs().amax(1) if self.columns else w.new_zeros(self.rows))
        highest = exponent.to(torch.int64) - (bits - 1)  # of a row that nothing of is clipped
        highest = torch.where((w != 0).any(1), highest, torch.full_like(highest, -126))
        highest = highest.clamp(min=int(highest.max()) - FARTHEST, max=127) if self.rows else highest
        depth = reach + 4  # exponents tried, from the highest down
        q = lambda e: torch.ldexp(blocks, -e[:, None, None]).round().clamp(-top, top)
        errors = torch.stack([((torch.ldexp(q(highest - i), (highest - i)[:, None, None]) - blocks).square() * load).sum(-1) for i in range(depth)])
        best = [errors[max(i - reach, 0):i + 1].min(0) for i in range(depth)]  # of a row whose lowest exponent is highest - i
        lowest = torch.stack([b.values.sum(-1) for b in best]).argmin(0)
        chosen = torch.stack([b.indices + max(i - reach, 0) for i, b in enumerate(best)])[lowest, torch.arange(self.rows)]
        offsets = lowest[:, None] - chosen
        exponents = highest - lowest
        codes = torch.ldexp(blocks, -(exponents[:, None] + offsets)[..., None]).round().clamp(-top, top).flatten(1)[:, :self.columns].to(torch.int64)
        self.register_buffer("codes", codes.to(torch.int8) if bits == 8 else pack_bits(codes & (2 * top + 1), bits))
        self.register_buffer("exponents", exponents.clamp(-128, 127).to(torch.int8))
        self.register_buffer("offsets", pack_bits(offsets, 2))
        self.to(weight.device)

    def integers(self, rows=None) -> tuple[torch.Tensor, torch.Tensor]:
        """(int8 (rows, columns), exponents (rows) int64): the codes shifted by their blocks' offsets, read as fp32, which holds them exactly. ``rows``: numbers of some."""
        codes, exponents, offsets = ((self.codes, self.exponents, self.offsets) if rows is None else (t[rows] for t in (self.codes, self.exponents, self.offsets)))
        scales = (1 << unpack_bits(offsets, 2, -(-self.columns // self.block), False)).to(torch.float32)
        none = torch.empty(0, dtype=torch.uint8, device=codes.device)
        block = self.block if self.block < self.columns else 0
        return dequantize(codes, scales, none, CODES[self.bits], block, self.columns, torch.float32).to(torch.int8), exponents.to(torch.int64)


class ShiftVector(torch.nn.Module):
    """A bias or a norm's weight: 16 bits a value and one exponent."""

    def __init__(self, x: torch.Tensor):
        super().__init__()
        q, e = shifted.from_float(x.detach().flatten()[None], 16)
        self.register_buffer("codes", q[0].to(torch.int16))
        self.register_buffer("exponent", e[0].clamp(-128, 127).to(torch.int8))

    def integers(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.codes.to(torch.int64), self.exponent.to(torch.int64)


def _ones(*shape, device):
    return torch.ones(shape, dtype=torch.float32, device=device)


def products(a, b):
    """Exact sums of int8 a (batch, m, k) times b (batch, n, k)^T as int64; beyond 2^24 rounded to fp32's 24 bits."""
    (count, m, _), n = a.shape, b.shape[1]
    device = a.device
    sums = matmul_grouped(a.to(torch.int8).contiguous(), _ones(count, m, 1, device=device), "int8", 0, b.to(torch.int8).contiguous(),
                          _ones(count, n, 1, device=device), "int8", 0, None, None, torch.float32)
    return sums.to(torch.int64)


def _infers(forward):
    """A ``forward`` without gradients, whose output refuses a backward that would go on to an input, as without a word it would end there."""
    @functools.wraps(forward)
    def run(self, *inputs, **options):
        with torch.no_grad():
            y = forward(self, *inputs, **options)
        asked = [x for x in (*inputs, *options.values()) if isinstance(x, torch.Tensor) and x.requires_grad]
        if asked and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            refuse = lambda y: Infers.apply(asked[0], y, f"{type(self).__name__} comes from gradmill.bct.quantize: it")
            return (refuse(y[0]), *y[1:]) if isinstance(y, tuple) else refuse(y)
        return y
    return run


class _Bct(torch.nn.Module):
    """Floats in, floats out, in the input's dtype, around ``integers``. No gradient: forward only."""

    entry = STREAM_BITS  # bits that an input is read with

    @_infers
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return shifted.to_float(*shifted.narrow(*self.integers(*shifted.from_float(x, self.entry)), STREAM_BITS), x.dtype)


class BctLinear(_Bct):
    """Y = X W^T + b: rows of X in 8 bits, W in ``bits``, one exact integer product."""

    entry = ACTIVATIONS_BITS

    def __init__(self, matrix: ShiftMatrix, bias: torch.Tensor | None):
        super().__init__()
        self.matrix = matrix
        self.bias = None if bias is None else ShiftVector(bias)

    def integers(self, q, e):
        if q.shape[-1] != self.matrix.columns:
            raise ValueError(f"BctLinear: x has shape {tuple(q.shape)}; its last dimension must be {self.matrix.columns}")
        q, e = shifted.narrow(q, e, ACTIVATIONS_BITS)
        codes, exponents = self.matrix.integers()
        x = q.reshape(q.shape[:-1].numel(), q.shape[-1]).to(torch.int8)
        sums = matmul_int8(x, codes, _ones(len(x), 1, device=x.device), _ones(len(codes), 1, device=x.device), None, torch.float32)
        low = exponents.min() if len(exponents) else exponents.sum()
        v, e = (sums.to(torch.int64) << (exponents - low)).view(*q.shape[:-1], self.matrix.rows), e + low
        return (v, e) if self.bias is None else shifted.add(v, e, *self.bias.integers())


class BctEmbedding(torch.nn.Module):
    """Rows of a ShiftMatrix. The table may be a linear layer's, too."""

    def __init__(self, matrix: ShiftMatrix, dtype: torch.dtype):
        super().__init__()
        self.matrix, self.dtype = matrix, dtype

    @torch.no_grad()
    def forward(self, index: torch.Tensor) -> torch.Tensor:
        codes, exponents = self.matrix.integers(index.flatten())
        return shifted.to_float(codes.to(torch.int64), exponents[:, None], self.dtype).view(*index.shape, self.matrix.columns)


class BctNorm(_Bct):
    """LayerNorm, or with ``centre`` false RMSNorm, over the last dimension: integer mean, variance, square root and division."""

    def __init__(self, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, centre: bool):
        super().__init__()
        self.weight, self.bias = (None if t is None else ShiftVector(t) for t in (weight, bias))
        self.eps, self.centre = eps, centre

    def integers(self, q, e):
        q, e = shifted.normalise(*shifted.narrow(q, e, STREAM_BITS), self.eps, self.centre)
        if self.weight is not None:
            w, w_e = self.weight.integers()
            q, e = q * w, e + w_e
        return (q, e) if self.bias is None else shifted.add(q, e, *self.bias.integers())


class BctActivation(_Bct):
    """"relu", "gelu", "gelu_tanh" or "silu": ReLU plus a table of 2049 16-bit integers, interpolated."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def integers(self, q, e):
        return shifted.activate(*shifted.narrow(q, e, STREAM_BITS), self.name)

    def extra_repr(self) -> str:
        return self.name


class BctSoftmax(_Bct):
    """Softmax over the last dimension: powers of two from a table of 256 integers, shifted, and one integer division."""

    def integers(self, q, e):
        p = shifted.exponentials(q, e, 1.0)
        return shifted.divide(p << 15, p.sum(-1, keepdim=True)), torch.full_like(e, -15)


class BctAttention(torch.nn.Module):
    """Multi-head self- or cross-attention as torch.nn.MultiheadAttention computes it, without its weights and its dropout.

    Q has an exponent for each row of a head, K and V one for each head of a sequence; scores are exact int8 products, probabilities 14-bit integers
    in two 7-bit pieces, so two exact products with V, divided by their sum.
    """

    def __init__(self, q: BctLinear, k: BctLinear, v: BctLinear, out: BctLinear, heads: int, batch_first: bool):
        super().__init__()
        self.q, self.k, self.v, self.out, self.num_heads, self.batch_first = q, k, v, out, heads, batch_first

    def _heads(self, q, e, dims):
        """(batch, time, width) -> (batch * heads, time, size) in 8 bits."""
        batch, time, width = q.shape
        q = q.view(batch, time, self.num_heads, width // self.num_heads).transpose(1, 2)
        low = e.amin(1, keepdim=True) if len(dims) > 1 else e
        low = torch.maximum(low, e.amax(1, keepdim=True) - 20) if len(dims) > 1 else low  # tokens share an exponent
        q = shifted.shift(q, (e - low)[:, None])
        q, e = shifted.narrow(q, low[:, None], ACTIVATIONS_BITS, dims)
        return q.flatten(0, 1), e.expand(batch, self.num_heads, *e.shape[2:]).flatten(0, 1)

    def integers(self, query, key, value, masked=None):
        """query, key, value: (q, e) of (batch, time, width); masked: bool, broadcasts to (batch, heads, queries, keys), or None."""
        narrowed = [shifted.narrow(*layer.integers(*x), 24) for layer, x in ((self.q, query), (self.k, key), (self.v, value))]
        batch, time, width = narrowed[0][0].shape
        (q, q_e), (k, k_e), (v, v_e) = self._heads(*narrowed[0], (-1,)), self._heads(*narrowed[1], (-2, -1)), self._heads(*narrowed[2], (-2, -1))
        if masked is not None:
            masked = masked.expand(batch, self.num_heads, time, k.shape[1]).flatten(0, 1)
        p = shifted.exponentials(products(q, k), q_e + k_e, 1 / math.sqrt(q.shape[-1]), masked)
        turned = v.transpose(1, 2)
        sums = (products(p >> 7, turned) << 7) + products(p & 127, turned)
        out = shifted.divide(sums << 10, p.sum(-1, keepdim=True).clamp(min=1)).view(batch, self.num_heads, time, -1).transpose(1, 2)
        e = v_e.view(batch, 1, self.num_heads, 1) - 10
        shared = e.amax(2, keepdim=True) - 20  # the heads of a token share an exponent
        out = shifted.shift(out, e - shared).reshape(batch, time, width)
        return self.out.integers(out, shared.view(batch, 1, 1).expand(batch, time, 1))

    @_infers
    def forward(self, query, key, value, key_padding_mask=None, need_weights=False, attn_mask=None, average_attn_weights=True, is_causal=False):
        """As torch.nn.MultiheadAttention's; returns (output, None). ValueError for need_weights, for masks that add anything but 0 and -inf."""
        if need_weights:
            raise ValueError("BctAttention: need_weights is True; it must be False: probabilities are not kept")
        if not query.numel():
            return torch.empty_like(query), None
        unbatched = query.dim() == 2
        inputs = [x[None] if unbatched else x if self.batch_first else x.transpose(0, 1) for x in (query, key, value)]
        masked = masks(attn_mask, key_padding_mask, is_causal, inputs[0], inputs[1], self.num_heads)
        y = shifted.to_float(*shifted.narrow(*self.integers(*(shifted.from_float(x, STREAM_BITS) for x in inputs), masked), STREAM_BITS), query.dtype)
        return (y[0] if unbatched else y if self.batch_first else y.transpose(0, 1)), None


def _hidden(name, mask):
    """A mask as True where a key is hidden."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    hidden = mask == -math.inf
    if not mask.is_floating_point() or not (hidden | (mask == 0)).all():
        raise ValueError(f"{name} is {mask.dtype}; it must be bool, or hold 0 and -inf alone")
    return hidden


def masks(attn_mask, key_padding_mask, is_causal, query, key, heads):
    """One bool mask of (batch, heads, queries, keys), or dimensions of 1, or None."""
    attn_mask, padding = _hidden("attn_mask", attn_mask), _hidden("key_padding_mask", key_padding_mask)
    if attn_mask is None and is_causal:
        attn_mask = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool, device=query.device).triu(1)
    masked = None if attn_mask is None else attn_mask.view(-1, heads, *attn_mask.shape[1:]) if attn_mask.dim() == 3 else attn_mask[None, None]
    if padding is not None:
        padding = padding.view(-1, 1, 1, key.shape[1])
        masked = padding if masked is None else masked | padding
    return masked


class BctEncoderLayer(torch.nn.Module):
    """torch.nn.TransformerEncoderLayer in integers from its input, read in 16 bits a value and an exponent a token, to its output."""

    def __init__(self, self_attn, linear1, linear2, norm1, norm2, activation, norm_first):
        super().__init__()
        self.self_attn, self.linear1, self.linear2, self.norm1, self.norm2, self.activation = self_attn, linear1, linear2, norm1, norm2, activation
        self.norm_first = norm_first

    def integers(self, q, e, masked=None):
        def attend(q, e):
            return shifted.narrow(*self.self_attn.integers((q, e), (q, e), (q, e), masked), STREAM_BITS)

        def feed(q, e):
            return self.linear2.integers(*self.activation.integers(*self.linear1.integers(q, e)))

        for part, norm in ((attend, self.norm1), (feed, self.norm2)):
            if self.norm_first:
                q, e = shifted.add(q, e, *part(*shifted.narrow(*norm.integers(q, e), STREAM_BITS)))
            else:
                q, e = norm.integers(*shifted.add(q, e, *part(q, e)))
            q, e = shifted.narrow(q, e, STREAM_BITS)
        return q, e

    @_infers
    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        if not src.numel():
            return torch.empty_like(src)
        unbatched, first = src.dim() == 2, self.self_attn.batch_first
        x = src[None] if unbatched else src if first else src.transpose(0, 1)
        masked = masks(src_mask, src_key_padding_mask, is_causal, x, x, self.self_attn.num_heads)
        y = shifted.to_float(*self.integers(*shifted.from_float(x, STREAM_BITS), masked), src.dtype)
        return y[0] if unbatched else y if first else y.transpose(0, 1)
