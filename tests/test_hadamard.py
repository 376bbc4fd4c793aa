"""The random Hadamard transform: its matrix by hand, what it keeps (lengths, products), then native against the reference bit for bit."""
import pytest
import torch
from gradmill.ops import hadamard
from gradmill.reference.philox import stream, words
from hypothesis import given, strategies as st

from .conftest import FLOATS, FLT_MAX, LEVELS, SPECIAL, assert_native_is_reference, assert_same_bits, key, layouts, reference, running, threads, wild

BLOCKS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SHAPES = [(1, 1), (3, 2), (2, 13), (5, 17), (7, 64), (1, 2051), (19, 300), (2, 4100), (0, 0), (0, 5), (5, 0)]
ROOT = torch.tensor(2.0).rsqrt()


# --- by hand ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("x, block, want", [
    ([3, 1], 2, [4 * ROOT, 2 * ROOT]),
    ([1, 2, 3, 5], 4, [5.5, -1.5, -2.5, 0.5]),                             # halves of 11, -3, -5, 1
    ([1, 2, 3, 5, 10], 4, [5.5, -1.5, -2.5, 0.5, 10]),                     # 4 + 1
    ([1, 2, 3, 5, 7], 16, [5.5, -1.5, -2.5, 0.5, 7]),
    ([6, 2, 9], 4, [8 * ROOT, 4 * ROOT, 9]),                               # 2 + 1
    ([8, 0, 0, 0, 0, 0, 0, 0] * 2, 16, [4] * 8 + [0] * 8),                 # elements 0 and 8: their sum, their difference
])
def test_values_worked_out_by_hand(x, block, want):
    for variant in ("reference", *LEVELS):
        with running(variant):
            got = hadamard(torch.tensor([x], dtype=torch.float32), block)
        assert got.tolist() == [[float(w) for w in want]], variant


def test_signs_are_bit_31_of_the_words_of_the_position_in_the_row():
    negative = words(7, 3, stream(5, "hadamard"), 0, 300) >> 31 == 1
    assert 100 < negative.sum() < 200
    x = torch.randn(4, 300)
    flipped = torch.where(negative, -x, x)
    for variant in ("reference", *LEVELS):
        with running(variant):
            k = key(7, 3)
            assert_same_bits(hadamard(x, 16, False, k, stream(5, "hadamard")), hadamard(flipped), variant)
            assert_same_bits(hadamard(x.t(), 16, True, k, stream(5, "hadamard")), hadamard(flipped), variant)
            back = hadamard(x, 16, False, k, stream(5, "hadamard"), None, True)
            plain = hadamard(x)
            assert_same_bits(back, torch.where(negative, -plain, plain), variant)


