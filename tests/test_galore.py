"""Projection as an option of any rule: bases, residuals, moments, sides, checkpoints; and the papers' algorithms written out."""
import copy
import io
import math
import time

import pytest
import torch

from gradmill import CheckpointError, QuantizedWeight, use_backend
from gradmill.ops import dct
from gradmill.optim import (SGD, AdamW, DCTAdamW, FiraAdamW, FrugalAdamW, GaLoreAdamW, Lion, Projection, QGaLoreAdamW, param_groups_for_projection,
                            state_nbytes)
from gradmill.optim import projection as projection_module
from gradmill.optim.projection import dct_vectors, random_indices, random_vectors

NAMED = [GaLoreAdamW, QGaLoreAdamW, FiraAdamW, FrugalAdamW, DCTAdamW]


def gradients(shape, count, rank=6):
    """Gradients whose leading directions stand out, so that a subspace is well defined."""
    rows, columns = shape[0], math.prod(shape[1:])
    u, _ = torch.linalg.qr(torch.randn(rows, rank))
    v, _ = torch.linalg.qr(torch.randn(columns, rank))
    strength = 2.0 ** -torch.arange(rank).float()
    return [(u * (strength * (1 + 0.1 * torch.randn(rank)))) @ v.t() + 1e-3 * torch.randn(rows, columns) for _ in range(count)]


def run(optimizer, w, grads):
    for g in grads:
        w.grad = g.view(w.shape).clone()
        optimizer.step()
    return w.detach()


# --- bases ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
@pytest.mark.parametrize("n, rows", [(1, 7), (2, 7), (3, 7), (4, 7), (5, 7), (8, 1), (24, 16), (33, 2), (63, 17), (96, 5), (100, 0), (128, 31), (768, 33), (1000, 150), (1001, 67)])
def test_dct_is_the_matrix_product(n, rows, backend):
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)[None]
    matrix = math.sqrt(2 / n) * torch.cos(i * (2 * j + 1) * math.pi / (2 * n))
    matrix[0] /= math.sqrt(2)
    for x in (torch.randn(rows, n), torch.randn(n, rows).t(), torch.randn(rows, n).bfloat16()):
        with use_backend(backend):
            results = dct(x, False), dct(x.t(), True).t()
        for y in results:
            assert y.dtype == torch.float32 and y.shape == x.shape
            assert rows == 0 or (y.double() - x.double() @ matrix).abs().max() <= 1e-6 * math.sqrt(n) * x.abs().max()
    assert (dct_vectors(torch.arange(n), n).double() - matrix.t()).abs().max() < 1e-6


def test_random_bases_depend_on_their_key_only():
    a = random_vectors(8, 50, 3, 5, 7, "cpu")
    assert torch.equal(a, random_vectors(8, 50, 3, 5, 7, "cpu")) and not torch.equal(a, random_vectors(8, 50, 3, 6, 7, "cpu"))
    assert (a @ a.t() - torch.eye(8)).abs().max() < 1e-5
    i = random_indices(8, 50, 3, 5, 7)
    assert len(set(i.tolist())) == 8 and i.tolist() == sorted(i.tolist()) and 0 <= i.min() and i.max() < 50


# --- the papers' algorithms, in float64 -------------------------------------------------------------------
def adam(r, m, v, t, betas, eps):
    m = betas[0] * m + (1 - betas[0]) * r
    v = betas[1] * v + (1 - betas[1]) * r * r
    return m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + eps), m, v


def by_hand(w, grads, left, basis_of, *, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, scale=0.25, every=200, residual=None, limiter=1.01,
            residual_scale=1.0, decay_after=True, reset=False):
    """basis_of(G, step) -> B (rank, side)."""
    w, m, v, last, since = w.double(), 0.0, 0.0, 0.0, 0
    for step, g in enumerate(grads, 1):
        g = g.double()
        if (step - 1) % every == 0:
            b = basis_of(g, step).double()
            if reset:
                m, v, since = 0.0, 0.0, step - 1
        r = b @ g if left else g @ b.t()
        psi, m, v = adam(r, m, v, step - since, betas, eps)
        outside = g - (b.t() @ r if left else r @ b)
        update = scale * (b.t() @ psi if left else psi @ b)
        if residual == "fira":
            dim = 0 if left else 1
            s = outside * (psi.norm(dim=dim, keepdim=True) / (r.norm(dim=dim, keepdim=True) + 1e-8))
            if last > 0 and s.norm() > limiter * last:
                s = s * (limiter * last / s.norm())
            last = s.norm() if s.norm() > 0 else last
            update = update + s
        elif residual == "sign":
            update = update + residual_scale * torch.where(outside.abs() < 2.0 ** -18 * g.abs().max(), 0.0, outside.sign())
        elif residual == "sgd":
            update = update + residual_scale * outside
        decay = 1 - lr * weight_decay
        w = (w - lr * update) * decay if decay_after else w * decay - lr * update
    return w


