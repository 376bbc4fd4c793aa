"""grouped: the products of every expert of a mixture (MoE) in one call, and the operands that dW needs."""
from __future__ import annotations

import torch

from gradmill.formats import CODES, FLOAT_DTYPES, cached, float_code
from gradmill.ops._registry import Op, describe, key_tuple, native_module, reject, require_key, require_matrix, where
from gradmill.ops.quant import BOTH_WAYS, FLOATS, check_format, row_major
from gradmill.reference import grouped as reference
from gradmill.reference.grouped import ragged_blocks

#: Codes of operands: quantised ones with codes of a byte each, and plain floats.
OPERANDS = (*BOTH_WAYS, *FLOAT_DTYPES)


def _check_offs(op, offs, device):
    if offs.dtype != torch.int32:
        reject(op, "offs", offs, "int32: where each expert's tokens end, counts.cumsum(0).to(torch.int32)", TypeError)
    if offs.dim() != 1:
        reject(op, "offs", offs, "1-D: where each expert's tokens end")
    if offs.device != device:
        reject(op, "offs", offs, f"on {device}")


def _check_ends(op, offs, tokens):
    """offs' values; on CUDA they are not read, which would wait for the device: kernels there hold them within bounds."""
    if offs is None or offs.is_cuda:
        return
    ends = offs.tolist()
    if any(b < a for a, b in zip([0, *ends], ends)) or ends and ends[-1] > tokens:
        reject(op, "offs", ends, f"ends of the experts' tokens: not negative, never decreasing, and at most {tokens}, how many tokens there are")


# --- quantize_grouped -------------------------------------------------------------------------------------
def _check_quantize(x, offs, code, block=0, key=None, stream=0, scales=None):
    op = "quantize_grouped"
    if code not in BOTH_WAYS:
        reject(op, "code", code, f"one of {', '.join(BOTH_WAYS)}")
    format = check_format(op, code, block)
    require_matrix(op, "x", x, FLOATS)
    _check_offs(op, offs, x.device)
    require_key(op, key)
    if scales is not None:
        require_matrix(op, "scales", scales, (torch.float32,), (x.shape[1], ragged_blocks(format, x.shape[0], offs.shape[0])), x.device, contiguous=True)


def _fake_quantize(x, offs, code, block=0, key=None, stream=0, scales=None):
    format = cached(code, block)
    return (x.new_empty(x.shape[::-1], dtype=format.code_dtype),
            x.new_empty((x.shape[1], ragged_blocks(format, x.shape[0], offs.shape[0])), dtype=torch.float32))


def _stored(codes, scales, code, block):
    """A stored operand for native code: (codes, scales, code, block)."""
    return codes.data_ptr(), 0 if scales is None else scales.data_ptr(), CODES[code], block


def _native_quantize(x, offs, code, block=0, key=None, stream=0, scales=None):
    codes, own = _fake_quantize(x, offs, code, block)
    if scales is None:
        own.zero_()
    else:
        own.copy_(scales)
    x, transposed = row_major(x, False)
    if transposed:
        x = x.t().contiguous()
    offs = offs.contiguous()
    codes.view(torch.uint8).zero_()  # of tokens beyond the last end
    if offs.numel() and x.shape[1]:
        native_module().quantize_grouped(*where(x), x.data_ptr(), CODES[float_code(x.dtype)], x.stride(0), *x.shape, len(offs), offs.data_ptr(),
                                         _stored(codes, own, code, block), key_tuple(key, stream), scales is not None)
    if scales is not None:
        reference.zero_spare(own, offs, block)
    return codes, own


quantize_grouped = Op(
    "quantize_grouped", "(Tensor x, Tensor offs, str code, int block=0, Tensor? key=None, int stream=0, Tensor? scales=None) -> (Tensor, Tensor)",
    _check_quantize, _fake_quantize,
    backends={"native": _native_quantize, "triton": "gradmill.kernels.grouped:quantize_grouped", "reference": reference.quantize_grouped},
    order={"cpu": ("native", "triton", "reference"), "cuda": ("native", "triton", "reference")},
    values=lambda x, offs, *rest, **named: _check_ends("quantize_grouped", offs, x.shape[0]))
