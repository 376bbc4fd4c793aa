"""The drop-in layer: QuantizedWeight, functional.linear and its autograd, nn.Linear, convert."""
import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
import gradmill
from gradmill import QuantizedWeight, convert, nbytes, recipes
from gradmill.formats import Format
from gradmill.functional import linear
from gradmill.nn import Linear
from gradmill.ops import dequantize, quantize
from gradmill.optim import AdamW, QGaLoreAdamW
from gradmill.recipes import Recipe

from .conftest import FLOATS, LEVELS, assert_same_bits, isa, threads

RECIPES = ["int8", "int8_weights"]
STOCHASTIC = Recipe("stochastic", y="int8", dx="int8", dw="int8", gradient_rounding="stochastic")


# --- QuantizedWeight --------------------------------------------------------------------------------------
@pytest.mark.parametrize("format", ["int8", "int4", "int8_row", Format("int4", 32)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_weight_stores_what_quantize_gives_and_looks_like_its_dtype(format, dtype):
    x = torch.randn(6, 300).to(dtype)
    w = QuantizedWeight.quantize(x, format)
    assert w.shape == (6, 300) and w.dtype == dtype and not w.requires_grad
    assert_same_bits((w.codes, w.scales, w.zeros), quantize(x, w.format.code, w.format.block))
    assert_same_bits(w.dequantize(), dequantize(w.codes, w.scales, w.zeros, w.format.code, w.format.block, 300, dtype))
    assert nbytes(w) == w.format.nbytes(6, 300) < nbytes(x.float()) / 2
    assert "QuantizedWeight((6, 300)" in repr(w)


def test_a_weight_counts_convolutions_as_rows_of_their_first_dimension():
    x = torch.randn(5, 3, 4, 4)
    w = QuantizedWeight.quantize(x)
    assert w.codes.shape == (5, 48) and w.dequantize().shape == x.shape
    y = nn.functional.conv2d(torch.randn(1, 3, 8, 8), w)
    assert y.shape == (1, 5, 5, 5)


def test_reading_ops_see_the_values():
    w = QuantizedWeight.quantize(torch.randn(6, 300))
    v = w.dequantize()
    for f in (lambda t: t + 1, lambda t: t.t(), lambda t: t[2], lambda t: t.sum(), lambda t: t.abs().max(), lambda t: torch.ones(2, 6) @ t,
              lambda t: torch.cat([t, t]), lambda t: t.double(), lambda t: t.norm(), lambda t: torch.equal(t, t), lambda t: t.reshape(-1)):
        out = f(w)
        assert not isinstance(out, QuantizedWeight)
        assert_same_bits(out, f(v)) if isinstance(out, torch.Tensor) else None


def test_writing_ops_quantise_what_they_wrote():
    x = torch.randn(6, 300)
    for write in (lambda t: t.copy_(x), lambda t: t.mul_(2), lambda t: t.add_(x), lambda t: t.zero_(), lambda t: t.fill_(3.0), lambda t: nn.init.ones_(t),
                  lambda t: torch.add(t, 1, out=t), lambda t: t.clamp_(min=0), lambda t: t.copy_(x.double()), lambda t: t.copy_(x[:1])):
        w, plain = QuantizedWeight.quantize(torch.randn(6, 300)), None
        plain = w.dequantize()
        result = write(w)
        write(plain)
        assert result is w
        assert_same_bits(w, QuantizedWeight.quantize(plain))


def test_writing_two_weights_in_one_op():
    a, b = (QuantizedWeight.quantize(torch.randn(6, 300)) for _ in range(2))
    want = [QuantizedWeight.quantize(t.dequantize() * 2) for t in (a, b)]
    torch._foreach_mul_([a, b], 2.0)
    assert_same_bits([a, b], want)


@pytest.mark.parametrize("bad, error, match", [(torch.ones(3, 3, dtype=torch.float64), TypeError, "float64"), (torch.ones(3), ValueError, "two dimensions")])
def test_unquantisable_tensors_are_refused(bad, error, match):
    with pytest.raises(error, match=match):
        QuantizedWeight.quantize(bad)
    with pytest.raises(ValueError, match="needs a quantised one"):
        QuantizedWeight.quantize(torch.ones(2, 2), "bf16")


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), torch.clone, lambda w: w.to("cpu", copy=True)],
                         ids=["deepcopy", "pickle", "clone", "to"])
def test_copies_of_a_weight_are_equal_and_independent(clone):
    w = nn.Parameter(QuantizedWeight.quantize(torch.randn(6, 300)))
    other = clone(w)
    assert isinstance(other, QuantizedWeight) and other.format == w.format and other.requires_grad
    if clone in (copy.deepcopy,):
        assert isinstance(other, nn.Parameter)
    assert_same_bits(other.detach(), w.detach())
    before = w.dequantize()
    other.detach().zero_()
    assert_same_bits(w.dequantize(), before)


def test_a_weight_travels_through_a_file():
    w = nn.Parameter(QuantizedWeight.quantize(torch.randn(64, 512)))
    file = io.BytesIO()
    torch.save({"w": w}, file)
    assert file.tell() < 64 * 512 * 2
    file.seek(0)
    back = torch.load(file, weights_only=True)["w"]
    assert isinstance(back, QuantizedWeight)
    assert_same_bits(back.detach(), w.detach())


def test_casting_keeps_the_codes_and_changes_the_outer_dtype():
    w = QuantizedWeight.quantize(torch.randn(6, 300))
    for dtype in FLOATS:
        other = w.to(dtype)
        assert isinstance(other, QuantizedWeight) and other.dtype == dtype
        assert_same_bits(other.codes, w.codes)
    assert not isinstance(w.to(torch.float64), QuantizedWeight)


def test_nan_and_empty_weights():
    x = torch.ones(3, 8)
    x[1, 2] = float("nan")
    assert QuantizedWeight.quantize(x, Format("uint8", 4)).dequantize().isnan().sum() == 4
    for shape in ((0, 5), (5, 0)):
        assert QuantizedWeight.quantize(torch.empty(shape)).dequantize().shape == shape


# --- linear: the quantised function, by hand --------------------------------------------------------------
def rowwise(x):
    """Codes and scales of int8 rows, in exact arithmetic's types: a second opinion in four lines."""
    scale = x.float().abs().amax(1, keepdim=True) / torch.full((x.shape[0], 1), 127.0)
    codes = torch.where(scale > 0, torch.round(x.float() / scale), 0)
    return codes.double(), scale.double()