def leading(rank, left):
    def basis_of(g, step):
        u, _, vh = torch.linalg.svd(g.float(), full_matrices=False)  # in fp32: signs are LAPACK's choice, and kept moments depend on them
        return u[:, :rank].t() if left else vh[:rank]
    return basis_of


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (30, 30)], ids=str)
@pytest.mark.parametrize("kind, optimizer, options", [
    ("galore", GaLoreAdamW, dict()), ("fira", FiraAdamW, dict(basis="svd", stagger=False)), ("frugal svd", FrugalAdamW, dict(basis="svd", bits=32)),
    ("frugal sgd", FrugalAdamW, dict(basis="svd", bits=32, residual="sgd", residual_scale=0.3))])
def test_exact_bases_are_the_papers_algorithms(kind, optimizer, options, shape):
    left = shape[0] < shape[1]
    w, grads = torch.randn(shape), gradients(shape, 7)
    parameter = torch.nn.Parameter(w.clone())
    got = run(optimizer([parameter], lr=1e-2, weight_decay=0.1, rank=6, refresh_every=3, **options), parameter, grads)
    want = by_hand(w, grads, left, leading(6, left), lr=1e-2, weight_decay=0.1, every=3, scale=0.25 if kind in ("galore", "fira") else 1.0,
                   residual={"galore": None, "fira": "fira", "frugal svd": "sign", "frugal sgd": "sgd"}[kind],
                   residual_scale=0.3 if kind == "frugal sgd" else 1.0, decay_after=kind in ("galore", "fira"), reset="frugal" in kind)
    # A sign flips where the residual is at the threshold or within fp32 of 0: few elements, each by 2 lr.
    error = (got.double() - want).abs()
    assert (error > 2e-4).float().mean() <= (0.02 if kind == "frugal svd" else 0.0), error.max()


def test_frugal_on_coordinates_steps_those_with_adamw_and_the_others_by_their_signs():
    w, grads = torch.randn(20, 12), gradients((20, 12), 5)
    parameter = torch.nn.Parameter(w.clone())
    optimizer = FrugalAdamW([parameter], lr=1e-2, rank=0.25, weight_decay=0.1, refresh_every=2, residual_scale=0.5, seed=3)
    chosen = []

    def basis_of(g, step):
        chosen.append(random_indices(3, 12, 3, step, 3))  # purpose "basis" of tensor 0
        return torch.nn.functional.one_hot(chosen[-1], 12)
    want = by_hand(w, grads, False, basis_of, lr=1e-2, weight_decay=0.1, scale=1.0, every=2, residual="sign", residual_scale=0.5, decay_after=False,
                   reset=True)
    got = run(optimizer, parameter, grads)
    assert (got.double() - want).abs().max() < 1e-5
    assert len({tuple(c.tolist()) for c in chosen}) > 1


@pytest.mark.parametrize("shape", [(20, 16), (16, 20)], ids=str)
def test_dct_takes_the_columns_of_largest_l1_norm_at_every_step_and_moves_moments_by_index(shape):
    left = shape[0] < shape[1]
    w, grads, lr, rank = torch.randn(shape), gradients(shape, 6), 1e-2, 5
    parameter = torch.nn.Parameter(w.clone())
    optimizer = DCTAdamW([parameter], lr=lr, rank=rank, weight_decay=0.1)
    n = min(shape)
    matrix = dct_vectors(torch.arange(n), n).double().t()
    want, m, v = w.double(), torch.zeros(max(shape), n, dtype=torch.float64), torch.zeros(max(shape), n, dtype=torch.float64)
    for step, g in enumerate(grads, 1):
        g = g.double().t() if left else g.double()
        s = g @ matrix
        kept = torch.zeros(n, dtype=torch.bool)
        kept[s.abs().sum(0).topk(rank).indices] = True
        m, v = m * kept, v * kept  # a column that was not chosen last time starts at zero
        psi, m, v = adam(s * kept, m, v, step, (0.9, 0.999), 1e-8)
        update = (psi * kept) @ matrix.t()
        want = want * (1 - lr * 0.1) - lr * (update.t() if left else update)
    assert (run(optimizer, parameter, grads).double() - want).abs().max() < 1e-4


