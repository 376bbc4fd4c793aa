"""On-device training: the INT8 layers against their definition, what is kept, what a step takes, plans under a budget."""
import copy
import io
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradmill
from gradmill import ondevice
from gradmill.autograd import ondevice as autograd
from gradmill.nn import Int8Conv2d, Int8Linear
from gradmill.ops import quantize

from .conftest import LEVELS, assert_same_bits, isa

#: layer, shape of its input
LAYERS = {
    "linear": (lambda: nn.Linear(13, 7), (5, 13)),
    "one": (lambda: nn.Linear(1, 1, bias=False), (1, 1)),
    "3x3": (lambda: nn.Conv2d(5, 6, 3, padding=1), (3, 5, 9, 7)),
    "1x1": (lambda: nn.Conv2d(17, 4, 1, bias=False), (2, 17, 3, 5)),
    "5x2": (lambda: nn.Conv2d(6, 7, (5, 2), stride=2, padding=(2, 1)), (2, 6, 11, 8)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2, groups=2), (1, 4, 6, 5)),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, padding="same", groups=6), (2, 6, 5, 4)),
}


def made(kind, channels=None, cap=None, **options):
    make, shape = LAYERS[kind]
    plain, x = make(), torch.randn(shape)
    layer = (Int8Linear if isinstance(plain, nn.Linear) else Int8Conv2d)(plain, float(x.abs().max()) / 100, channels, cap=cap, **options)
    return plain, layer, x.requires_grad_()


def rounded(x, scales):
    """The integers nearest to the fp32 quotient of x and fp32 scales, in fp64: a quotient of doubles falls on the other side of a tie now and then."""
    assert scales.dtype == torch.float32
    return torch.round(x / scales).double().clamp(-127, 127)


def rows8(d):
    """d (rows, columns) as INT8 by rows, in fp64."""
    codes, scales, _ = quantize(d.float().contiguous(), "int8", 0)
    return codes.double() * scales.double()


def by_definition(plain, x, x_scale, dy, cap):
    """Y, dX, dW and db in fp64 of integers, groups one after the other."""
    conv, groups = isinstance(plain, nn.Conv2d), getattr(plain, "groups", 1)
    weight = plain.weight.detach()
    s_w = weight.flatten(1).abs().amax(1, keepdim=True) / 127
    w = rounded(weight.flatten(1), s_w) * s_w.double()
    q = rounded(x.detach(), x_scale) * x_scale.double()
    if conv:
        padding = plain.padding if isinstance(plain.padding, tuple) else tuple(d * (k - 1) // 2 for d, k in zip(plain.dilation, plain.kernel_size))
        geometry = dict(kernel_size=plain.kernel_size, stride=plain.stride, padding=padding, dilation=plain.dilation)
        tokens = [F.unfold(part, **geometry).transpose(1, 2) for part in q.chunk(groups, 1)]
        n, positions = tokens[0].shape[:2]
        tokens = [t.flatten(0, 1) for t in tokens]
    else:
        tokens = [q]
    y = torch.cat([t @ part.t() for t, part in zip(tokens, w.chunk(groups))], 1) + (0 if plain.bias is None else plain.bias.detach())
    d = dy.transpose(0, 1).flatten(1).t() if conv else dy
    if cap is not None:
        d = d * ((y > 0) & (y < cap))
        y = y.clamp(0, cap)
    dx = [rows8(part * s.view(1, -1)) @ (p / s.double()) for part, s, p in zip(d.chunk(groups, 1), s_w.chunk(groups), w.chunk(groups))]
    dw = torch.cat([rows8(part.t()) @ t for part, t in zip(d.chunk(groups, 1), tokens)])
    if conv:
        y = y.view(n, *dy.shape[2:], -1).permute(0, 3, 1, 2)
        dx = torch.cat([F.fold(part.view(n, positions, -1).transpose(1, 2), x.shape[2:], **geometry) for part in dx], 1)
    return y, dx if conv else dx[0], dw.view(weight.shape), d.double().sum(0)


@pytest.mark.parametrize("cap", (None, torch.inf, 0.4))
@pytest.mark.parametrize("kind", LAYERS)
def test_the_products_are_the_definition(kind, cap):
    plain, layer, x = made(kind, cap=cap)
    dy = torch.randn_like(plain(x))
    want = by_definition(plain, x, layer.x_scale, dy, cap)
    y = layer(x)
    got = [y, *torch.autograd.grad(y, [x, layer.weight] + [layer.bias] * (plain.bias is not None), dy)]
    for g, w in zip(got, want):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g.detach().double(), w, rtol=1e-4, atol=1e-5 * float(w.abs().max()))


