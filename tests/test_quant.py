"""quant: codes by hand, Philox by its published vectors, then every backend bit for bit against the reference."""
import pytest
import torch
from gradmill.formats import Format
from gradmill.ops import dequantize, quantize, quantize_both
from gradmill.reference import philox
from gradmill.reference.philox import words
from gradmill.reference.quant import sqrt
from hypothesis import given, strategies as st

from .conftest import (BLOCKED, FLOATS, FLT_MAX, LEVELS, SPECIAL, assert_native_is_reference, assert_same_bits, fit, key, layouts, reference, running, threads, wild)

SCALED = ("int8", "uint8", "int4", "uint4")
SHAPES = [(1, 1), (1, 2), (3, 1), (2, 7), (5, 31), (7, 64), (3, 127), (2, 256), (4, 257), (13, 521), (1, 1031)]
EMPTY = [(0, 0), (0, 5), (5, 0)]


def inputs(code, *shape, dtype=torch.float32, generator=None):
    """Fresh values that ``code`` is for: second moments are not negative."""
    x = wild(*shape, dtype=dtype, generator=generator)
    return x.abs() if code.startswith("square") else x


# --- the reference itself ---------------------------------------------------------------------------------
def philox4x32(counter, key):
    """Philox4x32-10 in Python integers, as the paper writes it: an independent second opinion."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = b >> 32 ^ c1 ^ k0, b & 0xFFFFFFFF, a >> 32 ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return [c0, c1, c2, c3]


@pytest.mark.parametrize("counter, k, want", [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0], [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
])
def test_philox_known_answers_of_random123(counter, k, want):
    assert philox4x32(counter, k) == want


def test_philox_first_known_answer_through_gradmills_numbering():
    assert words(0, 0, 0, 0, 4).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@given(seed=st.integers(0, 2 ** 64 - 1), step=st.integers(0, 2 ** 32 - 1), stream=st.integers(0, 2 ** 32 - 1), first=st.integers(0, 2 ** 40))
def test_philox_counter_is_group_stream_step_and_word_is_element_mod_4(seed, step, stream, first):
    got = words(seed - (1 << 64) if seed >> 63 else seed, step, stream, first, 6).tolist()
    for i, word in enumerate(got):
        group = (first + i) // 4
        assert word == philox4x32([group & 0xFFFFFFFF, group >> 32, stream, step], [seed & 0xFFFFFFFF, seed >> 32])[(first + i) % 4]


def test_stream_holds_tensor_id_and_purpose():
    assert philox.stream(5, "weight") == 5 << 8
    assert len(set(philox.PURPOSES.values())) == len(philox.PURPOSES) and max(philox.PURPOSES.values()) < 256


HAND = [  # code, x, codes, scale, zero point: worked out on paper
    ("int8", [127, -127, 0, 63.5, 0.5, 1.5, -0.5], [127, -127, 0, 64, 0, 2, 0], 1.0, None),
    ("int8", [-254, 2], [-127, 1], 2.0, None),
    ("uint8", [-55, 200, 0, 2.5], [0, 255, 55, 57], 1.0, 55),
    ("uint8", [255, 254.5, 10], [255, 254, 10], 1.0, 0),                       # one-sided: the range still includes zero
    ("uint8", [-255, -1, -100], [0, 254, 155], 1.0, 255),
    ("int4", [7, -7, 0.5, 1.5, 3.5], [0x97, 0x20, 0x04], 1.0, None),           # nibbles 7 -7 | 0 2 | 4 -
    ("uint4", [-5, 10, 0, 2.5], [0xF0, 0x75], 1.0, 5),                         # nibbles 0 15 | 5 7
    ("moment8", [247, 1, -1, 0, -247, 3], [127, 16, 144, 0, 255, 32], 1.0, None),   # 1 + x is a float of exponent 0..7
    ("moment4", [11, -7, 0.5, 1, -0.2, 0], [0xE7, 0x21, 0x08], 1.0, None),   # codes 7 14 | 1 2 | 8 0
    ("square4", [13 ** 2, 1, 0, 9, 0.25 ** 2, 3.4 ** 2], [0x4F, 0x81, 0x81], 1.0, None),
    ("square8", [251 ** 2, 1, 0, 9], [255, 32, 1, 64], 1.0, None),             # never 0 in a block that is not all zero
]


@pytest.mark.parametrize("code, x, codes, scale, zero", HAND)
def test_codes_worked_out_by_hand(code, x, codes, scale, zero):
    for variant in ("reference", *LEVELS):
        with running(variant):
            got, scales, zeros = quantize(torch.tensor([x], dtype=torch.float32), code)
        assert got.tolist() == [codes] and scales.tolist() == [[scale]], variant
        assert zeros.tolist() == ([] if zero is None else [[zero]]), variant


@pytest.mark.parametrize("code, codes, scale, zero, want", [
    ("int8", [127, -128, 0], 0.5, None, [63.5, -64, 0]),
    ("uint8", [0, 255, 7], 2.0, 7, [-14, 496, 0]),
    ("int4", [0x97, 0x08], 1.0, None, [7, -7, -8]),
    ("uint4", [0xF0, 0x05], 1.0, 5, [-5, 10, 0]),
    ("moment8", [127, 255, 16, 0, 1], 2.0, None, [494, -494, 2, 0, 0.125]),
    ("moment4", [0xF7, 0x01, 0x0C], 2.0, None, [22, -22, 1, 0, -6]),
    ("square4", [0x4F, 0x01, 0x0C], 2.0, None, [676, 4, 0.25, 0, 196]),
    ("square8", [255, 32, 0, 1], 1.0, None, [63001, 1, 0, 1 / 1024]),
])
def test_values_worked_out_by_hand(code, codes, scale, zero, want):
    packed = torch.tensor([codes], dtype=Format(code).code_dtype)
    zeros = torch.tensor([] if zero is None else [[zero]], dtype=torch.uint8)
    for variant in ("reference", *LEVELS):
        with running(variant):
            assert dequantize(packed, torch.tensor([[scale]]), zeros, code, 0, len(want), torch.float32).tolist() == [want], variant


def test_blocks_stay_within_a_row_and_keep_a_short_tail():
    x = torch.tensor([[1.0, 2, 127, 0, 4], [8, 0, 16, 1, 0]])
    _, scales, _ = reference(quantize, x, "int8", 2)
    assert torch.equal(scales * 127, torch.tensor([[2.0, 127, 4], [8, 16, 0]]))


@pytest.mark.parametrize("code", BLOCKED)
def test_a_block_with_nan_or_inf_decodes_to_nan_and_its_neighbours_do_not(code):
    for bad in (float("nan"), float("inf")):
        x = torch.ones(2, 16)
        x[0, 1] = bad
        codes, scales, zeros = quantize(x, code, 8)
        assert scales.isnan().tolist() == [[True, False], [False, False]]
        assert (codes.view(torch.uint8)[0, :Format(code).bits] == 0).all()
        assert dequantize(codes, scales, zeros, code, 8, 16, torch.float32).isnan().tolist() == [[True] * 8 + [False] * 8, [False] * 16]


@pytest.mark.parametrize("code", BLOCKED)
def test_an_all_zero_block_has_scale_zero_and_decodes_to_zero(code):
    x = torch.tensor([[0.0, -0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 0.5]])
    codes, scales, zeros = quantize(x, code, 8)
    assert scales[0, 0] == 0 and scales[0, 1] > 0
    assert dequantize(codes, scales, zeros, code, 8, 11, torch.float32)[0, :8].tolist() == [0] * 8


def test_reference_sqrt_is_correctly_rounded():
    x = torch.randint(0x00800000, 0x7F7FFFFF, (20000,), dtype=torch.int32).view(torch.float32)
    root, exact = sqrt(x), x.double().sqrt()
    for direction in (-torch.inf, torch.inf):
        neighbour = torch.nextafter(root, torch.tensor(direction)).double()
        assert ((root.double() - exact).abs() <= (neighbour - exact).abs()).all()


# --- how far a code is from its value ---------------------------------------------------------------------
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("code", SCALED)
def test_scaled_codes_are_within_half_a_step_or_one_when_stochastic(code, stochastic):
    x = wild(17, 300)
    codes, scales, zeros = quantize(x, code, 32, False, key(1, 2) if stochastic else None)
    back = dequantize(codes, scales, zeros, code, 32, 300, torch.float32)
    step = scales.repeat_interleave(32, 1)[:, :300].double()
    # x / scale and the product back are fp32: a relative error of 2^-24 each, on values up to 255 steps
    assert ((back.double() - x.double()).abs() <= step * ((1.0 if stochastic else 0.5) + 255 * 3 * 2.0 ** -24)).all()


def test_float_codes_keep_their_relative_precision():
    """Codes of 4 and 5 mantissa bits of 1 + x/scale: half a step is 2^-5 and 2^-6 of that (square8: of the root)."""
    x = torch.rand(9, 512) ** 4
    codes, scales, _ = quantize(x, "moment8", 128)
    back, step = dequantize(codes, scales, torch.empty(0, dtype=torch.uint8), "moment8", 128, 512, torch.float32), scales.repeat_interleave(128, 1)
    assert ((back - x).abs() <= (x + step) * 2.0 ** -5 * 1.0001).all()
    codes, scales, _ = quantize(x, "square8", 128)
    back, step = dequantize(codes, scales, torch.empty(0, dtype=torch.uint8), "square8", 128, 512, torch.float32), scales.repeat_interleave(128, 1)
    # never 0: the smallest root is 1/32 of a step
    assert ((back.sqrt() - x.sqrt()).abs() <= (x.sqrt() + step) * 2.0 ** -6 * 1.0001 + step / 32).all()


# --- native against reference -----------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("code", BLOCKED)
def test_quantize_is_bit_equal_to_the_reference(code, dtype):
    for shape in SHAPES + EMPTY:
        x = inputs(code, *shape, dtype=dtype)
        for block in sorted({fit(code, b) for b in (0, 2, 64, 256, 1000)}):
            for transpose in (False, True):
                for k in (None, key(-5, 3)):
                    assert_native_is_reference(quantize, x, code, block, transpose, k, 7 << 8, what=f"{shape} block {block} {transpose} {k}")


@given(rows=st.integers(0, 9), columns=st.integers(0, 400), block=st.integers(0, 130), code=st.sampled_from(BLOCKED),
       transpose=st.booleans(), stochastic=st.booleans(), seed=st.integers(-2 ** 63, 2 ** 63 - 1), step=st.integers(0, 2 ** 32 - 1),
       stream=st.integers(0, 2 ** 32 - 1))
def test_quantize_and_back_are_bit_equal_for_any_shape_block_and_key(rows, columns, block, code, transpose, stochastic, seed, step, stream):
    block = fit(code, block)
    x = inputs(code, rows, columns, generator=torch.Generator().manual_seed(seed % 2 ** 63))
    k = key(seed, step) if stochastic else None
    packed = assert_native_is_reference(quantize, x, code, block, transpose, k, stream)
    assert_native_is_reference(dequantize, *packed, code, block, rows if transpose else columns, torch.float32)


def check_both(x, code, block, k=None, streams=(0, 0), what=""):
    """quantize_both is the two calls of quantize, in every backend."""
    want = (*reference(quantize, x, code, block, False, k, streams[0])[:2], *reference(quantize, x, code, block, True, k, streams[1])[:2])
    for variant in ("reference", *LEVELS):
        with running(variant):
            assert_same_bits(quantize_both(x, code, block, k, *streams), want, f"{variant} {code} {tuple(x.shape)} {block} {what}")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("code", ["int8", "int7", "e4m3", "e5m2"])
def test_quantize_both_ways_is_bit_equal_to_two_calls(code, dtype):
    for shape in [*EMPTY, (1, 1), (3, 5), (64, 64), (65, 63), (1, 300), (300, 1), (130, 70), (129, 257)]:
        x = inputs(code, *shape, dtype=dtype)
        for block in (0, 1, 32, 100, 128):
            check_both(x, code, block)
            check_both(x, code, block, key(-5, 3), (7 << 8, 9 << 8))
        for name, view in layouts(x):
            check_both(view, code, 0, what=name)
    x = inputs(code, 70, 130, dtype=dtype)
    x[3], x[:, 4], x[5, 6], x[69, 129], x[8] = 0.0, -0.0, torch.nan, -torch.inf, 1e-45
    x[9] = torch.tensor([FLT_MAX, 1.0] * 65)
    for block in (0, 32):
        check_both(x, code, block)
        check_both(x, code, block, key(1, 2), (3, 4))


@given(rows=st.integers(0, 150), columns=st.integers(0, 150), block=st.integers(0, 130), code=st.sampled_from(["int8", "int7", "e4m3", "e5m2"]),
       seed=st.integers(0, 2 ** 63 - 1))
def test_quantize_both_ways_any_shape(rows, columns, block, code, seed):
    check_both(inputs(code, rows, columns, generator=torch.Generator().manual_seed(seed)), code, block)


def test_quantize_both_ways_threads_do_not_matter():
    x, results = wild(300, 260), []
    for count in (1, 2):
        with threads(count):
            results.append(quantize_both(x, "int8"))
    assert_same_bits(results[1], results[0])


@pytest.mark.parametrize("code", BLOCKED)
def test_quantize_special_values(code):
    special = torch.tensor(SPECIAL)
    if code.startswith("square"):
        special = special.abs()
    finite = special[special.isfinite()]
    cases = [special[None], special[:, None], finite[None], finite.repeat(7)[None, :101], torch.zeros(3, 70), -torch.zeros(2, 66),
             torch.full((2, 67), FLT_MAX), torch.full((2, 67), 1e-45), torch.full((2, 3), 2.0 ** -100), torch.full((2, 3), 2.0 ** -101),
             torch.tensor([[FLT_MAX, 1.0, 1e-45, 0.0]]), torch.randn(8, 64).abs() * 1e-41]
    if not code.startswith("square"):
        cases += [torch.tensor([[FLT_MAX, -FLT_MAX, 1.0]]), torch.full((2, 67), -FLT_MAX)]
    for x in cases:
        for dtype in FLOATS:
            for block in (fit(code, 0), fit(code, 4)):
                for k in (None, key(9, 1)):
                    packed = assert_native_is_reference(quantize, x.to(dtype), code, block, False, k, what=f"{x.flatten()[:4]} {dtype} {block} {k}")
                    assert_native_is_reference(dequantize, *packed, code, block, x.shape[1], torch.float32)


@pytest.mark.parametrize("code", BLOCKED)
def test_quantize_takes_any_layout(level, code):
    for dtype in FLOATS:
        for shape in ((19, 67), (1, 5), (6, 1), (64, 64)):
            x = inputs(code, *shape, dtype=dtype)
            for transpose in (False, True):
                want = reference(quantize, x, code, 32, transpose, key(1, 1))
                for name, view in layouts(x):
                    assert_same_bits(quantize(view, code, 32, transpose, key(1, 1)), want, f"{name} {shape} {dtype} {transpose}")


def test_quantize_expanded_and_overlapping_views(level):
    row, column = torch.randn(1, 33).expand(5, 33), torch.randn(5, 1).expand(5, 33)
    overlapping = torch.randn(50).as_strided((5, 33), (3, 1))
    for x in (row, column, overlapping, row.t(), overlapping.t(), torch.randn(1).expand(4, 6)):
        for transpose in (False, True):
            want = reference(quantize, x.contiguous(), "uint4", 8, transpose)
            assert_same_bits(quantize(x, "uint4", 8, transpose), want)


@pytest.mark.parametrize("code", BLOCKED)
def test_quantize_threads_and_levels_give_the_same_bits(code):
    x = inputs(code, 259, 517)
    for block in (fit(code, 0), 64):
        for transpose in (False, True):
            results = []
            for name in LEVELS:
                for count in (1, 2):
                    with running(name), threads(count):
                        results.append(quantize(x, code, block, transpose, key(3, 4)))
            for other in results[1:]:
                assert_same_bits(other, results[0])


@pytest.mark.parametrize("code", BLOCKED)
def test_dequantize_any_codes_and_scales(code):
    """Codes no quantiser writes (-128, nibble -8) and scales of every kind, into each float type."""
    for rows, columns in [(1, 1), (3, 5), (5, 64), (2, 251), (11, 300), *EMPTY]:
        for block in sorted({fit(code, b) for b in (0, 2, 64, 130)}):
            format = Format(code, block)
            codes = torch.randint(0, 256, (rows, format.code_columns(columns)), dtype=torch.uint8).view(format.code_dtype)
            blocks = (rows, format.blocks(columns))
            scales = torch.randn(blocks) * 10 ** torch.randn(blocks)
            if scales.numel() > 4:
                scales.view(-1)[:5] = torch.tensor([float("nan"), float("inf"), 0.0, 1e-44, FLT_MAX])
            zeros = torch.randint(0, 2 ** format.bits, format.zeros_shape(rows, columns), dtype=torch.uint8)
            if code == "int4_outlier":  # finite values at positions inside the shortest tail
                zeros[:] = quantize(torch.randn(rows, columns), code, block)[2]
            for dtype in FLOATS:
                assert_native_is_reference(dequantize, codes, scales, zeros, code, block, columns, dtype, what=f"{rows}x{columns} {block} {dtype}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_float_is_read_exactly(level, dtype):
    """All 65536 bit patterns, one per row with its own scale: decode then gives the value's int8 neighbourhood."""
    x = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)[:, None]
    assert_same_bits(quantize(x, "int8"), reference(quantize, x, "int8"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversion_to_16_bit_floats_rounds_half_to_even(level, dtype):
    """Code 1 times an arbitrary fp32 scale is that scale: the output is torch's own conversion of it."""
    scales = torch.randint(-2 ** 31, 2 ** 31 - 1, (20000,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    ties = torch.tensor([1 + 2.0 ** -8, 1 + 3 * 2.0 ** -8, 1 + 2.0 ** -11, 1 + 3 * 2.0 ** -11, 65519.0, 65520.0, 2.0 ** -25, 3 * 2.0 ** -25, 6e-8, 1e-39])
    scales = torch.cat((scales, ties, -ties))[:, None]
    codes = torch.ones_like(scales, dtype=torch.int8)
    assert_same_bits(dequantize(codes, scales, torch.empty(0, dtype=torch.uint8), "int8", 0, 1, dtype), scales.to(dtype))


# --- random bits ------------------------------------------------------------------------------------------
def test_steps_streams_and_seeds_round_differently_and_repeat():
    x = torch.rand(4, 256)
    draws = [quantize(x, "uint4", 64, False, key(seed, step), stream)[0]
             for seed, step, stream in [(0, 0, 0), (1, 0, 0), (1 << 32, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 1 << 8)]]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert not torch.equal(a, b)
    assert torch.equal(draws[0], quantize(x, "uint4", 64, False, key(0, 0), 0)[0])


@pytest.mark.parametrize("code", SCALED)
@pytest.mark.parametrize("seed", [0, 1, 123456789])
def test_stochastic_rounding_is_unbiased(code, seed):
    """Rounding errors in steps of a fraction f have mean 0 and variance f (1 - f): their sum stays within 4 sigma, over
    all elements and steps, and so does the mean square of the elements' own scores."""
    x, steps, block = torch.randn(16, 512, generator=torch.Generator().manual_seed(seed)), 64, 128
    _, scales, zeros = reference(quantize, x, code, block)
    y = (x / scales.repeat_interleave(block, 1)).clamp(-127, 255).double()
    zero = zeros.repeat_interleave(block, 1) if len(zeros) else torch.zeros_like(y)
    fraction = y - y.floor()
    top = {"int8": 127, "int4": 7, "uint8": 255, "uint4": 15}[code]
    inside = (y.floor() + zero >= (0 if len(zeros) else -top)) & (y.floor() + 1 + zero <= top) & (fraction > 0.1) & (fraction < 0.9)
    total = torch.zeros_like(y)
    for step in range(steps):
        packed = quantize(x, code, block, False, key(seed, step))
        total += dequantize(*packed, code, block, 512, torch.float32) / scales.repeat_interleave(block, 1)
    variance = fraction * (1 - fraction)
    z = ((total / steps - y) / (variance / steps).sqrt())[inside]
    n = len(z)
    assert n > 4000
    assert abs(z.sum() / n ** 0.5) < 4
    # z^2 has mean 1 and variance 2 + (kurtosis excess)/steps, at most 2 + 6/64
    assert abs(((z ** 2).mean() - 1) * (n / 2.1) ** 0.5) < 4


def test_rounding_up_happens_exactly_when_the_fraction_exceeds_the_words_top_24_bits():
    x = torch.rand(1, 1000) * 254 - 127
    x[0, 0] = 127.0
    word = words(5, 6, 7, 0, 1000)
    codes, _, _ = quantize(x, "int8", 0, False, key(5, 6), 7)
    want = x.floor() + (x - x.floor() > (word >> 8).float() * 2.0 ** -24)
    assert torch.equal(codes.float(), want)


def test_element_numbers_count_from_the_whole_tensors_start():
    """Row r of a matrix uses words r * columns...: rows rounded alone, with a shifted reference, agree."""
    x = torch.rand(3, 40)
    x[:, 0] = 1.0
    codes, scales, _ = quantize(x, "int8", 0, False, key(5, 6), 7)
    for row in range(3):
        y = x[row] / scales[row]
        up = y - y.floor() > (words(5, 6, 7, row * 40, 40) >> 8).float() * 2.0 ** -24
        assert torch.equal(codes[row].float(), y.floor() + up)
