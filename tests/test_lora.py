"""LoRA-Pro against least squares in float64, LoRA-SB against an exact SVD; adapters built as peft builds them."""
import copy

import pytest
import torch
from torch import nn

from gradmill.lora import Latent, LoRAPro, init_lora_sb, pairs
from gradmill.optim import AdamW


class Adapted(nn.Module):
    """A linear layer or a convolution in peft's adapter: the same attributes, the same forward."""

    def __init__(self, base, rank, scaling=2.0, b=None, adapters=("default",)):
        super().__init__()
        self.base_layer, self.scaling, self.use_dora = base.requires_grad_(False), dict.fromkeys(adapters, scaling), dict.fromkeys(adapters, False)
        if isinstance(base, nn.Conv2d):
            down = lambda: nn.Conv2d(base.in_channels, rank, base.kernel_size, bias=False)
            up = lambda: nn.Conv2d(rank, base.out_channels, 1, bias=False)
        else:
            down, up = lambda: nn.Linear(base.in_features, rank, bias=False), lambda: nn.Linear(rank, base.out_features, bias=False)
        self.lora_A, self.lora_B = (nn.ModuleDict({n: make() for n in adapters}) for make in (down, up))
        for layer in self.lora_B.values():
            nn.init.zeros_(layer.weight) if b is None else nn.init.normal_(layer.weight, std=b)

    def forward(self, x):
        out = self.base_layer(x)
        for n in self.lora_A:
            out = out + self.lora_B[n](self.lora_A[n](x)) * self.scaling[n]
        return out


class Own(nn.Module):
    """loralib's way: A and B are the layer's own parameters, scaling a number."""

    def __init__(self, out, inputs, rank, scaling):
        super().__init__()
        self.weight, self.scaling = nn.Parameter(torch.randn(out, inputs), requires_grad=False), scaling
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(rank, inputs)), nn.Parameter(torch.randn(out, rank))


def give(a, b, g, s):
    """Gradients of A and B where W0 + s B A has the gradient g; those as they are kept."""
    with torch.no_grad():
        flat_a, flat_b = a.double().flatten(1), b.double().flatten(1)
        a.grad, b.grad = (s * flat_b.t() @ g).reshape(a.shape).to(a.dtype), (s * g @ flat_a.t()).reshape(b.shape).to(b.dtype)
        return a.grad.double().flatten(1), b.grad.double().flatten(1)


def by_least_squares(a, b, ga, gb, g, s):
    """Of the (hA, hB) for which s B hA + s hB A is nearest to g, the one nearest to (gA, gB)."""
    a, b = a.detach().double().flatten(1), b.detach().double().flatten(1)
    rank, (outputs, inputs) = len(a), g.shape
    kron = lambda x, y: torch.einsum("ik,jl->ijkl", x, y.double()).reshape(outputs * inputs, -1)
    move = s * torch.cat((kron(b, torch.eye(inputs)), kron(torch.eye(outputs).double(), a.t())), 1)
    now = torch.cat((ga.flatten(), gb.flatten()))
    h = now + torch.linalg.pinv(move, rtol=1e-10) @ (g.flatten() - move @ now)
    return h[:rank * inputs].reshape(rank, inputs), h[rank * inputs:].reshape(outputs, rank)


def close(got, want, tolerance):
    return (got.double().flatten(1) - want).norm() <= tolerance * max(want.norm(), 1e-30)