def test_by_hand():
    plain = nn.Linear(2, 2)
    with torch.no_grad():
        plain.weight.copy_(torch.tensor([[127.0, -63.5], [0.0, 0.0]]))
        plain.bias.copy_(torch.tensor([1.0, -2.0]))
    layer = Int8Linear(plain, 0.5, cap=torch.inf)
    assert layer.weight.codes.tolist() == [[127, -64], [0, 0]] and layer.weight.scales.tolist() == [[1.0], [1.0]]  # a row of zeros takes the other's scale
    x = torch.tensor([[1.0, -0.3], [100.0, 0.0]], requires_grad=True)  # codes 2, -1 and, saturated, 127, 0
    y = layer(x)
    assert y.tolist() == [[0.5 * (2 * 127 + 64) + 1, 0.0], [0.5 * 127 * 127 + 1, 0.0]]
    y.backward(torch.tensor([[127.0, 5.0], [-127.0, 5.0]]))
    assert layer.weight.grad.tolist() == [[127 * (1.0 - 63.5), -63.5], [0.0, 0.0]] and layer.bias.grad.tolist() == [0.0, 0.0]
    assert x.grad.tolist() == [[127.0 * 127, -64.0 * 127], [-127.0 * 127, 64.0 * 127]]


@pytest.mark.parametrize("kind", ("linear", "3x3", "1x1", "5x2"))
def test_chosen_channels_have_the_gradients_of_the_whole(kind):
    """And nothing else is computed or kept."""
    plain, whole, x = made(kind, cap=torch.inf)
    count, chosen = plain.weight.shape[1], [1, 3]
    layer = type(whole)(plain, float(whole.x_scale), chosen, cap=torch.inf)
    assert layer.weight.shape[1] == 2 and layer.frozen.shape[1] == count - 2 and not layer.frozen.requires_grad
    y, want = layer(x), whole(x)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    dy = torch.randn_like(y) * (want > 1e-3)
    got, all_of_it = (torch.autograd.grad(m(x), (x, m.weight), dy) for m in (layer, whole))
    assert_same_bits(got[0], all_of_it[0])
    assert_same_bits(got[1], all_of_it[1][:, chosen].contiguous())
    none = type(whole)(plain, float(whole.x_scale), (), bias=False)
    assert none.weight is None and not none(x.detach()).requires_grad
    torch.testing.assert_close(none(x), plain(x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", ("linear", "3x3"))
def test_the_default_dtype_is_nothing_to_it(kind):
    plain, whole, x = made(kind, cap=torch.inf)
    layer = type(whole)(plain, float(whole.x_scale), [1, 3], cap=torch.inf)
    want = torch.autograd.grad(layer(x).sum(), (x, layer.weight))
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = torch.autograd.grad(layer(x).sum(), (x, layer.weight))
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_bits(got, want)


def network():
    """BatchNorm and ReLUs to merge, a depthwise convolution, a residual that reads a convolution's own output, a head."""
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()

        def forward(self, x):
            y = self.conv(x)
            return y + self.relu(y)

    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6(),
                          Residual(), nn.Conv2d(8, 12, 1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 9, 4))
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(16, 3, 6, 6) + 0.3)
    return model.eval()


