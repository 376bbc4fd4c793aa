"""The Triton kernels under Triton's interpreter, against gradmill.reference. Run by test_triton.py in a subprocess with
TRITON_INTERPRET=1 (it must be set before triton is imported, and ahead-of-time compilation needs a process without it).

quant and optim are bit-equal. Float matmuls stay within (k + 4) 2^-24 sum |x| |w| of the float64 reference, the bound of a
fp32 sum of k products in any order, plus 2^-8 sum |x| |w| where the weight is rounded to bf16 before the dot, plus half
an ulp of the output's dtype.
"""
import itertools
import random

import pytest
import torch

from gradmill.formats import SPLIT, Format
from gradmill.kernels import _common, binary, codebook, grouped, matmul, optim, projection, quant, tiles
from gradmill.optim._base import QUANTIZED
from gradmill.optim.rules import RULES
from gradmill.reference import grouped as ref_grouped
from gradmill.reference import binary as ref_binary
from gradmill.reference import codebook as ref_codebook
from gradmill.reference import matmul as ref_matmul
from gradmill.reference import optim as ref_optim
from gradmill.reference import projection as ref_projection
from gradmill.reference import quant as ref_quant

from .conftest import fit, scalars_of

assert _common.INTERPRETING
CODES = ("int8", "uint8", "int4", "uint4", "moment8", "square8", "e4m3", "e5m2", "e2m1", "int7", "uint2", "int2", "uint3", "int4_outlier",
         "moment4", "square4")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALF_ULP = {torch.float32: 2 ** -24, torch.bfloat16: 2 ** -8, torch.float16: 2 ** -11}
SPECIAL = (0.0, -0.0, 1.4e-45, -1e-40, 1.1754944e-38, torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max, 3e-8)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Python's random follows torch's seed; tiles as small as the shapes, the interpreter pays for padding."""
    random.seed(torch.initial_seed())
    monkeypatch.setattr(optim, "TILE", 256)
    monkeypatch.setattr(optim, "TILES", 2)
    monkeypatch.setattr(quant, "TILE", 512)
    monkeypatch.setattr(quant, "SQUARE", 16)


def random_key():
    return torch.tensor([random.getrandbits(64) - (1 << 63), random.getrandbits(32)])


def assert_same(got, want, *what):
    """The same bits, but for a nan's sign and payload."""
    if got is None or want is None:
        assert got is want, what
        return
    assert got.dtype == want.dtype and got.shape == want.shape, (*what, got.dtype, want.dtype, got.shape, want.shape)
    if got.is_floating_point():
        integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
        equal = (got.contiguous().view(integer) == want.contiguous().view(integer)) | (got.isnan() & want.isnan())
    else:
        equal = got == want
    assert equal.all(), (*what, f"{int((~equal).sum())} differ", (~equal).nonzero()[:4].tolist(), got[~equal][:4], want[~equal][:4])


# --- quant ------------------------------------------------------------------------------------------------
def check_quantize(x, code, block, transpose, key, scales=None):
    stream, block = random.getrandbits(32), fit(code, block)
    before = None if scales is None else scales.clone()
    got = quant.quantize(x, code, block, transpose, key, stream, scales)
    want = ref_quant.quantize(x, code, block, transpose, key, stream, scales)
    assert_same(scales, before, "the given scales")
    for name, a, b in zip(("codes", "scales", "zeros"), got, want):
        assert_same(a, b, name, code, tuple(x.shape), x.dtype, block, transpose, key)
    columns = x.shape[0 if transpose else 1]
    assert_same(quant.dequantize(*want, code, block, columns, x.dtype), ref_quant.dequantize(*want, code, block, columns, x.dtype),
                "dequantize", code, tuple(x.shape), x.dtype, block)


@pytest.mark.parametrize("code", CODES)
def test_quantize(code):
    for i, (shape, block) in enumerate(itertools.product(((1, 1), (3, 37), (5, 128), (0, 4), (4, 0)), (0, 32, 10))):
        for stochastic in (False, True):
            x = torch.randn(shape).to(FLOATS[i % 3])
            check_quantize(x.abs() if code.startswith("square") else x, code, block, bool((i + stochastic) % 2), random_key() if stochastic else None)


