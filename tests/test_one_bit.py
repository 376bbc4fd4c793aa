"""one_bit_fqt: packed and simulated forms agree, gradients are unbiased, the parts that should be exact are."""
import copy
import dataclasses
import warnings

import pytest
import torch
import torch.nn.functional as F

import gradmill
from gradmill import recipes
from gradmill.autograd.one_bit import prune
from gradmill.reference import binary as reference_binary
from gradmill.reference.binary import inclusion
from gradmill.reference.philox import stream
from gradmill.reference.quant import unpack_bits

from .conftest import LEVELS, assert_same_bits, running

NONE, TOP = (dataclasses.replace(recipes.ONE_BIT_FQT, name=f"one_bit_{p}", one_bit=(4, p)) for p in ("none", "top"))


def sign(x):
    return torch.where(x < 0, -1.0, 1.0)


def layer(tokens=37, columns=50, out=24):
    """x with values on both sides of 1, w, scales, b, dy whose rows and columns differ in magnitude."""
    dy = torch.randn(tokens, out) * torch.linspace(0.5, 2, tokens)[:, None] * torch.linspace(2, 0.5, out)
    return (torch.randn(tokens, columns) * 1.2).requires_grad_(), *(t.requires_grad_() for t in (
        torch.randn(out, columns), torch.rand(out, 1) + 0.5, torch.randn(out))), dy


def gradients(recipe, x, w, s, b, dy, seed=None):
    if seed is not None:
        torch.manual_seed(seed)
    return torch.autograd.grad(gradmill.functional.linear(x, w, b, recipe, s), (x, w, s, b), dy)


def exact(x, w, s, b, dy):
    """What the straight-through gradients are without quantisation."""
    dx = (dy * s.view(1, -1)) @ sign(w) * (x.abs() <= 1)
    return dx, s * (dy.t() @ sign(x)), (dy * (sign(x) @ sign(w).t())).sum(0)[:, None], dy.sum(0)


# --- sampling ---------------------------------------------------------------------------------------------
def test_inclusion_by_hand():
    assert inclusion(torch.tensor([1.0, 2, 3, 100, 0]), 2).tolist() == pytest.approx([1 / 6, 2 / 6, 3 / 6, 1, 0])
    assert inclusion(torch.tensor([0.0, 0.0]), 1).tolist() == [0, 0]
    assert inclusion(torch.tensor([5.0, 0.0]), 1).tolist() == [1, 0]
    assert inclusion(torch.tensor([1.0, float("nan"), 1.0]), 2).tolist() == [0.5, 1, 0.5]


def test_inclusion_adds_up_and_is_proportional():
    for _ in range(50):
        sizes = torch.randn(40).exp() ** 2
        p = inclusion(sizes, 10)
        assert p.sum().item() == pytest.approx(10) and ((p >= 0) & (p <= 1)).all()
        ratio = (p / sizes)[p < 1]
        assert (ratio.max() - ratio.min()) <= 1e-9 * ratio.max() and (p[sizes > sizes[p < 1].max()] == 1).all()


def test_a_group_is_kept_as_often_as_its_probability_says():
    sizes, draws = torch.tensor([1.0, 4.0, 2.0, 30.0, 0.0, 3.0, 1.0, 2.0]), 3000
    p, seen = inclusion(sizes, 2), torch.zeros(8)
    for i in range(draws):
        kept, factor = prune(sizes, sizes, 4, "sample", torch.rand((), dtype=torch.float64))
        assert len(kept) == 2 and torch.allclose(factor.double() * p[kept], torch.ones(2, dtype=torch.float64))
        seen[kept] += 1
    assert (seen / draws - p).abs().max() < 5 * 0.5 / draws ** 0.5 and seen[4] == 0
    assert prune(sizes, sizes, 4, "top", None)[0].tolist() == [1, 3]


