"""Every recipe against its definition: products of what its formats' codes stand for."""
import copy
import dataclasses
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import gradmill
from gradmill import QuantizedWeight, functional, recipes
from gradmill.formats import FORMATS, Format
from gradmill.nn import Linear
from gradmill.ops import dequantize, quantize, quantize_to
from gradmill.recipes import RECIPES, Matmul

NAMES = list(RECIPES)
DETERMINISTIC = [n for n, r in RECIPES.items() if r.gradient_rounding == "nearest"]
QAT = [n for n in NAMES if n.startswith("qat_")]
FROZEN = [n for n, r in RECIPES.items() if r.frozen]


def values(x, format, transpose=False):
    """What a format makes of x (of x^T), in fp64."""
    x = x.t() if transpose else x
    if format is None:
        return x.double()
    if not format.blocked:
        return x.to(format.code_dtype).double()
    with gradmill.use_backend("reference"):
        return dequantize(*quantize_to(x.contiguous(), format), format.code, format.block, x.shape[1], torch.float32).double()


def product(a, b):
    """a b^T and, for a bound that holds where the sum cancels, its largest sum of magnitudes."""
    return a @ b.t(), (a.abs() @ b.abs().t()).max()


def expected(recipe, x, w, dy):
    """Y, dX and dW by the definition, in fp64, each with its size. w: the float weight a layer was made of."""
    stored = values(w, recipe.weight) if recipe.weight is not None else w.double()
    seen = stored.float()  # what a product's own quantisation starts from
    y = product(values(x, recipe.y.left), values(seen, recipe.y.right)) if recipe.y else product(x.double(), stored)
    if recipe.dx == "forward":
        dx = product(dy.double(), values(seen, recipe.y.right).t())
    elif recipe.dx:
        dx = product(values(dy, recipe.dx.left), values(seen, recipe.dx.right, True))
    else:
        dx = product(dy.double(), stored.t())
    if recipe.dw == "forward":
        dw = product(dy.double().t(), values(x, recipe.y.left).t())
    elif recipe.dw:
        dw = product(values(dy, recipe.dw.left, True), values(x, recipe.dw.right, True))
    else:
        dw = product(dy.double().t(), x.double().t())
    return y, dx, dw


def run(layer, x, dy):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    return y.detach(), x.grad, layer.weight.grad


def close(got, want, size=None, bits=17):
    """Within 2^-bits of the sums' magnitudes: fp32 sums of at most 300 products in any order stay far below 2^-17."""
    size = want.abs().max() if size is None else size
    assert (got.double() - want).abs().max() <= size * 2.0 ** -bits, ((got.double() - want).abs().max() / size).log2()


@pytest.mark.parametrize("tokens, columns, rows", [(1, 16, 3), (70, 300, 37), (129, 64, 130), (3, 1, 1)])
@pytest.mark.parametrize("name", [n for n in DETERMINISTIC if n not in QAT])
def test_the_three_products_are_the_definition(name, tokens, columns, rows):
    recipe = RECIPES[name]
    w, x, dy = torch.randn(rows, columns) / 8, torch.randn(tokens, columns), torch.randn(tokens, rows)
    linear = torch.nn.Linear(columns, rows, bias=False)
    linear.weight.data = w.clone()
    y, dx, dw = run(Linear.from_linear(linear, name), x, dy)
    want_y, want_dx, want_dw = expected(recipe, x, w, dy)
    bits = 8 if name == "bf16" else 17  # torch's bf16 product rounds its sums to bf16: half of 2^-7 of them
    close(y, *want_y, bits)
    close(dx, *want_dx, bits)
    if recipe.frozen:
        assert dw is None
    else:
        close(dw, *want_dw, bits)