@pytest.mark.parametrize("code", ("int8", "int7", "e4m3", "e5m2"))
def test_quantize_both(code):
    """Whole rows, blocks that tiles hold, longer ones, and blocks that take two launches, in every layout."""
    for i, (rows, columns, block) in enumerate(((37, 20, 0), (37, 20, 16), (37, 20, 10), (1, 1, 0), (1, 1, 128), (33, 70, 32), (19, 70, 128), (16, 32, 0), (16, 32, 256), (0, 5, 0),
                                                (5, 0, 16), (1, 40, 32))):
        x = torch.randn(rows, columns).to(FLOATS[i % 3])
        if x.numel() > 20:
            x[0, 3], x[-1, -1], x[rows // 2] = random.choice((1.0, float("nan"))), random.choice((1.0, float("-inf"))), random.choice((0.0, -0.0, 1e-40))
        x = (x, x.t().contiguous().t(), torch.cat((x, x), 1)[:, ::2] if columns % 2 == 0 else x)[i % 3]
        key = random.choice((None, random_key()))
        for name, a, b in zip(("codes", "scales", "turned codes", "turned scales"), quant.quantize_both(x, code, block, key, 3, 4),
                              ref_quant.quantize_both(x, code, block, key, 3, 4)):
            assert_same(a, b, name, code, tuple(x.shape), x.stride(), x.dtype, block, key)


@pytest.mark.parametrize("code", ("e4m3", "e5m2", "e2m1", "int7", "int8", "int4", "int2", "int3"))
def test_quantize_with_given_scales(code, monkeypatch):
    """Values beyond them saturate, scale 0 gives codes 0, a nan or an inf still makes its own block's scale nan."""
    for i, ((rows, columns), block, tile) in enumerate((((5, 100), 32, 512), ((3, 300), 0, 64), ((1, 1), 0, 512), ((7, 64), 16, 512))):
        monkeypatch.setattr(quant, "TILE", tile)
        transpose, block = bool(i % 2), fit(code, block)
        x = torch.randn(rows, columns)
        scales = torch.rand(rows, Format(code, block).blocks(columns)) * 10.0 ** -torch.randint(0, 4, (rows, 1))
        x[-1, -1], scales[0, 0] = random.choice((float("nan"), float("inf"), 1.0)), random.choice((0.0, 1e-40, 1e30, 0.01))
        check_quantize((x.t() if transpose else x).contiguous().to(FLOATS[i % 3]), code, block, transpose, random.choice((None, random_key())), scales)


@pytest.mark.parametrize("code", CODES)
def test_quantize_special_values(code):
    for dtype, key in ((torch.float32, None), (torch.float32, random_key()), (torch.bfloat16, random_key()), (torch.float16, None)):
        x = torch.randn(6, 64) * 10.0 ** torch.randint(-44, 30, (6, 1))
        x[0, :8] = torch.tensor(SPECIAL)
        x[1, 5], x[2, 40], x[3, 32:] = float("nan"), float("-inf"), 0.0
        check_quantize((x.abs() if code.startswith("square") else x).to(dtype), code, 32, False, key)


def test_quantize_rows_longer_than_a_tile(monkeypatch):
    monkeypatch.setattr(quant, "TILE", 64)
    for code, transpose, key in (("int8", False, None), ("uint4", False, random_key()), ("uint8", True, random_key()), ("square8", True, None),
                                 ("e4m3", False, random_key()), ("e2m1", True, None), ("int2", False, None)):
        check_quantize(torch.rand(301, 3) if transpose else torch.rand(3, 301), code, 0, transpose, key)


def test_quantize_strides():
    for x in (torch.randn(40, 7).t(), torch.randn(1, 50).expand(5, 50), torch.randn(9, 64)[:, ::2], torch.randn(9, 64)[::3]):
        check_quantize(x, "uint8", 16, False, random_key())
        check_quantize(x, "int4", 0, True, None)


@pytest.mark.parametrize("block, shapes", ((2, ((3, 37),)), (4, ((1, 1), (5, 8))), (8, ((9, 13),)), (16, ((0, 4), (4, 0), (2, 141), (3, 33))),
                                           (64, ((2, 127),)), (1024, ((1, 1030),))))
def test_hadamard(block, shapes):
    for i, (shape, across) in enumerate(itertools.product(shapes, (False, True))):
        x = torch.randn(shape)
        if x.numel() > 30:
            x.view(-1)[torch.randperm(x.numel())[:8]] = torch.tensor(SPECIAL)
            x[-1, -1] = random.choice((float("nan"), float("-inf")))
        x, out, stream = x.to(FLOATS[i % 3]), random.choice(FLOATS), random.getrandbits(32)
        if across:
            x = x.t().contiguous()
        for key, inverse in ((None, False), (random_key(), False), (random_key(), True)):
            assert_same(quant.hadamard(x, block, across, key, stream, out, inverse), ref_quant.hadamard(x, block, across, key, stream, out, inverse),
                        block, shape, across, inverse, x.dtype, out, key is None)


def test_hadamard_strides():
    for x in (torch.randn(40, 7).t(), torch.randn(1, 50).expand(2, 50), torch.randn(9, 64)[::3, ::2]):
        for transpose in (False, True):
            assert_same(quant.hadamard(x, 8, transpose), ref_quant.hadamard(x, 8, transpose), x.stride(), transpose)


# --- fake quantisation ------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_fake_quantize(bits):
    for i, (shape, block) in enumerate(itertools.product(((1, 1), (3, 37), (5, 130), (70, 34), (0, 4), (4, 0)), (0, 32, 10, 128))):
        weight, grad = torch.randn(shape).to(FLOATS[i % 3]), torch.randn(shape).to(FLOATS[(i + bits) % 3])
        if weight.numel() > 100:
            weight.view(-1)[:10] = torch.tensor([*SPECIAL, float("nan"), float("inf")])
            grad.view(-1)[20:22] = torch.tensor([float("nan"), float("inf")])
        steps, zeros = ref_quant.fake_quantize_parameters(weight, bits, block)
        steps, zeros = steps * torch.rand_like(steps), zeros + torch.randn_like(zeros)
        if steps.numel() > 8:
            steps.view(-1)[:5] = torch.tensor([0.0, -1.0, 1e-40, float("nan"), float("inf")])
            zeros.view(-1)[5:8] = torch.tensor([float("nan"), 0.5, 300.0])
        dtype = FLOATS[(i + 1) % 3]
        assert_same(quant.fake_quantize(weight, steps, zeros, bits, block, dtype), ref_quant.fake_quantize(weight, steps, zeros, bits, block, dtype),
                    shape, block, bits, weight.dtype, dtype)
        got, want = (module.fake_quantize_backward(grad, weight, steps, zeros, bits, block) for module in (quant, ref_quant))
        for name, a, b in zip(("dweight", "dsteps", "dzeros"), got, want):
            assert_same(a, b, name, shape, block, bits, weight.dtype, grad.dtype)


# --- matmul -----------------------------------------------------------------------------------------------
def int8_operands(m, n, k):
    return (torch.randint(-128, 128, (m, k), dtype=torch.int8), torch.randint(-128, 128, (n, k), dtype=torch.int8), torch.rand(m, 1),
            torch.rand(n, 1))


def test_matmul_int8():
    for (m, n, k), dtype in itertools.product(((1, 1, 1), (3, 37, 64), (33, 65, 130), (5, 7, 0), (0, 4, 8), (17, 33, 257)), FLOATS):
        bias = random.choice((None, torch.randn(n), torch.randn(n).bfloat16()))
        operands = int8_operands(m, n, k)
        assert_same(matmul.matmul_int8(*operands, bias, dtype), ref_matmul.matmul_int8(*operands, bias, dtype), (m, n, k), dtype)


def test_matmul_int8_beyond_int32(monkeypatch):
    """The sum of 2^17 + 40 products of -128 with itself does not fit int32."""
    k = (1 << 17) + 40
    a, b = torch.full((1, k), -128, dtype=torch.int8), torch.full((2, k), -128, dtype=torch.int8)
    one = torch.ones(2, 1)
    monkeypatch.setitem(tiles.TABLE["interpreter"], "int8", {"large": (16, 16, 4096, 1, 4, 1, 1)})
    assert_same(matmul.matmul_int8(a, b, one[:1], one, None, torch.float32), ref_matmul.matmul_int8(a, b, one[:1], one, None, torch.float32))
    monkeypatch.setattr(matmul, "EXACT_K", 4096)
    operands = int8_operands(3, 5, 9001)
    assert_same(matmul.matmul_int8(*operands, None, torch.float32), ref_matmul.matmul_int8(*operands, None, torch.float32))


def test_programs_walk_all_tiles(monkeypatch):
    """More tiles than programs, whole groups of tile rows and a short one: every tile once."""
    for cores, group in ((1, 1), (3, 4), (5, 2)):
        monkeypatch.setattr(tiles, "INTERPRETED_CORES", cores)
        monkeypatch.setitem(tiles.TABLE["interpreter"], "int8", {"large": (16, 16, 32, group, 4, 1, 1)})
        operands = int8_operands(83, 70, 40)
        assert_same(matmul.matmul_int8(*operands, None, torch.float32), ref_matmul.matmul_int8(*operands, None, torch.float32), cores, group)


def test_matmul_int8_where_the_table_says_torch(monkeypatch):
    calls, real = [], torch._int_mm
    monkeypatch.setitem(tiles.TABLE["interpreter"], "torch", ["int8 m64"])
    monkeypatch.setattr(torch, "_int_mm", lambda *a: (calls.append(1), real(*a))[1])
    for (m, n, k), theirs in (((33, 48, 64), True), ((17, 272, 16), True), ((5, 48, 64), False), ((33, 50, 64), False), ((33, 48, 60), False)):
        operands, before = int8_operands(m, n, k), len(calls)
        for dtype in FLOATS:
            bias = random.choice((None, torch.randn(n), torch.randn(n).bfloat16()))
            assert_same(matmul.matmul_int8(*operands, bias, dtype), ref_matmul.matmul_int8(*operands, bias, dtype), (m, n, k), dtype)
        assert len(calls) - before == 3 * theirs, (m, n, k)


def test_matmul_scaled_where_the_table_says_torch(monkeypatch):
    calls = []

    def scaled_mm(a, b, scale_a, scale_b, out_dtype, use_fast_accum):  # as torch documents it
        assert scale_a.shape == (a.shape[0], 1) and scale_b.shape == (1, b.shape[1]) and b.t().is_contiguous() and not use_fast_accum
        calls.append(1)
        return (a.double() @ b.double() * scale_a * scale_b).to(out_dtype)
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setitem(tiles.TABLE["interpreter"], "torch", ["fp8 m64"])
    for codes, shape, block, dtype, bias, theirs in ((("e4m3", "e4m3"), (33, 32, 48), 0, torch.bfloat16, None, True), (("e5m2", "e4m3"), (20, 16, 16), 0, torch.bfloat16, None, True),
                                                     (("e5m2", "e5m2"), (33, 32, 48), 0, torch.bfloat16, None, False), (("e4m3", "e4m3"), (33, 32, 48), 0, torch.float32, None, False),
                                                     (("e4m3", "e4m3"), (33, 32, 48), 0, torch.bfloat16, torch.randn(32), False), (("e4m3", "e4m3"), (33, 31, 48), 0, torch.bfloat16, None, False),
                                                     (("e4m3", "e4m3"), (5, 32, 48), 0, torch.bfloat16, None, False), (("e4m3", "e4m3"), (33, 32, 256), 64, torch.bfloat16, None, False)):
        (m, n, k), before = shape, len(calls)
        a, b = ref_quant.quantize(torch.randn(m, k), codes[0], block), ref_quant.quantize(torch.randn(n, k), codes[1], block)
        arguments = (*a, codes[0], block, *b, codes[1], block, k, False, bias)
        got, want = matmul.matmul_scaled(*arguments, dtype), ref_matmul.matmul_scaled(*arguments, torch.float64)
        magnitude = ref_quant.dequantize(*a, codes[0], block, k, torch.float64).abs() @ ref_quant.dequantize(*b, codes[1], block, k, torch.float64).abs().t()
        within(got, want, magnitude + (0 if bias is None else bias.abs()), k)
        assert len(calls) - before == theirs, (codes, shape, block, dtype)


def within(got, want, magnitude, k, extra=0.0):
    bound = ((k + 4) * 2 ** -24 + extra) * magnitude + HALF_ULP[got.dtype] * 1.01 * want.abs() + (1e-7 if got.dtype == torch.float16 else 1e-37)
    error = (got.double() - want.double()).abs()
    assert (error <= bound).all(), f"error {error.max():.3g}, {float((error / bound).max()):.2f} of the bound"


@pytest.mark.parametrize("code", CODES)
def test_matmul_packed(code):
    for i, ((rows, columns), block, transpose) in enumerate(itertools.product(((7, 64), (33, 100), (1, 1), (4, 0)), (0, 32, 10), (False, True))):
        dtype, out, block = FLOATS[i % 3], random.choice(FLOATS), fit(code, block)
        w = torch.randn(rows, columns)
        packed = ref_quant.quantize(w.abs() if code.startswith("square") else w, code, block)
        m, k, n = random.choice((1, 5, 33)), *((rows, columns) if transpose else (columns, rows))
        x, bias = torch.randn(m, k).to(dtype), random.choice((None, torch.randn(n)))
        got = matmul.matmul_packed(x, *packed, code, block, columns, transpose, bias, out)
        want = ref_matmul.matmul_packed(x, *packed, code, block, columns, transpose, bias, torch.float64)
        w = ref_quant.dequantize(*packed, code, block, columns, torch.float64).abs()
        magnitude = x.double().abs() @ (w if transpose else w.t()) + (0 if bias is None else bias.abs().double())
        assert got.dtype == out and got.shape == want.shape
        within(got, want, magnitude, k, 2 ** -8 if dtype == torch.bfloat16 else 0)


def test_matmul_packed_is_exact_in_the_integers():
    """bf16 x, blocks a tile fits into: the weight is not rounded to bf16, whatever its scale."""
    packed = ref_quant.quantize(torch.randn(19, 96) * 0.037, "uint8", 32)
    x = torch.randn(6, 96).bfloat16()
    want = ref_matmul.matmul_packed(x, *packed, "uint8", 32, 96, False, None, torch.float64)
    zero_part = (packed[2].double() * packed[1]).repeat_interleave(32, 1)  # the terms of code - zero, summed separately
    magnitude = x.double().abs() @ (ref_quant.dequantize(*packed, "uint8", 32, 96, torch.float64).abs() + zero_part).t()
    within(matmul.matmul_packed(x, *packed, "uint8", 32, 96, False, None, torch.float32), want, magnitude, 96)


@pytest.mark.parametrize("dtype", FLOATS)
def test_matmul_packed_nan_scale_gives_nan(dtype):
    for block, transpose in itertools.product((0, 16, 10), (False, True)):
        w = torch.randn(9, 48)
        w[4, 17] = float("nan")
        packed = ref_quant.quantize(w, "int8", block)
        x = torch.randn(3, 9 if transpose else 48).to(dtype)
        got = matmul.matmul_packed(x, *packed, "int8", block, 48, transpose, None, torch.float32)
        want = ref_matmul.matmul_packed(x, *packed, "int8", block, 48, transpose, None, torch.float32)
        assert torch.equal(got.isnan(), want.isnan()) and want.isnan().any()


FP8 = ("e4m3", "e5m2")
PAIRS = [(a, b, block, other) for a, b in itertools.product(FP8, FP8) for block, other in ((0, 0), (128, 128), (128, 0), (0, 32))] + [
    ("int8", "int7", 0, 0), ("int8", "int8", 32, 0), ("int7", "uint2", 0, 64), ("e2m1", "e2m1", 16, 16), ("e2m1", "e4m3", 32, 0), ("uint4", "bf16", 32, 0),
    ("bf16", "bf16", 0, 0), ("fp16", "fp16", 0, 0), ("fp32", "fp32", 0, 0), ("bf16", "fp32", 0, 0), ("fp32", "int4_outlier", 0, 64), ("bf16", "uint3", 0, 64),
    ("int3", "e5m2", 0, 0)]


@pytest.mark.parametrize("a_code, b_code, a_block, b_block", PAIRS)
def test_matmul_scaled(a_code, b_code, a_block, b_block):
    """FP8 and int8 pairs are exact but for fp32's sums; others round a, b or both to bf16 unless everything is fp32 (2^-8
    each), plain 16-bit ones with a bias may round twice."""
    def stored(x, code, block):
        return (x.to(Format(code).code_dtype), None, None) if not Format(code).blocked else ref_quant.quantize(x, code, block)

    for (m, n, k), transpose in itertools.product(((1, 1, 1), (5, 37, 257), (33, 7, 300), (3, 4, 0), (0, 3, 8)), (False, True)):
        dtype, bias = random.choice(FLOATS), random.choice((None, torch.randn(n), torch.randn(n).bfloat16()))
        a = stored(torch.randn(m, k), a_code, a_block)
        b = stored(torch.randn((k, n) if transpose else (n, k)), b_code, b_block)
        arguments = (*a, a_code, a_block, *b, b_code, b_block, n if transpose else k, transpose)
        got, want = matmul.matmul_scaled(*arguments, bias, dtype), ref_matmul.matmul_scaled(*arguments, bias, torch.float64)
        assert got.dtype == dtype and got.shape == want.shape

        def sizes(codes, scales, zeros, code, block, columns):  # of code - zero where there is a zero point: the terms that are added
            if scales is None:
                return codes.abs().double()
            values = ref_quant.dequantize(codes, scales, zeros, code, block, columns, torch.float64).abs()
            return values + (zeros.double() * scales).repeat_interleave(block or columns, 1)[:, :columns] if zeros.numel() and "outlier" not in code else values

        w = sizes(*b, b_code, b_block, n if transpose else k)
        magnitude = sizes(*a, a_code, a_block, k) @ (w if transpose else w.t()) + (0 if bias is None else bias.abs().double())
        on_codes = not transpose and ({a_code, b_code} <= set(FP8) and b_block != 32 or {a_code, b_code} <= {"int8", "int7"} and a_block == 0)
        rounded = 0 if on_codes else 2 ** -7 * 1.01 if a_code == "bf16" or dtype != torch.float32 else 0
        within(got, want, magnitude, k, rounded)


def test_matmul_scaled_nan_scale_gives_nan():
    for block in (0, 128):
        x = torch.randn(5, 300)
        x[3, 200] = float("nan")
        a, b = ref_quant.quantize(x, "e4m3", block), ref_quant.quantize(torch.randn(6, 300), "e5m2", block)
        got = matmul.matmul_scaled(*a, "e4m3", block, *b, "e5m2", block, 300, False, None, torch.float32)
        assert got[3].isnan().all() and got[[0, 1, 2, 4]].isfinite().all()


# --- optim ------------------------------------------------------------------------------------------------
SHAPES = [(3, 37), (2, 128), (17,), (1, 260), (), (4, 0), (2, 6, 6)]
PARAMS = (("fp32", 0), ("bf16", 0), ("fp16", 0), ("delta", 0), ("uint8", 64), ("int8", 0), ("int4", 32), ("uint4", 0), ("uint4", 20),
          ("e4m3", 64), *((code, 0) for code in SPLIT))


def tensors(shapes, param, state_codes, state_block, grad_dtype, special):
    """[params, param_scales, param_zeros, grads, states, state_scales]"""
    params, scales, zeros, grads, states, state_scales = out = [[], [], [], [], [], []]
    for shape in shapes:
        w, g = torch.randn(shape) * 0.1, torch.randn(shape)
        if special and g.numel() > 70:
            g.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), 1e-40])
            g.view(-1)[-64:] = 0
            w.view(-1)[5:9] = torch.tensor([-0.0, 1e-41, 3e38, float("-inf")])
        matrix = ref_optim.as_matrix(w)
        codes, s, z = (torch.randn(matrix.shape), None, None) if param.code == "delta" else ref_quant.store(matrix, param)
        params.append(codes if param.blocked else codes.view(shape))
        scales += [s] if param.blocked else []
        zeros += [z if param.has_zero_point else z.view(shape)] if param.has_zero_point or param.code in SPLIT else []
        grads.append(g.to(grad_dtype))
        for i, code in enumerate(state_codes):
            format = Format(code, state_block if Format(code).blocked else 0)
            value = torch.randn(matrix.shape) * 0.1
            codes, s, _ = ref_quant.store(value if i == 0 and code != "square8" else value * value, format)
            states.append(codes if format.blocked else codes.view(shape))
            state_scales.append(torch.empty(0) if s is None else s)
    if not any(Format(code).blocked for code in state_codes):
        state_scales.clear()
    return out