def product(a, b):
    """a b^T, both quantised by rows; the two fp32 scalings round, no more."""
    (qa, sa), (qb, sb) = rowwise(a), rowwise(b)
    return (qa @ qb.t()) * sa * sb.t()


def same_up_to_scaling(got, want, dtype=torch.float32):
    eps = {torch.float32: 2.0 ** -22, torch.bfloat16: 2.0 ** -8, torch.float16: 2.0 ** -11}[dtype] * 1.01
    torch.testing.assert_close(got.double(), want, rtol=eps, atol=1e-7 if dtype != torch.float32 else 1e-30)


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 3), (33, 64, 48), (2, 257, 65), (130, 31, 200)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_output_and_gradients_are_those_of_the_quantised_operands(shape, dtype):
    """Y from rows of X and W; dX from rows of dY and columns of W; dW from columns of dY and of X; db the plain sum."""
    m, k, n = shape
    x, w = (torch.randn(m, k).to(dtype).requires_grad_(), torch.randn(n, k).to(dtype).requires_grad_())
    dy = torch.randn(m, n).to(dtype)
    y = linear(x, w)
    assert y.dtype == dtype
    same_up_to_scaling(y, product(x.detach(), w.detach()), dtype)
    y.backward(dy)
    assert x.grad.dtype == w.grad.dtype == dtype
    same_up_to_scaling(x.grad, product(dy, w.detach().t()), dtype)
    same_up_to_scaling(w.grad, product(dy.t(), x.detach().t()), dtype)


def test_bias_is_added_in_fp32_and_its_gradient_is_the_column_sum():
    x, w, b = torch.randn(40, 30), torch.randn(20, 30), torch.randn(20, requires_grad=True)
    y = linear(x, w, b)
    torch.testing.assert_close(y.detach().double(), product(x, w) + b.detach().double(), rtol=2.0 ** -20, atol=1e-5)
    dy = torch.randn(40, 20)
    y.backward(dy)
    torch.testing.assert_close(b.grad, dy.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_relative_error_against_fp32_is_that_of_8_bits(recipe):
    """Rows of normal numbers have an absmax of 3 to 5 sigma: a step of about 1/30, an error of its 1/sqrt(12), 1 %, per
    operand (and one more for a stored weight): 2.5 % bounds all three."""
    x, layer = torch.randn(128, 256, requires_grad=True), nn.Linear(256, 192)
    ours = Linear.from_linear(copy.deepcopy(layer), recipe)
    dy = torch.randn(128, 192)
    y, want = ours(x), layer(x)
    (gx,), (hx,) = torch.autograd.grad(y, x, dy, retain_graph=True), torch.autograd.grad(want, x, dy, retain_graph=True)
    y.backward(dy), want.backward(dy)
    for name, a, b in (("y", y, want), ("dx", gx, hx), ("dw", ours.weight.grad, layer.weight.grad)):
        error = ((a - b).norm() / b.norm()).item()
        assert 1e-4 < error < 0.025, f"{name}: {error}"  # not fp32 in disguise either
    torch.testing.assert_close(ours.bias.grad, layer.bias.grad)


def test_y_dx_dw_recipes_are_independent():
    x, w, dy = torch.randn(16, 32), torch.randn(24, 32), torch.randn(16, 24)
    exact = x @ w.t(), dy @ w, dy.t() @ x
    quantised = product(x, w), product(dy, w.t()), product(dy.t(), x.t())
    for chosen in range(8):
        recipe = Recipe("mixed", *("int8" if chosen >> i & 1 else None for i in range(3)))
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = linear(a, b, recipe=recipe)
        y.backward(dy)
        for i, got in enumerate((y.detach(), a.grad, b.grad)):
            torch.testing.assert_close(got.double(), quantised[i] if chosen >> i & 1 else exact[i].double(), rtol=1e-5, atol=2e-5)


def test_integers_that_fit_are_exact():
    """Every row and column holds 127, so every scale is 1: quantised and exact arithmetic agree."""
    x, w = torch.randint(-127, 128, (9, 12)).float(), torch.randint(-127, 128, (11, 12)).float()
    x[:, 0] = x[0] = w[:, 0] = w[0] = 127.0
    dy = torch.randint(-127, 128, (9, 11)).float()
    dy[:, 0] = dy[0] = 127.0
    x.requires_grad_(), w.requires_grad_()
    y = linear(x, w)
    y.backward(dy)
    assert_same_bits((y.detach(), x.grad, w.grad), (x.detach() @ w.detach().t(), dy @ w.detach(), dy.t() @ x.detach()))


@pytest.mark.parametrize("shape", [(7,), (0, 7), (3, 7), (2, 3, 7), (2, 0, 7), (1, 1, 1, 7), (2, 3, 4, 5, 7)], ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_inputs_of_every_rank(shape, recipe):
    layer = Linear(7, 5, recipe=recipe)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 5)
    y.sum().backward()
    assert x.grad.shape == shape and layer.weight.grad.shape == (5, 7)
    assert_same_bits(y.detach().reshape(-1, 5), layer(x.detach().reshape(-1, 7)).detach())


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0), (1, 1)])
def test_layers_without_inputs_or_outputs(sizes):
    x, w = torch.randn(3, sizes[0], requires_grad=True), torch.randn(sizes[1], sizes[0], requires_grad=True)
    y = linear(x, w, torch.ones(sizes[1]))
    y.sum().backward()
    assert y.shape == (3, sizes[1]) and x.grad.shape == x.shape and w.grad.shape == w.shape
    if sizes[0] == 0:
        assert (y == 1).all()


def test_zero_rows_give_zero_and_do_not_disturb_others():
    x, w = torch.randn(6, 20), torch.randn(5, 20)
    x[2], w[3] = 0, 0
    y = linear(x, w)
    assert (y[2] == 0).all() and (y[:, 3] == 0).all()
    same_up_to_scaling(y, product(x, w))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("recipe", RECIPES)
def test_nan_and_inf_show_in_the_output_and_the_gradients(bad, recipe):
    layer, x = Linear(20, 5, recipe=recipe), torch.randn(6, 20, requires_grad=True)
    with torch.no_grad():
        x[2, 3] = bad
    y = layer(x)
    assert not y[2].isfinite().any() and y[[0, 1, 3, 4, 5]].isfinite().all()
    dy = torch.ones(6, 5)
    dy[1, 4] = bad
    y.backward(dy)
    assert not x.grad[1].isfinite().any() and x.grad[0].isfinite().all()
    assert not layer.weight.grad[:, 3].isfinite().any() and not layer.weight.grad[4].isfinite().any() and layer.weight.grad[:4, :3].isfinite().all()


