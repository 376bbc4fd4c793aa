"""BiPer: the gradients' formulas, both stages, and the packed form, which is the simulated one exactly."""
import copy
import math
import warnings

import pytest
import torch

import gradmill
from gradmill import biper
from gradmill.nn import BinaryConv2d, BinaryLinear, BiPerConv2d, BiPerLinear


def network():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 9, 3, padding=1), torch.nn.BatchNorm2d(9), torch.nn.Flatten(),
                               torch.nn.Linear(9 * 36, 17), torch.nn.LayerNorm(17), torch.nn.Linear(17, 5))


def signs(x):
    return torch.where(x < 0, -1.0, 1.0)


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_by_hand(stage):
    torch.manual_seed(0)
    layer, x = BiPerLinear(11, 5, omega=7.0), torch.randn(6, 11, requires_grad=True)
    layer.stage = stage
    with torch.no_grad():
        layer.weight[0, 0] = 0.0
        layer.alpha.mul_(torch.tensor([1.0, -1, 1, 1, 1])[:, None])
    d = torch.randn(6, 5)
    y = layer.eval()(x)
    y.backward(d)
    wave = (7 * layer.weight.detach()).sin()
    s = wave if stage == 1 else signs(wave)
    a, alpha = signs(x.detach()), layer.alpha.detach()
    torch.testing.assert_close(y.detach(), a @ s.t() * alpha.t() + layer.bias.detach())
    torch.testing.assert_close(layer.weight.grad, 7 * (7 * layer.weight.detach()).cos() * ((d * alpha.t()).t() @ a))
    torch.testing.assert_close(layer.alpha.grad, (d * (a @ s.t())).sum(0)[:, None])
    torch.testing.assert_close(layer.bias.grad, d.sum(0))
    torch.testing.assert_close(x.grad, ((d * alpha.t()) @ s) * (2 - 2 * x.detach().abs()).clamp(min=0))
    assert (x.grad == 0).any() and s[0, 0] == stage - 1, "sign(0) is +"


@pytest.mark.parametrize("make", [lambda: BiPerLinear(30, 4), lambda: BiPerConv2d(3, 4, 3, padding=1)])
def test_training_divides_by_each_samples_deviation(make):
    layer = make()
    x = torch.randn((6, 30) if layer.weight.dim() == 2 else (6, 3, 5, 7)) * torch.tensor([1e-2, 1, 30, 0, 1e3, 2]).view(-1, *[1] * (layer.weight.dim() - 1)) + 0.1
    assert torch.equal(layer.train()(x), layer.eval()(x)), "which changes no sign"
    got, want = x.clone().requires_grad_(), x.clone().requires_grad_()
    d = torch.randn_like(layer(x))
    layer.train()(got).backward(d)
    axes = tuple(range(1, x.dim()))
    layer.eval()(want / (want.var(axes, correction=0, keepdim=True) + 1e-5).sqrt()).backward(d)
    torch.testing.assert_close(got.grad, want.grad)
    layer.zero_grad()


def test_an_input_behind_a_relu_is_told_once():
    layer = BiPerLinear(8, 5)
    with pytest.warns(UserWarning, match="no negative value.*not a ReLU"):
        layer(torch.rand(4, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.rand(4, 8)), BiPerLinear(8, 5)(torch.randn(4, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0, 13), (1,), (70,), (3, 5, 129)])