def task(n=4):
    return torch.randn(n, 3, 6, 6) + 0.3, torch.randint(0, 4, (n,))


def test_norms_and_activations_are_merged_where_nothing_else_reads_them():
    model, (x, y) = network(), task()
    plan = ondevice.plan(model, x)
    assert [(r.name, r.norm, r.activation) for r in plan.layers] == [("0", "1", "2"), ("3", None, "4"), ("5.conv", None, None), ("6", None, "7"), ("9", None, None)]
    want = model(x)
    prepared = ondevice.prepare(copy.deepcopy(model), plan)
    got = prepared(x)
    assert (got - want).abs().max() < 0.1 * want.abs().max() and type(prepared[1]) is nn.Identity and isinstance(prepared[3], Int8Conv2d)
    assert type(prepared[5].relu) is nn.ReLU
    back = ondevice.dequantize(copy.deepcopy(prepared))
    assert type(back[0]) is nn.Conv2d and type(back[4]) is nn.ReLU6 and all(p.requires_grad for m in (back[0], back[9]) for p in m.parameters())
    assert (back(x) - got).abs().max() < 0.1 * got.abs().max()
    assert {n: t.dtype for n, t in back.state_dict().items()} == {n: torch.float32 for n in back.state_dict()}


def kept(model, x, loss=lambda y: y.sum()):
    """Bytes of what autograd keeps beside parameters and buffers, each storage once."""
    held = {t.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers()) for t in (getattr(p, "codes", p), getattr(p, "scales", p))}
    seen = {}

    def pack(t):
        for part in (t.codes, t.scales) if isinstance(t, gradmill.QuantizedWeight) else (t,):
            if part.untyped_storage().data_ptr() not in held:
                seen[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes(), part
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = loss(model(x))
    assert result is not None
    return sum(size for size, _ in seen.values())


@pytest.mark.parametrize("needs_x", (False, True))
@pytest.mark.parametrize("cap", (None, torch.inf, 6.0))
@pytest.mark.parametrize("channels, bias", ((None, True), ((0, 2), True), ((), True), ((), False), (None, False)))
@pytest.mark.parametrize("kind", ("linear", "3x3", "5x2", "depthwise"))
def test_kept_bytes_are_counted_exactly(kind, channels, bias, cap, needs_x):
    channels = None if kind == "depthwise" and channels else channels
    _, layer, x = made(kind, channels, cap, bias=bias)
    x = x.detach().requires_grad_(needs_x)
    assert kept(layer, x) == layer.saved_bytes(x.shape, needs_x)


def between(model, x, part):
    """A budget: part of the way from the least that a plan can take to training everything."""
    with pytest.raises(ValueError, match="memory_bytes is 1,000; training the last layer's bias alone takes") as refused:
        ondevice.plan(model, x, 1000)
    least = int(re.search(r"takes ([\d,]+):", str(refused.value))[1].replace(",", ""))
    return least + int(part * (ondevice.plan(model, x, share=1.0).bytes.peak - least))


@pytest.mark.parametrize("part", (None, 1.0, 0.7, 0.2, 0.0))
def test_a_plan_is_what_is_kept_and_allocated(part):
    model, (x, y) = network(), task()
    memory = None if part is None else between(model, x, part)
    plan = ondevice.plan(model, x, memory, data=[(x, y)])
    assert part != 1.0 or all(r.bias and len(r.channels) == r.of for r in plan.layers), "all of it fits"
    prepared = ondevice.prepare(copy.deepcopy(model), plan)
    assert memory is None or plan.bytes.peak <= memory
    assert ondevice.measure(prepared, x) == plan.bytes, "the same step, the same bytes"
    assert plan.bytes.weights == sum(gradmill.nbytes(t) for t in (*prepared.parameters(), *prepared.buffers()))
    batch = x.clone()
    assert kept(prepared, batch, lambda out: out.float().square().mean()) == plan.bytes.saved == sum(r.saved_bytes for r in plan.layers) + plan.other_saved_bytes
    before = {n: (p.codes if isinstance(p, gradmill.QuantizedWeight) else p).clone() for n, p in prepared.named_parameters()}
    F.cross_entropy(prepared(x), y).backward()
    trained = {n: p for n, p in prepared.named_parameters() if p.requires_grad}
    assert plan.bytes.gradients == sum(p.grad.nbytes for p in trained.values()) == sum(r.gradient_bytes for r in plan.layers)
    ondevice.SGD(trained.values(), lr=0.1).step()
    for n, p in prepared.named_parameters():
        changed = not torch.equal(getattr(p, "codes", p), before[n])
        assert not changed or n in trained, f"{n} does not train"
    assert plan.bytes.peak >= plan.bytes.weights + plan.bytes.saved and plan.torch_bytes.peak >= plan.torch_bytes.weights + plan.torch_bytes.gradients
    assert f"{plan.bytes.peak:,}" in str(plan) and f"{plan.torch_bytes.peak:,}" in str(plan) and all(r.name in str(plan) for r in plan.layers)


def test_more_memory_is_never_worse_and_too_little_is_refused():
    model, (x, y) = network(), task()
    plans = [ondevice.plan(model, x, between(model, x, part), data=[(x, y)]) for part in (0.0, 0.5, 1.0)]
    values = [sum(r.contribution for r in plan.layers) for plan in plans]
    assert values[0] <= values[1] + 0.05 and values[1] <= values[2] + 1e-9 and values[2] == pytest.approx(1.0)  # bisection finds nearly the best
    biases = ondevice.plan(model, x, share=0.0)
    assert all(r.bias and not r.channels for r in biases.layers) and biases.bytes.peak < ondevice.plan(model, x, share=1.0).bytes.peak


@pytest.mark.parametrize("batch, side", [(16, 8), (128, 8), (32, 16)])
def test_fewer_channels_need_less_memory(batch, side):
    """Of convolutions whose workspace weighs more than what they keep; 3x3, strided, depthwise and 1x1."""
    def block(*arguments, **options):
        return nn.Conv2d(*arguments, **options), nn.ReLU()
    model = nn.Sequential(*block(3, 16, 3, padding=1), *block(16, 32, 3, 2, 1), *block(32, 32, 3, padding=1, groups=32), *block(32, 64, 1), *block(64, 64, 3, padding=1),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    peaks = [ondevice.plan(model, torch.randn(batch, 3, side, side), share=share).bytes.peak for share in (0.25, 0.5, 1.0)]
    assert peaks[0] < peaks[1] < peaks[2], peaks


def test_the_knapsack_is_the_best_choice():
    for _ in range(20):
        options = [[(0.0, 0), *((float(v), int(c)) for v, c in zip(torch.rand(3), torch.randint(1, 60, (3,))))] for _ in range(4)]
        budget = int(torch.randint(20, 150, ()))
        every = torch.cartesian_prod(*[torch.arange(4)] * 4).tolist()
        best = max(sum(o[i][0] for o, i in zip(options, pick)) for pick in every if sum(o[i][1] for o, i in zip(options, pick)) <= budget)
        got = ondevice._knapsack(options, budget)
        assert sum(o[i][1] for o, i in zip(options, got)) <= budget and sum(o[i][0] for o, i in zip(options, got)) == pytest.approx(best)


def test_contributions_are_squared_gradients_of_the_float_model():
    model, (x, y) = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), (torch.randn(10, 6), torch.randint(0, 3, (10,)))
    F.cross_entropy(model(x), y).backward()
    squares = [p.grad.double().square().sum().item() for p in model.parameters()]
    model.zero_grad()
    plan = ondevice.plan(model, x, data=[(x, y)])
    assert [r.contribution for r in plan.layers] == pytest.approx([sum(squares[:2]) / sum(squares), sum(squares[2:]) / sum(squares)])
    assert all(p.grad is None for p in model.parameters()) and plan.layers[0].of == 6
    quarter = ondevice.plan(model, x, data=[(x, y)], share=0.25)
    largest = model[2].weight.detach().square().sum(0).argsort(descending=True)[:2]
    assert quarter.layers[1].channels == tuple(sorted(largest.tolist()))


def test_a_plan_says_which_layers_stay_in_floats():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.idle, self.last = nn.Linear(6, 6), nn.Conv2d(1, 1, 1), nn.Linear(6, 3)

        def forward(self, x):
            return self.last(self.shared(self.shared(x)))
    plan = ondevice.plan(Twice(), torch.randn(10, 6))
    assert plan.floats == {"shared": "called 2 times in a forward", "idle": "not called for the example input"} and [r.name for r in plan.layers] == ["last"]
    assert "called 2 times" in str(plan) and ondevice.Plan.from_dict(plan.to_dict()) == plan
    with pytest.raises(ValueError, match="data has no batches"):
        ondevice.plan(Twice(), torch.randn(10, 6), data=[])


def test_backward_stops_at_the_first_layer_that_trains(monkeypatch):
    model, (x, y) = network(), task()
    plan = ondevice.plan(model, x, between(model, x, 0.0) + 200, data=[(x, y)])
    first = next(i for i, r in enumerate(plan.layers) if r.bias or r.channels)
    assert 0 < first < len(plan.layers), "a budget that leaves some layers out"
    prepared, shapes, products = ondevice.prepare(model, plan), [], []
    for name, into in (("_input_gradient", shapes), ("_weight_gradient", products)):
        real = getattr(autograd, name)
        monkeypatch.setattr(autograd, name, lambda *a, real=real, into=into: into.append(1) or real(*a))
    F.cross_entropy(prepared(x), y).backward()
    parts = [(len(r.channels) > 0) + (len(r.channels) < r.of) for r in plan.layers]
    assert len(shapes) == sum(parts[first + 1:]) and len(products) == sum(bool(r.channels) for r in plan.layers)


# --- the optimizer ----------------------------------------------------------------------------------------
def test_a_step_of_codes_by_hand_and_unbiased():
    plain, layer, x = made("linear")
    layer.weight.grad, codes, scales = torch.zeros(7, 13), layer.weight.codes.clone(), layer.weight.scales.clone()
    layer.weight.grad[0, 0], layer.weight.grad[1, 1], layer.weight.grad[2, 2] = -3 * scales[0] / 0.5, 1e9, 0.25 * scales[2] / 0.5
    optimizer, moved = ondevice.SGD([layer.weight], lr=0.5, seed=5), []
    for _ in range(400):
        layer.weight.codes.copy_(codes)
        optimizer.step()
        moved.append(layer.weight.codes.int() - codes.int())
    moved = torch.stack(moved).double()
    assert_same_bits(layer.weight.scales, scales)
    assert (moved[:, 0, 0] == min(3, 127 - int(codes[0, 0]))).all() and (codes[1, 1] + moved[:, 1, 1] == -127).all()
    assert moved[:, 2, 2].mean().item() == pytest.approx(-0.25 if codes[2, 2] > -127 else 0, abs=5 * 0.433 / 20)
    rest = moved.clone()
    rest[:, [0, 1, 2], [0, 1, 2]] = 0
    assert not rest.any(), "without a gradient a code stays"


def test_without_scaling_a_step_is_that_of_the_integers():
    plain, layer, x = made("3x3", bias=True)
    other = Int8Conv2d(plain, float(layer.x_scale), qas=False)
    dy = torch.randn_like(plain(x))
    (dw, db), (dw_plain, db_plain) = (torch.autograd.grad(m(x), (m.weight, m.bias), dy) for m in (layer, other))
    s_w = layer.weight.scales
    torch.testing.assert_close(dw_plain, dw * s_w.view(-1, 1, 1, 1) ** 2, rtol=1e-5, atol=0)
    torch.testing.assert_close(db_plain, db * (s_w * layer.x_scale).view(-1) ** 2, rtol=1e-5, atol=0)


def train(model, optimizer, steps, batches):
    for x, y in batches[:steps]:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def same(a, b):
    for p, q in zip(a.parameters(), b.parameters()):
        assert_same_bits(getattr(p, "codes", p), getattr(q, "codes", q))


def test_it_learns_resumes_and_releases():
    x = task(32)[0]
    y = x.mean((2, 3)).argmax(1)
    batches = [(x, y)] * 30
    model = network()
    prepared = ondevice.prepare(model, ondevice.plan(model, x, share=1.0))
    one, two, three = (copy.deepcopy(prepared) for _ in range(3))
    sgd = [ondevice.SGD(m.parameters(), lr=0.3, seed=3) for m in (one, two, three)]
    before = F.cross_entropy(one(x), y).item()
    train(one, sgd[0], 30, batches)
    assert F.cross_entropy(one(x), y).item() < before - 0.1
    train(two, sgd[1], 11, batches)
    file = io.BytesIO()
    torch.save({"model": two.state_dict(), "optimizer": sgd[1].state_dict()}, file)
    file.seek(0)
    saved, again = torch.load(file), copy.deepcopy(prepared)
    again.load_state_dict(saved["model"])
    same(again, two)
    assert torch.equal(again(x), two(x))
    optimizer = ondevice.SGD(again.parameters(), lr=0.3, seed=99)
    optimizer.load_state_dict(saved["optimizer"])
    train(again, optimizer, 19, batches[11:])
    same(again, one)
    with gradmill.optim.release_gradients(three, sgd[2]):
        train(three, sgd[2], 30, batches)
    same(three, one)


def test_momentum_is_refused():
    with pytest.raises(ValueError, match="momentum is 0.9"):
        ondevice.SGD(nn.Linear(2, 2).parameters(), momentum=0.9)


# --- edges ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ("linear", "3x3", "depthwise"))
def test_backends_agree(kind):
    _, layer, x = made(kind, cap=torch.inf)
    dy, results = torch.randn_like(layer(x)), []
    for context in (*(isa(level) for level in LEVELS), gradmill.use_backend("reference")):
        with context:
            y = layer(x)
            results.append((y, *torch.autograd.grad(y, (x, layer.weight), dy)))
    for result in results[1:]:
        for got, want in zip(result, results[0]):
            assert_same_bits(got.detach(), want.detach())


def test_awkward_inputs():
    _, conv, x = made("3x3", cap=torch.inf)
    assert conv(x[:0]).shape == (0, 6, 9, 7)
    conv(x[:0].detach()).sum().backward()
    assert conv.weight.grad.abs().max() == 0
    assert torch.equal(conv(x[0]), conv(x)[0])
    assert torch.equal(conv(x.detach().contiguous(memory_format=torch.channels_last)), conv(x))
    assert conv(x.bfloat16()).dtype == torch.bfloat16
    _, linear, rows = made("linear")
    assert torch.equal(linear(rows.view(5, 1, 13)), linear(rows)[:, None])
    for bad in (float("nan"), float("inf"), -float("inf")):
        with torch.no_grad():
            image, matrix = x.detach().clone(), rows.detach().clone()
            image[1, 2, 3, 4], matrix[2, 5] = bad, bad
            assert conv(image)[1].isnan().all() and conv(image)[[0, 2]].isfinite().all()
            assert linear(matrix)[2].isnan().all() and linear(matrix)[[0, 1, 3, 4]].isfinite().all()
    with torch.no_grad():  # zeros, denormals and huge values
        for value in (0.0, -0.0, 1e-40, 3e38):
            y = linear(torch.full((2, 13), value))
            want = linear.weight.dequantize().double() @ torch.full((13,), min(value, 127 * float(linear.x_scale)) if value > 1 else 0.0).double() + linear.bias.double()
            torch.testing.assert_close(y[0].double(), want, rtol=1e-4, atol=1e-5)


def test_what_is_refused():
    model, (x, y) = network(), task()
    with pytest.raises(TypeError, match="model is str"):
        ondevice.plan("model", x)
    with pytest.raises(TypeError, match="example_input is list"):
        ondevice.plan(model, [x])
    with pytest.raises(ValueError, match="use gradmill.nn.Int8Linear"):
        ondevice.plan(nn.Linear(2, 2), torch.randn(1, 2))
    with pytest.raises(ValueError, match="no nn.Linear or nn.Conv2d"):
        ondevice.plan(nn.Sequential(nn.ReLU()), x)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        ondevice.measure(network().requires_grad_(False), x)
    with pytest.raises(ValueError, match="share is 0.5 and memory_bytes 10"):
        ondevice.plan(model, x, 10, share=0.5)
    plan = ondevice.plan(model, x)
    other = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model is not the plan's: '0' is Linear"):
        ondevice.prepare(other, plan)
    assert all(p.requires_grad for p in other.parameters())
    with pytest.raises(TypeError, match="layer is Linear of torch.float64"):
        Int8Linear(nn.Linear(2, 2).double(), 1.0)
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="x_scale is"):
            Int8Linear(nn.Linear(2, 2), scale)
    for channels in ([0, 0], [2], [-1]):
        with pytest.raises(ValueError, match="channels is"):
            Int8Linear(nn.Linear(2, 2), 1.0, channels)
    with pytest.raises(ValueError, match="in 2 groups all or none train"):
        Int8Conv2d(nn.Conv2d(8, 8, 3, groups=2), 1.0, [1])
    with pytest.raises(ValueError, match="reflect"):
        Int8Conv2d(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), 1.0)
    layer = Int8Conv2d(nn.Conv2d(3, 4, 3), 1.0)
    with pytest.raises(ValueError, match=r"input has shape \(1, 2, 5, 5\)"):
        layer(torch.randn(1, 2, 5, 5))
    with pytest.raises(ValueError, match="must fit into the padded image"):
        layer(torch.randn(1, 3, 2, 5))
    with pytest.raises(TypeError, match="input is torch.int64"):
        Int8Linear(nn.Linear(2, 2), 1.0)(torch.ones(1, 2, dtype=torch.int64))


