"""projection: into a packed basis, back into a weight, and the basis itself; then Q-GaLore on top of them."""
import copy
import io
import random

import pytest
import torch
from gradmill import CheckpointError, QuantizedWeight
from gradmill.formats import FLOAT_DTYPES, Format
from gradmill.ops import dequantize, project, project_back, quantize, subspace_basis
from gradmill.optim import AdamW, QGaLoreAdamW, state_nbytes
from gradmill.reference.philox import stream
from gradmill.reference.projection import random_basis
from hypothesis import given, strategies as st

from .conftest import FLOATS, LEVELS, assert_same_bits, isa, key, layouts, reference, running, threads

BASES = [("uint4", 256), ("uint4", 32), ("int4", 0), ("uint8", 64), ("int8", 0)]
SHAPES = [(1, 1, 1), (2, 5, 1), (7, 5, 3), (33, 64, 8), (64, 33, 17), (130, 257, 31), (5, 300, 5), (70, 1031, 16)]


def basis_rows(rank, d):
    return torch.linalg.qr(torch.randn(d, max(rank, 1)))[0].t()[:rank].contiguous() if d >= rank else torch.randn(rank, d)


def packed_size(packed, code, block, d):
    """|decoded basis| as a kernel that sums q and zero point apart would have it."""
    codes, scales, zeros = packed
    size = reference(dequantize, codes, scales, zeros, code, block, d, torch.float32).double().abs()
    if Format(code).has_zero_point:
        size = size + 2 * (zeros.double() * scales.double()).repeat_interleave(block or d, 1)[:, :d]
    return size


# --- project ----------------------------------------------------------------------------------------------
def check_project(grad, packed, code, block, left):
    """fp32 accumulation in any order: (K + 8) 2^-24 sum |g| |b| (see test_matmul.packed_bound)."""
    d = grad.shape[0 if left else 1]
    want = reference(project, grad, *packed, code, block, left).double()
    g, b = grad.double().abs(), packed_size(packed, code, block, d)
    bound = (d + 8) * 2.0 ** -24 * (b @ g if left else g @ b.t()) + 1e-44
    for variant in LEVELS:
        with running(variant):
            got = project(grad, *packed, code, block, left)
        assert got.dtype == torch.float32 and got.shape == want.shape
        assert ((got.double() - want).abs() <= bound).all(), f"{variant} {tuple(grad.shape)} {code} {block} {left}"


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_project_worked_out_by_hand(left):
    basis = torch.tensor([[1.0, 0, -1], [0, 7, 7]])
    packed = quantize(basis, "int4", 0)
    grad = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    for variant in ("reference", *LEVELS):
        with running(variant):
            got = project(grad.t() if left else grad, *packed, "int4", 0, left)
        want = torch.tensor([[-2.0, 35], [-2, 77]])
        torch.testing.assert_close(got, want.t() if left else want, rtol=1e-6, atol=1e-6, msg=variant)


@pytest.mark.parametrize("code, block", BASES)
def test_project_is_within_the_bound_of_fp32_accumulation(code, block):
    for m, n, rank in [*SHAPES, (0, 5, 2), (5, 0, 0)]:
        for left in (False, True):
            packed = quantize(basis_rows(rank, m if left else n), code, block)
            for dtype in FLOATS:
                check_project(torch.randn(m, n).to(dtype), packed, code, block, left)


@given(m=st.integers(1, 60), n=st.integers(1, 300), rank=st.integers(1, 40), left=st.booleans(), basis=st.sampled_from(BASES),
       seed=st.integers(0, 2 ** 30))
def test_project_any_shape(m, n, rank, left, basis, seed):
    torch.manual_seed(seed)
    check_project(torch.randn(m, n), quantize(torch.randn(rank, m if left else n), *basis), *basis, left)


def test_project_takes_any_layout(level):
    for left in (False, True):
        grad = torch.randn(37, 66)
        packed = quantize(basis_rows(9, 37 if left else 66), "uint4", 32)
        want = project(grad, *packed, "uint4", 32, left)
        for name, view in layouts(grad):
            assert_same_bits(project(view, *packed, "uint4", 32, left), want, name)