def test_only_the_gradients_asked_for_are_computed():
    for need_x, need_w, need_b in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)):
        x, w, b = torch.randn(4, 8, requires_grad=bool(need_x)), torch.randn(5, 8, requires_grad=bool(need_w)), torch.randn(5, requires_grad=bool(need_b))
        y = linear(x, w, b)
        assert y.requires_grad == bool(need_x or need_w or need_b)
        if y.requires_grad:
            y.sum().backward()
        assert [t.grad is not None for t in (x, w, b)] == [bool(need_x), bool(need_w), bool(need_b)]
    layer = Linear(8, 5, recipe="int8_weights").requires_grad_(False)
    x = torch.randn(4, 8, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None and x.grad is not None


def test_int8_copies_are_saved_instead_of_the_input():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(torch.randn(64, 512, requires_grad=True), torch.randn(8, 512, requires_grad=True))
    held = {t.data_ptr(): t.nbytes for t in saved if t.shape not in ((8, 512),)}
    assert sum(held.values()) < 64 * 512 * 4 / 3


def test_double_backward_is_refused_not_wrong():
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    (g,) = torch.autograd.grad(linear(x, w).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        g.sum().backward()


def test_layouts_expanded_transposed_and_sliced_inputs():
    w = torch.randn(5, 12)
    base = torch.randn(12, 9)
    for x in (base.t(), torch.randn(1, 12).expand(9, 12), torch.randn(9, 30)[:, 3:15], torch.randn(9, 24)[:, ::2], torch.randn(4, 3, 12).transpose(0, 1)):
        assert_same_bits(linear(x, w), linear(x.contiguous(), w))
    assert_same_bits(linear(base.t(), torch.randn(12, 5).t().copy_(w)), linear(base.t().contiguous(), w))
    for grad in (torch.ones(()).expand(9, 5), torch.randn(5, 9).t()):
        results = []
        for g in (grad, grad.contiguous()):
            x, v = base.t().clone().requires_grad_(), w.clone().requires_grad_()
            linear(x, v).backward(g)
            results.append((x.grad, v.grad))
        assert_same_bits(*results)


@pytest.mark.parametrize("recipe", RECIPES)
def test_threads_and_instruction_sets_give_the_same_bits(recipe):
    torch.manual_seed(0)
    layer, x, dy = Linear(300, 200, recipe=recipe), torch.randn(150, 300), torch.randn(150, 200)
    results = []
    for level in LEVELS:
        for count in (1, 2):
            with isa(level), threads(count):
                a = x.clone().requires_grad_()
                layer.zero_grad()
                y = layer(a)
                y.backward(dy)
                results.append((y.detach(), a.grad, layer.weight.grad.clone()))
    for other in results[1:]:
        assert_same_bits(other, results[0])


def test_gradients_accumulate_and_tied_weights_add_theirs():
    w = torch.randn(8, 8, requires_grad=True)
    x, dy = torch.randn(4, 8), torch.randn(4, 8)
    linear(x, w).backward(dy)
    once = w.grad.clone()
    linear(x, w).backward(dy)
    assert_same_bits(w.grad, once * 2)
    a = torch.randn(8, 8, requires_grad=True)
    linear(linear(x, a), a).backward(dy)
    inner = linear(x, a.detach())
    dinner = product(dy, a.detach().t()).float()
    torch.testing.assert_close(a.grad, (product(dy.t(), inner.t()) + product(dinner.t(), x.t())).float(), rtol=1e-4, atol=1e-4)


# --- stochastic gradient rounding -------------------------------------------------------------------------
def gradients(recipe, seed=None):
    g = torch.Generator().manual_seed(1)
    x, w, dy = (torch.randn(s, generator=g) for s in ((16, 24), (20, 24), (16, 20)))
    x.requires_grad_(), w.requires_grad_()
    if seed is not None:
        torch.manual_seed(seed)
    linear(x, w, recipe=recipe).backward(dy)
    return x.grad, w.grad


def test_stochastic_rounding_of_gradients_follows_manual_seed_and_is_unbiased():
    assert_same_bits(gradients(STOCHASTIC, 5), gradients(STOCHASTIC, 5))
    assert not torch.equal(gradients(STOCHASTIC, 5)[0], gradients(STOCHASTIC, 6)[0])
    g = torch.Generator().manual_seed(1)
    x, w, dy = (torch.randn(s, generator=g) for s in ((16, 24), (20, 24), (16, 20)))
    # what dX and dW are on average: dY exact, the other operand quantised by rows as it is
    q, s = rowwise(w.t())
    want_x = (dy.double() @ (q * s).t())
    q, s = rowwise(x.t())
    want_w = dy.double().t() @ (q * s).t()
    draws = [gradients(STOCHASTIC, seed) for seed in range(300)]
    for i, want in enumerate((want_x, want_w)):
        samples = torch.stack([d[i] for d in draws]).double()
        scores = (samples.mean(0) - want) / (samples.std(0) / 300 ** 0.5)
        assert abs(scores.mean()) < 4 / scores.numel() ** 0.5 * 3  # rows share words' operands: not independent, hence the 3
        assert scores.abs().max() < 5.5


@pytest.mark.parametrize("recipe", [*RECIPES, STOCHASTIC], ids=str)
def test_checkpointing_gives_the_same_gradients(recipe):
    layers = nn.Sequential(Linear(16, 32, recipe=recipe), nn.GELU(), Linear(32, 16, recipe=recipe))
    x, results = torch.randn(5, 16), []
    for reentrant in (None, False, True):
        torch.manual_seed(3)
        layers.zero_grad()
        a = x.clone().requires_grad_()
        y = layers(a) if reentrant is None else checkpoint(layers, a, use_reentrant=reentrant)
        y.square().sum().backward()
        results.append((a.grad, *(p.grad.clone() for p in layers.parameters())))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("recipe", [*RECIPES, STOCHASTIC], ids=lambda r: getattr(r, "name", r))
def test_compile_without_a_graph_break(recipe):
    torch._dynamo.reset()
    model = nn.Sequential(Linear(16, 32, recipe=recipe), nn.ReLU(), Linear(32, 4, recipe=recipe))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for f in (model, compiled):
        torch.manual_seed(4)
        model.zero_grad()
        x = torch.ones(5, 16).mul(torch.arange(16)).requires_grad_()
        y = f(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())))
    if recipe is STOCHASTIC:  # a compiled graph may draw its seeds in another order
        assert_same_bits(results[1][0], results[0][0])
    else:
        assert_same_bits(results[1], results[0])