@pytest.mark.parametrize("name", ["fp4", "mxfp4"])
def test_fp4_gradients_are_unbiased(name):
    """Over many draws the mean of dX comes to dY times the quantised weight, and dW's to dY^T times X up to X's own
    rounding: the error of a mean of n draws is that of one over sqrt(n)."""
    recipe, n = RECIPES[name], 150
    w, x, dy = torch.randn(32, 64) / 8, torch.randn(48, 64), torch.randn(48, 32)
    layer = Linear(64, 32, bias=False, recipe=name)
    layer.weight.data = w.clone()
    want = dy.double() @ values(w, recipe.dx.right, True).t()
    draws = []
    for seed in range(n):
        torch.manual_seed(seed)
        draws.append(run(layer, x, dy)[1].double())
    one = torch.stack([(d - want).norm() for d in draws]).mean()
    assert one > 0.01 * want.norm()  # it does round
    assert (torch.stack(draws).mean(0) - want).norm() < 1.5 * one / n ** 0.5


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_bits_and_checkpointing(name):
    layer, x, dy = Linear(48, 20, recipe=name), torch.randn(33, 48), torch.randn(33, 20)

    def go(recompute):
        torch.manual_seed(7)
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        (checkpoint(layer, leaf, use_reentrant=False) if recompute else layer(leaf)).backward(dy)
        return [leaf.grad] + [p.grad.clone() for p in layer.parameters() if p.grad is not None]

    first = go(False)
    for again in (go(False), go(True)):
        assert len(first) == len(again) and all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_nan_and_inf_show_in_the_output(name, bad):
    layer, x = Linear(40, 8, recipe=name), torch.randn(5, 40)
    x[2, 3] = bad
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    assert not y[2].isfinite().any()
    dy = torch.zeros_like(y)
    dy[1, 1] = bad
    y.backward(dy)
    assert not leaf.grad[1].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_what_needs_a_gradient(name):
    layer = Linear(24, 10, recipe=name)
    for shape in ((0, 24), (24,), (2, 3, 24), (2, 1, 4, 24)):
        x = torch.randn(shape, requires_grad=True)
        y = layer(x)
        assert y.shape == (*shape[:-1], 10)
        y.sum().backward()
        assert x.grad.shape == x.shape
    layer(torch.randn(4, 24)).sum().backward()      # an input that needs none
    layer.requires_grad_(False)
    x = torch.randn(4, 24, requires_grad=True)
    layer(x).sum().backward()                       # frozen weights
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_16_bit_layers(name, dtype):
    layer, x = Linear(64, 12, recipe=name, dtype=dtype), torch.randn(9, 64, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.float().square().mean().backward()
    assert y.dtype == dtype and x.grad.dtype == dtype and y.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_state_dicts(name):
    torch.manual_seed(3)
    plain = torch.nn.Linear(64, 12)
    layer = Linear.from_linear(copy.deepcopy(plain), name)
    x = torch.randn(5, 64)
    want = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), want)
    fresh = Linear(64, 12, recipe=name)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), want)
    fresh = Linear(64, 12, recipe=name)
    fresh.load_state_dict(plain.state_dict(), strict=name not in QAT)
    assert torch.equal(fresh(x), want)
    assert type(layer.dequantize_()) is torch.nn.Linear


@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition"])  # the second recomputes in backward what torch thinks is cheap, as inductor does
@pytest.mark.parametrize("name", NAMES)
def test_compile_fullgraph(name, backend):
    layer, x = Linear(32, 12, recipe=name), torch.randn(64, 32)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    results = []
    for f in (layer, compiled):
        torch.manual_seed(1)
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = f(leaf)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad, *(p.grad for p in layer.parameters() if p.requires_grad)))
    if RECIPES[name].history or RECIPES[name].one_bit:  # two steps made two scales; what backward alone reads a compiled graph may draw there
        results = [r[:1] for r in results]
    for eager, got in zip(*results):  # with one layer, and so one key, the stochastic ones too
        assert torch.allclose(eager, got, atol=2e-2 * float(eager.abs().max()) if name == "bf16" else 1e-5 * float(eager.abs().max()))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in QAT])
def test_saved_bytes_are_counted_exactly(name):
    recipe, tokens, columns, rows = RECIPES[name], 130, 300, 17
    layer, x = Linear(columns, rows, bias=False, recipe=name), torch.randn(tokens, columns)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        layer(x)  # x needs no gradient: only what dW needs is kept
    kept = sum(t.nbytes for t in seen if t.dim() > 1 and not any(t.shape == p.shape for p in layer.parameters()))
    assert kept == recipe.saved_bytes(tokens, columns, 4)