def test_project_nan_shows_where_it_belongs(level):
    grad = torch.randn(20, 40)
    grad[3, 7] = float("nan")
    right = project(grad, *quantize(basis_rows(4, 40), "uint4", 32), "uint4", 32, False)
    assert right[3].isnan().all() and not right[[0, 1, 2, 4, 19]].isnan().any()
    left = project(grad, *quantize(basis_rows(4, 20), "uint4", 32), "uint4", 32, True)
    assert left[:, 7].isnan().all() and not left[:, :7].isnan().any()


# --- project back -----------------------------------------------------------------------------------------
WEIGHTS = [("fp32", 0), ("bf16", 0), ("fp16", 0), ("uint8", 256), ("uint8", 64), ("int8", 0), ("int4", 32), ("uint4", 64)]


def stored(x, code, block):
    if Format(code).blocked:
        codes, scales, zeros = quantize(x, code, block)
        return codes, scales, zeros if Format(code).has_zero_point else None
    return x.to(FLOAT_DTYPES[code]), None, None


def values(weight, code, block, columns):
    codes, scales, zeros = weight
    if Format(code).blocked:
        return dequantize(codes, scales, torch.empty(0, dtype=torch.uint8) if zeros is None else zeros, code, block, columns, torch.float32)
    return codes.float()


def back(weight, code, block, columns, update, packed, basis, left, decay, alpha, k, stream_word=0, residual=None, scales=None, first=0):
    weight = tuple(None if t is None else t.clone() for t in weight)
    project_back(*weight, code, block, columns, update, *packed, *basis, left, torch.tensor([decay, alpha]), k, stream_word, residual, scales, first)
    return weight


@pytest.mark.parametrize("code, block", WEIGHTS)
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_project_back_is_within_one_rounding_of_the_exact_update(code, block, left):
    """The fp32 update has accumulation error; the weight's own rounding adds half a step, or one when stochastic, of a
    scale that differs from the reference's by as little."""
    for m, n, rank in SHAPES:
        basis = ("uint4", 32)
        packed = quantize(basis_rows(rank, m if left else n), *basis)
        update = torch.randn(rank, n) if left else torch.randn(m, rank)
        w0 = stored(torch.randn(m, n), code, block)
        b = reference(dequantize, *packed, *basis, m if left else n, torch.float32).double()
        product = b.t() @ update.double() if left else update.double() @ b
        exact = 0.99 * values(w0, code, block, n).double() - 0.3 * product
        size = packed_size(packed, *basis, m if left else n)
        size = values(w0, code, block, n).double().abs() + 0.3 * (size.t() @ update.double().abs() if left else update.double().abs() @ size)
        slack = (rank + 12) * 2.0 ** -24 * size + 1e-6
        for variant in ("reference", *LEVELS):
            with running(variant):
                got = back(w0, code, block, n, update, packed, basis, left, 0.99, -0.3, key(3, 4), 5 << 8)
            if Format(code).blocked:
                step = got[1].double().repeat_interleave(block or n, 1)[:, :n]
            else:
                step = {"fp32": 2.0 ** -23, "bf16": 2.0 ** -7, "fp16": 2.0 ** -10}[code] * exact.abs()
            error = (values(got, code, block, n).double() - exact).abs()
            assert (error <= step * (1 + 1e-4) + slack).all(), f"{variant} {m}x{n} rank {rank}: {(error - step - slack).max()}"