def check_step(rule, param_code, param_block, state_codes, state_block, shapes=SHAPES, grad_dtype=torch.float32, special=False, still=False, rows=False,
               counted=False):
    """still: no decay and no step, so that blocks must keep their codes. rows: scalars differ between tensors. counted: steps too, every third is none."""
    a = tensors(shapes, Format(param_code, param_block), state_codes, state_block, grad_dtype, special)
    b = [[t.clone() for t in group] for group in a]
    h = scalars_of(rule, random.randint(1, 9), 0.0 if still else 0.01, 0.5).repeat(len(shapes) if rows else 1, 1)
    if rows:
        h *= torch.arange(1, len(shapes) + 1)[:, None]
    offsets = random.choice((None, [random.choice((0, 4, 37, 1 << 33)) for _ in shapes]))
    counts = torch.tensor([-1.0 if i % 3 == 0 else float(random.randint(1, 1 << 24)) for i in range(len(shapes))]) if counted else None
    arguments = (h, random_key(), [random.getrandbits(20) for _ in shapes], param_code, param_block, list(state_codes), state_block, offsets, counts)
    optim.fused_step(rule, *a, *arguments)
    ref_optim.fused_step(rule, *b, *arguments)
    for name, got, want in zip(("param", "param_scales", "param_zeros", "grad", "state", "state_scales"), a, b):
        for i, (x, y) in enumerate(zip(got, want)):
            assert_same(x, y, f"{name}[{i}]", rule, param_code, param_block, state_codes, state_block, grad_dtype, "special" * special)


