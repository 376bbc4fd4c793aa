"""projection: gradient to a packed basis, back into the weight, and the basis itself."""
from __future__ import annotations

import functools
import math

import torch

from gradmill.formats import CODES, FLOAT_DTYPES, STATE_CODES, STEPPED, cached, float_code
from gradmill.ops._registry import Op, key_tuple, native_module, reject, require_key, require_matrix, where
from gradmill.ops.optim import _check_stored
from gradmill.ops.quant import FLOATS, check_packed, matrix_tuple
from gradmill.reference import projection as reference


# --- project ----------------------------------------------------------------------------------------------
def _check_vectors(op, codes, scales, zeros, code, block, side, rank=None):
    """A basis (rank, side): packed, or plain floats, whose scales and zeros are not looked at."""
    if code in FLOAT_DTYPES:
        require_matrix(op, "basis codes", codes, (FLOAT_DTYPES[code],), (rank, side), contiguous=True)
    else:
        check_packed(op, "basis ", codes, scales, zeros, code, block, side, rank)


def _check_project(grad, codes, scales, zeros, code, block, left):
    if code not in STEPPED:
        reject("project", "code", code, f"one of {', '.join(STEPPED)}")
    require_matrix("project", "grad", grad, FLOATS)
    _check_vectors("project", codes, scales, zeros, code, block, grad.shape[0 if left else 1])
    if codes.device != grad.device:
        reject("project", "basis codes", codes, f"on {grad.device}")


def _fake_project(grad, codes, scales, zeros, code, block, left):
    shape = (codes.shape[0], grad.shape[1]) if left else (grad.shape[0], codes.shape[0])
    return grad.new_empty(shape, dtype=torch.float32)


def _native_project(grad, codes, scales, zeros, code, block, left):
    grad, out = grad.contiguous(), _fake_project(grad, codes, scales, zeros, code, block, left)
    if out.numel():
        d = grad.shape[0 if left else 1]
        native_module().project(*where(grad), *grad.shape, grad.data_ptr(), CODES[float_code(grad.dtype)],
                                matrix_tuple(codes, scales, zeros, cached(code, block), codes.shape[0], d), left, out.data_ptr())
    return out


project = Op(
    "project", "(Tensor grad, Tensor codes, Tensor scales, Tensor zeros, str code, int block, bool left) -> Tensor",
    _check_project, _fake_project,
    backends={"native": _native_project, "triton": "gradmill.kernels.projection:project", "reference": reference.project},
    order={"cpu": ("native", "triton", "reference"), "cuda": ("native", "triton", "reference")})
project.__doc__ = """project(grad, codes, scales, zeros, code, block, left) -> fp32

Basis B (rank, d) packed, or plain floats (code fp32, bf16 or fp16; scales and zeros any tensors), rows are the basis vectors. right: grad (m, d) -> grad B^T (m, rank); left: grad (d, n) ->
B grad (rank, n). grad fp32, bf16 or fp16; fp32 accumulation straight from the packed codes (Zhang et al., "Q-GaLore"). Raises TypeError for
dtypes, ValueError for shapes, code and device."""