# --- dtypes, autocast, devices ----------------------------------------------------------------------------
def test_autocast_sets_the_output_dtype_and_gradients_keep_the_parameters():
    for recipe in RECIPES:
        layer, x = Linear(16, 8, recipe=recipe), torch.randn(4, 16, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        assert layer.weight.grad.dtype == layer.bias.grad.dtype == x.grad.dtype == torch.float32
        assert layer(x).dtype == torch.float32


def test_mixed_dtypes_of_input_weight_and_bias():
    for xd in FLOATS:
        for wd in FLOATS:
            x, w, b = torch.randn(4, 16, dtype=xd, requires_grad=True), torch.randn(8, 16, dtype=wd, requires_grad=True), torch.randn(8, dtype=wd, requires_grad=True)
            y = linear(x, w, b)
            assert y.dtype == xd
            y.sum().backward()
            assert (x.grad.dtype, w.grad.dtype, b.grad.dtype) == (xd, wd, wd)


@pytest.mark.parametrize("arguments, error, message", [
    ((torch.ones(2, 4, dtype=torch.float64), torch.ones(3, 4)), TypeError, "x is torch.float64"),
    ((torch.ones(2, 4), torch.ones(3, 4, dtype=torch.float64)), TypeError, "weight is torch.float64"),
    ((torch.ones(2, 4), torch.ones(3, 4), torch.ones(3, dtype=torch.float64)), TypeError, "bias is torch.float64"),
    ((torch.ones(2, 4, dtype=torch.int32), torch.ones(3, 4)), TypeError, "x is torch.int32"),
    ((torch.ones(2, 5), torch.ones(3, 4)), ValueError, r"x has shape \(2, 5\); its last dimension must be 4"),
    ((torch.ones(()), torch.ones(3, 4)), ValueError, r"x has shape \(\)"),
    ((torch.ones(2, 4), torch.ones(4)), ValueError, "weight has shape"),
    ((torch.ones(2, 4), torch.ones(3, 4), torch.ones(4)), ValueError, r"bias has shape \(4,\); it must be \(3,\)"),
    ((torch.ones(2, 4), torch.ones(3, 4), None, "int9"), ValueError, "recipe is 'int9'"),
])
def test_bad_arguments_are_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        linear(*arguments)


def test_recipes_check_themselves():
    with pytest.raises(ValueError, match="dx is 'int3'"):
        Recipe("x", dx="int3")
    with pytest.raises(ValueError, match="gradient_rounding"):
        Recipe("x", gradient_rounding="up")
    assert recipes.get("int8") is recipes.INT8 and recipes.get(STOCHASTIC) is STOCHASTIC


# --- the module -------------------------------------------------------------------------------------------
def test_the_layer_is_a_drop_in():
    layer = Linear(16, 8)
    assert isinstance(layer, nn.Linear) and "in_features=16, out_features=8, bias=True, recipe=int8" in repr(layer)
    assert Linear(16, 8, bias=False).bias is None
    assert Linear(16, 8, dtype=torch.bfloat16).weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="recipe is 'nope'"):
        Linear(16, 8, recipe="nope")


@pytest.mark.parametrize("recipe", RECIPES)
def test_state_dict_to_and_from_nn_linear(recipe):
    plain, layer = nn.Linear(16, 8), Linear(16, 8, recipe=recipe)
    layer.load_state_dict(plain.state_dict())
    assert isinstance(layer.weight, QuantizedWeight) == (recipe == "int8_weights")
    if recipe == "int8_weights":
        assert_same_bits(layer.weight.detach(), QuantizedWeight.quantize(plain.weight.detach()))
    again = Linear(16, 8, recipe=recipe)
    again.load_state_dict(layer.state_dict())
    assert_same_bits(again.weight.detach(), layer.weight.detach())
    back = nn.Linear(16, 8)
    back.load_state_dict(layer.state_dict())
    values = layer.weight.dequantize() if recipe == "int8_weights" else layer.weight.detach()
    assert_same_bits(back.weight.detach(), values)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert_same_bits(again(torch.ones(1, 16)), layer(torch.ones(1, 16)))
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(nn.Linear(17, 8).state_dict())


@pytest.mark.parametrize("recipe", RECIPES)
def test_loading_with_assign_keeps_the_layer_working(recipe):
    layer, plain = Linear(16, 8, recipe=recipe), nn.Linear(16, 8)
    layer.load_state_dict(plain.state_dict(), assign=True)
    assert type(layer.weight) is (QuantizedWeight if recipe == "int8_weights" else nn.Parameter), "a float weight is packed"
    x = torch.randn(3, 16)
    layer(x).sum().backward()
    torch.testing.assert_close(layer(x), plain(x), atol=0.1, rtol=0.1)