# --- the official codes, on the same gradients ------------------------------------------------------------
def as_their_code_does(w, grads, rank, *, lr, betas, eps, weight_decay, scale, every, kind, limited=True):
    """galore-torch's and Fira's AdamW in plain fp32 torch, in their order of operations: eps in an uncorrected root, bias corrected in
    the step size (so that Fira's limiter sees uncorrected updates), decay last, Fira's residual from alpha P R; FRUGAL's from P R."""
    w, m, v, norm, basis = w.clone(), 0.0, 0.0, None, None
    left, dim = w.shape[0] < w.shape[1], 0 if w.shape[0] < w.shape[1] else 1
    for step, g in enumerate(grads):
        if step % every == 0:
            u, _, vh = torch.linalg.svd(g, full_matrices=False)
            basis = u[:, :rank] if left else vh[:rank]
            if kind == "frugal":
                m, v, since = 0.0, 0.0, step
        back = (lambda r: basis @ r) if left else (lambda r: r @ basis)
        r = basis.t() @ g if left else g @ basis.t()
        m, v = betas[0] * m + (1 - betas[0]) * r, betas[1] * v + (1 - betas[1]) * r * r
        t = step + 1 - (since if kind == "frugal" else 0)
        size = lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        psi = m / (v.sqrt() + eps)
        if kind == "frugal":  # decay first; the residual steps at lr whatever the bias
            w = w - lr * weight_decay * w
            w = w - size * scale * back(psi) - lr * torch.sign(g - back(r))
            continue
        update = scale * back(psi)
        if kind == "fira":
            s = (g - scale * back(r)) * (psi.norm(dim=dim, keepdim=True) / (r.norm(dim=dim, keepdim=True) + 1e-8))
            if limited:
                found = s.norm()
                if norm is not None:
                    by = max(float(found / (norm + 1e-8)), 1.01) / 1.01
                    s, found = s / by, found / by
                norm = found
            update = update + s
        w = w - size * update
        w = w - lr * weight_decay * w
    return w


OFFICIAL = dict(lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (30, 30)], ids=str)
def test_galore_torch_itself_agrees(shape):
    """Its one deviation is eps, which it adds to an uncorrected root: too small to count here."""
    theirs = pytest.importorskip("galore_torch", reason="galore-torch is not installed (docs/benchmarks.md says how)", exc_type=ImportError)
    start, grads = torch.randn(shape), [torch.randn(shape) for _ in range(9)]
    a, b = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    official = theirs.GaLoreAdamW([{"params": [a], "rank": 6, "update_proj_gap": 4, "scale": 0.25, "proj_type": "std"}], eps=1e-30, no_deprecation_warning=True, **OFFICIAL)
    ours = GaLoreAdamW([b], rank=6, refresh_every=4, eps=1e-30, **OFFICIAL)
    run(official, a, grads)
    assert (a.detach() - run(ours, b, grads)).abs().max() < 2e-6


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)], ids=str)
@pytest.mark.parametrize("kind, made, betas, limited", [
    ("galore", lambda p, **o: GaLoreAdamW(p, **o), (0.9, 0.999), None),
    # Without bias to correct the limiters see the same; with it, theirs sees another growth.
    ("fira", lambda p, **o: FiraAdamW(p, basis="svd", scale=1.0, stagger=False, **o), (0.0, 0.0), True),
    ("fira", lambda p, **o: FiraAdamW(p, basis="svd", scale=1.0, stagger=False, limiter=math.inf, **o), (0.9, 0.999), False),
    ("frugal", lambda p, **o: FrugalAdamW(p, basis="svd", bits=32, **o), (0.9, 0.999), None)])
def test_official_formulas_agree_where_their_deviations_are_set(kind, made, betas, limited, shape):
    growing = [g * 1.5 ** i for i, g in enumerate(torch.randn(9, *shape))]
    start = torch.randn(shape)
    w = torch.nn.Parameter(start.clone())
    got = run(made([w], rank=6, refresh_every=4, betas=betas, eps=1e-30, **OFFICIAL), w, growing)
    want = as_their_code_does(start, growing, 6, betas=betas, eps=1e-30, scale=0.25 if kind == "galore" else 1.0, every=4, kind=kind, limited=limited, **OFFICIAL)
    error = (got - want).abs()
    # With eps 0 Adam's quotient divides what rounding did to an element of R near 0 by the element: a few values may be further off, and a sign of
    # FRUGAL's at its threshold flips.
    assert error.median() < 1e-6 and (error > 1e-5).float().mean() <= 0.01, (error.median(), error.max())
    if limited:  # and the limiter had work to do
        free = as_their_code_does(start, growing, 6, betas=betas, eps=1e-30, scale=1.0, every=4, kind=kind, limited=False, **OFFICIAL)
        assert (free - want).abs().max() > 1e-3


