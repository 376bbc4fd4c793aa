"""project_out and project_normal against their formulas in float64."""
import pytest
import torch

from gradmill import QuantizedWeight, use_backend
from gradmill.optim import project_normal, project_out

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDING = {"fp32": 2.0 ** -20, "bf16": 2.0 ** -8, "fp16": 2.0 ** -10}


def basis(rank, side):
    return torch.linalg.qr(torch.randn(side, rank)).Q.t().contiguous()


def values(b):
    return (b.dequantize() if isinstance(b, QuantizedWeight) else b).double()


def expected(g, b, left):
    g, b = g.double().flatten(1), values(b)
    return g - (b.t() @ (b @ g) if left else g @ b.t() @ b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", ["fp32", "bf16", "int4", "int8"])
@pytest.mark.parametrize("left", [False, True])
def test_many_gradients_at_once(dtype, stored, left):
    shapes = [(37, 54), (1, 54), (54, 3), (16, 5, 3, 3), (130, 300)]
    grads = [torch.randn(s).to(DTYPES[dtype]) for s in shapes]
    bases = [basis(min(7, n), n) for n in (g.shape[0] if left else g[0].numel() for g in grads)]
    bases = [QuantizedWeight.quantize(b, stored) if stored in ("int4", "int8") else b.to(DTYPES[stored]) for b in bases]
    before = [g.clone() for g in grads]
    project_out(grads, bases, side="left" if left else "right")
    for g, old, b in zip(grads, before, bases):
        assert g.shape == old.shape and g.dtype == old.dtype
        assert (g.double().flatten(1) - expected(old, b, left)).abs().max() <= ROUNDING[dtype] * old.abs().max() * 3


@pytest.mark.parametrize("left", [False, True])
def test_nothing_is_left_in_the_span(left):
    """Of an orthonormal basis; of the stored 4-bit vectors, and of dependent ones, with orthonormal=False."""
    b, g = basis(9, 64), torch.randn(64, 64)
    dependent = torch.cat((torch.randn(3, 64), torch.zeros(1, 64)))
    dependent[2] = dependent[0] - 2 * dependent[1]
    packed = QuantizedWeight.quantize(b, "int4")
    for stored, orthonormal in ((b, True), (packed, False), (dependent, False)):
        rest = g.clone()
        project_out(rest, stored, side="left" if left else "right", orthonormal=orthonormal)
        inside = values(stored) @ (rest if left else rest.t()).double()
        assert inside.abs().max() < 2e-5 and rest.norm() > 0.8 * g.norm()
    loose = g.clone()
    project_out(loose, packed, side="left" if left else "right")
    assert (values(packed) @ (loose if left else loose.t()).double()).abs().max() > 1e-3, "4 bits are not orthonormal"


def test_old_inputs_keep_their_outputs():
    """CUBER's purpose: a step on the rest does not change what the layer says to inputs in the span."""
    b, w = basis(5, 40), torch.randn(20, 40)
    old = torch.randn(11, 5) @ b
    grad = torch.randn(20, 40)
    project_out([grad], [b])
    assert (old @ (w - 0.3 * grad).t() - old @ w.t()).abs().max() < 1e-4


def test_reference_and_native_agree():
    g, b = torch.randn(33, 70), QuantizedWeight.quantize(basis(6, 70), "int4")
    native, plain = g.clone(), g.clone()
    project_out(native, b)
    with use_backend("reference"):
        project_out(plain, b)
    assert (native - plain).abs().max() < 1e-5


def test_edges_of_project_out():
    g = torch.randn(6, 8)
    grads = [g.clone(), None, g.clone(), torch.randn(0, 8), torch.randn(8, 6).t()]
    turned = grads[4].clone()
    project_out(grads, [None, basis(2, 8), torch.zeros(0, 8), basis(2, 8), b := basis(3, 8)])
    assert torch.equal(grads[0], g) and torch.equal(grads[2], g)
    assert (grads[4].double() - expected(turned, b, False)).abs().max() < 1e-5 and not grads[4].is_contiguous()
    whole = torch.randn(4, 8)
    project_out(whole, basis(8, 8))
    assert whole.abs().max() < 1e-5
    bad = torch.full((2, 8), float("nan"))
    project_out(bad, b)
    assert bad.isnan().all()


@pytest.mark.parametrize("arguments, options, error, named", [
    (([torch.zeros(2, 3)], []), {}, ValueError, "bases has 0"), ((torch.zeros(3), torch.zeros(1, 3)), {}, ValueError, r"grads\[0\]"),
    ((torch.zeros(2, 3), torch.zeros(1, 2)), {}, ValueError, r"\(rank, 3\)"), ((torch.zeros(2, 3), torch.zeros(1, 3)), {"side": "both"}, ValueError, "side"),
    ((torch.zeros(2, 3).double(), torch.zeros(1, 3)), {}, TypeError, r"grads\[0\]"), ((torch.zeros(2, 3), torch.zeros(1, 3).int()), {}, TypeError, r"bases\[0\]"),
])
def test_what_project_out_refuses(arguments, options, error, named):
    with pytest.raises(error, match=named):
        project_out(*arguments, **options)


def test_nothing_changes_where_one_is_refused():
    g = torch.ones(2, 3)
    with pytest.raises(ValueError):
        project_out([g, torch.zeros(2, 3)], [torch.ones(1, 3), torch.zeros(1, 9)])
    assert torch.equal(g, torch.ones(2, 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_normal_plane_over_the_whole_model(dtype):
    shapes = [(5, 7), (1,), (), (3, 2, 4), (0, 3), (300, 41)]
    f = [torch.randn(s).to(DTYPES[dtype]) for s in shapes]
    g = [(torch.randn(s) + 0.5).to(DTYPES[dtype]) for s in shapes]
    flat = [torch.cat([t.double().flatten() for t in ts]) for ts in (f, g)]
    c = float(flat[0] @ flat[1] / flat[0].square().sum())
    kept = [t.clone() for t in f]
    assert project_normal(g, f) == pytest.approx(c, rel=1e-4, abs=1e-6)
    got, want = torch.cat([t.double().flatten() for t in g]), flat[0] + (flat[1] - c * flat[0])
    assert (got - want).abs().max() <= ROUNDING[dtype] * 16
    assert all(torch.equal(a, b) for a, b in zip(f, kept))
    assert abs(float((want - flat[0]) @ flat[0])) < 1e-8 * float(flat[0].square().sum())


def test_edges_of_project_normal():
    g, start = torch.randn(4, 3), torch.randn(4, 3)
    old = g.clone()
    assert project_normal(g, torch.zeros(4, 3)) == 0 and torch.equal(g, old)
    assert project_normal([], []) == 0 and project_normal([None, g], [start, None]) == 0 and torch.equal(g, old)
    tiny = torch.full((2,), 1e-6)
    other = torch.full((2,), 3.0)
    assert project_normal(other, tiny) == pytest.approx(6e-6 / 1e-10, rel=1e-5), "the floor of the denominator"
    opposed = -start
    project_normal(opposed, start)
    assert torch.allclose(opposed, start, atol=1e-5), "what is left of a parallel gradient is the reference"
    for bad in (torch.zeros(3, 4), [g, g]):
        with pytest.raises(ValueError, match="references"):
            project_normal(g, bad)