@pytest.mark.parametrize("code, block", WEIGHTS)
def test_project_back_exact_products_give_the_references_bits(code, block):
    """Updates of one small integer per row and basis vectors of integers: the sums are exact in fp32, so that what is
    left, the rounding and its random words, must agree bit for bit, at every instruction set and thread count."""
    for m, n, rank in [(1, 1, 1), (7, 5, 3), (33, 65, 8), (66, 257, 5), (150, 300, 4)]:
        for left in (False, True):
            d = m if left else n
            codes = torch.randint(0, 256, (rank, -(-d // 2)), dtype=torch.uint8)
            packed = codes, torch.full((rank, -(-d // 32)), 0.5), torch.full((rank, -(-d // 32)), 8, dtype=torch.uint8)
            update = torch.randint(-4, 5, (rank, n) if left else (m, rank)).float()
            w0 = stored(torch.randn(m, n), code, block)
            residual = torch.randn(n, m).t().to(random.choice((torch.float32, torch.bfloat16, torch.float16)))  # any layout
            for extra in ((), (residual, torch.randn(n if left else m))):
                want = reference(back, w0, code, block, n, update, packed, ("uint4", 32), left, 1.0, 0.25, key(11, 12), 3 << 8, *extra)
                for variant in LEVELS:
                    for count in (1, 2):
                        with running(variant), threads(count):
                            got = back(w0, code, block, n, update, packed, ("uint4", 32), left, 1.0, 0.25, key(11, 12), 3 << 8, *extra)
                        assert_same_bits(got, want, f"{variant} {m}x{n} left {left} threads {count} residual {bool(extra)}")


@pytest.mark.parametrize("code, block", WEIGHTS)
def test_project_back_of_a_shards_rows_is_that_part_of_the_whole(code, block):
    for m, n, start in [(7, 33, 3), (66, 129, 65), (40, 300, 1)]:
        packed, update, w0 = quantize(basis_rows(4, n), "uint4", 32), torch.randn(m, 4), stored(torch.randn(m, n), code, block)
        part = tuple(None if t is None else t[start:].contiguous() for t in w0)
        for variant in ("reference", *LEVELS):
            with running(variant):
                want = back(w0, code, block, n, update, packed, ("uint4", 32), False, 0.9, 0.25, key(11, 12), 3 << 8)
                got = back(part, code, block, n, update[start:].contiguous(), packed, ("uint4", 32), False, 0.9, 0.25, key(11, 12), 3 << 8, first=start * n)
            assert_same_bits(got, tuple(None if t is None else t[start:] for t in want), f"{variant} {m}x{n}")


def test_project_back_adds_the_residual_by_hand():
    packed = torch.tensor([[0x98]], dtype=torch.uint8), torch.ones(1, 1), torch.full((1, 1), 8, dtype=torch.uint8)  # one vector, (0, 1)
    residual, update = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[10.0], [20.0]])
    right = back((torch.ones(2, 2), None, None), "fp32", 0, 2, update, packed, ("uint4", 2), False, 0.5, 1.0, key(1, 1), 0, residual, torch.tensor([1.0, -1.0]))
    assert right[0].tolist() == [[1.5, 12.5], [-2.5, 16.5]]  # W / 2 + update (0, 1) + a scale per row
    left = back((torch.ones(2, 2), None, None), "fp32", 0, 2, update.t(), packed, ("uint4", 2), True, 0.5, 1.0, key(1, 1), 0, residual, torch.tensor([1.0, -1.0]))
    assert left[0].tolist() == [[1.5, -1.5], [13.5, 16.5]]   # a scale per column


def test_project_back_leaves_an_unchanged_block_alone():
    """A zero update with decay 1 must not requantise: repeated rounding would wander."""
    for code, block in WEIGHTS:
        w0 = stored(torch.randn(9, 300), code, block)
        packed = quantize(basis_rows(4, 300), "uint4", 32)
        for variant in ("reference", *LEVELS):
            with running(variant):
                got = back(w0, code, block, 300, torch.zeros(9, 4), packed, ("uint4", 32), False, 1.0, 1.0, key(1, 1))
            assert_same_bits(got, w0, f"{variant} {code}")


def test_stochastic_bf16_weights_move_by_less_than_an_ulp_on_average():
    """Decay of 1.0001 moves a bf16 1.0 by 1/78 of its ulp (2^-7): nearest rounding would lose it. 4 sigma of the mean."""
    n, steps, p = 4096, 24, (1.0001 - 1) * 2 ** 7
    packed = quantize(torch.randn(1, n), "uint4", 32)
    for seed in (0, 1, 2):
        ups = 0
        for step in range(steps):
            got, _, _ = back((torch.ones(1, n, dtype=torch.bfloat16), None, None), "bf16", 0, n, torch.zeros(1, 1), packed, ("uint4", 32), False,
                             1.0001, 1.0, key(seed, step))
            assert ((got == 1) | (got == 1 + 2 ** -7)).all()
            ups += int((got != 1).sum())
        total = n * steps
        assert abs(ups - total * p) < 4 * (total * p * (1 - p)) ** 0.5


# --- basis ------------------------------------------------------------------------------------------------
def decaying(m, n, power=1.0):
    """A matrix with singular values 1, 2^-power, 3^-power, ..."""
    k = min(m, n)
    u, v = torch.linalg.qr(torch.randn(m, k))[0], torch.linalg.qr(torch.randn(n, k))[0]
    return (u * torch.arange(1, k + 1).float() ** -power) @ v.t()


def energy(grad, basis, left):
    return float((basis @ grad if left else grad @ basis.t()).norm() ** 2)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("m, n, rank", [(96, 64, 16), (64, 96, 16), (300, 200, 32), (40, 40, 1), (33, 29, 29)])
def test_basis_is_orthonormal_and_catches_the_energy_of_the_svd_within_one_percent(m, n, rank, left):
    grad = decaying(m, n)
    best = float((torch.linalg.svdvals(grad)[:rank] ** 2).sum())
    for backend in ("torch", "reference"):
        with running(backend):
            # a single vector among close ones turns by (sigma2 / sigma1)^2 an iteration only
            first = subspace_basis(grad, None, rank, 2 if rank > 1 else 6, left, key(1, 1), stream(0, "basis"))
        assert first.shape == (rank, m if left else n)
        torch.testing.assert_close(first @ first.t(), torch.eye(rank), rtol=0, atol=rank * 4e-6)
        assert energy(grad, first, left) > 0.99 * best, backend


def test_refreshing_from_the_last_basis_follows_a_drifting_gradient():
    grad = decaying(120, 80)
    basis = subspace_basis(grad, None, 12, 2, False, key(), 0)
    for step in range(5):
        grad = grad + 0.05 * decaying(120, 80)
        packed = quantize(basis, "uint4", 32)
        basis = subspace_basis(grad, dequantize(*packed, "uint4", 32, 80, torch.float32), 12, 1, False, key(0, step), 0)
        assert energy(grad, basis, False) > 0.99 * float((torch.linalg.svdvals(grad)[:12] ** 2).sum())


def test_random_basis_is_standard_normal_and_keyed():
    x = random_basis(64, 512, key(7, 1), stream(3, "basis"))
    n = x.numel()
    assert abs(x.mean()) < 4 / n ** 0.5 and abs(x.var() - 1) < 4 * (2 / n) ** 0.5 and abs((x ** 4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert torch.equal(x, random_basis(64, 512, key(7, 1), stream(3, "basis")))
    assert not torch.equal(x, random_basis(64, 512, key(7, 2), stream(3, "basis")))


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_basis_of_a_degenerate_gradient_is_still_orthonormal(left):
    rank, m, n = 8, 40, 30
    cases = {"zero": torch.zeros(m, n), "rank 1": torch.randn(m, 1) @ torch.randn(1, n), "rank 3": torch.randn(m, 3) @ torch.randn(3, n),
             "tiny": torch.randn(m, n) * 1e-30, "huge": torch.randn(m, n) * 1e15, "one row": torch.zeros(m, n)}
    cases["one row"][4] = 1.0
    for name, grad in cases.items():
        for dtype in (torch.float32, torch.bfloat16):
            basis = subspace_basis(grad.to(dtype), None, rank, 2, left, key(), 0)
            assert (basis @ basis.t() - torch.eye(rank)).abs().max() < 1e-4, f"{name} {dtype}"


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_the_basis_does_not_depend_on_the_gradients_size(left):
    """Up to the ends of fp32, where G^T G Q and its Gram matrix would be inf or 0."""
    grad = decaying(60, 40)
    grad = grad / grad.abs().max()
    want = subspace_basis(grad, None, 6, 2, left, key(), 0)
    for power in (-100, -30, 31, 127):
        assert torch.equal(subspace_basis(torch.ldexp(grad, torch.tensor(power)), None, 6, 2, left, key(), 0), want), power
    again = subspace_basis(grad, want, 6, 1, left, key(), 0)
    assert torch.equal(subspace_basis(torch.ldexp(grad, torch.tensor(100)), want, 6, 1, left, key(), 0), again)
    best = float((torch.linalg.svdvals(grad)[:6] ** 2).sum())
    tiny = torch.ldexp(grad, torch.tensor(-138))  # denormals
    assert energy(tiny.double(), subspace_basis(tiny, None, 6, 3, left, key(), 0).double(), left) > 0.98 * best * 2.0 ** -276


# --- Q-GaLore ---------------------------------------------------------------------------------------------
def qgalore(params, rank=8, **options):
    return QGaLoreAdamW([{"params": params, "rank": rank}], **{"lr": 1e-2, "refresh_every": 3, "min_quantized_numel": 1, **options})


def qgalore_by_hand(weights, grads, *, rank, lr, betas, eps, weight_decay, scale, refresh_every, iterations, seed):
    """The algorithm on one fp32 weight with fp32 states and a fixed interval, from ops' references and plain torch."""
    w, m, v, basis = weights.clone(), 0, 0, None
    left = w.shape[0] < w.shape[1]
    for t, g in enumerate(grads, 1):
        if (t - 1) % refresh_every == 0:
            basis = subspace_basis(g, basis, rank, iterations + (basis is None), left, key(seed, t), stream(0, "basis"))
            packed = quantize(basis, "uint4", 256)
            basis = dequantize(*packed, "uint4", 256, basis.shape[1], torch.float32)
        r = basis @ g if left else g @ basis.t()
        m, v = betas[0] * m + (1 - betas[0]) * r, betas[1] * v + (1 - betas[1]) * r * r
        update = m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
        w = (w - lr * scale * (basis.t() @ update if left else update @ basis)) * (1 - lr * weight_decay)
    return w


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (40, 40)], ids=str)
def test_qgalore_is_galore_on_the_packed_basis_with_decay_after_the_step(shape):
    options = dict(lr=0.02, betas=(0.8, 0.9), eps=1e-8, weight_decay=0.5, scale=0.3, refresh_every=4, iterations=1, seed=5)
    w = torch.nn.Parameter(torch.randn(shape))
    start, grads = w.detach().clone(), [decaying(*shape) + 0.1 * torch.randn(shape) for _ in range(10)]
    optimizer = QGaLoreAdamW([{"params": [w], "rank": 6}], states="fp32", adaptive=False, **options)
    for g in grads:
        w.grad = g
        optimizer.step()
    want = qgalore_by_hand(start, grads, rank=6, **options)
    torch.testing.assert_close(w.detach(), want, rtol=1e-4, atol=2e-5)


def test_a_constant_gradients_interval_doubles_after_five_agreeing_refreshes_up_to_the_cap():
    w = torch.nn.Parameter(torch.randn(30, 20))
    grad, refreshes = decaying(30, 20), []
    optimizer = qgalore([w], rank=4, refresh_every=2, max_refresh_every=8, lr=1e-3)
    for step in range(1, 81):
        w.grad = grad
        due = step == 1 or optimizer.state[w]["next_refresh"] == step
        optimizer.step()
        if due:
            refreshes.append(step)
    # the first refresh has nothing to compare with; five agreeing ones double the interval, and the queue starts anew
    assert refreshes == [1, 3, 5, 7, 9, 11, 15, 19, 23, 27, 31, 39, 47, 55, 63, 71, 79]
    assert optimizer.state[w]["refresh_interval"] == 8


def test_a_gradient_that_turns_keeps_its_interval_and_adaptive_false_always_does():
    for adaptive in (True, False):
        w = torch.nn.Parameter(torch.randn(64, 48))
        optimizer = qgalore([w], rank=2, refresh_every=2, adaptive=adaptive)
        fixed = torch.randn(64, 2) @ torch.randn(2, 48)
        for _ in range(40):
            w.grad = torch.randn(64, 2) @ torch.randn(2, 48) if adaptive else fixed
            optimizer.step()
        assert optimizer.state[w]["refresh_interval"] == 2


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_a_refresh_finds_a_gradient_orthogonal_to_the_last_basis(left):
    """Units that were dead wake up: the old basis sees nothing of the new gradient, two refreshes must."""
    old, new = torch.zeros(64, 48), torch.zeros(64, 48)
    old[:20, :4], new[30:50, 8:12] = torch.randn(20, 4), torch.randn(20, 4)
    basis = subspace_basis(old, None, 8, 2, left, key(0, 1), 0)
    for step in (2, 3):
        basis = subspace_basis(new, basis, 8, 1, left, key(0, step), 0)
    assert energy(new, basis, left) > 0.9 * float(new.norm() ** 2)


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (24, 3, 5, 5)], ids=str)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_qgalore_trains_every_kind_of_weight_and_both_sides(shape, kind):
    """A low-rank target: the distance to it falls to less than half."""
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    target = (torch.randn(rows, 2) @ torch.randn(2, columns)).view(shape)
    start = torch.zeros(shape) if kind != "int8" else QuantizedWeight.quantize(torch.randn(shape) * 0.01, "int8")
    w = torch.nn.Parameter(start.bfloat16() if kind == "bf16" else start)
    optimizer = qgalore([w], rank=8, lr=0.1, scale=1.0, refresh_every=10)
    first = None
    for _ in range(150):
        value = w.dequantize() if kind == "int8" else w.detach()
        w.grad = (value.float() - target).to(w.dtype)
        first = w.grad.float().norm() if first is None else first
        optimizer.step()
    value = w.dequantize() if kind == "int8" else w.detach()
    assert (value.float() - target).norm() < first / 2
    assert "basis_codes" in optimizer.state[w] and optimizer.state[w]["basis_codes"].dtype == torch.uint8


def test_qgalore_plain_steps_are_adamw():
    """rank None, 1-D parameters and those no larger than the rank step exactly as gradmill.optim.AdamW."""
    shapes, options = [(8, 20), (33,), (), (300, 70)], dict(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, states="int8", min_quantized_numel=1, seed=3)
    ours, plain = ([torch.nn.Parameter(torch.ones(s)) for s in shapes] for _ in range(2))
    a = QGaLoreAdamW([{"params": ours[:3], "rank": 8}, {"params": ours[3:]}], **options)
    b = AdamW(plain, **options)
    for _ in range(4):
        for p, q in zip(ours, plain):
            p.grad = q.grad = torch.randn(p.shape)
        a.step()
        b.step()
    for p, q in zip(ours, plain):
        assert_same_bits(p.detach(), q.detach())


@pytest.mark.parametrize("name, grad", [("zero", torch.zeros(40, 24)), ("rank 1", torch.ones(40, 24)), ("tiny", torch.full((40, 24), 1e-30))])
def test_degenerate_gradients_leave_finite_weights(name, grad):
    w = torch.nn.Parameter(torch.randn(40, 24))
    optimizer = qgalore([w])
    for _ in range(8):
        w.grad = grad.clone()
        optimizer.step()
    assert w.isfinite().all()
    for _ in range(4):
        w.grad = torch.randn(40, 24)
        optimizer.step()
    assert w.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nan_gradient_shows_in_the_weight_and_does_not_raise(bad):
    w = torch.nn.Parameter(torch.randn(40, 24))
    optimizer = qgalore([w])
    for step in range(8):
        w.grad = torch.randn(40, 24)
        if step == 3:
            w.grad[2, 3] = bad
        optimizer.step()
    assert w.isnan().any()


def test_unprojectable_shapes_take_plain_steps():
    shapes = [(1, 64), (64, 1), (8, 64), (0, 16), (16, 0), (0,), ()]
    params = [torch.nn.Parameter(torch.ones(s)) for s in shapes]
    optimizer = qgalore(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p in params:
        assert "basis_codes" not in optimizer.state[p] and (p != 1).all()


def test_parameters_without_a_gradient_are_skipped():
    a, b = (torch.nn.Parameter(torch.ones(40, 24)) for _ in range(2))
    optimizer = qgalore([a, b])
    a.grad = torch.randn(40, 24)
    optimizer.step()
    assert (b == 1).all() and not (a == 1).all() and len(optimizer.state[b]) == 0


def test_state_is_an_eighth_of_torchs_at_a_quarter_rank():
    p, q = (torch.nn.Parameter(torch.zeros(512, 512)) for _ in range(2))
    ours, theirs = qgalore([p], rank=128, states="int8"), torch.optim.AdamW([q])
    p.grad = q.grad = torch.randn(512, 512)
    ours.step()
    theirs.step()
    assert state_nbytes(ours) * 8 < state_nbytes(theirs)


def clone_parameter(p):
    return torch.nn.Parameter(p.detach().clone(), p.requires_grad)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("states", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("saved_at", [1, 4, 7])
def test_resume_is_bit_equal_through_adaptive_refreshes(kind, states, saved_at):
    def parameters():
        shapes = [(80, 72), (72, 80), (130,)]
        out = []
        for i, s in enumerate(shapes):
            x = torch.randn(s, generator=torch.Generator().manual_seed(i))
            if kind == "int8" and len(s) == 2:
                x = QuantizedWeight.quantize(x, "int8")
            out.append(torch.nn.Parameter(x.bfloat16() if kind == "bf16" else x))
        return out

    grads = [[decaying(80, 72), decaying(72, 80), torch.randn(130)] for _ in range(3)]

    def train(params, optimizer, start, stop):
        for step in range(start, stop):
            for p, g in zip(params, grads[step % 3]):
                p.grad = g.to(p.dtype)
            optimizer.step()

    options = dict(rank=16, refresh_every=1, max_refresh_every=4, states=states, cosine_threshold=0.1, seed=9)
    params = parameters()
    optimizer = qgalore(params, **options)
    train(params, optimizer, 0, saved_at)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": params}, file)
    train(params, optimizer, saved_at, 12)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = [clone_parameter(p) for p in saved["params"]]
    resumed = qgalore(again, **{**options, "seed": 1, "lr": 5.0})  # the checkpoint's win
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, saved_at, 12)
    for p, q in zip(params, again):
        assert_same_bits(q.detach(), p.detach())
    assert_same_bits(resumed.state_dict()["state"], optimizer.state_dict()["state"])


def test_corrupted_projected_checkpoints_are_refused_and_change_nothing():
    w = torch.nn.Parameter(torch.randn(72, 80))  # projected on the left: moments (16, 80), in 8 bits
    optimizer = qgalore([w], rank=16)
    w.grad = torch.randn(72, 80)
    optimizer.step()
    good = copy.deepcopy(optimizer.state_dict())

    def broken(change):
        bad = copy.deepcopy(good)
        change(bad["state"][0])
        return bad

    damage = [lambda s: s.pop("exp_avg_codes"), lambda s: s.pop("exp_avg_scales"), lambda s: s.update(basis_codes=s["basis_codes"][:-1]),
              lambda s: s.update(basis_scales=s["basis_scales"][:, :0]), lambda s: s.pop("basis_codes"), lambda s: s.pop("basis_zeros"),
              lambda s: s.update(basis_codes=s["basis_codes"].float()), lambda s: s.update(exp_avg_codes=s["exp_avg_codes"].float()),
              lambda s: s.pop("cosines"), lambda s: s.update(exp_avg_codes="nonsense"), lambda s: s.update(basis_scales=s["basis_scales"].int())]
    for i, change in enumerate(damage):
        try:
            optimizer.load_state_dict(broken(change))
        except CheckpointError:
            pass
        else:
            pytest.fail(f"damage {i} was accepted")
        assert_same_bits(optimizer.state_dict(), good)
    bigger = qgalore([torch.nn.Parameter(torch.randn(80, 16))], rank=16)
    with pytest.raises(CheckpointError):
        bigger.load_state_dict(good)


@pytest.mark.parametrize("options", [dict(rank=0), dict(rank=1.5), dict(scale=0.0), dict(refresh_every=0), dict(cosine_threshold=1.5), dict(bits=3),
                                     dict(group_size=33), dict(iterations=0), dict(refresh_every=10, max_refresh_every=5), dict(group_size=-2)],
                         ids=str)
def test_options_out_of_range_are_refused_by_name(options):
    with pytest.raises(ValueError, match=list(options)[-1]):
        qgalore([torch.nn.Parameter(torch.zeros(40, 30))], **options)


@pytest.mark.parametrize("bits, group_size", [(4, 256), (4, 0), (8, 64), (8, 0), (4, 2)])
def test_bases_of_any_packing(bits, group_size):
    w = torch.nn.Parameter(torch.randn(50, 41))
    optimizer = qgalore([w], bits=bits, group_size=group_size)
    for _ in range(4):
        w.grad = torch.randn(50, 41)
        optimizer.step()
    format = Format("uint4" if bits == 4 else "uint8", group_size)
    state = optimizer.state[w]
    assert state["basis_codes"].shape == (8, format.code_columns(41)) and state["basis_scales"].shape == (8, format.blocks(41))
    assert w.isfinite().all()


@pytest.mark.parametrize("m, n, rank, left", [(300, 1500, 40, False), (130, 1100, 300, True), (500, 90, 70, False), (57, 1025, 257, False), (600, 2100, 70, True)])
def test_products_whose_operands_are_packed_once_for_all_tiles(level, m, n, rank, left):
    """Several tiles down, across or both, k above and below one step; the same bits at every thread count."""
    grad, basis = torch.randn(m, n), ("uint4", 32)
    rank = min(rank, m if left else n)
    packed = quantize(basis_rows(rank, m if left else n), *basis)
    check_project(grad, packed, *basis, left)
    update, results = torch.randn(rank, n) if left else torch.randn(m, rank), []
    weight = stored(torch.randn(m, n), "uint8", 256)
    for count in (1, 2, 3):
        with threads(count):
            results.append((project(grad, *packed, *basis, left), *back(weight, "uint8", 256, n, update, packed, basis, left, 0.9, 0.3, torch.tensor([1, 2]))))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("level", LEVELS)
def test_steps_are_the_same_at_every_thread_count(level):
    """End to end, but for the basis, whose matmuls are torch's: refreshed once, in one thread."""
    results, grads = [], [torch.randn(300, 200) for _ in range(4)]
    for count in (1, 2):
        w = torch.nn.Parameter(QuantizedWeight.quantize(torch.ones(300, 200), "int8"))
        optimizer = qgalore([w], rank=32, refresh_every=100, seed=2)
        for i, g in enumerate(grads):
            w.grad = g
            with isa(level), threads(1 if i == 0 else count):
                optimizer.step()
        results.append((w.detach(), optimizer.state_dict()["state"]))
    assert_same_bits(results[1], results[0])


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: __import__("pickle").loads(__import__("pickle").dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copied_optimizer_takes_new_groups(clone):
    w = torch.nn.Parameter(torch.randn(40, 24))
    optimizer = qgalore([w])
    w.grad = torch.randn(40, 24)
    optimizer.step()
    other = clone(optimizer)
    other.add_param_group({"params": [torch.nn.Parameter(torch.randn(40, 24))]})
    for group in other.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(40, 24)
    other.step()