# --- every combination ------------------------------------------------------------------------------------
@pytest.mark.parametrize("residual", [None, "fira", "sign", "sgd"])
@pytest.mark.parametrize("basis, bits", [("svd", 32), ("subspace", 4), ("subspace", 8), ("subspace", 16), ("subspace", 32), ("dct", 4), ("random", 4),
                                         ("coordinate", 4)])
def test_any_basis_and_residual_trains_and_resumes_bit_equal(basis, bits, residual):
    for i, (shape, kind) in enumerate((((20, 12), "fp32"), ((12, 3, 7), "bf16"), ((16, 64), "int8"))):
        target = torch.randn(shape).flatten(1)

        def made(values):
            if kind == "int8":
                return torch.nn.Parameter(QuantizedWeight.quantize(values, "int8"))
            return torch.nn.Parameter(values.to(torch.bfloat16 if kind == "bf16" else torch.float32))

        def value(w):
            return (w.dequantize() if isinstance(w, QuantizedWeight) else w).detach().float().flatten(1)

        moments = ("keep", "reset", "rotate")[i]
        if basis == "random" and moments == "rotate":
            moments = "keep"
        projection = Projection(4, basis, bits, 8, refresh_every=3, residual=residual, residual_scale=0.1, scale=1.0, moments=moments, side=("auto", "left", "right")[i])
        start = torch.randn(shape)
        w = made(start)
        optimizer = AdamW([w], lr=5e-2, betas=(0.8, 0.9), weight_decay=0.0, projection=projection, states=("fp32", "int8", "bf16")[i],
                          min_quantized_numel=1, seed=5)
        before = float((value(w) - target).norm())
        saved = None
        for step in range(40):
            if step == 7:
                buffer = io.BytesIO()
                torch.save(optimizer.state_dict(), buffer)
                saved = copy.deepcopy(w), buffer
            w.grad = (value(w) - target).view(shape).to(torch.bfloat16 if kind == "bf16" else torch.float32)
            optimizer.step()
        assert float((value(w) - target).norm()) < (1.0 if residual is None else 0.9) * before, (shape, kind)

        again = saved[0]
        resumed = AdamW([again], lr=5e-2, betas=(0.8, 0.9), weight_decay=0.0, projection=projection, states=("fp32", "int8", "bf16")[i],
                        min_quantized_numel=1, seed=99)
        saved[1].seek(0)
        resumed.load_state_dict(torch.load(saved[1], weights_only=True))
        for step in range(7, 40):
            again.grad = (value(again) - target).view(shape).to(torch.bfloat16 if kind == "bf16" else torch.float32)
            resumed.step()
        assert torch.equal(value(again), value(w)), (shape, kind)


@pytest.mark.parametrize("optimizer, options", [(Lion, {}), (SGD, dict(momentum=0.9)), (SGD, {}), (AdamW, dict(amsgrad=True))])
@pytest.mark.parametrize("shape", [(20, 12), (12, 20)], ids=str)
def test_any_elementwise_rule_takes_a_projection(optimizer, options, shape):
    """The weight moves by what the rule itself makes of R, projected back: a fixed basis, and the rule on R as a weight of its own."""
    left, grads = shape[0] < shape[1], [torch.randn(shape) for _ in range(8)]
    w = torch.nn.Parameter(torch.randn(shape))
    start = w.detach().clone()
    run(made := optimizer([w], lr=1e-2, weight_decay=0.0, projection=Projection(4, "svd", 32, scale=0.5), **options), w, grads)
    basis = made.state[w]["basis_codes"]
    low = torch.nn.Parameter(torch.zeros((4, shape[1]) if left else (shape[0], 4)))
    run(optimizer([low], lr=1e-2, weight_decay=0.0, **options), low, [basis @ g if left else g @ basis.t() for g in grads])
    moved = basis.t() @ low.detach() if left else low.detach() @ basis
    assert (w.detach() - start - 0.5 * moved).abs().max() < 1e-5