# --- LoRA-Pro ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("outputs, inputs, rank", [(9, 13, 3), (13, 5, 4), (7, 7, 1), (6, 6, 6)])
@pytest.mark.parametrize("s", [0.5, 3.0])
def test_adjusted_gradients_are_least_squares(outputs, inputs, rank, s):
    model = nn.ModuleList([Adapted(nn.Linear(inputs, outputs), rank, s, b=1.0).double() for _ in range(3)])
    wanted = []
    for pair in pairs(model):
        g = torch.randn(outputs, inputs).double()
        wanted.append((g, *by_least_squares(pair.a, pair.b, *give(pair.a, pair.b, g, s), g, s)))
    LoRAPro(model, ridge=1e-14)()
    for pair, (g, ha, hb) in zip(pairs(model), wanted):
        assert close(pair.a.grad, ha, 1e-6) and close(pair.b.grad, hb, 1e-6)
        # The step is the projection of g on what adapters can do: what is left of g is out of reach of A and of B.
        a, b = pair.a.detach(), pair.b.detach()
        left = g - s * b @ pair.a.grad - s * pair.b.grad @ a
        assert (b.t() @ left).norm() < 1e-8 * g.norm() * b.norm() and (left @ a.t()).norm() < 1e-8 * g.norm() * a.norm()


def test_shapes_dtypes_and_scalings_together():
    """Layers of several shapes, each with its own s, fp32 and bf16, linear, convolution and loralib's."""
    model = nn.ModuleDict({"one": Adapted(nn.Linear(8, 6), 2, 1.5, b=0.7), "two": Adapted(nn.Linear(8, 6), 2, 4.0, b=0.7), "conv": Adapted(nn.Conv2d(3, 5, 3), 2, 0.3, b=0.7),
                           "bf16": Adapted(nn.Linear(11, 5), 3, 2.0, b=0.7).bfloat16(), "own": Own(7, 10, 2, 0.8)})
    found, wanted = list(pairs(model)), []
    assert [(p.name, p.adapter) for p in found] == [(n, "" if n == "own" else "default") for n in model]
    for pair in found:
        s = pair.scaling
        g = torch.randn(len(pair.b), pair.a[0].numel()).double()
        wanted.append(by_least_squares(pair.a, pair.b, *give(pair.a, pair.b, g, s), g, s))
    LoRAPro(model)()
    for pair, (ha, hb) in zip(found, wanted):
        # A rounded (gA, gB) is no g's: the Sylvester equation stays exact only to that rounding.
        tolerance = 0.2 if pair.a.dtype == torch.bfloat16 else 1e-4
        assert pair.a.grad.dtype == pair.a.dtype and pair.a.grad.shape == pair.a.shape
        assert close(pair.a.grad, ha, tolerance) and close(pair.b.grad, hb, tolerance), pair.name


def test_first_step():
    """B = 0: A's gradient stays, also what a penalty put there; B's is s^-2 gB (A A^T)^-1. Real gradients of a real model."""
    model = Adapted(nn.Linear(12, 9), 4, 0.5)
    (pair,) = pairs(model)
    x, y = torch.randn(20, 12), torch.randn(20, 9)
    (model(x) - y).square().sum().backward()
    assert not pair.a.grad.any() and pair.b.grad.any()
    pair.a.grad.add_(penalty := torch.randn(4, 12))
    a, gb = pair.a.detach().double(), pair.b.grad.double()
    LoRAPro(model)()
    assert torch.equal(pair.a.grad, penalty)
    want = gb @ torch.linalg.inv(a @ a.t()) / 0.25
    assert close(pair.b.grad, want, 1e-5)


def test_a_step_is_the_nearest_to_full_fine_tuning():
    """A real model's SGD step moves W as adapters can that is nearest to W's own gradient; plain LoRA's does not."""
    x, y, rate = torch.randn(30, 16).double(), torch.randn(30, 20).double(), 1e-6
    start, off = Adapted(nn.Linear(16, 20), 3, 2.0, b=0.3).double(), {}
    start.base_layer.weight.requires_grad_(True)
    for name in ("plain", "pro"):
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD([*model.lora_A.parameters(), *model.lora_B.parameters()], lr=rate)
        if name == "pro":
            LoRAPro(model).attach(optimizer)
        a, b, before = (t.detach().clone() for t in (model.lora_A["default"].weight, model.lora_B["default"].weight, weight(model)))
        (model(x) - y).square().sum().backward()
        optimizer.step()
        g = model.base_layer.weight.grad
        nearest = g - (torch.eye(20) - b @ torch.linalg.pinv(b)) @ g @ (torch.eye(16) - torch.linalg.pinv(a) @ a)
        off[name] = float((((before - weight(model)) / rate - nearest).norm() / nearest.norm()).detach())
    assert off["pro"] < 1e-3 and off["plain"] > 0.1, off