# --- forward and backward ---------------------------------------------------------------------------------
def test_forward_is_the_simulated_one():
    x, w, s, b, _ = layer()
    want = s.view(1, -1) * (sign(x) @ sign(w).t()) + b
    torch.testing.assert_close(gradmill.functional.linear(x, w, b, "one_bit_fqt", s), want)
    torch.testing.assert_close(gradmill.functional.linear(x, w, None, "one_bit_fqt", s), want - b)


def test_backward_is_the_simulated_one():
    """The same groups and the same random words in floats."""
    x, w, s, b, dy = layer()
    torch.manual_seed(5)
    offsets = torch.rand(2, dtype=torch.float64)
    key = torch.stack((torch.randint(-2 ** 63, 2 ** 63 - 1, (), dtype=torch.int64), torch.zeros((), dtype=torch.int64)))

    def restored(t, transpose, number):
        planes, scales, offsets = reference_binary.pack_planes(t, 4, transpose, key, stream(number, "gradient"))
        q = sum(unpack_bits(plane, 1, t.shape[0 if transpose else 1], False) << p for p, plane in enumerate(planes))
        return offsets.double() + scales.double() * q

    for recipe, pruning in ((NONE, "none"), (recipes.ONE_BIT_FQT, "sample"), (TOP, "top")):
        dx, dw, ds, db = gradients(recipe, x, w, s, b, dy, seed=5)
        g = (dy * s.view(1, -1)).detach()
        rows, factor = prune((g.amax(1).clamp(min=0) - g.amin(1).clamp(max=0)), g.abs().amax(1), 4, pruning, offsets[0])
        want = torch.zeros_like(x, dtype=torch.float64)
        want[rows] = restored(g[rows], False, 0) @ sign(w).double() * factor[:, None]
        torch.testing.assert_close(dx.double(), want * (x.abs() <= 1), rtol=1e-4, atol=1e-4)
        size = s.flatten().detach()
        columns, factor = prune((dy.amax(0).clamp(min=0) - dy.amin(0).clamp(max=0)) * size, dy.abs().amax(0) * size, 4, pruning, offsets[1])
        want = torch.zeros_like(w, dtype=torch.float64)
        want[columns] = restored(dy[:, columns], True, 1) @ sign(x).double() * (factor * size[columns])[:, None]
        torch.testing.assert_close(dw.double(), want.detach(), rtol=1e-4, atol=1e-4)
        if pruning != "none":
            assert len(rows) == 10 and len(columns) == 6, "a quarter"
        torch.testing.assert_close((ds, db), exact(x, w, s, b, dy)[2:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", [recipes.ONE_BIT_FQT, NONE], ids=lambda r: r.name)
def test_gradients_are_unbiased(recipe):
    x, w, s, b, dy = layer(13, 20, 12)
    draws, want = 1500, exact(x, w, s, b, dy)[:2]
    got = [gradients(recipe, x, w, s, b, dy)[:2] for _ in range(draws)]
    for i in range(2):
        values = torch.stack([g[i] for g in got]).double()
        error, deviation = (values.mean(0) - want[i]).abs(), values.std(0)
        assert (error <= 6 * deviation / draws ** 0.5 + 1e-4).all(), (error / (deviation / draws ** 0.5 + 1e-9)).max()
        assert deviation.max() > 0


def test_top_is_biased_as_the_official_code_is():
    x, w, s, b, dy = layer(13, 20, 12)
    dw = torch.stack([gradients(TOP, x, w, s, b, dy)[1] for _ in range(20)])
    assert ((dw == 0).all(2).all(0)).sum() == 9, "three of twelve channels, always the same"


def test_every_backend_gives_the_same_bits():
    args = layer()
    want = None
    for variant in ("reference", *LEVELS):
        with running(variant):
            got = gradients(recipes.ONE_BIT_FQT, *args, seed=3)
        want = want or got
        assert_same_bits(got[:2], want[:2], variant)


def test_the_output_of_a_linear_layer_may_be_changed_in_place():
    for shape in [(7, 19), (2, 3, 19), (19,), (0, 19)]:
        layer, x = gradmill.nn.Linear(19, 5, recipe="one_bit_fqt"), torch.randn(shape, requires_grad=True)
        torch.manual_seed(0)
        want = layer(x).mul(2).relu()
        torch.manual_seed(0)
        got = layer(x).mul_(2).relu_()
        assert torch.equal(got, want)
        for y in (want, got):
            y.sum().backward()


def test_awkward_shapes_and_values():
    for tokens, columns, out in ((1, 1, 1), (0, 5, 3), (3, 1, 7), (65, 9, 2)):
        args = layer(tokens, columns, out)
        for recipe in ("one_bit_fqt", NONE, TOP):
            for g, t in zip(gradients(recipe, *args), args):
                assert g.shape == t.shape and g.isfinite().all()
    x, w, s, b, dy = layer(9, 10, 8)
    assert all((g == 0).all() for g in gradients("one_bit_fqt", x, w, s, b, torch.zeros(9, 8))[:2])
    bad = dy.clone()
    bad[4, 2] = torch.nan
    dx, dw, _, _ = gradients("one_bit_fqt", x, w, s, b, bad)
    assert dx[4][x[4].abs() <= 1].isnan().all() and dw[2].isnan().all(), "a nan is never pruned away"
    with torch.no_grad():
        x[1, 1] = torch.nan
    y = gradmill.functional.linear(x, w, b, "one_bit_fqt", s)
    assert y[1].isnan().all() and not y[[0, 2]].isnan().any()
    for dtype in (torch.bfloat16, torch.float16):
        x, w, s, b, dy = layer(9, 10, 8)
        x = x.detach().to(dtype).requires_grad_()
        y = gradmill.functional.linear(x, w, b, "one_bit_fqt", s)
        assert y.dtype == dtype and torch.autograd.grad(y, x, dy.to(dtype))[0].dtype == dtype


# --- layers -----------------------------------------------------------------------------------------------
def test_convert_keeps_both_ends():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3), torch.nn.Flatten(), torch.nn.Linear(32, 16),
                                torch.nn.Linear(16, 4))
    report = gradmill.convert(model, "one_bit_fqt")
    assert list(report.layers) == ["2", "4"] and {n for n, _ in report.skipped} == {"0", "5"} and report.new_parameters
    w = model[4].weight
    assert torch.equal(model[4].weight_steps, w.abs().mean(1, keepdim=True)) and model[2].weight_steps.shape == (8, 1)
    loss = model(torch.randn(5, 3, 6, 6)).square().mean()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    again = gradmill.nn.Linear(32, 16, recipe="one_bit_fqt")
    again.load_state_dict({k: v for k, v in model[4].state_dict().items() if k != "weight_steps"})
    assert torch.equal(again.weight_steps, again.weight.abs().mean(1, keepdim=True)), "taken anew from a checkpoint without them"
    x = sign(torch.randn(3, 32))
    torch.testing.assert_close(model[4].dequantize_()(x), model[4](x))
    with pytest.raises(ValueError, match="float32 scales of shape"):
        gradmill.functional.linear(x, w, None, "one_bit_fqt")
    with pytest.raises(ValueError, match="one_bit is"):
        recipes.Recipe("x", one_bit=(5, "sample"))


