"""binary: packing and exact products of packed bits, the same bits in every backend."""
import pytest
import torch
from hypothesis import given, strategies as st

from gradmill import ops
from gradmill.formats import Format
from gradmill.ops import binary as binary_ops, matmul_binary, matmul_planes, pack_planes, pack_signs

from .conftest import FLOATS, LEVELS, SPECIAL, assert_native_is_reference, assert_same_bits, key, layouts, misaligned, reference, running, threads, wild

SHAPES = [(1, 1), (1, 31), (2, 32), (3, 33), (17, 64), (5, 515), (33, 1030), (70, 17), (0, 5), (5, 0), (0, 0)]


def values(rows, columns, dtype=torch.float32):
    """Numbers of many magnitudes; further rows are all equal, huge, tiny, special."""
    x = wild(rows, columns)
    if rows > 4 and columns > 1:
        x[1], x[2] = 0.25, torch.linspace(-3.3e38, 3.3e38, columns)
        x[3] = torch.randn(columns) * 1e-32
        x[4, :len(SPECIAL)] = torch.tensor(SPECIAL)[:columns]
    return x.to(dtype)


def bit_rows(rows, columns):
    """Packed bits; what unused bits hold does not matter, so they are random, too."""
    return torch.randint(0, 256, (rows, -(-columns // 8)), dtype=torch.uint8)


# --- packing ----------------------------------------------------------------------------------------------
def test_packed_by_hand():
    x = torch.tensor([[1.0, -2.0, 0.0, -0.0, float("nan"), -float("inf"), 3.0, -4.0, -5.0], [-1.0] * 8 + [7.0]])
    for variant in ("reference", *LEVELS):
        with running(variant):
            bits, scales = pack_signs(x)
            means = pack_signs(x, mean=True)[1]
            columns, _ = pack_signs(x, transpose=True)
            planes, steps, offsets = pack_planes(torch.tensor([[-1.0, 0.0, 2.0, 0.5], [3.0, 3.0, 3.0, 3.0]]), 2)
        assert bits.tolist() == [[2 + 32 + 128, 1], [255, 0]], variant
        assert scales[0].isnan() and scales[1] == 1 and means[0].isnan() and pack_signs(-x[:1, 5:7])[1].isnan() and means[1] == 15 / 9
        assert columns.flatten().tolist() == [2, 3, 2, 2, 2, 3, 2, 3, 1]
        # range -1 .. 2 in steps of 1: q = 0, 1, 3, 1.5 -> 2 (half to even)
        assert planes.tolist() == [[[0b0110], [0]], [[0b1100], [0]]] and steps.tolist() == [[1.0], [0.0]] and offsets.tolist() == [[-1.0], [3.0]]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing_is_bit_equal_in_every_backend(shape):
    for dtype in FLOATS:
        x = values(*shape, dtype)
        for transpose in (False, True):
            for mean in (False, True):
                assert_native_is_reference(pack_signs, x, transpose, mean, what=f"{dtype} {transpose} {mean}")
            for bits in (1, 2, 3, 4):
                assert_native_is_reference(pack_planes, x, bits, transpose, None, 0, what=f"{dtype} {transpose} {bits}")
                assert_native_is_reference(pack_planes, x, bits, transpose, key(5 + (1 << 40), 3), 7 << 8, what=f"{dtype} {transpose} {bits} stochastic")


def test_packing_takes_any_layout():
    x = values(13, 70)
    want = reference(pack_signs, x), reference(pack_planes, x, 4, False, key(1, 2), 9)
    for level in LEVELS:
        for name, view in layouts(x):
            with running(level):
                assert_same_bits((pack_signs(view), pack_planes(view, 4, False, key(1, 2), 9)), want, f"{level} {name}")


def test_planes_are_within_a_step_and_unbiased():
    """What a row stands for is at most a step off; over many keys its mean is the value itself."""
    x = wild(4, 300)
    def restored(bits, k):
        planes, scales, offsets = pack_planes(x, bits, False, k, 0)
        q = sum(((planes[p][..., None] >> torch.arange(8) & 1).flatten(1)[:, :300].double() * 2 ** p for p in range(bits)))
        return offsets.double() + scales.double() * q, scales.double()
    for bits in (1, 3, 4):
        got, scales = restored(bits, None)
        assert ((got - x).abs() <= scales * 0.5001).all()
        draws, total = 400, torch.zeros_like(x, dtype=torch.float64)
        for step in range(draws):
            got, scales = restored(bits, key(11, step))
            assert ((got - x).abs() <= scales * 1.0001).all()
            total += got
        # A draw lies in an interval of one step around the value: standard deviation at most half a step. Six of the mean's.
        assert ((total / draws - x).abs() <= scales * (0.5 * 6 / draws ** 0.5)).all()


# --- gradients --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n, c, p", [(1, 1, 1), (0, 3, 4), (3, 0, 4), (5, 7, 1), (70, 40, 1), (4, 17, 9), (3, 64, 64), (2, 33, 40)])
def test_gradients_ranges_and_planes(n, c, p):
    special = torch.randn(n, c, p)
    if special.numel() > 8:
        special.view(-1)[torch.randperm(special.numel())[:3]] = torch.tensor([torch.nan, -torch.inf, 3e38])
    for dy in (wild(n * c, p).view(n, c, p), special, torch.zeros(n, c, p), -torch.rand(n, c, p)):
        sizes = torch.randn(c)
        for count in (1, 2):
            with threads(count):
                assert_native_is_reference(ops.gradient_ranges, dy, sizes)
        for s, matrix in ((sizes, (dy * sizes[:, None]).transpose(1, 2).reshape(n * p, c)), (None, dy.transpose(0, 1).reshape(c, n * p))):
            kept = torch.randperm(len(matrix))[:len(matrix) // 3 + 1]
            for bits, k in ((1, None), (3, key(5, 2)), (4, key(1 << 40, 3))):
                want = reference(pack_planes, matrix[kept], bits, False, k, 9)
                assert_same_bits(assert_native_is_reference(ops.pack_gradient, dy, s, kept, bits, k, 9), want, f"{bits}")
                assert_same_bits(binary_ops._pack_kept(dy, s, kept, bits, k, 9), want, "what CUDA and Triton are made of")


def test_ranges_by_hand():
    dy = torch.tensor([[[1.0, -3.0], [2.0, torch.inf]]])
    for variant in ("reference", *LEVELS):
        with running(variant):
            got = ops.gradient_ranges(dy, torch.tensor([2.0, -1.0]))
            assert [t.tolist() for t in got] == [[4.0, torch.inf], [2.0, torch.inf], [4.0, torch.inf], [3.0, torch.inf]], "2 and -2; 1 and -3"


def test_sampled_groups_are_the_references():
    for trial in range(300):
        ranges = torch.rand(torch.randint(1, 80, ()).item()) ** torch.randint(0, 9, ()).item() * (trial % 9 > 0)
        ranges[torch.rand(len(ranges)) < trial % 4 / 4] = 0
        if trial % 5 == 0:
            ranges[torch.randint(len(ranges), (2,))] = torch.tensor([torch.inf, torch.nan])
        offset = torch.rand((), dtype=torch.float64)
        for bits in (1, 2, 4):
            want = reference(ops.sample_groups, ranges, bits, offset)
            assert len(want[0]) == -(-len(ranges) // bits) and (want[0].diff() > 0).all()
            for variant in LEVELS:
                with running(variant):
                    got = ops.sample_groups(ranges, bits, offset)
                assert_same_bits(got[0], want[0], f"{ranges} {bits} {offset}")
                torch.testing.assert_close(got[1], want[1], rtol=2.0 ** -23, atol=0)
    assert all(len(t) == 0 for t in ops.sample_groups(torch.empty(0), 4, offset))


@pytest.mark.parametrize("m, n, k, run", [(1, 1, 9, 1), (5, 12, 20, 4), (30, 200, 100, 25), (64, 130, 257, 13), (64, 2048, 31, 1024), (7, 0, 9, 3), (0, 6, 9, 3), (9, 6, 0, 3)])
def test_products_in_runs(m, n, k, run):
    a, b, a_scales, b_scales = bit_rows(m, k), bit_rows(n, k), torch.randn(m, 1), torch.randn(n, 1)
    for bias, dtype in ((None, torch.float32), (torch.randn(m), torch.float32), (torch.randn(m).bfloat16(), torch.float16)):
        got = assert_native_is_reference(matmul_binary, a, b, k, a_scales, b_scales, bias, dtype, run)
        assert got.shape == (n // run, m, run)
        want = matmul_binary(a, b, k, a_scales, b_scales, None, torch.float32)
        want = want if bias is None else want + bias.float()[:, None]
        assert_same_bits(got.transpose(0, 1).reshape(m, n), want.to(dtype))
        other = binary_ops._binary_in_runs(binary_ops.reference.matmul_binary, a, b, k, torch.ones(m, 1), b_scales, bias, dtype, run)
        assert_same_bits(other, matmul_binary(a, b, k, torch.ones(m, 1), b_scales, bias, dtype, run), "what CUDA and Triton are made of")


# --- products ---------------------------------------------------------------------------------------------
PRODUCTS = [(1, 1, 1), (1, 70, 255), (8, 65, 256), (9, 64, 248), (9, 63, 249), (13, 130, 1031), (193, 65, 2050), (11, 1100, 64), (400, 3, 500),
            (10, 5, 20000), (0, 3, 4), (3, 0, 4), (12, 4, 0)]


def test_products_by_hand():
    x, w = torch.tensor([[1.0, -1.0, 1.0], [-1.0, -1.0, -1.0]]), torch.tensor([[2.0, 2.0, -2.0], [-1.0, 1.0, -1.0]])
    for variant in ("reference", *LEVELS):
        with running(variant):
            (a, _), (b, ones) = pack_signs(x), pack_signs(w)
            out = matmul_binary(a, b, 3, torch.tensor([[2.0], [1.0]]), torch.tensor([[1.0], [4.0]]), torch.tensor([0.5, 0.0]), torch.float32)
            planes = torch.tensor([[[0b101]], [[0b011]]], dtype=torch.uint8)  # q = 3, 2, 1
            both = matmul_planes(planes, b, 3, torch.tensor([[0.5]]), torch.tensor([[10.0]]), ones, torch.float32)
        assert out.tolist() == [[-1.5, -24.0], [-0.5, 4.0]], variant  # sums -1, -3 / -1, 1
        assert both.tolist() == [[10.0 + 0.5 * 4, -10.0 + 0.5 * -2]], variant


def check_products(m, n, k, dtype, variants=LEVELS):
    a, b, a_scales, b_scales = bit_rows(m, k), bit_rows(n, k), 10 ** torch.randn(m, 1), 10 ** torch.randn(n, 1)
    if m > 2:
        a_scales[2] = torch.nan
    cases = [(matmul_binary, (a, b, k, a_scales, b_scales, bias, dtype)) for bias in (None, torch.randn(n), torch.randn(n).bfloat16())]
    cases += [(matmul_planes, (torch.stack([bit_rows(m, k) for _ in range(bits)]), b, k, a_scales, torch.randn(m, 1), b_scales, dtype))
              for bits in (1, 2, 3, 4)]
    for op, args in cases:
        want = reference(op, *args)
        for variant in variants:
            with running(variant):
                assert_same_bits(op(*args), want, f"{op.name} {variant} {m, n, k} {dtype}")
                assert_same_bits(op(*(misaligned(t) if isinstance(t, torch.Tensor) else t for t in args)), want, f"{op.name} {variant} misaligned")


@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_products_are_bit_equal_in_every_backend(shape):
    for dtype in FLOATS:
        check_products(*shape, dtype)


@given(m=st.integers(0, 80), n=st.integers(0, 150), k=st.integers(0, 600), seed=st.integers(0, 2 ** 30))
def test_products_of_any_shape(m, n, k, seed):
    torch.manual_seed(seed)
    check_products(m, n, k, torch.float32)


def test_largest_sums():
    """Every bit differs, or every product is 15: what byte and 16-bit sums could lose."""
    for k in (247, 248, 249, 256, 4368, 70000):
        ones, none = (torch.full((66, -(-k // 8)), v, dtype=torch.uint8) for v in (255, 0))
        scale = torch.ones(66, 1)
        for level in LEVELS:
            with running(level):
                assert (matmul_binary(ones, none, k, scale, scale, None, torch.float32) == -k).all(), (level, k)
                assert (matmul_binary(ones, ones, k, scale, scale, None, torch.float32) == k).all(), (level, k)
                for b, sign in ((ones, -1), (none, 1)):
                    out = matmul_planes(torch.stack([ones] * 4), b, k, scale, 0 * scale, scale, torch.float32)
                    assert (out == sign * 15 * k).all(), (level, k)


def test_threads_do_not_matter():
    with threads(2):
        check_products(230, 140, 2050, torch.float32)


def test_a_nan_reaches_its_row_and_column_only():
    x, w = torch.randn(12, 70), torch.randn(20, 70)
    x[3, 5], w[7, 69] = torch.nan, torch.nan
    for variant in ("reference", *LEVELS):
        with running(variant):
            (a, sa), (b, sb), (p, scales, offsets) = pack_signs(x), pack_signs(w), pack_planes(x, 4)
            for out in (matmul_binary(a, b, 70, sa, sb, None, torch.float32), matmul_planes(p, b, 70, scales, offsets, sb, torch.float32)):
                bad = out.isnan()
                assert bad[3].all() and bad[:, 7].all() and bad.sum() == 20 + 12 - 1, variant


# --- float x signs ----------------------------------------------------------------------------------------
def within(got, want, bound, what):
    excess = (got.double() - want).abs() - bound
    assert got.shape == want.shape and not (excess > 0).any() and torch.equal(got.isnan(), want.isnan()), f"{what}: {excess.max()} beyond the bound"


@pytest.mark.parametrize("m, rows, columns", [(1, 1, 1), (1, 33, 70), (3, 40, 515), (7, 9, 16), (20, 33, 130), (70, 65, 33), (2, 3, 0), (0, 3, 8)])
def test_sign_is_a_format(m, rows, columns):
    w = torch.randn(rows, columns)
    bits, scales = pack_signs(w, mean=True)
    if rows > 3:
        scales[1] = torch.nan
    none = torch.empty(0, dtype=torch.uint8)
    want = torch.where(w < 0, -scales, scales)
    assert_same_bits(assert_native_is_reference(ops.dequantize, bits, scales, none, "sign", 0, columns, torch.float32), want)
    for dtype in FLOATS:
        for transpose in (False, True):
            x, bias = torch.randn(m, rows if transpose else columns).to(dtype), torch.randn(columns if transpose else rows)
            exact = x.double() @ (want if transpose else want.t()).double() + bias
            size = x.double().abs() @ (want if transpose else want.t()).double().abs() + bias.abs()
            bound = (size * (x.shape[1] + 8) * 2.0 ** -24 + exact.abs() * torch.finfo(dtype).eps).nan_to_num(torch.inf)
            for variant in ("reference", *LEVELS):
                with running(variant):
                    got = ops.matmul_packed(x, bits, scales, none, "sign", 0, columns, transpose, bias, dtype)
                within(got, exact, bound, f"{variant} {dtype} {transpose}")


def test_quantize_leaves_signs_to_pack_signs():
    with pytest.raises(ValueError, match="pack_signs makes signs"):
        ops.quantize(torch.randn(2, 8), "sign")
    with pytest.raises(ValueError, match="must be 0 for sign"):
        Format("sign", 8)
    assert Format("sign").nbytes(3, 9) == 3 * (2 + 4)


@pytest.mark.parametrize("m, rows, columns", [(1, 1, 1), (8, 33, 70), (9, 70, 515), (70, 33, 64), (3, 40, 16), (0, 3, 8), (3, 4, 0)])
def test_a_tenant_for_each_row(m, rows, columns):
    bits, alphas = torch.stack([bit_rows(rows, columns) for _ in range(3)]), torch.tensor([0.5, -2.0, 3e-3])
    for tenants in (torch.zeros(m, dtype=torch.int64), torch.randint(-1, 3, (m,)), torch.full((m,), -1), torch.arange(m) % 3):
        for dtype in FLOATS:
            x, base = torch.randn(m, columns).to(dtype), torch.randn(m, rows).to(dtype)
            with running("reference"):
                want = ops.matmul_tenants(x, base.double().float(), bits, alphas, tenants, columns).double()
            size = base.double().abs() + 2 * x.double().abs().sum(1, keepdim=True)
            for variant in ("reference", *LEVELS):
                with running(variant):
                    got = ops.matmul_tenants(x, base, bits, alphas, tenants, columns)
                within(got, want, size * (columns + 8) * 2.0 ** -23 + want.abs() * torch.finfo(dtype).eps, f"{variant} {dtype}")
                assert_same_bits(got[tenants < 0], base[tenants < 0], "the base's rows")


def test_tenants_and_threads_do_not_change_a_row():
    x, bits, alphas = torch.randn(11, 300), torch.stack([bit_rows(70, 300) for _ in range(4)]), torch.rand(4)
    tenants = torch.tensor([0, 1, 1, 3, 3, 3, 3, 3, 2, 0, 3])
    for level in LEVELS:
        with running(level):
            want = ops.matmul_tenants(x, torch.zeros(11, 70), bits, alphas, tenants, 300)
            with threads(2):
                assert_same_bits(ops.matmul_tenants(x, torch.zeros(11, 70), bits, alphas, tenants, 300), want)


# --- refusals ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("call, error, words", [
    (lambda: pack_signs(torch.randn(3, 4).double()), TypeError, "pack_signs: x is float64"),
    (lambda: pack_signs(torch.randn(3)), ValueError, "pack_signs: x"),
    (lambda: pack_planes(torch.randn(3, 4), 5), ValueError, "pack_planes: bits is 5; it must be 1 to 4"),
    (lambda: pack_planes(torch.randn(3, 4), 2, key=torch.zeros(3)), ValueError, "pack_planes: key"),
    (lambda: matmul_binary(bit_rows(2, 9), bit_rows(2, 8), 9, *[torch.ones(2, 1)] * 2, None, torch.float32), ValueError, "matmul_binary: b is"),
    (lambda: matmul_binary(bit_rows(2, 9), bit_rows(2, 9), 8, *[torch.ones(2, 1)] * 2, None, torch.float32), ValueError, "matmul_binary: a is"),
    (lambda: matmul_binary(bit_rows(2, 9), bit_rows(2, 9), -1, *[torch.ones(2, 1)] * 2, None, torch.float32), ValueError, "columns is -1|a is"),
    (lambda: matmul_binary(bit_rows(2, 9), bit_rows(2, 9), 9, *[torch.ones(2)] * 2, None, torch.float32), ValueError, "scales"),
    (lambda: matmul_binary(bit_rows(2, 9), bit_rows(2, 9), 9, *[torch.ones(2, 1)] * 2, None, torch.float64), TypeError, "dtype"),
    (lambda: ops.matmul_tenants(torch.randn(2, 9), torch.randn(2, 4), bit_rows(4, 9)[None], torch.ones(1), torch.tensor([0, 1]), 9), ValueError, r"tenants is \[0, 1\]"),
    (lambda: ops.matmul_tenants(torch.randn(2, 9), torch.randn(2, 4), bit_rows(4, 9)[None], torch.ones(2), torch.tensor([0, 0]), 9), ValueError, "alphas"),
    (lambda: matmul_binary(bit_rows(2, 9), bit_rows(4, 9), 9, torch.ones(2, 1), torch.ones(4, 1), None, torch.float32, 3), ValueError, "run is 3; it must be 0 or a divisor of 4"),
    (lambda: matmul_binary(bit_rows(2, 9), bit_rows(4, 9), 9, torch.ones(2, 1), torch.ones(4, 1), torch.ones(4), torch.float32, 2), ValueError, "bias"),
    (lambda: ops.transpose_bits(bit_rows(2, 9), 17), ValueError, "transpose_bits: bits is"),
    (lambda: ops.gradient_ranges(torch.ones(2, 3), torch.ones(3)), ValueError, "gradient_ranges: dy is"),
    (lambda: ops.gradient_ranges(torch.ones(2, 3, 4), torch.ones(4)), ValueError, "gradient_ranges: sizes is"),
    (lambda: ops.gradient_ranges(torch.ones(2, 3, 4).double(), torch.ones(3)), TypeError, "gradient_ranges: dy is"),
    (lambda: ops.pack_gradient(torch.ones(2, 3, 4), None, torch.tensor([3]), 4), ValueError, "pack_gradient: kept is .*0 to 2"),
    (lambda: ops.pack_gradient(torch.ones(2, 3, 4), None, torch.tensor([0]), 5), ValueError, "pack_gradient: bits is 5"),
    (lambda: ops.sample_groups(torch.ones(2), 0, torch.zeros((), dtype=torch.float64)), ValueError, "bits is 0"),
    (lambda: ops.sample_groups(torch.ones(2), 4, torch.zeros(())), TypeError, "offset is"),
    (lambda: matmul_planes(bit_rows(2, 9), bit_rows(2, 9), 9, *[torch.ones(2, 1)] * 3, torch.float32), ValueError, "matmul_planes: a is"),
])
def test_errors_name_the_argument(call, error, words):
    with pytest.raises(error, match=words):
        call()