def test_any_optimizer_and_its_handle():
    model = nn.Sequential(Adapted(nn.Linear(10, 8), 2, b=0.5), nn.ReLU(), Adapted(nn.Linear(8, 10), 2, b=0.5))
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(params, lr=1e-2)
    handle = LoRAPro(model).attach(optimizer)
    model(torch.randn(5, 10)).square().sum().backward()
    by_hand = copy.deepcopy(model)
    for p, q in zip(model.parameters(), by_hand.parameters()):
        q.grad = None if p.grad is None else p.grad.clone()
    before = [p.grad.clone() for p in params]
    optimizer.step()
    LoRAPro(by_hand)()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(params, [p for p in by_hand.parameters() if p.requires_grad]))
    assert not any(torch.equal(p.grad, g) for p, g in zip(params, before))
    handle.remove()
    before = [p.grad.clone() for p in params]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(params, before))


def test_edges_of_lora_pro():
    model = nn.ModuleList([Adapted(nn.Linear(6, 5), 2, b=1.0) for _ in range(6)])
    found = list(pairs(model))
    for pair in found[1:]:
        give(pair.a, pair.b, torch.randn(5, 6).double(), 2.0)
    found[1].b.grad = None                                    # half a gradient
    found[2].module.scaling["default"] = 0.0
    found[3].a.grad.zero_(), found[3].b.grad.zero_()
    found[4].b.data[0, 0] = float("nan")                      # one layer's nan is that layer's
    with torch.no_grad():
        found[5].b[:, 1] = found[5].b[:, 0]                   # B of rank 1
    g = torch.randn(5, 6).double()
    give(found[5].a, found[5].b, g, 2.0)
    kept = [found[1].a.grad.clone(), found[2].a.grad.clone(), found[2].b.grad.clone()]
    LoRAPro(model)()
    assert found[0].a.grad is None and torch.equal(found[1].a.grad, kept[0]) and found[1].b.grad is None
    assert torch.equal(found[2].a.grad, kept[1]) and torch.equal(found[2].b.grad, kept[2])
    assert not found[3].a.grad.any() and not found[3].b.grad.any()
    assert found[4].b.grad.isnan().any()
    a, b = found[5].a.detach().double(), found[5].b.detach().double()
    p_a, p_b = torch.linalg.pinv(a) @ a, b @ torch.linalg.pinv(b)
    moved = 2 * b @ found[5].a.grad.double() + 2 * found[5].b.grad.double() @ a
    assert (moved - (g - (torch.eye(5) - p_b) @ g @ (torch.eye(6) - p_a))).norm() < 1e-3 * g.norm()


def test_what_lora_pro_refuses():
    with pytest.raises(ValueError, match="no adapter"):
        LoRAPro(nn.Linear(3, 3))
    frozen = Adapted(nn.Linear(3, 3), 1)
    frozen.lora_A.requires_grad_(False)
    with pytest.raises(ValueError, match="no adapter"):
        LoRAPro(frozen)
    dora = nn.Sequential(Adapted(nn.Linear(3, 3), 1))
    dora[0].use_dora["default"] = True
    with pytest.raises(ValueError, match="0 is a DoRA"):
        LoRAPro(dora)
    grouped = Adapted(nn.Conv2d(4, 4, 1), 2)
    grouped.base_layer.groups = 2
    with pytest.raises(ValueError, match="2 groups"):
        LoRAPro(grouped)
    experts = Adapted(nn.Linear(3, 3), 1)
    experts.num_experts = 4
    kasa = Adapted(nn.Linear(3, 3), 1)
    kasa.lora_variant = {"default": type("KasaLinearVariant", (), {})()}
    for other, named in ((experts, "4 experts"), (kasa, "Kasa")):
        with pytest.raises(ValueError, match=named):
            LoRAPro(other)
    with pytest.raises(ValueError, match="ridge is 0"):
        LoRAPro(Adapted(nn.Linear(3, 3), 1), ridge=0)