@pytest.mark.parametrize("groups, stride, padding", [(1, 1, 1), (2, 2, 0), (1, 2, 2)])
def test_convolution_is_the_linear_layer_over_patches(groups, stride, padding):
    x, w = (torch.randn(3, 4, 9, 7) * 1.2).requires_grad_(), torch.randn(6, 4 // groups, 3, 2, requires_grad=True)
    s, b = torch.rand(6, 1) + 0.5, torch.randn(6)
    y = gradmill.functional.conv2d(x, w, b, stride, padding, groups=groups, recipe=NONE, steps=s)
    padded = F.pad(sign(x), (padding,) * 4, value=1.0)  # zero padding counts as +
    want = F.conv2d(padded, sign(w), None, stride, groups=groups) * s.view(1, -1, 1, 1) + b.view(1, -1, 1, 1)
    torch.testing.assert_close(y, want)
    dy = torch.randn_like(y)
    draws = [torch.autograd.grad(gradmill.functional.conv2d(x, w, b, stride, padding, groups=groups, recipe=NONE, steps=s), (x, w), dy) for _ in range(30)]
    xs, ws = padded.clone().requires_grad_(), sign(w.detach()).requires_grad_()
    gx, gw = torch.autograd.grad(F.conv2d(xs, ws, None, stride, groups=groups) * s.view(1, -1, 1, 1), (xs, ws), dy)
    gx = gx[:, :, padding:padding + 9, padding:padding + 7] * (x.abs() <= 1)
    for i, g in enumerate((gx, gw)):
        values = torch.stack([d[i] for d in draws])
        assert (values.mean(0) - g).norm() < 0.1 * g.norm(), "4 bits without pruning, 30 draws"
    last = gradmill.functional.conv2d(x.detach().contiguous(memory_format=torch.channels_last), w, b, stride, padding, groups=groups, recipe=NONE, steps=s)
    torch.testing.assert_close(last, y)


def test_bytes_kept_are_those_said():
    recipe, (x, w, s, b, _) = recipes.ONE_BIT_FQT, layer(64, 80, 24)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        gradmill.functional.linear(x, w, b, recipe, s)
    kept = sum(t.nbytes for t in seen if t.data_ptr() not in (w.data_ptr(), s.data_ptr()) and t.numel() > 2)
    outside = 64 * 80 // 8  # for dX
    assert kept == recipe.saved_bytes(64, 80, 4) + outside < 64 * 80 * 4 / 6


def test_it_trains():
    """A layer between two float ones learns a function that needs it."""
    torch.manual_seed(0)
    x = torch.randn(512, 16)
    target = torch.sign(x[:, :4].sum(1)) * torch.sign(x[:, 4:8].sum(1))
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.LayerNorm(64), torch.nn.Linear(64, 64), torch.nn.LayerNorm(64), torch.nn.Linear(64, 1))
    gradmill.convert(model, "one_bit_fqt")
    optimizer = gradmill.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    losses = []
    for _ in range(150):
        loss = (model(x)[:, 0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.6 * losses[0], losses[::15]


def test_an_input_without_signs_is_told_once():
    x = torch.randn(2, 3, 8, 8)
    layers = [gradmill.nn.Linear(8, 5, recipe="one_bit_fqt"), gradmill.nn.Conv2d(3, 5, 3, recipe="one_bit_fqt")]
    for layer in layers:
        with pytest.warns(UserWarning, match="no negative value.*not a ReLU"):
            layer(x.relu())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for layer in layers:
            layer(x.relu())  # once is enough
        for x in (torch.randn(4, 8), torch.randn(0, 8)):
            gradmill.nn.Linear(8, 5, recipe="one_bit_fqt")(x)
        gradmill.nn.Linear(8, 5, recipe="int8")(torch.rand(4, 8))


def test_a_first_input_that_cannot_be_looked_at_is_not():
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer = gradmill.nn.Linear(8, 5, recipe="one_bit_fqt")
    assert copy.deepcopy(layer).to("meta")(torch.empty(3, 8, device="meta")).shape == (3, 5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(torch.randn(3, 8)).shape == (3, 5)
    layer(torch.empty(0, 8)), layer(torch.rand(1, 8))  # nothing, and too little to tell
    with pytest.warns(UserWarning, match="no negative value"):
        layer(torch.rand(3, 8))


@pytest.mark.parametrize("recipe", [recipes.ONE_BIT_FQT, NONE, TOP], ids=lambda r: r.name)
def test_the_default_dtype_is_nothing_to_it(recipe):
    x, w, s, b, dy = layer()
    wanted = torch.autograd.grad(gradmill.functional.linear(x, w, b, NONE, s), (w, s, b), dy)
    torch.set_default_dtype(torch.float64)
    try:
        found = torch.autograd.grad(gradmill.functional.linear(x, w, b, recipe, s), (w, s, b), dy)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [g.dtype for g in found] == [torch.float32] * 3 and torch.equal(found[2], wanted[2])