def test_every_rule_of_the_reference_is_here():
    assert set(optim.RULES) == set(ref_optim.RULES) == set(RULES)


@pytest.mark.parametrize("rule, param", [(rule, param) for rule in RULES for param in (PARAMS if rule in ("adamw", "adamw_amsgrad", "lion") else PARAMS[1:5:3])],
                         ids=lambda x: x if isinstance(x, str) else f"{x[0]}-{x[1]}")
def test_step(rule, param):
    """Every format under three rules, which have one to three states; the other rules with bf16 and uint8 weights."""
    i = PARAMS.index(param) + len(rule)
    block = 40 if param[1] == 20 else 64
    blocked = RULES[rule].state_codes
    check_step(rule, *param, blocked, block, special=bool(i % 2), still=i % 3 == 0, rows=i % 3 == 1)
    if param[0] in ("fp32", "bf16", "uint8"):
        for kind in ("int4", "fp8"):
            check_step(rule, *param, tuple(QUANTIZED[kind].get(c, Format(c)).code for c in blocked), 32, special=not i % 2)
    plain = ("fp32", "bf16", "fp16")
    check_step(rule, *param, tuple(plain[(i + s) % 3] for s in range(len(blocked))), 0, grad_dtype=FLOATS[i % 3], shapes=SHAPES[:5],
               special=not i % 2)