def test_delayed_scales_come_from_the_largest_of_the_steps_before():
    recipe = dataclasses.replace(recipes.FP8_DELAYED, history=3)
    layer, seen = Linear(40, 12, bias=False, recipe=recipe), ([], [], [])

    def coded(x, code, past):
        """x's values under the scale that the last three steps make."""
        largest = max(past[-3:]) if past else x.abs().max().item()
        scale = torch.full((x.shape[0], 1), largest) / torch.tensor({"e4m3": 448.0, "e5m2": 57344.0}[code])
        codes, _, zeros = quantize(x.contiguous(), code, 0, scales=scale)
        return dequantize(codes, scale, zeros, code, 0, x.shape[1], torch.float32).double()

    for step in range(8):
        x, dy = torch.randn(9, 40) * 2.0 ** (step % 3), torch.randn(9, 12) * 10.0 ** -(step % 4)
        w = layer.weight.detach()
        layer.zero_grad()
        y, dx, dw = run(layer, x, dy)
        close(y, coded(x, "e4m3", seen[0]) @ coded(w, "e4m3", seen[1]).t())
        close(dx, coded(dy, "e5m2", seen[2]) @ coded(w, "e4m3", seen[1]))
        close(dw, coded(dy, "e5m2", seen[2]).t() @ coded(x, "e4m3", seen[0]))
        for past, t in zip(seen, (x, w, dy)):
            past.append(t.abs().max().item())
        assert layer.amax_history[:, 0].tolist() == [past[-1] for past in seen]
    assert layer.amax_history.tolist() == [past[:-4:-1] for past in seen]
    with torch.no_grad():
        layer.eval()(x * 1e6)
    assert layer.amax_history[0, 0] == seen[0][-1]  # only a backward pass adds a step


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_delayed_scales_saturate_but_show_what_is_no_number(bad):
    layer, x = Linear(40, 12, bias=False, recipe="fp8_delayed"), torch.rand(9, 40)
    run(layer, x, torch.ones(9, 12))
    layer.weight.data.fill_(1 / 16)
    layer.amax_history[1].fill_(0)
    x[3] = 1e30
    y = layer(x)
    assert y.isfinite().all() and torch.allclose(y[3], torch.full((12,), 40 / 16 * layer.amax_history[0, 0].item()), rtol=1e-3)
    x[4, 5] = bad
    x.requires_grad_()
    y = layer(x)
    assert y[4].isnan().all() and y[[0, 1, 2, 3, 5]].isfinite().all()
    y.nansum().backward()
    assert layer.amax_history.isfinite().all() and layer.amax_history[0, 0] == 0
    assert layer(torch.rand(9, 40)).isfinite().all()


def test_delayed_scales_live_in_the_layer():
    layer, x, dy = Linear(24, 10, recipe="fp8_delayed"), torch.randn(6, 24), torch.randn(6, 10)
    run(layer, x, dy)
    state = layer.state_dict()
    assert state["amax_history"].shape == (3, 16) and list(state) == ["weight", "bias", "amax_history"]
    fresh = Linear(24, 10, recipe="fp8_delayed")
    fresh.load_state_dict(state)
    assert torch.equal(fresh(3 * x), layer(3 * x)) and torch.equal(copy.deepcopy(layer)(3 * x), layer(3 * x))
    recomputed = copy.deepcopy(layer)
    leaf = x.clone().requires_grad_()
    checkpoint(recomputed, leaf, use_reentrant=False).backward(dy)
    run(layer, x, dy)
    assert torch.equal(recomputed.amax_history, layer.amax_history) and torch.equal(recomputed.weight.grad, layer.weight.grad)
    plain = layer.dequantize_()
    assert list(plain.state_dict()) == ["weight", "bias"]
    fresh.load_state_dict(plain.state_dict())  # strict: no history is none
    assert not fresh.amax_history.any()
    with torch.device("meta"):
        fresh = Linear(24, 10, recipe="fp8_delayed")
    fresh.load_state_dict(plain.state_dict(), assign=True)
    run(fresh, x, dy)
    assert fresh.amax_history[:, 0].all()
    with pytest.raises(ValueError, match="amax_history is missing; recipe fp8_delayed needs one of shape"):
        functional.linear(x, layer.weight, None, "fp8_delayed")
    with pytest.raises(ValueError, match="takes none"):
        functional.linear(x, layer.weight, None, "fp8_tensor", amax_history=torch.zeros(3, 16))
    with pytest.raises(ValueError, match="must be float32 of shape"):
        functional.linear(x, layer.weight, None, "fp8_delayed", amax_history=torch.zeros(3, 4))


def test_power_of_two_scales():
    layer, x = Linear(70, 9, recipe="fp8_row_pow2"), torch.randn(5, 70)
    _, scales, _ = quantize_to(x, recipes.FP8_ROW_POW2.y.left)
    assert torch.equal(scales.log2(), scales.log2().round()) and (x.abs().amax(1, keepdim=True) <= 448 * scales).all()
    assert (x.abs().amax(1, keepdim=True) > 224 * scales).all() and layer(x).shape == (5, 9)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits, group", [(8, 32), (4, 32), (4, 64), (4, 128), (3, 64), (2, 32), (8, 0)])