# --- project back -----------------------------------------------------------------------------------------
def _check_back(weight, weight_scales, weight_zeros, weight_code, weight_block, columns, update, codes, scales, zeros, code, block,
                left, scalars, key, stream, residual=None, residual_scales=None, first=0):
    op = "project_back"
    format = cached(weight_code, weight_block)
    if weight_code not in STEPPED or weight_code in ("delta", *STATE_CODES):
        reject(op, "weight_code", weight_code, "a trainable weight's code: fp32, bf16, fp16, int8, uint8, int4 or uint4")
    if code not in STEPPED:
        reject(op, "code", code, f"one of {', '.join(STEPPED)}")
    rows = weight.shape[0] if weight.dim() > 1 else 1
    require_matrix(op, "update", update, (torch.float32,), device=weight.device, contiguous=True)
    d = rows if left else columns
    _check_vectors(op, codes, scales, zeros, code, block, d, update.shape[0 if left else 1])
    if update.shape[1 if left else 0] != (columns if left else rows):
        reject(op, "update", update, f"({codes.shape[0]}, {columns})" if left else f"({rows}, {codes.shape[0]})")
    if not (weight.is_contiguous()):
        reject(op, "weight", weight, "contiguous")
    _check_stored(op, "weight", 0, weight, weight_scales, weight_zeros, format, (rows, columns), update.device)
    if not (scalars.dtype == torch.float32 and scalars.shape == (2,) and scalars.device.type in ("cpu", "meta")):
        reject(op, "scalars", scalars, "fp32 [decay, alpha] on CPU")
    require_key(op, key)
    if first < 0:
        reject(op, "first", first, "at least 0")
    if (residual is None) != (residual_scales is None):
        reject(op, "residual_scales", residual_scales, "given with residual, and only then")
    if residual is not None:
        require_matrix(op, "residual", residual, FLOATS, (rows, columns), weight.device)
        size = columns if left else rows
        if not (residual_scales.dtype == torch.float32 and residual_scales.shape == (size,) and residual_scales.is_contiguous()
                and residual_scales.device == weight.device):
            reject(op, "residual_scales", residual_scales, f"contiguous fp32 of shape ({size},) on {weight.device}")


def _fake_back(*args, **kwargs):
    return None


def _native_back(weight, weight_scales, weight_zeros, weight_code, weight_block, columns, update, codes, scales, zeros, code, block,
                 left, scalars, key, stream, residual=None, residual_scales=None, first=0):
    rows = weight.shape[0] if weight.dim() > 1 else 1
    if rows * columns == 0:
        return
    decay, alpha = scalars.tolist()
    extra = (0, 0, 0)
    if residual is not None:
        residual = residual.contiguous()
        extra = residual.data_ptr(), CODES[float_code(residual.dtype)], residual_scales.data_ptr()
    native_module().project_back(
        *where(weight), matrix_tuple(weight, weight_scales, weight_zeros, cached(weight_code, weight_block), rows, columns),
        update.data_ptr(), matrix_tuple(codes, scales, zeros, cached(code, block), codes.shape[0], rows if left else columns), left,
        decay, alpha, key_tuple(key, stream), first, *extra)


project_back = Op(
    "project_back",
    "(Tensor(a!) weight, Tensor(b!)? weight_scales, Tensor(c!)? weight_zeros, str weight_code, int weight_block, int columns, "
    "Tensor update, Tensor codes, Tensor scales, Tensor zeros, str code, int block, bool left, Tensor scalars, Tensor key, "
    "int stream, Tensor? residual=None, Tensor? residual_scales=None, int first=0) -> ()",
    _check_back, _fake_back,
    backends={"native": _native_back, "triton": "gradmill.kernels.projection:project_back", "reference": reference.project_back},
    order={"cpu": ("native", "triton", "reference"), "cuda": ("native", "triton", "reference")})
project_back.__doc__ = """project_back(weight, weight_scales, weight_zeros, weight_code, weight_block, columns, update, codes, scales, zeros,
code, block, left, scalars, key, stream, residual=None, residual_scales=None, first=0)

weight <- decay * weight + alpha * (update B, or B^T update when left) + residual_scales * residual, in place, tile by tile: the
full-size product is never stored. scalars = fp32 [decay, alpha] on CPU. residual: floats of the weight's shape, with one
fp32 scale per index that is not projected (left: columns; right: rows). bf16 and quantised weights are rounded stochastically; a quantised
block whose values do not change keeps its codes and scale. first: the number of the weight's first element in the whole tensor, above 0 in a
shard: it keys the random bits. update is fp32 (m, rank), or (rank, n) when left. Raises TypeError for dtypes, ValueError for shapes, codes and device."""