# --- LoRA-SB ----------------------------------------------------------------------------------------------
def weight(layer):
    """The weight that an adapted layer stands for."""
    return layer.base_layer.weight.double() + layer.scaling["default"] * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()


@pytest.mark.parametrize("outputs, inputs, rank", [(40, 64, 8), (64, 40, 8), (30, 30, 30), (12, 50, 1)])
def test_the_first_update_at_its_best(outputs, inputs, rank):
    model = nn.Sequential(Adapted(nn.Linear(inputs, outputs), rank, 7.0))
    layer, g = model[0], torch.randn(outputs, inputs)
    before = layer.base_layer.weight.clone()
    (latent,) = init_lora_sb(model, {"0": g}, lr=0.02, iterations=12)
    u = -0.02 * g.sign().double()
    exact = torch.linalg.svd(u, full_matrices=False)
    best = exact.U[:, :rank] * exact.S[:rank] @ exact.Vh[:rank]
    assert layer.scaling["default"] == 1.0 and torch.equal(layer.base_layer.weight, before)
    moved = weight(layer) - before.double()
    assert (u - moved).norm() <= 1.001 * (u - best).norm() + 4 * rank ** 0.5 * 2.0 ** -24 * u.norm()  # two fp32 factors, each orthonormal to 2 * 2^-24 a column
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].basis
    assert (a @ a.t() - torch.eye(rank)).abs().max() < 1e-5 and (b.t() @ b - torch.eye(rank)).abs().max() < 1e-5
    assert [p for p in model.parameters() if p.requires_grad] == [latent] or sum(p.requires_grad for p in model.parameters()) == 1
    assert latent.shape == (rank, rank) and latent.dtype == torch.float32 and torch.equal(latent, latent.diag().diag())
    x = torch.randn(5, inputs)
    assert torch.allclose(model(x).double(), x.double() @ weight(layer).t() + layer.base_layer.bias, atol=1e-4)


def test_gradients_from_losses_are_those_given():
    def made():
        torch.manual_seed(3)
        return nn.Sequential(Adapted(nn.Linear(20, 16), 4), nn.Tanh(), Adapted(nn.Linear(16, 24), 4))

    batches, model = [torch.randn(6, 20) for _ in range(3)], made()
    plain = nn.Sequential(model[0].base_layer, nn.Tanh(), model[2].base_layer).requires_grad_(True)
    for x in batches:
        plain(x).square().sum().backward()
    given = {"0": plain[0].weight.grad, "2": plain[2].weight.grad}
    several, one, named = made(), made(), made()
    init_lora_sb(several, (several(x).square().sum() for x in batches))
    init_lora_sb(one, lambda: sum(one(x).square().sum() for x in batches))
    trained = init_lora_sb(named, given)
    for other in (several, one):
        for i in (0, 2):
            assert not other[i].base_layer.weight.requires_grad and other[i].base_layer.weight.grad is None
            assert torch.allclose(weight(other[i]), weight(named[i]), atol=1e-7)
    # and it trains: only R changes
    start = copy.deepcopy(named.state_dict())
    optimizer = AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = sum(named(x).square().sum() for x in batches)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {k for k, v in named.state_dict().items() if not torch.equal(v, start[k])}
    assert changed == {f"{i}.lora_B.default.{name}" for i in (0, 2) for name in ("latent", "weight")}  # weight: B R