def test_weight_only_in_any_group(bits, group, symmetric):
    recipe, plain, x = recipes.weight_only(bits, group, symmetric), torch.nn.Linear(130, 12), torch.randn(5, 130)
    layer = Linear.from_linear(copy.deepcopy(plain), recipe)
    assert layer.weight.format == Format(f"{'' if symmetric else 'u'}int{bits}", group) and not layer.weight.requires_grad
    close(layer(x).detach(), x.double() @ values(plain.weight.detach(), layer.weight.format).t() + plain.bias.double())
    fresh = Linear(130, 12, recipe=recipe)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x)) and recipe.name in repr(layer)
    model = torch.nn.Sequential(copy.deepcopy(plain), torch.nn.ReLU())
    assert gradmill.convert(model, recipe).replaced == ["0"] and torch.equal(model[0](x), layer(x))
    leaf = x.clone().requires_grad_()
    layer.train_steps_()(leaf).sum().backward()
    assert layer.steps.grad.isfinite().all() and leaf.grad.isfinite().all()


def test_weight_only_defaults_and_refusals():
    for bits in (8, 4, 3):
        assert recipes.weight_only(bits).weight == RECIPES[f"w{bits}"].weight
    assert recipes.weight_only(2, 64).weight == RECIPES["w2"].weight
    for bits, group in ((5, 128), (4, 33), (3, 12), (4, -2)):
        with pytest.raises(ValueError, match="bits is|block is"):
            recipes.weight_only(bits, group)


@pytest.mark.parametrize("name", FROZEN)
def test_step_sizes_train(name):
    """The gradient of the step sizes by finite differences: Y is linear in them."""
    layer = Linear(200, 6, bias=False, recipe=name).train_steps_()
    x, dy = torch.randn(9, 200), torch.randn(9, 6)
    layer(x).backward(dy)
    assert layer.weight.grad is None
    codes = dequantize(layer.weight.codes, torch.ones_like(layer.steps), layer.weight.zeros, layer.weight.format.code, layer.weight.format.block,
                       200, torch.float32).double()
    full = codes * (dy.double().t() @ x.double())
    want = torch.stack([full[:, i:i + layer.weight.format.block].sum(1) for i in range(0, 200, layer.weight.format.block)], 1)
    close(layer.steps.grad, want)
    with torch.no_grad():
        layer.steps.mul_(2)
    before = layer(x)
    assert torch.equal(layer.train_steps_(False)(x), before) and "steps" not in layer.state_dict()
    assert torch.allclose(layer.dequantize_()(x), before, atol=1e-4)