quantize_grouped.__doc__ = """quantize_grouped(x, offs, code, block=0, key=None, stream=0, scales=None) -> (codes, scales)

x (tokens, columns) fp32, bf16 or fp16, its tokens sorted by expert, as the operand of a product that sums over each expert's
tokens: dW[e] = dY[tokens of e]^T X[tokens of e]. Expert e's part is ``quantize(x[tokens of e], code, block, True)``, rounded
stochastically with stream + (e << 8) where ``key`` is given; the parts lie one after the other in the memory of codes (columns,
tokens) and of scales (columns, blocks), where blocks = experts, or tokens // block + experts when there is a block, of which
those that exist come first and the rest are 0. ``offs`` int32 (experts): where each expert's tokens end, as torch's
``_grouped_mm`` has it; tokens beyond the last end are left out (codes 0). code: an 8-bit symmetric one. Raises TypeError for
dtypes, ValueError for shapes, code, block and (on CPU) offs that decrease or go beyond the tokens."""


# --- matmul_grouped ---------------------------------------------------------------------------------------
def _require(op, name, x, dtype, shape, device):
    if x.dtype != dtype:
        reject(op, name, x, str(dtype).removeprefix("torch."), TypeError)
    if tuple(x.shape) != tuple(shape) or x.device != device or not x.is_contiguous():
        reject(op, name, f"{describe(x)}{'' if x.is_contiguous() else ', not contiguous'}", f"contiguous, of shape {tuple(shape)} on {device}")


def _shape(a, a_code, b, offs):
    """summed, experts, m, n, k and the output's shape; m (k where summed) is what is ragged."""
    if a.dim() == b.dim() == 2:
        m, n = (a.shape[1], b.shape[1]) if a_code in FLOAT_DTYPES else (a.shape[0], b.shape[0])
        return True, offs.shape[0], m, n, 0, (offs.shape[0], m, n)
    m, n, k = a.shape[-2], b.shape[1], b.shape[2]
    return False, b.shape[0], m, n, k, (m, n) if a.dim() == 2 else (b.shape[0], m, n)


def _tokens(a, a_code):
    """How many tokens a sum over them has before it."""
    return a.shape[1] if a_code not in FLOAT_DTYPES else a.shape[0]


def _check_matmul(a, a_scales, a_code, a_block, b, b_scales, b_code, b_block, offs, bias, dtype):
    op = "matmul_grouped"
    for name, code in (("a_code", a_code), ("b_code", b_code)):
        if code not in OPERANDS:
            reject(op, name, code, f"one of {', '.join(OPERANDS)}")
    if (a_code in FLOAT_DTYPES) != (b_code in FLOAT_DTYPES):
        reject(op, "a_code and b_code", (a_code, b_code), "both quantised or both plain floats")
    if (a.dim(), b.dim()) not in ((2, 3), (3, 3), (2, 2)):
        reject(op, "a and b", f"{a.dim()}-D and {b.dim()}-D", "2-D and 3-D, 3-D and 3-D, or 2-D and 2-D")
    if (offs is None) != (a.dim() == 3):
        reject(op, "offs", None if offs is None else offs, "None for 3-D times 3-D, else a tensor")
    if offs is not None:
        _check_offs(op, offs, a.device)
    if dtype not in FLOATS:
        reject(op, "dtype", dtype, "float32, bfloat16 or float16", TypeError)
    summed, experts, m, n, k, _ = _shape(a, a_code, b, offs)
    if offs is not None and offs.shape[0] != experts:
        reject(op, "offs", offs, f"of shape ({experts},), an end for each of b's experts")
    if summed:
        tokens = _tokens(a, a_code)
        shapes = ((tokens, m), (tokens, n)) if a_code in FLOAT_DTYPES else ((m, tokens), (n, tokens))
    else:
        shapes = (*a.shape[:-1], k), tuple(b.shape)
    for name, x, scales, code, block, shape in zip("ab", (a, b), (a_scales, b_scales), (a_code, b_code), (a_block, b_block), shapes):
        format = check_format(op, code, block) if code in BOTH_WAYS else cached(code)
        _require(op, name, x, format.code_dtype, shape, a.device)
        if format.blocked:
            if scales is None:
                reject(op, f"{name}_scales", scales, f"a tensor: {code} needs scales")
            blocks = ragged_blocks(format, tokens, experts) if summed else format.blocks(k)
            _require(op, f"{name}_scales", scales, torch.float32, (*shape[:-1], blocks), a.device)
    if bias is not None:
        if bias.dtype not in FLOATS:
            reject(op, "bias", bias, "float32, bfloat16 or float16", TypeError)
        if tuple(bias.shape) != (experts, n) or bias.device != a.device:
            reject(op, "bias", bias, f"of shape ({experts}, {n}) on {a.device}")