def test_assigning_float_weights_over_a_frozen_recipes_packs_and_freezes_them():
    for layer in (Linear(16, 8, recipe="w4"), Linear(16, 8, recipe="w4", device="meta"), gradmill.nn.Conv2d(2, 4, 3, recipe="w4")):
        plain = layer._plain(*layer.weight.shape[1::-1], *[3] * (layer.weight.dim() // 4))
        layer.load_state_dict(plain.state_dict(), assign=True)
        assert isinstance(layer.weight, QuantizedWeight) and layer.weight.device.type == "cpu" and not layer.weight.requires_grad
        assert_same_bits(layer.weight.dequantize(), QuantizedWeight.quantize(plain.weight, layer.recipe.weight).dequantize())


def _shared(queue, layer):
    with torch.no_grad():
        layer.weight.copy_(torch.full(layer.weight.shape, 2.0))
    queue.put(float(layer.weight.dequantize()[0, 0]))


def test_a_quantised_weight_is_shared_between_processes():
    layer = Linear(16, 8, recipe="int8_weights").share_memory()
    assert layer.weight.is_shared() and all(t.is_shared() for t in (layer.weight.codes, layer.weight.scales, layer.bias))
    context = torch.multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_shared, args=(queue, layer))
    process.start()
    process.join(60)
    assert queue.get() == 2.0 and bool((layer.weight.dequantize() == 2.0).all())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_copies_of_a_layer_compute_alike_and_train_apart(clone, recipe):
    layer, x = Linear(16, 8, recipe=recipe), torch.randn(3, 16)
    other = clone(layer)
    want = layer(x).detach()
    assert_same_bits(other(x).detach(), want)
    optimizer = AdamW(other.parameters(), lr=0.1)
    other(x).sum().backward()
    optimizer.step()
    assert_same_bits(layer(x).detach(), want)
    assert not torch.equal(other(x), want)


@pytest.mark.parametrize("recipe", RECIPES)
def test_meta_device_and_to_empty(recipe):
    layer = Linear(16, 8, recipe=recipe, device="meta")
    assert layer.weight.is_meta and layer(torch.empty(3, 16, device="meta")).shape == (3, 8)
    layer.to_empty(device="cpu")
    layer.load_state_dict(nn.Linear(16, 8).state_dict())
    assert layer(torch.ones(3, 16)).isfinite().all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_module_casts(recipe):
    layer = Linear(16, 8, recipe=recipe).to(torch.bfloat16)
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    assert isinstance(layer.weight, QuantizedWeight) == (recipe == "int8_weights")
    y = layer(torch.randn(3, 16, dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype == layer.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("recipe", RECIPES)
def test_dequantize_gives_a_plain_layer_back(recipe):
    layer, x = Linear(16, 8, recipe=recipe), torch.randn(3, 16)
    layer.register_forward_hook(lambda m, i, o: o + 1)
    layer.eval()
    plain = layer.dequantize_()
    assert type(plain) is nn.Linear and not isinstance(plain.weight, QuantizedWeight) and isinstance(plain.weight, nn.Parameter) and not plain.training
    values = layer.weight.dequantize() if recipe == "int8_weights" else layer.weight.detach()
    assert_same_bits(plain(x).detach(), nn.functional.linear(x, values, layer.bias.detach()) + 1)
    assert plain.bias is layer.bias and "recipe" not in repr(plain)


# --- convert ----------------------------------------------------------------------------------------------
class Special(nn.Linear):
    pass


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.first = nn.Linear(16, 32)
        self.block = nn.Sequential(nn.Linear(32, 32, bias=False), nn.ReLU(), Special(32, 16))
        self.again = self.first
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.lm_head = nn.Linear(16, 50, bias=False)
        self.tied = nn.Linear(16, 50, bias=False)
        self.tied.weight = self.embedding.weight
        self.double = nn.Linear(4, 4, dtype=torch.float64)


@pytest.mark.parametrize("recipe", RECIPES)
def test_convert_replaces_exact_linears_and_reports_the_rest(recipe):
    model = Model()
    before, hidden = model.state_dict(), model.block[0].weight
    report = convert(model, recipe)
    assert report.replaced == ["first", "again", "frozen", "block.0"]
    why = dict(report.skipped)
    assert why.keys() == {"block.2", "lm_head", "tied", "double"}
    assert "subclass" in why["block.2"] and "head" in why["lm_head"] and "embedding" in why["tied"] and "float64" in why["double"]
    assert type(model.first) is Linear and model.again is model.first and type(model.block[2]) is Special and type(model.lm_head) is nn.Linear
    assert model.tied.weight is model.embedding.weight and not model.frozen.weight.requires_grad and model.block[0].bias is None
    assert (model.block[0].weight is hidden) == (recipe == "int8")
    assert model.state_dict().keys() == before.keys()
    floats = 4 * (16 * 32 + 32 * 32 + 16 * 16)
    assert report.bytes_before == floats and (report.bytes_after == floats if recipe == "int8" else report.bytes_after < floats / 2.5)
    text = str(report)
    assert "4 replaced, 4 skipped" in text and "block.2" in text and recipe in text
    once = copy.deepcopy(dict(model.named_parameters()))
    second = convert(model, recipe)
    assert not second.replaced and ("first", f"already a gradmill layer, recipe {recipe}") in second.skipped
    assert_same_bits({k: v.detach() for k, v in model.named_parameters()}, {k: v.detach() for k, v in once.items()})


def test_a_filter_replaces_the_default_choice():
    model = Model()
    asked = []
    report = convert(model, "int8", filter=lambda name, layer: asked.append((name, type(layer))) or name in ("lm_head", "tied"))
    assert report.replaced == ["lm_head", "tied"] and ("first", "the filter said no") in report.skipped
    assert model.tied.weight is model.embedding.weight and all(t is nn.Linear for _, t in asked)


def test_hooks_training_mode_and_attributes_survive_conversion():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    calls = []
    model[0].register_forward_hook(lambda *a: calls.append("forward"))
    model[0].register_forward_pre_hook(lambda *a: calls.append("pre"))
    model[0].register_full_backward_hook(lambda *a: calls.append("backward"))
    model[0].weight.register_hook(lambda g: calls.append("weight") or g)
    model[0].note = "mine"
    model[0].register_buffer("count", torch.ones(1))
    model[1].eval()
    convert(model, "int8")
    assert model[0].training and not model[1].training and model[0].note == "mine" and "0.count" in model.state_dict()
    model(torch.ones(2, 4, requires_grad=True)).sum().backward()
    assert sorted(calls) == ["backward", "forward", "pre", "weight"]


def test_an_optimizer_made_before_an_int8_conversion_still_steps_the_layer():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = AdamW(model.parameters(), lr=0.1)
    convert(model, "int8")
    before = model[0].weight.detach().clone()
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_tied_between_two_layers_stay_tied(recipe):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    convert(model, recipe)
    assert model[1].weight is model[0].weight and model[0] is not model[1]
    assert len(list(model.parameters())) == 3
    model(torch.randn(3, 8)).sum().backward()
    AdamW(model.parameters(), lr=0.1).step()


def test_convert_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="itself a torch.nn.Linear.*from_linear"):
        convert(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="model is list"):
        convert([nn.Linear(3, 3)])
    with pytest.raises(ValueError, match="recipe is 'int9'"):
        convert(nn.Sequential(nn.Linear(3, 3)), "int9")


def test_parametrised_layers_are_skipped_and_still_work():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    report = convert(model, "int8_weights")
    assert report.replaced == ["2"] and [n for n, _ in report.skipped] == ["0", "1"]
    model(torch.randn(2, 4)).sum().backward()


def test_lazy_and_meta_layers():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4, device="meta"))
    report = convert(model, "int8")
    assert report.replaced == ["1"] and [n for n, _ in report.skipped] == ["0"]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 16)

    def forward(self, x):
        return self.out(self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("recipe", RECIPES)
def test_attention_keeps_its_own_projection_in_training_and_on_the_fast_path(recipe):
    model = Attention()
    plain = copy.deepcopy(model)
    report = convert(model, recipe)
    assert report.replaced == ["out"] and "NonDynamicallyQuantizableLinear" in dict(report.skipped)["attention.out_proj"]
    x = torch.randn(2, 5, 16)
    model(x).sum().backward()
    model.eval(), plain.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), atol=0.05, rtol=0.05)