# --- basis ------------------------------------------------------------------------------------------------
def _check_basis(grad, previous, rank, iterations, left, key, stream):
    op = "subspace_basis"
    require_matrix(op, "grad", grad, FLOATS)
    d = grad.shape[0 if left else 1]
    if not (1 <= rank <= min(grad.shape)):
        reject(op, "rank", rank, f"1 to {min(grad.shape)}, the smaller side of grad")
    if not (iterations >= 1):
        reject(op, "iterations", iterations, "1 or more")
    if previous is not None:
        require_matrix(op, "previous", previous, (torch.float32,), (rank, d), grad.device)
    require_key(op, key)


def _fake_basis(grad, previous, rank, iterations, left, key, stream):
    return grad.new_empty((rank, grad.shape[0 if left else 1]), dtype=torch.float32)


def orthonormal(y: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns spanning those of y (d, rank), fp32.

    Cholesky-QR twice: two matmuls and a small factorisation instead of a Householder QR (8x faster at 1024x128 here);
    where the Gram matrix is not safely positive definite (a rank-deficient gradient), Householder QR.
    """
    q = y
    for _ in range(2):
        gram = (q.t() @ q).to(torch.float64)
        factor, info = torch.linalg.cholesky_ex(gram)
        diagonal = factor.diagonal()
        if int(info) or not bool(diagonal.min() > 1e-3 * diagonal.max()):
            return torch.linalg.qr(y).Q
        q = torch.linalg.solve_triangular(factor.to(torch.float32), q.t(), upper=False).t()
    return q


def _torch_basis(grad, previous, rank, iterations, left, key, stream):
    g = grad.to(torch.float32)
    exponent = math.frexp(float(torch.stack((-g.amin(), g.amax())).amax()))[1]
    if abs(exponent) > 20:  # Gram matrices of G^T G Q take G to its fourth power: a power of two away from 1 that leaves fp32
        g = torch.ldexp(g, torch.tensor(-exponent, device=g.device))
    if left:
        g = g.t()
    return reference.power_iteration(g, previous, rank, iterations, key, stream, orthonormal).t().contiguous()


subspace_basis = Op(
    "subspace_basis", "(Tensor grad, Tensor? previous, int rank, int iterations, bool left, Tensor key, int stream) -> Tensor",
    _check_basis, _fake_basis,
    backends={"torch": _torch_basis, "reference": reference.subspace_basis},
    order={"cpu": ("torch", "reference"), "cuda": ("torch", "reference")})
subspace_basis.__doc__ = """subspace_basis(grad, previous, rank, iterations, left, key, stream) -> (rank, d) fp32, orthonormal rows

Block power iteration: Q <- orth(G^T G Q), ``iterations`` times, from ``previous`` (rank, d) or from Gaussian rows drawn
with ``key`` = int64 CPU tensor [seed, step] and ``stream``. The rows approach the leading singular vectors of the projected side. grad (m, n)
fp32, bf16 or fp16. Raises TypeError for dtypes, ValueError for shapes, rank and iterations."""


# --- discrete cosine transform ----------------------------------------------------------------------------
MOST_BASE = 63  # the native transform halves the size while it is even and above 4; what is left is a product of matrices


def _check_dct(x, columns):
    require_matrix("dct", "x", x, FLOATS)


def _fake_dct(x, columns):
    return torch.empty(x.shape, dtype=torch.float32, device=x.device)


@functools.lru_cache(maxsize=32)
def _twiddles(n: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """For `_torch_dct`: real and imaginary factors of x_k and of x_(n-k), k in [0, n/2]; where column j of the result is."""
    k = torch.arange(n // 2 + 1, dtype=torch.float64)
    angle = math.pi * k / (2 * n)
    root = math.sqrt(n / 2)
    own, other = torch.full_like(k, root), torch.full_like(k, root)
    own[0], other[0] = math.sqrt(n), 0.0
    j = torch.arange(n)
    where = torch.where(j % 2 == 0, j // 2, n - (j + 1) // 2)
    factors = own * angle.cos(), other * angle.sin(), own * angle.sin(), -other * angle.cos()
    return *(f.to(device, torch.float32) for f in factors), where.to(device)


def _torch_dct(x, columns):
    """An FFT of n/2 a row. After Makhoul: the inverse DCT-II is an inverse FFT of the twisted spectrum v_k e^(i angle), Hermitian with
    v_(n-k), reordered. A few rows at a time, so that all of it happens in cache."""
    if not x.numel():
        return _fake_dct(x, columns)
    x = x.t().contiguous() if columns else x
    rows, n = x.shape
    real, real_other, imaginary, imaginary_other, order = _twiddles(n, x.device)
    out = torch.empty(rows, n, dtype=torch.float32, device=x.device)
    count = max(1, rows if x.is_cuda else min(rows, 2 ** 16 // n))
    half = torch.empty(count, n // 2 + 1, 2, dtype=torch.float32, device=x.device)
    for part, into in zip(x.split(count), out.split(count)):
        own, z = part.to(torch.float32), half[:len(part)]
        other = torch.cat((own[:, :1], own.flip(1)[:, :n // 2]), 1)
        own = own[:, :n // 2 + 1]
        torch.mul(own, real, out=z[..., 0]).addcmul_(other, real_other)
        torch.mul(own, imaginary, out=z[..., 1]).addcmul_(other, imaginary_other)
        torch.fft.irfft(torch.view_as_complex(z), n=n, out=into)
    out = out.index_select(1, order)
    return out.t().contiguous() if columns else out


@functools.lru_cache(maxsize=32)
def dct_table(n: int) -> tuple[torch.Tensor, int]:
    """For csrc/cpu/projection.cpp: cosines and sines of (2j+1) pi / 4m, j below m / 2, for m = n/2, n/4, ... that are halved (at n - 2m), and from n
    on the matrices of c3 and c4 of the size that is not; fp32 on CPU. And that size."""
    def angle(count, m):
        return (2 * torch.arange(count, dtype=torch.float64) + 1) * (math.pi / (4 * m))
    base, parts = n, []
    while base % 2 == 0 and base > 4:
        base //= 2
        if base % 2 == 0 and base > 4:
            parts += [angle(base // 2, base).cos(), angle(base // 2, base).sin()]
    odd, i = angle(base, base), torch.arange(base, dtype=torch.float64)
    table = torch.zeros(n + 2 * base * base, dtype=torch.float32)
    steps = torch.cat(parts) if parts else table[:0]
    table[:len(steps)] = steps
    table[n:] = torch.stack(((2 * odd[:, None] * i).cos(), (odd[:, None] * (2 * i + 1)).cos())).flatten()
    return table, base


def _native_dct(x, columns):
    n = x.shape[0 if columns else 1]
    out = _fake_dct(x, columns)
    if not x.numel():
        return out
    if n // (n & -n) > MOST_BASE:
        return _torch_dct(x, columns)
    (table, base), x = dct_table(n), x.contiguous()
    native_module().dct(x.numel() // n, n, x.data_ptr(), CODES[float_code(x.dtype)], columns, table.data_ptr(), base, out.data_ptr())
    return out


dct = Op(
    "dct", "(Tensor x, bool columns) -> Tensor", _check_dct, _fake_dct,
    backends={"native": _native_dct, "torch": _torch_dct, "reference": reference.dct},
    order={"cpu": ("native", "torch", "reference"), "cuda": ("torch", "reference")})
dct.__doc__ = """dct(x, columns) -> fp32

Orthonormal DCT-III: x D of x (rows, n), or with ``columns`` D^T x of x (n, rows); D_ij = sqrt(2/n) cos(i (2j+1) pi / 2n), its first row over sqrt 2.
x fp32, bf16 or fp16. A fast transform, O(n log n) a row, where n is a power of 2 times an odd number up to 63; elsewhere an FFT of torch's.
Raises TypeError for dtypes, ValueError for shapes."""