def test_layers_that_stay_as_they_are():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(5, 5), nn.Linear(5, 3), nn.LayerNorm(5)

        def forward(self, x):
            return self.b(self.norm(self.a(self.a(x))))

    model, x = Twice(), torch.randn(4, 5)
    plan = ondevice.plan(model, x)
    assert [r.name for r in plan.layers] == ["b"]
    prepared = ondevice.prepare(model, plan)
    assert type(prepared.a) is nn.Linear and [n for n, p in prepared.named_parameters() if p.requires_grad] == ["b.weight", "b.bias"]


def test_example_of_the_docs_page(run_page, tmp_path):
    names, = run_page("docs/ondevice.md")
    assert type(names["model"][0]) is nn.Conv2d and names["plan"].bytes.peak <= 1 << 19
    held = torch.load(tmp_path / "trained.pt")
    fresh = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
                          nn.Flatten(), nn.Linear(32 * 8 * 8, 10))
    ondevice.prepare(fresh, ondevice.Plan.from_dict(held["plan"])).load_state_dict(held["model"])
    assert isinstance(held["model"]["6.weight"], gradmill.QuantizedWeight)


def test_a_plan_survives_json():
    import json
    plan = ondevice.plan(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)), torch.randn(5, 8))
    assert ondevice.Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    with pytest.raises(ValueError, match="no plan"):
        ondevice.Plan.from_dict({"layers": []})