def test_same_seed_same_start_and_bf16():
    g = {"0": torch.randn(32, 48)}
    models = [nn.Sequential(Adapted(nn.Linear(48, 32), 4).bfloat16()) for _ in range(3)]
    latents = [init_lora_sb(m, g, seed=seed)[0] for m, seed in zip(models, (1, 1, 2))]
    assert torch.equal(latents[0], latents[1]) and latents[0].dtype == torch.float32
    assert models[0](torch.randn(2, 48).bfloat16()).dtype == torch.bfloat16
    layer = models[0][0].lora_B["default"]
    assert isinstance(layer, Latent) and layer.weight.dtype == torch.bfloat16 and (layer.out_features, layer.in_features) == (32, 4)
    zero = nn.Sequential(Adapted(nn.Linear(8, 6), 2))
    init_lora_sb(zero, {"0": torch.zeros(6, 8)})
    assert torch.equal(weight(zero[0]), zero[0].base_layer.weight.double())


def test_what_lora_sb_refuses_changes_nothing():
    model = nn.Sequential(Adapted(nn.Linear(8, 6), 2), Adapted(nn.Linear(6, 8), 2))
    start = copy.deepcopy(model.state_dict())
    good = torch.randn(6, 8)
    for gradients in ({"0": good}, {"0": good, "1": torch.randn(6, 8)}, {"0": good, "1": torch.full((8, 6), float("inf"))}, iter([])):
        with pytest.raises(ValueError, match=r"the gradient of [01] is"):
            init_lora_sb(model, gradients)
    model[1].base_layer.weight = nn.Parameter(torch.zeros(8, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="base weight of 1"):
        init_lora_sb(model, lambda: model(torch.randn(1, 8)).sum())
    after = model.state_dict()
    assert after.keys() == start.keys() and all(torch.equal(after[k], v) for k, v in start.items() if k != "1.base_layer.weight")
    assert not model[0].base_layer.weight.requires_grad and model[0].scaling["default"] == 2.0
    dora, merged, biased, kasa = (Adapted(nn.Linear(4, 3), 1) for _ in range(4))
    dora.use_dora["default"], merged.merged_adapters, kasa.lora_variant = True, ["default"], {"default": type("KasaLinearVariant", (), {})()}
    biased.lora_B["default"].bias = nn.Parameter(torch.zeros(3))
    for other, named in ((dora, "DoRA"), (merged, "unmerge it"), (biased, "lora_bias"), (kasa, "Kasa")):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match=named):
            init_lora_sb(other, {"": torch.randn(3, 4)})
        assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    for other, named in ((nn.Linear(3, 3), "no linear adapter"), (Adapted(nn.Conv2d(3, 5, 3), 2), "no linear adapter"),
                         (Adapted(nn.Linear(3, 3), 1, adapters=("a", "b")), "more than one"), (Adapted(nn.Linear(4, 3), 5), "at most 3")):
        with pytest.raises(ValueError, match=named):
            init_lora_sb(other, {"": torch.randn(3, 4 if named == "at most 3" else 3)})


def test_what_is_saved_loads_with_and_without_gradmill():
    model = nn.Sequential(Adapted(nn.Linear(20, 16), 4, 3.0), nn.Tanh(), Adapted(nn.Linear(16, 24), 2, 0.5))
    fresh, again = copy.deepcopy(model), copy.deepcopy(model)
    trained = init_lora_sb(model, {"0": torch.randn(16, 20), "2": torch.randn(24, 16)}, lr=1e-2)
    with torch.no_grad():
        for r in trained:
            r.add_(torch.randn_like(r))
    saved, x = model.state_dict(), torch.randn(5, 20)
    ordinary = fresh.load_state_dict(saved, strict=False)  # its own lora_B, at its own scale
    assert not ordinary.missing_keys and torch.allclose(fresh(x), model(x), atol=1e-5)
    init_lora_sb(again, {"0": torch.randn(16, 20), "2": torch.randn(24, 16)})
    again.load_state_dict(saved)
    assert torch.equal(again(x), model(x)) and all(torch.equal(v, saved[k]) for k, v in again.state_dict().items())