@pytest.mark.parametrize("basis", ["svd", "subspace"])
def test_a_gradient_in_the_span_is_stepped_whole(basis):
    """w - target has rank 2: SGD at rate 1/2 in the leading subspace of rank 4 halves it at every step."""
    target, offset = torch.randn(20, 12), torch.randn(20, 2) @ torch.randn(2, 12)
    w = torch.nn.Parameter(target + offset)
    made = SGD([w], lr=0.5, projection=Projection(4, basis, 32, scale=1.0, refresh_every=3))
    for _ in range(6):
        w.grad = (w - target).detach()
        made.step()
    assert torch.allclose(w.detach() - target, offset / 64, atol=1e-4)


# --- moments, intervals -----------------------------------------------------------------------------------
def test_what_a_refresh_does_to_the_moments():
    """Two orthogonal gradients: at the refresh the basis turns by 90 degrees."""
    first, second = torch.zeros(6, 4), torch.zeros(6, 4)
    first[:, 0], second[:, 1] = 1.0, 1.0
    moments = {}
    for mode in ("keep", "reset", "rotate"):
        w = torch.nn.Parameter(torch.zeros(6, 4))
        optimizer = AdamW([w], lr=1.0, weight_decay=0.0, projection=Projection(1, "svd", 32, refresh_every=2, scale=1.0, moments=mode))
        run(optimizer, w, [first, first, second])
        moments[mode] = optimizer.state[w]["exp_avg"].abs()
    kept = 0.9 * (1 - 0.9 ** 2)
    assert torch.allclose(moments["reset"], torch.full((6, 1), 0.1), atol=1e-6)            # as if it were the first step
    assert torch.allclose(moments["rotate"], torch.full((6, 1), 0.1), atol=1e-6)           # nothing of the old basis is in the new one
    signs = {round(float(x), 4) for x in moments["keep"].flatten()}
    assert signs <= {round(kept + 0.1, 4), round(kept - 0.1, 4)}                           # old moments count in the new basis


def test_rotation_keeps_what_the_bases_share():
    """The same gradient, drawn by the seed: coordinates kept by both bases keep their moments, new ones start at zero."""
    w, g = torch.nn.Parameter(torch.zeros(10, 8)), torch.randn(10, 8)
    optimizer = AdamW([w], lr=1e-3, weight_decay=0.0, seed=1, projection=Projection(4, "coordinate", refresh_every=2, moments="rotate"))
    run(optimizer, w, [g, g])
    old, before = optimizer.state[w]["basis_indices"].tolist(), optimizer.state[w]["exp_avg"].clone()
    run(optimizer, w, [g])
    new, after = optimizer.state[w]["basis_indices"].tolist(), optimizer.state[w]["exp_avg"]
    assert old != new and set(old) & set(new)
    for place, column in enumerate(new):
        want = 0.9 * (before[:, old.index(column)] if column in old else 0.0) + 0.1 * g[:, column]
        assert torch.allclose(after[:, place], want, atol=1e-6)


def test_refreshes_of_several_parameters_end_at_different_steps():
    ws = [torch.nn.Parameter(torch.randn(12, 8)) for _ in range(4)]
    optimizer = AdamW(ws, projection=Projection(2, refresh_every=20))
    for w in ws:
        w.grad = torch.randn(12, 8)
    optimizer.step()
    assert len({optimizer.state[w]["next_refresh"] for w in ws}) == 4
    for _ in range(60):
        optimizer.step()
    assert len({optimizer.state[w]["next_refresh"] for w in ws}) == 4


# --- groups, memory, refusals -----------------------------------------------------------------------------
def model():
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.o = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16, bias=False)

    m = torch.nn.Module()
    m.embedding, m.attention, m.mlp, m.norm, m.lm_head = (torch.nn.Embedding(30, 16), Attention(), torch.nn.Linear(16, 48), torch.nn.LayerNorm(16),
                                                          torch.nn.Linear(16, 30))
    return m