@pytest.mark.parametrize("param", (("fp32", 0), ("uint8", 0), ("int4", 0), ("uint4", 192), ("bf16", 0)), ids=lambda p: f"{p[0]}-{p[1]}")
def test_step_of_blocks_longer_than_a_tile(param, monkeypatch):
    monkeypatch.setattr(optim, "TILE", 64)
    monkeypatch.setattr(optim, "LONGEST", 64)
    shapes = [(2, 37), (2, 150)]
    for states, block in ((("fp32", "bf16"), 0), (("moment8", "square8"), 0), (("moment8", "square8"), 32), (("int8", "fp32"), 0),
                          (("e4m3", "square8"), 0), (("moment4", "square4"), 32), (("moment4", "square4"), 0)):
        check_step("adamw", *param, states, block, shapes=shapes, special=random.random() < 0.5)


@pytest.mark.parametrize("param", (("fp32", 0), ("bf16", 0), ("uint8", 64), ("bf16+8", 0)), ids=lambda p: f"{p[0]}-{p[1]}")
def test_steps_counted_on_the_device(param):
    check_step("adamw", *param, ("moment8", "square8"), 64, shapes=SHAPES[:6], rows=True, counted=True)
    check_step("lion", *param, ("int8",), 0, shapes=SHAPES[:4], rows=True, counted=True)