def _fake_matmul(a, a_scales, a_code, a_block, b, b_scales, b_code, b_block, offs, bias, dtype):
    return a.new_empty(_shape(a, a_code, b, offs)[-1], dtype=dtype)


def _native_matmul(a, a_scales, a_code, a_block, b, b_scales, b_code, b_block, offs, bias, dtype):
    summed, experts, m, n, k, shape = _shape(a, a_code, b, offs)
    out = a.new_empty(shape, dtype=dtype)
    if offs is not None and not summed:
        offs = offs.contiguous()
        if out.is_cuda or not experts:
            out.zero_()  # rows beyond the last end are nobody's
        else:
            out[int(offs[-1]):].zero_()
    if out.numel() and experts:
        bias = None if bias is None else bias.to(torch.float32).contiguous()
        native_module().matmul_grouped(*where(a), summed, experts, _tokens(a, a_code) if summed else m, m, n, k, 0 if offs is None else offs.contiguous().data_ptr(),
                                       _stored(a, a_scales, a_code, a_block), _stored(b, b_scales, b_code, b_block), 0 if bias is None else bias.data_ptr(),
                                       out.data_ptr(), CODES[float_code(dtype)])
    return out


matmul_grouped = Op(
    "matmul_grouped", "(Tensor a, Tensor? a_scales, str a_code, int a_block, Tensor b, Tensor? b_scales, str b_code, int b_block, Tensor? offs, "
    "Tensor? bias, ScalarType dtype) -> Tensor",
    _check_matmul, _fake_matmul,
    backends={"native": _native_matmul, "triton": "gradmill.kernels.grouped:matmul_grouped", "reference": reference.matmul_grouped},
    order={"cpu": ("native", "triton", "reference"), "cuda": ("triton", "native", "reference")},
    values=lambda a, a_scales, a_code, a_block, b, b_scales, b_code, b_block, offs, *rest, **named: _check_ends("matmul_grouped", offs, (
        _tokens(a, a_code) if a.dim() == b.dim() else a.shape[0])))
matmul_grouped.__doc__ = """matmul_grouped(a, a_scales, a_code, a_block, b, b_scales, b_code, b_block, offs, bias, dtype) -> Tensor

The products of all experts of a mixture, in the three forms of torch's ``_grouped_mm`` but with b's rows, not its columns, as the
output's columns, as everywhere in gradmill. ``offs`` int32 (experts): where each expert's tokens end, cumulative.

- a (tokens, k), b (experts, n, k), offs: rows of expert e times b[e]^T -> (tokens, n); rows beyond the last end are 0.
- a (experts, m, k), b (experts, n, k), offs None: -> (experts, m, n).
- a and b over tokens, offs: summed over each expert's tokens -> (experts, m, n); without tokens 0. Quantised operands
  are what :func:`quantize_grouped` makes, (m, tokens) and (n, tokens); plain floats are (tokens, m) and (tokens, n).

Both operands are quantised (int8, int7, e4m3, e5m2; scales (..., blocks) as quantize's) or both plain floats (scales None).
Whole-row int8 and int7 are exact and bit-equal in every backend, as matmul_int8; all else is multiplied and added in fp32.
bias (experts, n) or None. Tiles of all experts are shared out to threads together. Raises TypeError for dtypes, ValueError for
shapes, layout, codes and (on CPU) offs that decrease or go beyond the tokens."""