def test_groups_take_linear_layers_but_the_head():
    m = model()
    projected, rest = param_groups_for_projection(m, 4, basis="svd")
    assert {id(p) for p in projected["params"]} == {id(m.attention.q.weight), id(m.attention.o.weight), id(m.mlp.weight)}
    assert len(rest["params"]) + len(projected["params"]) == len(list(m.parameters())) and projected["rank"] == 4
    optimizer = Lion([projected, rest], lr=1e-3)
    assert optimizer.param_groups[0]["projection"] == Projection(4, "svd") and optimizer.param_groups[1]["projection"] is None
    with pytest.raises(ValueError, match="bits but no rank"):
        Lion([{"params": [m.mlp.weight], "bits": 8}])
    with pytest.raises(ValueError, match="projection and rank"):
        Lion([{"params": [m.mlp.weight], "rank": 8, "projection": Projection(4)}])
    fira = FiraAdamW(param_groups_for_projection(m, 4), rank=2)  # the class's own settings, but for what the groups say; the rest stays whole
    assert fira.param_groups[0]["projection"].residual == "fira" and fira.param_groups[0]["projection"].rank == 4
    assert fira.param_groups[1]["projection"] is None
    for p in m.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert optimizer.state[m.mlp.weight]["exp_avg"].shape == (48, 4) and optimizer.state[m.embedding.weight]["exp_avg"].shape == (30, 16)
    with pytest.raises(ValueError, match="rank 16"):
        param_groups_for_projection(m, 16)


@pytest.mark.parametrize("named", NAMED)
def test_named_optimizers_save_memory_train_and_take_options_by_group(named):
    w, plain = torch.nn.Parameter(torch.zeros(256, 128)), torch.nn.Parameter(torch.zeros(128))
    target = torch.randn(256, 4) @ torch.randn(4, 128)
    optimizer = named([{"params": [w], "rank": 32, "scale": 1.0}, {"params": [plain]}], lr=3e-2)
    for _ in range(60):
        w.grad, plain.grad = (w - target).detach(), (plain - 1).detach()
        optimizer.step()
    assert state_nbytes(optimizer) < 0.5 * 8 * (w.numel() + plain.numel())
    assert (w - target).norm() < 0.9 * target.norm() and (plain - 1).abs().max() < 0.2


@pytest.mark.parametrize("named", NAMED)
@pytest.mark.parametrize("grad", [torch.zeros(12, 8), torch.ones(12, 8), torch.full((12, 8), 1e-30), torch.ones(12, 1) * torch.eye(8)[0]],
                         ids=["zero", "rank 1", "tiny", "one column"])
def test_degenerate_gradients_leave_finite_weights(named, grad):
    w = torch.nn.Parameter(torch.randn(12, 8))
    start = w.detach().clone()
    run(named([w], lr=1e-2, rank=3, refresh_every=1), w, [grad] * 4)
    assert torch.isfinite(w).all()
    if not grad.any():
        assert torch.equal(w, start)


@pytest.mark.parametrize("named", NAMED)
def test_a_nan_gradient_shows_and_the_next_refresh_recovers_the_basis(named):
    w = torch.nn.Parameter(torch.randn(12, 8))
    optimizer = named([w], lr=1e-2, rank=3, refresh_every=1)
    w.grad = torch.randn(12, 8)
    w.grad[2, 3] = math.nan
    optimizer.step()
    assert not torch.isfinite(w).all()
    w.grad = torch.randn(12, 8)
    optimizer.step()
    assert all(torch.isfinite(value.float()).all() for name, value in optimizer.state[w].items() if name.startswith("basis_"))


def test_maximize_and_grad_scale_are_seen_by_the_residual():
    start, grads = torch.randn(12, 8), gradients((12, 8), 3, 4)
    results = []
    for sign, maximize in ((1, False), (-1, True)):
        for residual in ("fira", "sign", "sgd"):
            w = torch.nn.Parameter(start.clone())
            optimizer = AdamW([w], lr=1e-2, maximize=maximize, projection=Projection(3, "svd", 32, residual=residual))
            results.append(run(optimizer, w, [sign * g for g in grads]))
    for a, b in zip(results[:3], results[3:]):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("options", [dict(rank=0), dict(rank=1.5), dict(basis="pca"), dict(bits=3), dict(group_size=3), dict(refresh_every=0), dict(residual="adam"),
                                     dict(scale=0.0), dict(side="top"), dict(moments="drop"), dict(limiter=0.5), dict(basis="dct", adaptive=True),
                                     dict(max_refresh_every=1), dict(refresh_every=2.0), dict(refresh_every="3"), dict(iterations=1.5), dict(group_size=8.0),
                                     dict(max_refresh_every=400.5), dict(scale="a"), dict(rank="4"), dict(residual_scale=math.nan)])
def test_options_out_of_range_are_refused_by_name(options):
    name = "adaptive" if "adaptive" in options else next(iter(options))
    with pytest.raises(ValueError, match=name):
        Projection(**{"rank": 4, **options})


