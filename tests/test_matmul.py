"""matmul: integer products exact in every backend, float products within what fp32 accumulation allows."""
import pytest
import torch
from gradmill.formats import Format
from gradmill.ops import dequantize, linear_int8, linear_int8_backward, matmul_int8, matmul_packed, quantize
from hypothesis import given, strategies as st

from .conftest import (BLOCKED, FLOATS, LEVELS, SPECIAL, assert_same_bits, fit, key, layouts, misaligned, reference, running, threads, wild)

INT8 = (*LEVELS, "torch")
SHAPES = [(1, 1, 1), (1, 7, 13), (2, 1, 64), (3, 5, 127), (4, 33, 32), (5, 17, 256), (17, 64, 65), (63, 31, 129), (64, 48, 257), (65, 49, 300),
          (67, 97, 1031), (1, 1030, 40), (400, 40, 70)]
EMPTY = [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)]


def int8_operands(m, n, k, low=-128):
    """Codes of every value, -128 (which no quantiser writes) included, and scales of many magnitudes."""
    return (torch.randint(low, 128, (m, k), dtype=torch.int8), torch.randint(low, 128, (n, k), dtype=torch.int8),
            10 ** torch.randn(m, 1), 10 ** torch.randn(n, 1))


def check_int8(*args, what="", variants=INT8):
    want = reference(matmul_int8, *args)
    for variant in variants:
        with running(variant):
            assert_same_bits(matmul_int8(*args), want, f"{variant} {what}")


# --- int8 x int8 ------------------------------------------------------------------------------------------
def test_int8_worked_out_by_hand():
    a, b = torch.tensor([[1, 2, 3], [-4, 5, -6]], dtype=torch.int8), torch.tensor([[7, 8, 9], [-128, 0, 127]], dtype=torch.int8)
    scales = torch.tensor([[0.5], [2.0]])
    for variant in ("reference", *INT8):
        with running(variant):
            out = matmul_int8(a, b, scales, torch.tensor([[1.0], [4.0]]), torch.tensor([10.0, 20.0]), torch.float32)
        # sums: 50, 253 / -42, -250
        assert out.tolist() == [[35.0, 526.0], [-74.0, -1980.0]], variant


@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
def test_int8_is_bit_equal_in_every_backend(shape):
    for dtype in FLOATS:
        for bias in (None, torch.randn(shape[1]), torch.randn(shape[1]).bfloat16()):
            check_int8(*int8_operands(*shape), bias, dtype, what=f"{shape} {dtype}")


@given(m=st.integers(0, 80), n=st.integers(0, 80), k=st.integers(0, 300), seed=st.integers(0, 2 ** 30))
def test_int8_any_shape(m, n, k, seed):
    torch.manual_seed(seed)
    check_int8(*int8_operands(m, n, k), None, torch.float32)


@pytest.mark.parametrize("k", [511, 512, 1024, 65535, 65536, 65537, 131073, 133145, 300001])
@pytest.mark.parametrize("m, n", [(1, 3), (70, 5)])
def test_int8_sums_of_the_largest_products_do_not_overflow(k, m, n):
    """127 * 127 * 133145 is the first such sum beyond int32; 255 * 128 * 65537 the first of a path that offsets a by 128."""
    for x, y in ((127, 127), (-128, -128), (127, -128), (-128, 127)):
        a, b = torch.full((m, k), x, dtype=torch.int8), torch.full((n, k), y, dtype=torch.int8)
        ones = torch.ones(m, 1), torch.ones(n, 1)
        for variant in INT8 if x + y in (254, -256) or k < 2000 else LEVELS[-1:]:
            with running(variant):
                out = matmul_int8(a, b, *ones, None, torch.float32)
            assert (out == torch.tensor(float(x * y * k), dtype=torch.float64).float()).all(), f"{variant} {x} {y}: {out[0, 0]} is not {x * y * k}"