def encoder():
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(32, 8))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_transformer_encoder_computes_about_the_same_in_every_mode(recipe):
    """torch's fused inference path reads the layers' weights itself: converted layers must work with it or turn it off."""
    model = encoder()
    plain = copy.deepcopy(model)
    assert len(convert(model, recipe).replaced) == 5
    x = torch.randn(3, 7, 32)
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[:, 5:] = True
    for mode in (True, False):
        model.train(mode), plain.train(mode)
        for no_grad in (True, False):
            with torch.set_grad_enabled(not no_grad):
                got, want = model(x), plain(x)
                assert (got - want).norm() < 0.05 * want.norm(), (mode, no_grad)
                a, b = model[0](x, src_key_padding_mask=mask)[:, :5], plain[0](x, src_key_padding_mask=mask)[:, :5]
                assert (a - b).norm() < 0.05 * b.norm(), (mode, no_grad)


@pytest.mark.parametrize("recipe, optimizer", [("int8", AdamW), ("int8_weights", AdamW), ("int8", "galore"), ("int8_weights", "galore"),
                                               ("int8_weights", torch.optim.AdamW), ("int8", torch.optim.SGD)], ids=str)
def test_a_converted_transformer_trains(recipe, optimizer):
    """A task that needs the layers: tell which class a sequence's offset belongs to. The loss ends below a third."""
    torch.manual_seed(0)
    model = encoder()
    convert(model, recipe)
    if optimizer == "galore":
        groups = [{"params": [p for p in model.parameters() if p.dim() == 2], "rank": 8}, {"params": [p for p in model.parameters() if p.dim() != 2]}]
        optimizer = QGaLoreAdamW(groups, lr=6e-3, scale=1.0, refresh_every=10, seed=0)
    elif optimizer is torch.optim.SGD:
        optimizer = optimizer(model.parameters(), lr=0.1, momentum=0.9)
    else:
        optimizer = optimizer(model.parameters(), lr=3e-3)
    classes, centres = torch.randint(0, 8, (64,)), torch.randn(8, 32)
    x = centres[classes][:, None] + torch.randn(64, 6, 32)
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(x).mean(1), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3, losses
    if recipe == "int8_weights":
        assert isinstance(model[0].layers[0].linear1.weight, QuantizedWeight)


def test_clip_grad_norm_and_parameters_to_vector_see_quantised_weights():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    convert(model, "int8_weights")
    model(torch.randn(3, 16)).sum().backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    assert norm > 0.1 and torch.stack([p.grad.norm() for p in model.parameters()]).norm() <= 0.1001
    assert nn.utils.parameters_to_vector(model.parameters()).shape == (16 * 16 + 16 + 4 * 16 + 4,)


def test_items_and_data_of_a_quantized_weight_can_be_assigned():
    weight = nn.Parameter(QuantizedWeight.quantize(torch.randn(8, 32)))
    with torch.no_grad():
        weight[:4] = 0
        weight[5, 3] = 2.0
    assert weight.dequantize()[:4].abs().max() == 0 and abs(weight.dequantize()[5, 3].item() - 2) < 0.05
    weight.data = torch.ones(8, 32)
    assert torch.equal(weight.dequantize(), torch.ones(8, 32))
    nn.utils.vector_to_parameters(torch.full((256,), 3.0), [weight])
    assert torch.equal(weight.dequantize(), torch.full((8, 32), 3.0))