def test_a_projection_that_is_none_or_of_another_type_or_rule():
    w = torch.nn.Parameter(torch.randn(12, 8))
    with pytest.raises(TypeError, match="projection"):
        AdamW([w], projection=4)
    from gradmill.optim import Muon
    with pytest.raises(ValueError, match="Muon.*projection"):
        Muon([w], projection=Projection(4))


@pytest.mark.parametrize("key, value", [("basis_codes", None), ("basis_indices", torch.zeros(2)), ("next_refresh", -1), ("exp_avg", torch.zeros(12, 8))])
def test_damaged_projected_checkpoints_are_refused_and_change_nothing(key, value):
    basis = "dct" if key == "basis_indices" else "subspace"
    w = torch.nn.Parameter(torch.randn(12, 8))
    optimizer = AdamW([w], projection=Projection(3, basis, group_size=4))
    run(optimizer, w, [torch.randn(12, 8)] * 2)
    good, damaged = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    if value is None:
        del damaged["state"][0][key]
    else:
        damaged["state"][0][key] = value
    with pytest.raises(CheckpointError, match=key):
        optimizer.load_state_dict(damaged)
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
               for a, b in zip(optimizer.state_dict()["state"][0].values(), good["state"][0].values()))


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)], ids=str)
def test_a_galore_torch_state_loads_and_goes_on(shape):
    """Its state holds a projector object with an ortho_matrix: (rank, columns) to the right, (rows, rank) to the left."""
    from types import SimpleNamespace
    start, grads = torch.randn(shape), gradients(shape, 5, 4)
    options = dict(lr=1e-2, rank=3, refresh_every=3)
    w = torch.nn.Parameter(start.clone())
    ours = GaLoreAdamW([w], **options)
    run(ours, w, grads[:2])
    state, left = ours.state[w], shape[0] < shape[1]
    basis = state["basis_codes"]
    theirs = {"step": 2, "exp_avg": state["exp_avg"].clone(), "exp_avg_sq": state["exp_avg_sq"].clone(),
              "projector": SimpleNamespace(ortho_matrix=basis.t().clone() if left else basis.clone())}
    saved = ours.state_dict()
    group = {k: saved["param_groups"][0][k] for k in ("lr", "betas", "eps", "weight_decay")}
    again = torch.nn.Parameter(w.detach().clone())
    resumed = GaLoreAdamW([again], **options)
    resumed.load_state_dict({"state": {0: theirs}, "param_groups": [{**group, "params": [0], "rank": 3, "update_proj_gap": 3, "scale": 0.25}]})
    assert torch.equal(run(ours, w, grads[2:]), run(resumed, again, grads[2:]))


# --- bases computed beside training -----------------------------------------------------------------------
def background_run(shape, projection, grads, slow=0.0, monkeypatch=None, states="fp32", resume_at=None):
    """(weight, basis after each step); resumed from a checkpoint at that step."""
    if slow:
        real = projection_module.find_basis
        monkeypatch.setattr(projection_module, "find_basis", lambda *a: (time.sleep(slow), real(*a))[1])
    w = torch.nn.Parameter(torch.zeros(shape))
    optimizer, bases = AdamW([w], lr=1e-2, projection=projection, states=states, min_quantized_numel=1, seed=5), []
    for step, g in enumerate(grads):
        if step == resume_at:
            buffer = io.BytesIO()
            torch.save(optimizer.state_dict(), buffer)
            buffer.seek(0)
            w = torch.nn.Parameter(w.detach().clone())
            optimizer = AdamW([w], lr=0.5, projection=projection, states=states, min_quantized_numel=1, seed=99)
            optimizer.load_state_dict(torch.load(buffer, weights_only=True))
        w.grad = g.clone()
        optimizer.step()
        w.grad.zero_()  # the basis is that of the gradient as it was
        state = optimizer.state[w]
        bases.append({k: v.clone() for k, v in state.items() if k.startswith("basis_")})
    return w.detach(), bases


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


BACKGROUND = [dict(basis="svd", bits=32), dict(basis="subspace", bits=4, group_size=4, moments="rotate"), dict(basis="subspace", bits=8, group_size=8, adaptive=True, cosine_threshold=0.0),
              dict(basis="dct", moments="rotate"), dict(basis="svd", bits=16, residual="fira", moments="reset")]