def test_step_of_many_tensors_and_other_layouts():
    check_step("adamw", "bf16", 0, ("fp32", "fp32"), 0, shapes=[(i % 7, 5) if i % 7 else (5,) for i in range(21)], rows=True)
    a, b = (tensors([(6, 10)], Format("fp32"), ("fp32", "fp32"), 0, torch.float32, False) for _ in range(2))
    for group, other in zip(a, b):
        for i, t in enumerate(group):
            group[i] = t.t().contiguous().t()  # the same values, columns contiguous
            other[i] = t.clone()
    h = torch.rand(1, 16)
    for module, group in ((optim, a), (ref_optim, b)):
        module.fused_step("adamw", *group, h, torch.tensor([1, 2]), [0], "fp32", 0, ["fp32", "fp32"], 0)
    for got, want in zip(a[0] + a[4], b[0] + b[4]):
        assert_same(got, want)


def test_measure():
    for dtype, limits in itertools.product(FLOATS, (None, torch.rand(7, 2))):
        tensors = [torch.randn(n).to(dtype) for n in (1, 0, 37, 4096, 4097, 40000, 5)]
        tensors[2][5], tensors[6][1] = float("inf"), float("nan")
        assert_same(optim.measure_tensors(tensors, limits), ref_optim.measure(tensors, limits), dtype, limits)


# --- projection -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("left", (False, True))
def test_project(left):
    for (m, d, rank), (code, block), dtype in itertools.product(((20, 64, 8), (33, 100, 40), (1, 16, 1)), (("uint4", 32), ("int8", 0), ("uint8", 10)), FLOATS):
        grad, side = torch.randn(m, d).to(dtype), m if left else d
        basis = ref_quant.quantize(torch.randn(rank, side), code, block)
        got, want = projection.project(grad, *basis, code, block, left), ref_projection.project(grad, *basis, code, block, left)
        b = ref_quant.dequantize(*basis, code, block, side, torch.float64).abs()
        zero = (basis[2].double() * basis[1]).repeat_interleave(block or side, 1)[:, :side] if basis[2].numel() else 0
        magnitude = (b + zero) @ grad.double().abs() if left else grad.double().abs() @ (b + zero).t()
        assert got.is_contiguous() and got.dtype == torch.float32
        within(got, want, magnitude, side, 2 ** -8 if dtype == torch.bfloat16 and block == 10 else 0)


def exact_basis(rank, d, code, block):
    """A packed basis whose values are small multiples of 1/4: products with small integers are exact in any order."""
    format = Format(code, block)
    q = torch.randint(-7, 8, (rank, d)) if code in ("int8", "int4") else torch.randint(0, 16, (rank, d))
    codes = ref_quant.pack_bits(q, format.bits) if format.bits < 8 else q.to(format.code_dtype)
    shape = (rank, format.blocks(d))
    zeros = torch.randint(0, 16, shape, dtype=torch.uint8) if format.has_zero_point else torch.empty(0, dtype=torch.uint8)
    return codes, 0.25 * 2.0 ** torch.randint(0, 3, shape), zeros


@pytest.mark.parametrize("left", (False, True))
@pytest.mark.parametrize("weight", (("fp32", 0), ("bf16", 0), ("fp16", 0), ("uint8", 32), ("int8", 0), ("int4", 20), ("uint4", 64), ("uint4", 0)),
                         ids=lambda w: f"{w[0]}-{w[1]}")