# --- what it is for ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("columns", [1, 2, 3, 13, 16, 31, 100, 1027])
@pytest.mark.parametrize("block", [2, 16, 128, 1024])
def test_is_orthogonal_at_every_length(block, columns):
    h = hadamard(torch.eye(columns), block, False, key(1, 2)).double()
    # an entry is 2^(-k/2) rounded once: the sum of at most `block` products of two is off by two roundings
    assert (h @ h.t() - torch.eye(columns)).abs().max() <= 2 * 2.0 ** -24
    sizes, tail = [block] * (columns // block), columns % block
    sizes += [1 << i for i in reversed(range(10)) if tail >> i & 1]
    where = torch.block_diag(*(torch.ones(s, s) for s in sizes))
    assert torch.equal(h != 0, where != 0)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("columns, block", [(13, 16), (64, 16), (257, 32), (1500, 1024)])
def test_a_product_of_two_transformed_operands_is_the_same_product(columns, block, transpose):
    a, b = wild(9, columns), wild(11, columns)
    k, s = key(11, 3), stream(2, "hadamard")
    ha, hb = (hadamard(x.t().contiguous() if transpose else x, block, transpose, k, s).double() for x in (a, b))
    # each butterfly step and the scale round once, relative to the block's norm; an orthogonal transform keeps norms
    bound = 2 * (block.bit_length() + 1) * 2.0 ** -24 * a.double().norm(dim=1)[:, None] * b.double().norm(dim=1)[None]
    assert ((ha @ hb.t() - a.double() @ b.double().t()).abs() <= bound).all()


@pytest.mark.parametrize("block", [2, 16, 1024])
def test_inverse_undoes_it(block):
    x, k = torch.randn(5, 1077), key(-9, 4)
    back = hadamard(hadamard(x, block, False, k, 5), block, False, k, 5, None, True)
    assert ((back - x).double().norm(dim=1) <= 2 * (block.bit_length() + 1) * 2.0 ** -24 * x.double().norm(dim=1)).all()
    wrong = hadamard(hadamard(x, block, False, k, 5), block, False, k, 6, None, True)
    assert (wrong - x).abs().max() > 0.5


def test_spreads_an_outlier_over_its_block():
    x = torch.zeros(1, 32)
    x[0, 5] = 64.0
    assert hadamard(x, 16, False, key(0, 0))[0].abs().tolist() == [16.0] * 16 + [0.0] * 16


def test_nan_and_inf_spread_over_their_block_only():
    x = torch.ones(2, 40)
    x[0, 3], x[1, 20] = float("nan"), float("inf")
    y = hadamard(x, 16, False, key(1, 1))
    assert y.isnan()[0].tolist() == [True] * 16 + [False] * 24
    assert (~y.isfinite())[1].tolist() == [False] * 16 + [True] * 16 + [False] * 8


# --- native against reference -----------------------------------------------------------------------------
@pytest.mark.parametrize("block", BLOCKS)
def test_is_bit_equal_to_the_reference(block):
    for i, shape in enumerate(SHAPES):
        for j, dtype in enumerate(FLOATS):
            out = (None, *FLOATS)[(i + j) % 4]
            for transpose in (False, True):
                for k, inverse in ((None, False), (key(-5, 3), False), (key(2 ** 62, 2 ** 32 - 1), True)):
                    assert_native_is_reference(hadamard, wild(*shape, dtype=dtype), block, transpose, k, 7 << 8 | 5, out, inverse,
                                               what=f"{shape} {dtype} to {out} {transpose} {k} {inverse}")


@given(rows=st.integers(0, 40), columns=st.integers(0, 700), log=st.integers(1, 10), transpose=st.booleans(), inverse=st.booleans(),
       seed=st.integers(-2 ** 63, 2 ** 63 - 1), step=st.integers(0, 2 ** 32 - 1), stream=st.integers(0, 2 ** 32 - 1))
def test_is_bit_equal_for_any_shape_block_and_key(rows, columns, log, transpose, inverse, seed, step, stream):
    x = wild(rows, columns, generator=torch.Generator().manual_seed(seed % 2 ** 63))
    assert_native_is_reference(hadamard, x, 1 << log, transpose, key(seed, step), stream, None, inverse)


@pytest.mark.parametrize("block", BLOCKS)
def test_special_values(block):
    special = torch.tensor(SPECIAL)
    finite = special[special.isfinite()]
    for x in (special[None], special[:, None], finite.repeat(9)[None], torch.full((2, 67), FLT_MAX), torch.full((2, 67), 1e-45), -torch.zeros(3, 70),
              torch.randn(8, 64) * 1e-41, torch.tensor([[FLT_MAX, -FLT_MAX, 1e-45, -0.0]])):
        for dtype in FLOATS:
            for k, inverse in ((None, False), (key(9, 1), False), (key(9, 1), True)):
                for out in FLOATS:
                    assert_native_is_reference(hadamard, x.to(dtype), block, False, k, 0, out, inverse, what=f"{x.flatten()[:4]} {dtype} {k} {inverse} {out}")


def test_takes_any_layout(level):
    for dtype in FLOATS:
        for shape in ((19, 67), (1, 5), (6, 1), (64, 64)):
            x = wild(*shape, dtype=dtype)
            for transpose in (False, True):
                want = reference(hadamard, x, 16, transpose, key(1, 1))
                for name, view in layouts(x):
                    assert_same_bits(hadamard(view, 16, transpose, key(1, 1)), want, f"{name} {shape} {dtype} {transpose}")
    overlapping = torch.randn(50).as_strided((5, 33), (3, 1))
    for x in (torch.randn(1, 33).expand(5, 33), torch.randn(5, 1).expand(5, 33), overlapping, overlapping.t(), torch.randn(1).expand(4, 6)):
        for transpose in (False, True):
            assert_same_bits(hadamard(x, 8, transpose), reference(hadamard, x.contiguous(), 8, transpose))


def test_threads_and_levels_give_the_same_bits_and_leave_x_alone():
    x = wild(259, 517)
    before = x.clone()
    for transpose in (False, True):
        results = []
        for name in LEVELS:
            for count in (1, 2):
                with running(name), threads(count):
                    results.append(hadamard(x, 64, transpose, key(3, 4)))
        for other in results[1:]:
            assert_same_bits(other, results[0])
    assert_same_bits(x, before)