@pytest.mark.parametrize("options", BACKGROUND, ids=str)
@pytest.mark.parametrize("shape", [(20, 12), (11, 70)], ids=str)
def test_a_basis_computed_beside_training_is_taken_so_many_steps_later(options, shape, monkeypatch):
    grads = gradients(shape, 16)
    made = {k: Projection(5, refresh_every=5, background=k, stagger=False, **options) for k in (0, 2)}
    now, later = (background_run(shape, made[k], grads) for k in (0, 2))
    # Refreshed at steps 1, 6 and 11: the second basis serves from step 8 on. A basis from the last one's packed form, or from
    # one gradient alone, is the same as without delay.
    if not options.get("adaptive"):
        for step in range(16):
            want = now[1][step if step in (0, 1, 2, 3, 4, 7, 8, 9, 12, 13, 14) else step - 2]
            assert same_tensors(later[1][step], want), step
    assert not torch.equal(now[0], later[0])
    # however long it takes, and resumed from a checkpoint between start and arrival
    slow = background_run(shape, made[2], grads, 0.05, monkeypatch)
    assert torch.equal(slow[0], later[0])
    monkeypatch.undo()
    for at in (6, 7, 8):
        resumed = background_run(shape, made[2], grads, resume_at=at)
        assert torch.equal(resumed[0], later[0]) and all(map(same_tensors, resumed[1], later[1])), at


def test_what_fails_beside_training_is_raised_by_the_step_that_waits_and_changes_nothing(monkeypatch):
    w = torch.nn.Parameter(torch.randn(20, 12))
    optimizer = AdamW([w], lr=1e-2, projection=Projection(3, "svd", 32, refresh_every=4, background=2))
    run(optimizer, w, gradients((20, 12), 4))
    monkeypatch.setattr(projection_module, "find_basis", lambda *a: 1 / 0)
    run(optimizer, w, gradients((20, 12), 2))  # step 5 starts, step 7 waits
    before, state = w.detach().clone(), copy.deepcopy(optimizer.state[w])
    with pytest.raises(RuntimeError, match=r"\(20, 12\) beside training failed: division"):
        optimizer.step()
    assert torch.equal(w, before) and optimizer.state[w]["step"] == state["step"]
    monkeypatch.undo()
    old = optimizer.state[w]["basis_codes"]
    run(optimizer, w, gradients((20, 12), 3))  # step 7 starts again
    assert not torch.equal(old, optimizer.state[w]["basis_codes"]) and torch.isfinite(w).all()


def test_a_pickled_optimizer_has_the_basis_on_its_way():
    w = torch.nn.Parameter(torch.randn(20, 12))
    optimizer = AdamW([w], lr=1e-2, projection=Projection(3, refresh_every=4, group_size=4, background=3))
    grads = gradients((20, 12), 12)
    run(optimizer, w, grads[:6])
    assert "adopt_at" in optimizer.state[w]
    other, copied = copy.deepcopy((w, optimizer))
    assert torch.equal(run(optimizer, w, grads[6:]), run(copied, other, grads[6:]))


def test_an_interrupt_while_a_step_waits_loses_no_basis(monkeypatch):
    start, grads = torch.randn(20, 12), gradients((20, 12), 10)
    a, b = (torch.nn.Parameter(start.clone()) for _ in range(2))
    plain, stopped = (AdamW([w], lr=1e-2, projection=Projection(3, refresh_every=4, background=2)) for w in (a, b))
    run(plain, a, grads), run(stopped, b, grads[:6])

    class Waiting:
        def __getattr__(self, name):
            raise KeyboardInterrupt

    coming = stopped._coming[b]
    stopped._coming[b] = coming._replace(future=Waiting())
    with pytest.raises(KeyboardInterrupt):  # the first wait of step 7
        run(stopped, b, grads[6:7])
    assert b in stopped._coming and stopped.state[b]["step"] == 6
    stopped._coming[b] = coming
    assert torch.equal(run(stopped, b, grads[6:]), a)


@pytest.mark.parametrize("options", [dict(background=200), dict(background=-1), dict(background=1, basis="random"), dict(background=1.0), dict(background=1, basis="dct", refresh_every=1)])
def test_backgrounds_that_make_no_sense(options):
    with pytest.raises(ValueError, match="background"):
        Projection(4, **options)


def test_damaged_states_on_their_way_are_refused():
    w = torch.nn.Parameter(torch.randn(12, 8))
    optimizer = AdamW([w], projection=Projection(3, "dct", refresh_every=4, background=2))
    run(optimizer, w, gradients((12, 8), 5, 4))
    state = optimizer.state_dict()
    del state["state"][0]["coming_basis_indices"]
    with pytest.raises(CheckpointError, match="coming_basis_indices"):
        optimizer.load_state_dict(state)