def test_project_back(weight, left, monkeypatch):
    """Bit-equal where the product is exact, so that everything else of the kernel is."""
    format = Format(*weight)
    for i, ((m, d, rank), (code, block), widest) in enumerate(zip(((20, 64, 8), (33, 101, 40), (1, 16, 1), (18, 300, 5)),
                                                                  (("uint4", 32), ("int8", 0), ("uint8", 10), ("int4", 64)), (256, 64, 256, 64))):
        monkeypatch.setattr(projection, "WIDEST", widest)  # 64: rows are worked off in chunks
        basis = exact_basis(rank, m if left else d, code, block)
        update = torch.randint(-3, 4, (rank, d) if left else (m, rank)).float()
        update[..., :1], update[::2] = 0, 0 if not left else update[::2]
        stored = ref_quant.store(torch.randn(m, d), format)
        if not format.has_zero_point:
            stored = (*stored[:2], None)
        scalars = torch.tensor([1.0 if i % 2 else 0.99, -0.03])
        extra = () if i % 2 else (torch.randn(m, d).to((torch.float32, torch.bfloat16)[i // 2]), torch.randn(d if left else m))
        results = []
        key = random_key()
        for module in (projection, ref_projection):
            mine = [None if t is None else t.clone() for t in stored]
            module.project_back(*mine, *weight, d, update, *basis, code, block, left, scalars, key, 5 << 8, *extra)
            results.append(mine)
        for name, got, want in zip(("codes", "scales", "zeros"), *results):
            assert_same(got, want, name, weight, (m, d, rank), code, block, left)


def test_project_back_of_real_numbers():
    """fp32 weight: |error| <= |alpha| (rank + 4) 2^-24 |U| |B| + two roundings of the result."""
    for left, block in itertools.product((False, True), (0, 32)):
        m, d, rank = 19, 70, 24
        basis = ref_quant.quantize(torch.randn(rank, m if left else d), "uint8", block)
        update, w = torch.randn((rank, d) if left else (m, rank)), torch.randn(m, d)
        got, want, scalars = w.clone(), w.clone(), torch.tensor([0.9, -0.03])
        for module, t in ((projection, got), (ref_projection, want)):
            module.project_back(t, None, None, "fp32", 0, d, update, *basis, "uint8", block, left, scalars, torch.tensor([1, 1]), 0)
        b = ref_quant.dequantize(*basis, "uint8", block, m if left else d, torch.float64).abs()
        magnitude = 0.03 * (b.t() @ update.double().abs() if left else update.double().abs() @ b)
        within(got, want, magnitude + (0.9 * w).abs() * 4 * 2 ** -24 / ((rank + 4) * 2 ** -24), rank)


# --- binary -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 17), (9, 70), (0, 5), (5, 0)])
def test_pack_bits(rows, columns, monkeypatch):
    monkeypatch.setattr(binary, "WIDTH", 64)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(rows, columns).to(dtype)
        if rows > 3:
            x[0, :8] = torch.tensor(SPECIAL).to(dtype)[:columns] if columns >= 8 else 0
            x[1], x[2, :1], x[3, :1] = 0.25, torch.nan, torch.inf
        for transpose, mean in itertools.product((False, True), repeat=2):
            for got, want in zip(binary.pack_signs(x, transpose, mean), ref_binary.pack_signs(x, transpose, mean)):
                assert_same(got, want, "signs", dtype, transpose, mean)
            for bits, key in ((1, None), (4, random_key()), (3, random_key())):
                for got, want in zip(binary.pack_planes(x, bits, transpose, key, 7), ref_binary.pack_planes(x, bits, transpose, key, 7)):
                    assert_same(got, want, bits, dtype, transpose)


@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (5, 40, 300), (33, 17, 64), (2, 3, 0)])
def test_matmul_binary(m, n, k):
    a, b = (torch.randint(0, 256, (rows, -(-k // 8)), dtype=torch.uint8) for rows in (m, n))  # unused bits are set, too
    a_scales, b_scales, bias = torch.rand(m, 1), torch.rand(n, 1), torch.randn(n)
    b_scales[0] = torch.nan
    for dtype, bias in ((torch.float32, bias), (torch.bfloat16, bias.bfloat16()), (torch.float16, None)):
        args = a, b, k, a_scales, b_scales, bias, dtype
        assert_same(binary.matmul_binary(*args), ref_binary.matmul_binary(*args), dtype)
        for planes in (1, 4):
            args = torch.randint(0, 256, (planes, *a.shape), dtype=torch.uint8), b, k, a_scales, torch.randn(m, 1), b_scales, dtype
            assert_same(binary.matmul_planes(*args), ref_binary.matmul_planes(*args), planes, dtype)


def test_one_bit_convolution():
    """Forward and backward through Triton's kernels and what torch puts between them."""
    import gradmill
    x, w, steps, dy = torch.randn(2, 3, 4, 5), torch.randn(4, 3, 3, 2), torch.rand(4, 1), torch.randn(2, 4, 4, 4)
    results = []
    for backend in ("triton", "reference"):
        torch.manual_seed(3)
        leaves = [t.clone().requires_grad_() for t in (x, w, steps)]
        with gradmill.use_backend(backend):
            y = gradmill.functional.conv2d(leaves[0], leaves[1], None, 1, (1, 0), recipe="one_bit_fqt", steps=leaves[2])
            results.append((y, *torch.autograd.grad(y, leaves, dy)))
    for got, want, name in zip(*results, ("y", "dx", "dw", "steps")):
        assert_same(got, want, name)


@pytest.mark.parametrize("m, rows, columns", [(1, 1, 1), (5, 40, 70), (2, 3, 64)])
def test_signs_times_floats(m, rows, columns):
    bits, alphas, tenants = torch.randint(0, 256, (2, rows, -(-columns // 8)), dtype=torch.uint8), torch.tensor([0.5, -2.0]), torch.randint(-1, 2, (m,))
    none, scales = torch.empty(0, dtype=torch.uint8), torch.rand(rows, 1)
    w = ref_quant.dequantize(bits[0], scales, none, "sign", 0, columns, torch.float32)
    assert_same(quant.dequantize(bits[0], scales, none, "sign", 0, columns, torch.float32), w)
    x, base = torch.randn(m, columns), torch.randn(m, rows)
    got, want = (module.matmul_tenants(x, y, bits, alphas, tenants, columns) for module, y in ((binary, base), (ref_binary, base.double())))
    within(got, want, base.double().abs() + 2 * x.double().abs().sum(1, keepdim=True), columns + 4)
    for a, b, transpose in ((x, w.t(), False), (base, w, True)):
        got = matmul.matmul_packed(a, bits[0], scales, none, "sign", 0, columns, transpose, None, torch.float32)
        within(got, a.double() @ b.double(), a.double().abs() @ b.double().abs(), a.shape[1])


def test_cpu_tensors_are_refused_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(_common, "INTERPRETING", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        quant.quantize(torch.randn(2, 2), "int8")


# --- grouped ----------------------------------------------------------------------------------------------
GROUPS = ([5, 0, 40, 1], [0], [33], [0, 0, 3], [1] * 5)


def ends(sizes):
    return torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("code", ("int8", "int7", "e4m3", "e5m2"))
def test_quantize_grouped(code):
    for i, sizes in enumerate(GROUPS):
        for columns, block in ((37, 0), (3, 16)):
            x, offs = torch.randn(sum(sizes) + 2, columns).to(FLOATS[i % 3]), ends(sizes)
            x[-1, -1], x[0, 0] = random.choice((1.0, float("nan"))), random.choice((1.0, float("inf")))
            x = x.t().contiguous().t() if i % 2 else x
            for key in (None, random_key()):
                want = ref_grouped.quantize_grouped(x, offs, code, block, key, 3)
                for given in (None, torch.rand_like(want[1])):
                    want = ref_grouped.quantize_grouped(x, offs, code, block, key, 3, given)
                    for name, g, w in zip(("codes", "scales"), grouped.quantize_grouped(x, offs, code, block, key, 3, given), want):
                        assert_same(g, w, name, code, sizes, columns, block, key, given is not None)


@pytest.mark.parametrize("code, block", (("int8", 0), ("int7", 0), ("e4m3", 0), ("e5m2", 64), ("e4m3", 32), ("fp32", 0)))
def test_matmul_grouped(code, block):
    for sizes in GROUPS:
        offs, tokens, format = ends(sizes), sum(sizes) + 2, Format(code, block)

        def operand(*shape, over=False):
            x = torch.randn(shape)
            if not format.blocked:
                return x, None
            if over:
                return ref_grouped.quantize_grouped(x, offs, code, block)
            codes, scales, _ = ref_quant.quantize(x.flatten(0, -2), code, block)
            return codes.view(x.shape), scales.view(*shape[:-1], -1)

        bias = torch.randn(len(sizes), 35)
        for a, b, where, with_bias in ((operand(tokens, 70), operand(len(sizes), 35, 70), offs, bias),
                                       (operand(len(sizes), 19, 64), operand(len(sizes), 35, 64), None, bias),
                                       (operand(tokens, 34, over=True), operand(tokens, 35, over=True), offs, None)):
            arguments = (*a, code, block, *b, code, block, where, with_bias, torch.float32)
            got, want = grouped.matmul_grouped(*arguments), ref_grouped.matmul_grouped(*arguments)
            if code in ("int8", "int7"):
                assert_same(got, want, code, sizes)
            else:
                assert got.shape == want.shape and (not got.numel() or (got - want).abs().max() <= 2.0 ** -15 * (want.abs().max() + 1)), (code, sizes)


def test_offs_out_of_bounds_stay_within_the_tensors():
    """Nobody checks their values on a GPU: results are then anything, reads and writes are not."""
    codes, scales, _ = ref_quant.quantize(torch.randn(9, 16), "int8")
    w, w_scales, _ = ref_quant.quantize(torch.randn(9, 16), "int8")
    for bad in ([-4, 50, 3], [9, 0, 9], [2 ** 31 - 1, -2 ** 31, 5]):
        offs = torch.tensor(bad, dtype=torch.int32)
        grouped.matmul_grouped(codes, scales, "int8", 0, w.view(3, 3, 16), w_scales.view(3, 3, 1), "int8", 0, offs, None, torch.float32)
        over = grouped.quantize_grouped(torch.randn(9, 16), offs, "e4m3", 4)
        grouped.matmul_grouped(*over, "e4m3", 64, *over, "e4m3", 64, offs, None, torch.float32)


# --- codebook ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", range(1, 9))
def test_matmul_codebook(bits):
    for i, (m, rows, columns) in enumerate(((1, 1, 1), (3, 37, 70), (33, 5, 41), (0, 3, 8), (2, 3, 0))):
        indices = torch.randint(0, 256, (rows, -(-columns * bits // 8)), dtype=torch.uint8)
        books, groups, dtype = torch.randn(3, 1 << bits), torch.randint(0, 3, (rows,)).to(torch.uint8), FLOATS[(i + bits) % 3]
        dense = ref_codebook.values(indices, books.double(), groups, bits, columns)
        for transpose in (False, True):
            x, w = torch.randn(m, rows if transpose else columns).to(dtype), dense if transpose else dense.t()
            bias = torch.randn(w.shape[1]).to(random.choice(FLOATS)) if (i + transpose) % 2 else None
            got = codebook.matmul_codebook(x, indices, books, groups, bits, columns, transpose, bias, dtype)
            want, size = x.double() @ w + (0 if bias is None else bias.double()), x.double().abs() @ w.abs() + (0 if bias is None else bias.double().abs())
            assert got.dtype == dtype and got.shape == want.shape
            # a bf16 product rounds the weight to bf16
            bound = size * ((x.shape[1] + 8) * 2.0 ** -23 + (2.0 ** -8 if dtype == torch.bfloat16 else 0)) + want.abs() * 2 * HALF_ULP[dtype] + 1e-7
            assert ((got.double() - want).abs() <= bound).all(), (bits, m, rows, columns, dtype, transpose)