def test_convert_leaves_layers_alone_whose_weight_or_forward_is_not_their_own():
    model = nn.Sequential(nn.Linear(8, 8), nn.utils.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    model[2].forward = lambda x: x
    report = convert(model, "int8")
    assert report.replaced == ["0"] and [name for name, _ in report.skipped] == ["1", "2"]
    embedding = nn.Embedding(16, 8)
    tied = nn.ModuleDict({"e": embedding, "out": nn.Linear(8, 16, bias=False)})
    tied["out"].weight = embedding.weight
    report = convert(tied, "int8_weights", filter=lambda name, module: True)
    assert not report.replaced and tied["out"].weight is embedding.weight


class Adapted(nn.Module):
    """What peft makes of a linear layer; saved: of one in modules_to_save."""

    def __init__(self, layer, saved=False):
        super().__init__()
        if saved:
            self.original_module, self.modules_to_save = layer, nn.ModuleDict({"default": copy.deepcopy(layer)})
        else:
            self.base_layer = layer
            self.lora_A, self.lora_B = nn.ModuleDict({"default": nn.Linear(64, 4, bias=False)}), nn.ModuleDict({"default": nn.Linear(4, 64, bias=False)})
        layer.requires_grad_(False)


@pytest.mark.parametrize("recipe", ["w4", "int8_weights", "qat_w4", "one_bit_fqt", "int8"])
def test_adapters_train_on_in_float_and_a_wrapped_head_is_a_head(recipe):
    """w4 froze peft's adapters with the weights: nothing trained."""
    model = nn.ModuleDict({"first": nn.Linear(64, 64), "q": Adapted(nn.Linear(64, 64)), "out": nn.Linear(64, 64), "lm_head": Adapted(nn.Linear(64, 64), saved=True)})
    adapters = {name: p for name, p in model.named_parameters() if "lora" in name or "modules_to_save" in name}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of speed
        report = convert(model, recipe)
    assert isinstance(model["q"].base_layer, Linear) and all(p.requires_grad for p in adapters.values())
    if recipe != "int8":
        after = {name: p for name, p in model.named_parameters() if "lora" in name or "modules_to_save" in name}
        assert after.keys() == adapters.keys() and all(after[name] is p for name, p in adapters.items())
        assert "an adapter of peft" in dict(report.skipped)["q.lora_A.default"]
    skipped = dict(report.skipped)
    assert all("head" in skipped[f"lm_head.{name}"] or recipe == "one_bit_fqt" for name in ("original_module", "modules_to_save.default"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "lm_head.original_module" in convert(model, recipe, filter=lambda name, layer: "lm_head" in name).replaced


def test_convert_names_matrices_that_no_layer_holds():
    class Experts(nn.Module):  # as transformers 5 keeps a mixture's
        def __init__(self):
            super().__init__()
            self.gate_up_proj, self.token = nn.Parameter(torch.randn(4, 16, 8)), nn.Parameter(torch.randn(1, 1, 8))

    report = convert(nn.Sequential(nn.Linear(8, 8), Experts(), gradmill.nn.GroupedLinear(4, 8, 16), nn.Conv1d(2, 3, 2), nn.Bilinear(2, 3, 4)), "int8")
    assert report.replaced == ["0"] and dict(report.skipped).keys() == {"1.gate_up_proj", "3"}
    assert "4 matrices" in dict(report.skipped)["1.gate_up_proj"] and "GroupedLinear" in dict(report.skipped)["1.gate_up_proj"]
    assert [name for name, _ in convert(Experts(), "int8").skipped] == ["gate_up_proj"]


def test_safetensors_says_that_it_cannot_hold_a_quantised_weight(tmp_path):
    from safetensors.torch import load_file, save_file
    layer, again = Linear(16, 8, recipe="int8_weights"), Linear(16, 8, recipe="int8_weights")
    with pytest.raises(RuntimeError, match="a safetensors file cannot hold it: call gradmill.state_in_parts"):
        save_file(layer.state_dict(), tmp_path / "x")
    save_file({k: v.dequantize() if isinstance(v, QuantizedWeight) else v for k, v in layer.state_dict().items()}, tmp_path / "x")
    again.load_state_dict(load_file(tmp_path / "x"))
    torch.testing.assert_close(again.weight.dequantize(), layer.weight.dequantize())


@pytest.mark.parametrize("recipe", ["int8_weights", "w8", "w4", "w3", "w2", recipes.weight_only(4, 0, symmetric=True)], ids=str)
def test_a_state_in_parts_is_what_safetensors_holds(recipe, tmp_path):
    from safetensors.torch import load_file, save_file

    def model():
        made = nn.Sequential(nn.Linear(40, 24), nn.Unflatten(1, (6, 2, 2)), nn.Conv2d(6, 8, 1), nn.Flatten(), nn.Linear(32, 3))
        convert(made, recipe, filter=lambda name, layer: name != "4")
        return made
    one, other, plain = model(), model(), model()
    gradmill.state_in_parts(one)
    state = one.state_dict()
    assert {"0.weight_codes", "0.weight_scales", "0.weight_zeros", "2.weight_codes", "4.weight"} <= set(state) and not {"0.weight", "2.weight"} & set(state)
    assert not any(isinstance(t, QuantizedWeight) for t in state.values())
    save_file(state, tmp_path / "x")
    x = torch.randn(5, 40)
    for target in (other, plain, copy.deepcopy(one)):
        target.load_state_dict(load_file(tmp_path / "x"))
        assert_same_bits(target(x), one(x))
        assert_same_bits(target[0].weight.codes, one[0].weight.codes)
    with torch.device("meta"):
        empty = model()
    empty.load_state_dict(load_file(tmp_path / "x"), assign=True)
    assert_same_bits(empty(x), one(x))
    gradmill.state_in_parts(one, False)
    assert isinstance(one.state_dict()["0.weight"], QuantizedWeight)
    other.load_state_dict(one.state_dict())
    for wrong in (nn.Sequential(Linear(40, 24, recipe="int8")), nn.Sequential(Linear(40, 24, recipe=recipes.weight_only(8, 8)))):
        with pytest.raises(RuntimeError, match="0.weight is in the checkpoint in parts of shapes .* in this layer's recipe .* convert the model"):
            wrong.load_state_dict({k: v for k, v in state.items() if k.startswith("0.")})


def test_convert_names_transformers_transposed_linear_layer():
    Conv1D = type("Conv1D", (nn.Module,), {"__module__": "transformers.pytorch_utils"})
    report = convert(nn.Sequential(nn.Linear(8, 8), Conv1D()), "int8")
    assert report.replaced == ["0"] and report.skipped[0][0] == "1" and "transposed" in report.skipped[0][1]


def test_convert_knows_a_blocks_output_from_the_head():
    def block():
        return nn.ModuleDict({"fc_in": nn.Linear(8, 8), "fc_out": nn.Linear(8, 8), "output": nn.Linear(8, 8)})
    model = nn.ModuleDict({"h": nn.ModuleList([block(), block()]), "output": nn.Linear(8, 8)})  # GPT-J, RWKV
    report = convert(model, "int8")
    assert len(report.replaced) == 6 and report.skipped == [("output", "the head (pass filter= to convert it)")]
    one = nn.Sequential(nn.ModuleDict({"fc_out": nn.Linear(8, 8)}))  # a Sequential may wrap a whole model
    groups = gradmill.optim.param_groups_for_projection(nn.ModuleDict({"h": nn.ModuleList([block(), block()]), "output": nn.Linear(8, 8)}), 2)
    assert len(groups[0]["params"]) == 6
    assert convert(one, "int8").skipped == [("0.fc_out", "the head (pass filter= to convert it)")]


# --- speeds -----------------------------------------------------------------------------------------------
def test_convert_warns_where_a_recipe_was_measured_slower(monkeypatch):
    from gradmill import _C, speeds
    monkeypatch.setattr(speeds, "_table", lambda: {_C.isa(): {"fp4": {"64x64": 0.5, "1024x1024": 2.0}, "int8": {"64x64": 0.98}}})
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8), torch.nn.Linear(64, 16384), torch.nn.Linear(64, 4))
    with pytest.warns(UserWarning, match="fp4 trains slower .* 2 of the 4 layers .* 0.5 times as fast at layer '0'"):
        report = gradmill.convert(model, "fp4")
    assert report.slower == {"0": 0.5, "1": 0.5} and "0.5x fp32" in str(report)  # 64 -> 4 is 16 times smaller than any measured
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not gradmill.convert(torch.nn.Sequential(torch.nn.Linear(64, 64)), "int8").slower  # within the spread


def test_convert_warns_of_convolutions_measured_slower(monkeypatch):
    from gradmill import _C, speeds
    monkeypatch.setattr(speeds, "_table", lambda: {_C.isa(): {"bf16": {"64x3x3x64": 0.7, "64x64": 2.0}}})
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(64, 32, 3), torch.nn.Conv2d(32, 64, 1), torch.nn.Conv2d(64, 64, 3, groups=4), torch.nn.Conv2d(64, 1024, 3),
                                torch.nn.Conv2d(64, 64, 3, stride=2, padding=1), torch.nn.Linear(64, 64))
    with pytest.warns(UserWarning, match="bf16 trains slower .* 2 of the 6 layers .* 0.7 times as fast at layer '0'"):
        report = gradmill.convert(model, "bf16")
    assert report.slower == {"0": 0.7, "4": 0.7}  # another window, groups and 16 times the size were not measured
    with gradmill.profile() as p:
        model[0](torch.randn(1, 64, 4, 4))
        model[1](torch.randn(1, 32, 4, 4))
    assert [hint for hint in p.hints if "recipe" in hint] == ["recipe bf16 was measured at 0.7x the speed of torch's fp32 at layers like 64 -> 32, window 3x3 on this kind of CPU "
                                                              "(1 forwards): it saves memory there, not time"]