def test_packed_linear_is_the_simulated_one(shape, dtype):
    model = torch.nn.Sequential(BiPerLinear(shape[-1], 7, bias=len(shape) > 1, dtype=dtype))
    x = torch.randn(shape).to(dtype)
    if x.numel() > 1:
        x.view(-1)[:2] = torch.tensor([0.0, -0.0])
    with torch.no_grad():
        model[0].weight[1], model[0].alpha[2] = 0.0, -0.3
    biper.binarize(model)
    want = model.eval()(x).detach()
    assert biper.pack(model) == ["0"] and type(model[0]) is BinaryLinear
    assert model(x).dtype == dtype and torch.equal(model(x), want)
    assert model[0].bits.shape == (7, -(-shape[-1] // 8)) and not list(model.parameters())[:-1]


@pytest.mark.parametrize("kwargs", [
    dict(padding=1), dict(padding=(2, 0), stride=(1, 2), dilation=(1, 2)), dict(groups=3, bias=False), dict(padding="same", kernel_size=(2, 3)),
    dict(padding=1, padding_mode="reflect"), dict(padding=2, padding_mode="circular", groups=3), dict(kernel_size=1)])
def test_packed_convolution_is_the_simulated_one(kwargs):
    model = torch.nn.Sequential(BiPerConv2d(6, 9, **{"kernel_size": 3, **kwargs}))
    biper.binarize(model.eval())
    packed = copy.deepcopy(model)
    assert biper.pack(packed) == ["0"] and type(packed[0]) is BinaryConv2d
    last = torch.randn(2, 6, 7, 8).to(memory_format=torch.channels_last)
    for x in (torch.randn(2, 6, 7, 8), torch.randn(6, 7, 8), torch.randn(0, 6, 7, 8), last):
        want = model(x).detach()
        assert want.shape == torch.nn.Conv2d(6, 9, **{"kernel_size": 3, **kwargs})(x).shape and torch.equal(packed(x), want)
    x[1, 2, 3, 4], x[0, 0, 0, 0] = torch.nan, torch.inf
    want = model(x).detach()
    assert want.isnan().any() and not want.isnan().all() and torch.equal(packed(x).isnan(), want.isnan())


def test_the_road_from_a_float_model_to_a_packed_one():
    torch.manual_seed(0)
    model = network()
    weights, names = [p for p in model.parameters()], [n for n, _ in model.named_parameters()]
    assert biper.convert(model) == ["2", "5"] and type(model[0]) is torch.nn.Conv2d and type(model[7]) is torch.nn.Linear
    assert all(a is dict(model.named_parameters())[n] for n, a in zip(names, weights)), "the same Parameters"
    torch.testing.assert_close(model[2].alpha.detach(), model[2].weight.detach().flatten(1).abs().mean(1, keepdim=True))
    x, y, losses = torch.randn(32, 3, 8, 8), torch.randint(0, 5, (32,)), []
    optimizer = gradmill.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(60):
        if step == 30:
            with pytest.raises(ValueError, match="layer '2' is in stage 1"):
                biper.pack(model)
            assert biper.binarize(model) == ["2", "5"]
            with pytest.raises(ValueError, match="no BiPer layer in stage 1"):
                biper.binarize(model)
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[29] < losses[0] / 2 and losses[59] < losses[0] / 2
    model.eval()
    want = model(x).detach()
    again = network().eval()  # stage and omega come with the state
    biper.convert(again, omega=3)
    again.load_state_dict(model.state_dict())
    assert again[2].stage == 2 and again[5].omega == 20 and torch.equal(again(x), want) and torch.equal(copy.deepcopy(model)(x), want)
    before = gradmill.nbytes(model[5].weight)
    assert biper.pack(model) == ["2", "5"] and torch.equal(model(x.requires_grad_(False)), want)
    assert model[5].bits.nbytes == 17 * -(-9 * 36 // 8) <= before / 31 and "omega" not in repr(model)
    biper.pack(again)
    again[5].bits.zero_()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), want) and torch.equal(copy.deepcopy(model)(x), want)
    with pytest.raises(RuntimeError, match="BinaryLinear only infers"):  # some layer before it would stay as it is
        model(x).sum().backward()


def test_what_is_kept_and_what_is_refused():
    shared = torch.nn.Linear(8, 8)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), shared, shared, torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    model[3].weight = model[1].weight
    assert biper.convert(model) == ["1", "2", "3"] and model[1] is model[2] and model[3].weight is model[1].weight
    assert biper.convert(model, filter=lambda name, layer: name == "0") == ["0"]
    biper.binarize(model)
    assert biper.pack(model) == ["0", "1", "2", "3"] and model[1] is model[2]
    for call, words in ((lambda: biper.convert(network(), omega=0.0), "omega is 0.0"), (lambda: BiPerLinear(2, 2, omega=math.nan), "omega is nan"),
                        (lambda: biper.convert(torch.nn.Sequential(torch.nn.Linear(2, 2))), "no nn.Linear or nn.Conv2d"),
                        (lambda: biper.pack(network()), "no BiPer layer")):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="model is int"):
        biper.convert(3)


def test_autocast_and_reset():
    layer, x = BiPerLinear(40, 3), torch.randn(5, 40)
    want = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
    assert got.dtype == torch.bfloat16 and torch.equal(got, want.to(torch.bfloat16)), "products stay exact"
    with torch.no_grad():
        layer.alpha.zero_()
    layer.reset_parameters()
    assert torch.equal(layer.alpha.detach(), layer.weight.detach().abs().mean(1, keepdim=True))


def test_the_quantisation_error_falls_with_omega():
    """E (sin - sign)^2 of normal weights is 1 - 2 E|sin| + E sin^2: from 1 at omega 0 to that of an even phase, 3/2 - 4/pi."""
    w = torch.randn(1 << 16, dtype=torch.float64) * 0.05
    errors = []
    for omega in (1, 5, 10, 20, 80):
        wave = (omega * w).sin()
        errors.append((wave - signs(wave)).square().mean().item())
    assert errors[:4] == sorted(errors[:4], reverse=True) and errors[0] > 0.9 and errors[3] < 0.4
    assert errors[4] == pytest.approx(1.5 - 4 / math.pi, abs=0.01)