def test_int8_alternating_extremes_cancel_exactly():
    k = 100_002
    a = torch.tensor([127, -127] * (k // 2), dtype=torch.int8)[None]
    b = torch.full((1, k), 127, dtype=torch.int8)
    b[0, 0] = 126
    check_int8(a, b, torch.ones(1, 1), torch.ones(1, 1), None, torch.float32)
    assert matmul_int8(a, b, torch.ones(1, 1), torch.ones(1, 1), None, torch.float32).item() == -127


@given(m=st.integers(65, 150), n=st.integers(0, 80), k=st.integers(1, 2200), seed=st.integers(0, 2 ** 30))
def test_int8_codes_of_seven_bits(m, n, k, seed):
    """Codes in [-64, 63] take the way with 16-bit partial sums where there is one; the result is the same."""
    torch.manual_seed(seed)
    a, b = (torch.randint(-64, 64, (rows, k), dtype=torch.int8) for rows in (m, n))
    check_int8(a, b, 10 ** torch.randn(m, 1), 10 ** torch.randn(n, 1), torch.randn(n), torch.float32, variants=LEVELS)


@pytest.mark.parametrize("k", [1, 7, 8, 9, 1023, 1024, 1025, 4099, 65536, 65537])
@pytest.mark.parametrize("x, y", [(63, 63), (-64, -64), (63, -64), (-64, 63)])
def test_int8_largest_products_of_seven_bits_do_not_saturate(x, y, k):
    a, b = torch.full((66, k), x, dtype=torch.int8), torch.full((3, k), y, dtype=torch.int8)
    check_int8(a, b, torch.ones(66, 1), torch.ones(3, 1), None, torch.float32, what=f"{x} {y} {k}", variants=LEVELS)


@pytest.mark.parametrize("operand", [0, 1])
@pytest.mark.parametrize("code", [64, -65, 127, -128])
def test_int8_one_code_of_eight_bits_among_seven_bit_ones_counts(operand, code):
    """Wherever it stands: in the first row, the last, the first column, the last."""
    for row, column in ((0, 0), (0, 1030), (69, 0), (69, 1030), (30, 517)):
        operands = [torch.randint(-64, 64, (70, 1031), dtype=torch.int8) for _ in range(2)]
        operands[operand][row, column] = code
        operands[1 - operand][:, column] = 63
        check_int8(*operands, torch.ones(70, 1), torch.ones(70, 1), None, torch.float32, what=f"{code} at {row}, {column}", variants=LEVELS)


def test_int8_seven_bit_threads_do_not_matter():
    args = *(torch.randint(-64, 64, (rows, 2050), dtype=torch.int8) for rows in (230, 140)), torch.rand(230, 1), torch.rand(140, 1), None, torch.float32
    with threads(2):
        check_int8(*args, variants=LEVELS)


def test_int8_scales_that_are_not_numbers_show_in_their_row_and_column_only():
    a, b, sa, sb = int8_operands(6, 7, 40)
    sa[2], sb[3] = float("nan"), float("inf")
    check_int8(a, b, sa, sb, torch.tensor(SPECIAL[:7]), torch.float32)
    out = matmul_int8(a, b, sa, sb, None, torch.float32)
    assert out[2].isnan().all() and not out[[0, 1, 3]][:, :3].isnan().any()


def test_int8_misaligned_operands(level):
    for shape in SHAPES[:11]:
        args = int8_operands(*shape)
        want = reference(matmul_int8, *args, None, torch.bfloat16)
        assert_same_bits(matmul_int8(*(misaligned(t) for t in args), None, torch.bfloat16), want, shape)


def test_int8_threads_do_not_matter():
    args = *int8_operands(130, 140, 600), torch.randn(140), torch.float32
    with threads(2):
        check_int8(*args)


def test_int8_huge_and_denormal_results_round_as_the_reference(level):
    a, b, _, _ = int8_operands(9, 9, 30)
    for exponent in (-160, -140, -24, 60, 100):
        sa, sb = torch.full((9, 1), 2.0 ** (exponent // 2)) * torch.rand(9, 1), torch.full((9, 1), 2.0 ** (exponent // 2)) * torch.rand(9, 1)
        for dtype in FLOATS:
            check_int8(a, b, sa, sb, None, dtype, variants=(level,), what=f"2^{exponent} {dtype}")


# --- float x packed ---------------------------------------------------------------------------------------
def packed_bound(want, x, packed, code, block, columns, transpose, bias, dtype):
    """How far fp32 accumulation in any order may be from the exact product.

    A sum of K products, each rounded, is within (K + 1) u sum |x| |w| (u = 2^-24, second order absorbed by K + 8); a
    decoded weight has 2 more roundings; a kernel may sum x q and x z apart, so a weight counts with |q| + z. Codes of 4 and 2
    bits may be multiplied before they are taken apart: 2^bits + 1 units and a zero point of at most 2^bits more (csrc/cpu/matmul.cpp,
    Fields). Then the output is rounded once more (and fp16 and bf16 have denormals)."""
    codes, scales, zeros = packed
    w = reference(dequantize, codes, scales, zeros, code, block, columns, torch.float32).double().abs()
    if Format(code).has_zero_point:
        w = w + 2 * (zeros.double() * scales.double()).repeat_interleave(block or columns or 1, 1)[:, :columns]
    if Format(code).bits < 8 and code != "e2m1":
        w = w + 2 * (2 ** Format(code).bits + 1) * scales.double().repeat_interleave(block or columns or 1, 1)[:, :columns]
    k = x.shape[1]
    size = x.double().abs() @ (w if transpose else w.t())
    if bias is not None:
        size = size + bias.double().abs()
    sum_error = (k + 8) * 2.0 ** -24 * size
    return sum_error + torch.finfo(dtype).eps / 2 * (want.abs() + sum_error) + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def check_packed(x, packed, code, block, columns, transpose, bias, dtype, what=""):
    want = reference(matmul_packed, x, *packed, code, block, columns, transpose, bias, torch.float32).double()
    # the reference is exact to fp64, then rounded once
    bound = packed_bound(want, x, packed, code, block, columns, transpose, bias, dtype)
    for variant in LEVELS:
        with running(variant):
            out = matmul_packed(x, *packed, code, block, columns, transpose, bias, dtype)
        assert out.dtype == dtype and out.shape == want.shape
        worst = ((out.double() - want).abs() - bound).max() if out.numel() else 0
        assert worst <= 0, f"{variant} {code} block {block} {tuple(x.shape)} x {tuple(packed[0].shape)} {dtype} {transpose} {what}: {worst} over the bound"


@pytest.mark.parametrize("code", BLOCKED)
@pytest.mark.parametrize("transpose", [False, True], ids=["xWt", "xW"])
def test_packed_is_within_the_bound_of_fp32_accumulation(code, transpose):
    for m, n, k in [*SHAPES, *EMPTY, (3, 300, 64), (17, 19, 1100)]:
        for block in sorted({fit(code, b) for b in (0, 32, 256, 54)}):
            w = torch.randn(n, k)
            packed = quantize(w.abs() if code.startswith("square") else w, code, block)
            for dtype in FLOATS:
                x = torch.randn(m, n if transpose else k).to(dtype)
                check_packed(x, packed, code, block, k, transpose, torch.randn(k if transpose else n), dtype)


@given(m=st.integers(0, 20), n=st.integers(0, 70), k=st.integers(0, 300), half_block=st.integers(0, 70), code=st.sampled_from(BLOCKED),
       transpose=st.booleans(), seed=st.integers(0, 2 ** 30))
def test_packed_any_shape_and_block(m, n, k, half_block, code, transpose, seed):
    torch.manual_seed(seed)
    block = fit(code, 2 * half_block)
    packed = quantize(torch.rand(n, k) - (0 if code.startswith("square") else 0.3), code, block)
    check_packed(torch.randn(m, n if transpose else k), packed, code, block, k, transpose, None, torch.float32)


@pytest.mark.parametrize("code", ["int8", "uint8", "int4", "uint4"])
def test_packed_small_integers_are_exact(code):
    """Products and sums of small integers are exact in fp32, whatever the order: no bound needed."""
    n, k = 37, 130
    format = Format(code, 64)
    codes = torch.randint(0, 256, (n, format.code_columns(k)), dtype=torch.uint8).view(format.code_dtype)
    scales = torch.full((n, 3), 0.5)
    zeros = torch.randint(0, 16, (n, 3), dtype=torch.uint8) if format.has_zero_point else torch.empty(0, dtype=torch.uint8)
    for transpose in (False, True):
        for m in (1, 2, 3, 4, 5, 16, 17, 40):
            x = torch.randint(-8, 9, (m, n if transpose else k)).float()
            want = reference(matmul_packed, x, codes, scales, zeros, code, 64, k, transpose, None, torch.float32)
            for variant in LEVELS:
                with running(variant):
                    assert_same_bits(matmul_packed(x, codes, scales, zeros, code, 64, k, transpose, None, torch.float32), want, f"{variant} {m}")


def test_packed_takes_any_layout_and_alignment(level):
    packed = tuple(misaligned(t) for t in quantize(torch.randn(33, 130), "uint4", 64))
    for dtype in FLOATS:
        for m in (3, 20):
            x = torch.randn(m, 130).to(dtype)
            want = matmul_packed(x, *packed, "uint4", 64, 130, False, None, torch.float32)
            for name, view in layouts(x):
                assert_same_bits(matmul_packed(view, *packed, "uint4", 64, 130, False, None, torch.float32), want, name)
            expanded = x[:1].expand(m, 130)
            got = matmul_packed(expanded, *packed, "uint4", 64, 130, False, None, torch.float32)
            assert_same_bits(got, matmul_packed(expanded.contiguous(), *packed, "uint4", 64, 130, False, None, torch.float32))


@pytest.mark.parametrize("m", [1, 5, 40])
@pytest.mark.parametrize("code", BLOCKED)
def test_packed_nan_in_a_block_reaches_its_outputs_only(level, code, m):
    w = torch.rand(9, 70) + 0.1
    w[4, 3] = float("nan")
    packed = quantize(w, code, 32)
    out = matmul_packed(torch.ones(m, 70), *packed, code, 32, 70, False, None, torch.float32)
    assert out[:, 4].isnan().all() and not out[:, :4].isnan().any() and not out[:, 5:].isnan().any()
    back = matmul_packed(torch.ones(m, 9), *packed, code, 32, 70, True, None, torch.float32)
    assert back[:, :32].isnan().all() and not back[:, 32:].isnan().any()
    x = torch.ones(m, 70)
    x[0, 5] = float("inf")
    out = matmul_packed(x, *quantize(torch.rand(9, 70) + 0.1, code, 32), code, 32, 70, False, None, torch.float32)
    assert not out[0].isfinite().any() and out[1:].isfinite().all()


@pytest.mark.parametrize("code", BLOCKED)
def test_packed_threads_do_not_matter(code):
    w = wild(260, 512).abs()
    packed = quantize(w, code, 64)
    for variant in LEVELS:
        for m in (1, 12, 70):
            for transpose in (False, True):
                x, results = torch.randn(m, 260 if transpose else 512), []
                for count in (1, 2):
                    with running(variant), threads(count):
                        results.append(matmul_packed(x, *packed, code, 64, 512, transpose, None, torch.float32))
                assert_same_bits(results[1], results[0], f"{variant} m {m} {transpose}")


# --- whole INT8 layers ------------------------------------------------------------------------------------
def check_layer(x, weight, bias, dy, code="int8", dtypes=(torch.float32,) * 3, k=None, variants=("reference", *LEVELS), what=""):
    """linear_int8 and its backward are the calls of quantize and matmul_int8 that they stand for, in every backend."""
    y_dtype, dx_dtype, dw_dtype = dtypes
    q = lambda *args: reference(quantize, *args)[:2]
    (a, s), (b, t), kept = q(x, code), q(weight, code), q(x, code, 0, True)
    y = reference(matmul_int8, a, b, s, t, bias, y_dtype)
    (d, u), (wt, v), (dt, w) = q(dy, code, 0, False, k, 5), q(weight, code, 0, True), q(dy, code, 0, True, k, 6)
    dx, dw = reference(matmul_int8, d, wt, u, v, None, dx_dtype), reference(matmul_int8, dt, kept[0], w, kept[1], None, dw_dtype)
    none = torch.empty(0, 0)
    for variant in variants:
        with running(variant):
            name = f"{variant} {code} {tuple(x.shape)} -> {len(weight)} {what}"
            assert_same_bits(linear_int8(x, weight, bias, code, True, y_dtype), (y, *kept), name)
            assert_same_bits(linear_int8(x, weight, bias, code, False, y_dtype), (y, kept[0][:0], kept[1][:0]), name)
            for wanted in ((dx_dtype, dw_dtype), (dx_dtype, None), (None, dw_dtype), (None, None)):
                got = linear_int8_backward(dy, weight if wanted[0] else None, *(kept if wanted[1] else (None, None)), code, k, 5, 6, *wanted)
                assert_same_bits(got, (dx if wanted[0] else none, dw if wanted[1] else none), f"{name} {wanted}")


@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
def test_a_layer_in_one_call_has_the_bits_of_its_calls(shape):
    """(tokens, out, in)"""
    tokens, outputs, inputs = shape
    if tokens * outputs * inputs < 100000:
        for dtype in FLOATS:
            x, weight, dy = wild(tokens, inputs, dtype), wild(outputs, inputs), wild(tokens, outputs, dtype)
            for code, k in (("int8", None), ("int7", None), ("int8", key(-3, 7))):
                check_layer(x, weight, torch.randn(outputs).to(dtype), dy, code, (dtype, dtype, torch.float32), k)
    check_layer(wild(tokens, inputs), wild(outputs, inputs).half(), None, wild(tokens, outputs))


def test_a_layer_in_one_call_reads_any_layout():
    x, weight, dy = wild(9, 21), wild(7, 21), wild(9, 7)
    for views in zip(*(layouts(t) for t in (x, weight, dy))):
        (name, x_), (_, weight_), (_, dy_) = views
        for args in ((x_, weight, dy), (x, weight_, dy), (x, weight, dy_), (x_, weight_, dy_)):
            check_layer(args[0], args[1], None, args[2], k=None if name != "transposed" else key(1, 2), what=name)
    check_layer(x, weight, torch.randn(14)[::2], dy[:1].expand(9, 7), what="a strided bias, an expanded dy")


def test_a_layer_in_one_call_shows_nan_and_inf_and_keeps_zeros():
    for bad in SPECIAL:
        x, weight, dy = wild(5, 33), wild(6, 33), wild(5, 6)
        x[2, 3], weight[4, 5], dy[0, 1], x[3] = bad, bad, bad, 0.0
        check_layer(x, weight, None, dy, what=str(bad))


@given(m=st.integers(0, 80), n=st.integers(0, 80), k=st.integers(0, 100), code=st.sampled_from(["int8", "int7"]), seed=st.integers(0, 2 ** 30))
def test_a_layer_in_one_call_any_shape(m, n, k, code, seed):
    torch.manual_seed(seed)
    check_layer(torch.randn(m, k), torch.randn(n, k), torch.randn(n), torch.randn(m, n), code, variants=LEVELS[-1:])


def test_a_layer_in_one_call_refuses_bad_arguments_by_name():
    x, w, dy, f = torch.randn(5, 12), torch.randn(7, 12), torch.randn(5, 7), torch.float32
    _, codes, scales = linear_int8(x, w, None, "int8", True, f)
    for args, error, words in (((x, w, None, "e4m3", True, f), ValueError, "code is 'e4m3'; it must be int8 or int7"),
                               ((x.double(), w, None, "int8", True, f), TypeError, "x is float64"),
                               ((x, w[:, :3], None, "int8", True, f), ValueError, "weight is .* it must be of shape .any, 12"),
                               ((x, w, w, "int8", True, f), ValueError, "bias is .* it must be of shape .7,"),
                               ((x, w, None, "int8", True, torch.int8), TypeError, "dtype is torch.int8")):
        with pytest.raises(error, match=words):
            linear_int8(*args)
    good = {"dy": dy, "weight": w, "codes": codes, "scales": scales, "code": "int8", "key": None, "stream": 0, "turned_stream": 0, "dx_dtype": f, "dw_dtype": f}
    for change, error, words in (({"code": "uint8"}, ValueError, "code is"), ({"dy": dy.long()}, TypeError, "dy is int64"), ({"weight": None}, TypeError, "weight is None"),
                                 ({"weight": w[:3]}, ValueError, "weight is"), ({"codes": None}, TypeError, "codes is None"), ({"codes": codes[:5]}, ValueError, "codes is"),
                                 ({"codes": codes.t()}, ValueError, "codes is"), ({"scales": scales.double()}, TypeError, "scales is"), ({"key": torch.zeros(2)}, ValueError, "key is"),
                                 ({"scales": None}, TypeError, "scales is None"), ({"dx_dtype": torch.int8}, TypeError, "dx_dtype is"), ({"dw_dtype": torch.float64}, TypeError, "dw_dtype is")):
        with pytest.raises(error, match=words):
            linear_int8_backward(**{**good, **change})