def test_the_table_of_speeds_has_convolutions():
    from gradmill import speeds
    for recipes in speeds._table().values():
        assert {"128x3x3x128", "256x3x3x256"} <= set(recipes["int8"]) & set(recipes["bf16"])
    if gradmill._C and gradmill._C.isa() in speeds._table():
        assert 0 < speeds.measured("bf16", 128, 3, 3, 128) != speeds.measured("bf16", 128 * 3, 3 * 128)


def test_the_table_of_speeds_is_of_this_packages_recipes():
    from gradmill import speeds
    assert set(speeds._table()) == {"avx2", "avx512_vnni"} and all({"int8", "fp4", "one_bit_fqt"} <= set(recipes) for recipes in speeds._table().values())
    for isa, recipes in speeds._table().items():
        assert isa in ("portable", "avx2", "avx512", "avx512_vnni") and set(recipes) <= set(gradmill.recipes.RECIPES)
        assert all(0 < ratio < 100 for shapes in recipes.values() for ratio in shapes.values())


# --- what users' own code does to a layer -----------------------------------------------------------------
@pytest.mark.parametrize("name", ["w4", "int8_weights"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_packed_weight_moves_while_an_output_is_alive(name, kind):
    """torch swaps a subclass's memory in .to(dtype), which it refuses where a graph still holds the Parameter."""
    layer, x = (Linear(24, 8, recipe=name), torch.randn(5, 24)) if kind == "linear" else (gradmill.nn.Conv2d(3, 8, 3, recipe=name), torch.randn(2, 3, 6, 6))
    optimizer = AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-3)
    y, weight, codes = layer(x.requires_grad_()), layer.weight, layer.weight.codes.clone()
    y.sum().backward()
    alive = layer(x)
    layer.to(torch.bfloat16)
    assert layer.weight is weight and weight.dtype == torch.bfloat16 and torch.equal(weight.codes, codes) and layer.bias.dtype == torch.bfloat16
    assert name == "w4" or weight.grad.dtype == torch.bfloat16
    optimizer.step()
    optimizer.zero_grad()
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    if name == "w4":  # a float weight's graph does not survive a change of its dtype either
        alive.sum().backward()
    del alive, y
    assert layer.float()(x.detach()).dtype == torch.float32 and layer.weight is weight
    moved = layer.to("meta")
    assert moved.weight.is_meta and isinstance(moved.weight, QuantizedWeight)


def test_buffers_that_kernels_read_are_float32_under_any_default_dtype():
    x = torch.randn(4, 16)
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            layer = Linear(16, 8, recipe="fp8_delayed", dtype=torch.float32)
            layer(x).sum().backward()
            books = gradmill.nn.CodebookLinear(16, 8, shared=True)
            assert layer.amax_history.dtype == books.codebooks.dtype == books.scales.dtype == torch.float32
        finally:
            torch.set_default_dtype(torch.float32)


def test_what_cannot_run_under_transforms_says_so():
    layer, x = Linear(16, 8, recipe="int8"), torch.randn(3, 16)
    parameters = {k: v.detach() for k, v in layer.named_parameters()}
    assert torch.equal(torch.func.functional_call(layer, parameters, (x,)), layer(x))
    for run in (lambda: torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).sum())(parameters), lambda: torch.func.vmap(layer)(x[:, None]),
                lambda: torch.func.jvp(layer, (x,), (x,)), lambda: torch.func.jacrev(layer)(x)):
        with pytest.raises(RuntimeError, match="gradmill linear: quantised layers do not run under torch.func"):
            run()
    for name in ("int8", "fp8_delayed", "w4", "qat_w4", "one_bit_fqt"):
        leaf = x.clone().requires_grad_()
        y = Linear(16, 8, recipe=name)(leaf)
        with pytest.raises(RuntimeError, match="one gradient at a time"):
            torch.autograd.grad(y, leaf, torch.randn(2, *y.shape), is_grads_batched=True)
        with pytest.raises(RuntimeError, match="twice"):
            dx, = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
            dx.sum().backward()
    with pytest.raises(TypeError, match="x has the layout torch.jagged; it must be a dense"):
        layer(torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged))


@pytest.mark.parametrize("name", ["int8", "fp8_delayed", "fp8_block", "fp4", "mxfp4", "w4"])
def test_compile_with_dynamic_shapes(name):
    torch._dynamo.reset()
    layer = Linear(32, 8, recipe=name)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 9):
        x = torch.randn(tokens, 32)
        y, eager = compiled(x), layer(x)  # before backward, which writes a delayed scale's history
        y.sum().backward()
        assert torch.allclose(y, eager, atol=1e-4)


@pytest.mark.parametrize("name", ["int8", "w4", "one_bit_fqt"])
def test_a_trace_takes_other_numbers_of_tokens(name):
    layer = Linear(16, 8, recipe=name).eval()
    with torch.no_grad():
        trace = torch.jit.trace(layer, (torch.randn(2, 3, 16),), check_trace=False)
        x = torch.randn(5, 7, 16)
        assert torch.allclose(trace(x), layer(x), atol=1e-5)


def test_steps_in_16_bits_are_taken_as_fsdp_hands_them_out():
    x = torch.randn(5, 32)
    one_bit, packed = Linear(32, 8, recipe="one_bit_fqt"), Linear(32, 8, recipe="w4").train_steps_()
    for layer, name in ((one_bit, "weight_steps"), (packed, "steps")):
        steps = getattr(layer, name).detach().bfloat16().requires_grad_()
        linear(x, layer.weight, layer.bias, layer.recipe, steps).sum().backward()
        same = steps.detach().float().requires_grad_()
        assert_same_bits(linear(x, layer.weight, layer.bias, layer.recipe, steps).detach(), linear(x, layer.weight, layer.bias, layer.recipe, same).detach())
        assert steps.grad.dtype == torch.bfloat16 and steps.grad.abs().sum() > 0