def test_shared_scales_are_shared_and_rounded():
    x = torch.randn(40, 70)
    x[3, 5], x[20, 40] = 100.0, -50.0
    _, scales, _ = quantize_to(x, FORMATS["e4m3_tensor"])
    assert scales.shape == (40, 1) and (scales == torch.tensor(100.0) / torch.tensor(448.0)).all()
    _, scales, _ = quantize_to(x, Format("e4m3", 32, rows=16))
    for r in range(0, 40, 16):
        for c in range(0, 70, 32):
            assert (scales[r:r + 16, c // 32] == x[r:r + 16, c:c + 32].abs().amax() / torch.tensor(448.0)).all()
    _, scales, _ = quantize_to(x, FORMATS["mxfp4"], transpose=True)
    assert scales.shape == (70, 2) and torch.equal(scales.log2(), scales.log2().round())
    codes, scales, zeros = quantize_to(x, FORMATS["mxfp4"])
    assert ((x - dequantize(codes, scales, zeros, "e2m1", 32, 70, torch.float32)).abs() <= scales.repeat_interleave(32, 1)[:, :70]).all()  # no saturation
    _, scales, _ = quantize_to(x, FORMATS["nvfp4"])
    share = scales / (x.abs().max() / torch.tensor(448.0 * 6))
    assert torch.allclose(share, share.to(torch.float8_e4m3fn).float(), rtol=1e-6)
    x[0, 0] = torch.nan
    assert quantize_to(x, FORMATS["e4m3_tensor"])[1].isnan().all()
    for shape in ((0, 5), (5, 0)):
        assert quantize_to(torch.zeros(shape), FORMATS["nvfp4"])[0].numel() == 0


@pytest.mark.parametrize("arguments, message", [
    (dict(y="int9"), "y is 'int9'"), (dict(y="forward"), "y is 'forward'"), (dict(dx="forward"), "needs a Matmul"),
    (dict(gradient_rounding="up"), "gradient_rounding is 'up'"), (dict(y="e4m3", dx="e4m3", dw="e4m3", history=4), "history is 4"), (dict(history=-1), "history is -1"), (dict(dw=3), "dw is 3")])
def test_bad_recipes_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        recipes.Recipe("mine", **arguments)


def test_a_recipe_is_data():
    mine = recipes.Recipe("mine", y=Matmul(FORMATS["int8_row"], FORMATS["e4m3_row"]), dw="int7")
    x, w = torch.randn(9, 70, requires_grad=True), torch.randn(4, 70, requires_grad=True)
    y = functional.linear(x, w, None, mine)
    close(y.detach(), values(x.detach(), FORMATS["int8_row"]) @ values(w.detach(), FORMATS["e4m3_row"]).t())
    y.sum().backward()
    with pytest.raises(ValueError, match="steps were given"):
        functional.linear(x, w, None, "int8", torch.ones(4, 1))
    with pytest.raises(ValueError, match="only the step sizes"):
        Linear(4, 4).train_steps_()
    assert isinstance(Linear(8, 8, recipe="w4").weight, QuantizedWeight)


def test_convert_reports_bytes_of_weights_and_kept_inputs():
    def report(name):
        return gradmill.convert(torch.nn.Sequential(torch.nn.Linear(256, 8), torch.nn.Linear(8, 4)), name)

    assert report("int8").layers["0"][:4] == (256 * 8 * 4, 256 * 8 * 4, 1024 * 256 * 4, 1024 * 256 + 256 * 4)
    assert report("w4").layers["0"][:4] == (256 * 8 * 4, 256 * 8 // 2 + 8 * 2 * 5, 1024 * 256 * 4, 0)
    assert "1,048,576 -> 263,168" in str(report("int8"))


# --- beside torch's own machinery -------------------------------------------------------------------------
def encoder():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    return torch.nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 8, 64)


@pytest.mark.parametrize("how", ["qat_w2", "int8", "one_bit_fqt", "w4", "codebook", "bct"])
@pytest.mark.parametrize("masked", [False, True])
def test_torchs_fast_path_for_encoders_does_not_go_around_a_layer(how, masked):
    model, x = encoder()
    mask = {"src_key_padding_mask": torch.arange(8).expand(2, 8) >= torch.tensor([[5], [8]])} if masked else {}
    with torch.no_grad():
        plain = model(x, **mask)
    if how == "codebook":
        gradmill.codebook.fit(model, bits=2, progress=False)
    elif how == "bct":
        model, _ = gradmill.bct.quantize(model)
    else:
        gradmill.convert(model, how)
    with torch.no_grad():
        got = model(x, **mask)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            want = model(x, **mask)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    shown = torch.ones(2, 8, dtype=torch.bool) if not masked else ~mask["src_key_padding_mask"]
    # Attention's own fast path stays, and rounds in another order: an operand's code may differ here and there.
    assert (got - want)[shown].norm() < 0.5 * (plain - want)[shown].norm()


@pytest.mark.parametrize("how", ["fp8_delayed", "one_bit_fqt", "qat_w4", "codebook"])
def test_what_kernels_read_as_float32_stays_so_under_to(how):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 72), torch.nn.Linear(72, 64), torch.nn.Linear(64, 8))
    if how == "codebook":
        gradmill.codebook.fit(model, progress=False, filter=lambda *_: True)
    else:
        gradmill.convert(model, how)
    model(torch.randn(5, 64)).sum().backward()
    names = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.dtype == torch.float32 and not n.endswith((".weight", ".bias"))]
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    before = {n: tensors[n].detach().clone() for n in names}
    grads = {n: tensors[n].grad.clone() for n in names if tensors[n].grad is not None}
    assert names
    model.to(torch.bfloat16)
    after = dict((*model.named_parameters(), *model.named_buffers()))
    assert model[1].bias.dtype == torch.bfloat16 and all(torch.equal(after[n], before[n]) for n in names)
    assert all(torch.equal(after[n].grad, g) for n, g in grads.items())
    model(torch.randn(5, 64, dtype=torch.bfloat16)).sum().backward()