def test_a_layer_whose_weight_lies_the_other_way():
    """GPT-2's: y = x W, W (inputs, outputs), and peft's fan_in_fan_out around it."""
    class Turned(Adapted):
        fan_in_fan_out = True

        def forward(self, x):
            return x @ self.base_layer.weight + self.lora_B["default"](self.lora_A["default"](x)) * self.scaling["default"]

    for inputs, outputs in ((12, 12), (10, 17)):
        turned, straight = Turned(nn.Linear(inputs, outputs, bias=False), 3), Adapted(nn.Linear(inputs, outputs, bias=False), 3)
        turned.base_layer.weight = nn.Parameter(straight.base_layer.weight.detach().t().contiguous(), requires_grad=False)
        models, x = [nn.Sequential(turned), nn.Sequential(straight)], torch.randn(7, inputs)
        for model in models:
            init_lora_sb(model, lambda: model(x).square().sum(), lr=1e-2)
        assert torch.allclose(models[0](x), models[1](x), atol=1e-5) and not torch.equal(models[0](x), x @ turned.base_layer.weight)
        with pytest.raises(ValueError, match="must be a finite tensor"):
            init_lora_sb(nn.Sequential(Turned(nn.Linear(5, 4), 2)), {"0": torch.randn(5, 4).t()})


# --- the peft library itself ------------------------------------------------------------------------------
def test_modules_of_peft(tmp_path):
    """Gradients adjusted, started, stepped, saved and merged, on what peft makes."""
    peft = pytest.importorskip("peft")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.up, self.down = nn.Conv2d(3, 8, 3), nn.Linear(8 * 16, 40), nn.Linear(40, 10)

        def forward(self, x):
            return self.down(self.up(self.conv(x).flatten(1)).tanh())

    x, base = torch.randn(4, 3, 6, 6), Net()
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, lora_alpha=12, target_modules=["conv", "up", "down"], init_lora_weights=False))
    assert [p.name.split(".")[-1] for p in pairs(model)] == ["conv", "up", "down"]
    model(x).square().sum().backward()
    wanted = []
    for pair in pairs(model):
        wanted.append((*(p.grad.double().flatten(1) for p in (pair.a, pair.b)), pair))
    assert all(pair.scaling == 3.0 for *_, pair in wanted)
    LoRAPro(model)()
    for ga, gb, pair in wanted:  # what B and A see of the step is what they see of W's gradient: s B^T step = gA, s step A^T = gB
        a, b, ha, hb = (t.detach().double().flatten(1) for t in (pair.a, pair.b, pair.a.grad, pair.b.grad))
        step = 3 * b @ ha + 3 * hb @ a
        assert (3 * b.t() @ step - ga).norm() < 1e-4 * ga.norm() and (3 * step @ a.t() - gb).norm() < 1e-4 * gb.norm()

    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=["up", "down"]))
    trained = init_lora_sb(model, lambda: model(x).square().sum(), lr=1e-4)
    assert {id(p) for p in trained} == {id(p) for p in model.parameters() if p.requires_grad} and sum(p.numel() for p in trained) == 32
    started = float(model(x).square().sum().detach())
    assert started < float(base(x).square().sum().detach()), "the model moves at step 0"
    optimizer = AdamW(trained, lr=1e-2)
    model(x).square().sum().backward()
    optimizer.step()
    saved = peft.get_peft_model_state_dict(model)
    assert sum("latent" in k for k in saved) == sum("basis" in k for k in saved) == 2
    before = model(x).detach()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.allclose(again(x), before, atol=1e-4)
    assert torch.allclose(model.merge_and_unload()(x), before, atol=1e-4)
