"""qat.block_ap: what it trains, in which order, and what it leaves alone."""
import copy

import pytest
import torch

import gradmill
from gradmill.demo import LanguageModel
from gradmill.nn import Linear
from gradmill.qat import block_ap


def text(batches, size=8, seq=16):
    """Bytes with something to learn: each is the one before plus 0, 1 or 2."""
    steps = torch.randint(0, 3, (batches, size, seq + 1))
    sequences = (torch.randint(0, 64, (batches, size, 1)) + steps.cumsum(-1)) % 64
    return [(s[:, :-1], s[:, 1:]) for s in sequences]


def loss_of(model, data):
    with torch.no_grad():
        return sum(model(*batch).item() for batch in data) / len(data)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = LanguageModel(64, 2, 16)
    optimizer = gradmill.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in text(120):
        model(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_two_bits_beat_rounding_to_nearest(trained):
    torch.manual_seed(1)
    data, held_out = text(24), text(8)
    nearest, model, packed = (copy.deepcopy(trained) for _ in range(3))
    gradmill.convert(nearest.blocks, gradmill.recipes.QAT_W2, lambda name, layer: True)
    report = block_ap(model, iter(data), 2, 64, epochs=4, lr=3e-4, steps_lr=1e-3, progress=False)
    assert list(report.blocks) == ["blocks.0", "blocks.1"] and len(report.layers) == 14 and report.layers[7] == "blocks.1.q"
    assert all(after < 0.8 * before for before, after in report.blocks.values())
    full, rounded, ours = (loss_of(m, held_out) for m in (trained, nearest, model))
    assert full < ours < rounded and ours - full < 0.7 * (rounded - full)
    for old, new in zip(trained.blocks, model.blocks):  # everything trained
        assert not any(torch.equal(p, dict(new.named_parameters())[n]) for n, p in old.named_parameters())
        starts = Linear.from_linear(old.gate, gradmill.recipes.QAT_W2)
        assert not torch.equal(new.gate.weight_steps, starts.weight_steps) and not torch.equal(new.gate.weight_zeros, starts.weight_zeros)
    assert torch.equal(model.head.weight, trained.head.weight) and model.training and all(m.training for m in model.modules())
    assert "blocks.1" in str(report)
    block_ap(packed, data, 2, 64, epochs=4, lr=3e-4, steps_lr=1e-3, packed=True, progress=False)
    gradmill.qat.pack(model)
    for ours, other in zip(model.state_dict().values(), packed.state_dict().values()):
        ours, other = (t.dequantize() if isinstance(t, gradmill.QuantizedWeight) else t for t in (ours, other))
        assert torch.equal(ours, other)
    assert packed.blocks[0].q.steps.requires_grad


def test_a_block_that_training_makes_worse_is_kept_rounded(trained):
    torch.manual_seed(3)
    data, model, rounded = text(6), copy.deepcopy(trained), copy.deepcopy(trained)
    report = block_ap(model, data, 4, 64, epochs=1, lr=10.0, progress=False)
    block_ap(rounded, data, 4, 64, epochs=0, progress=False)
    assert all(after == before for before, after in report.blocks.values())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), rounded.state_dict().values(), strict=True))


def test_chains_are_kept_in_step_and_no_training_is_rounding_to_nearest(trained):
    data = text(3)
    model, nearest = copy.deepcopy(trained), copy.deepcopy(trained).eval()
    report = block_ap(model, data, 3, 128, epochs=0, progress=False)
    gradmill.convert(nearest.blocks, gradmill.recipes.QAT_W3, lambda name, layer: True)
    losses = []
    with torch.no_grad():
        for x, _ in data:
            exact = ours = trained.embedding(x)
            for old, new in zip(trained.blocks, nearest.blocks):
                exact, ours = old(exact, trained.cos, trained.sin), new(ours, trained.cos, trained.sin)
                losses.append((exact - ours).square().mean().item())
    for i, (before, after) in enumerate(report.blocks.values()):
        assert before == after == pytest.approx(sum(losses[i::2]) / 3, rel=1e-5)
    assert model.blocks[0].q.recipe is gradmill.recipes.QAT_W3


def test_rates_follow_the_paper(trained, monkeypatch):
    rates = []
    step = gradmill.optim.AdamW.step

    def watched(self):
        rates.append([g[key] for key in ("lr", "weight_decay") for g in self.param_groups])
        return step(self)

    monkeypatch.setattr(gradmill.optim.AdamW, "step", watched)
    block_ap(copy.deepcopy(trained), text(4), 2, progress=False)
    assert len(rates) == 2 * 2 * 4 and rates[0] == pytest.approx([2e-5, 1e-4, 0, 0]) and rates[8] == rates[0]
    assert rates[4][:2] == pytest.approx([2e-5 * 0.525, 1e-4 * 0.525]) and rates[7] == sorted(rates[:8])[0]
    rates.clear()
    block_ap(copy.deepcopy(trained), text(1), 4, 32, epochs=1, progress=False)
    assert rates[0][0] == pytest.approx(1e-5)


class Keyword(torch.nn.Module):
    """Blocks that take their hidden state by keyword, give tuples and write into their input."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.drop = torch.nn.Linear(10, 10), torch.nn.Dropout(0.5)

        def forward(self, shift, hidden):
            hidden += shift
            return self.drop(self.a(hidden)), None

    def __init__(self, wrong=""):
        super().__init__()
        self.wrong, self.layers = wrong, torch.nn.ModuleList(self.Block() for _ in range(3))
        self.layers[1].requires_grad_(False)

    def forward(self, x):
        for i, layer in enumerate(reversed(self.layers) if self.wrong == "order" else self.layers[:2] if self.wrong == "few" else self.layers):
            x = layer(hidden=x * 2 if self.wrong == "chain" else x, shift=i)[0]
        return x


def test_keyword_blocks_frozen_ones_and_modes():
    model = Keyword()
    model.layers[2].eval()
    old = copy.deepcopy(model)
    with torch.no_grad():  # the caller's
        report = block_ap(model, [{"x": torch.randn(5, 10)}], 4, 0, list(model.layers), filter=lambda name, layer: name != "layers.2.a", progress=False)
    assert report.layers == ["layers.0.a", "layers.1.a"] and type(model.layers[2].a) is torch.nn.Linear
    assert [p.requires_grad for p in model.parameters()] == [True] * 4 + [False] * 4 + [True] * 2
    assert [m.training for m in model.modules()] == [m.training for m in old.modules()]
    x = torch.randn(3, 10)
    torch.testing.assert_close(model.eval()(x.clone()), old.eval()(x.clone()), rtol=0.5, atol=0.5)


def test_refusals(trained):
    data = text(1)
    for kwargs, words in ((dict(bits=1), "bits is 1"), (dict(bits=5, packed=True), "bits is 5"), (dict(group=7), "group is 7"), (dict(epochs=-1), "epochs is -1"),
                          (dict(lr=float("nan")), "lr is nan"), (dict(blocks="block"), "blocks is 'block'"), (dict(blocks="blocks.0.q"), "not of a Linear"),
                          (dict(blocks=[torch.nn.Linear(1, 1)]), r"blocks\[0\]"), (dict(blocks=[]), "0 elements"), (dict(data=[]), "no batches"),
                          (dict(filter=lambda name, layer: False), "no layer to quantise")):
        with pytest.raises(ValueError, match=words):
            block_ap(trained, **{"data": data, "progress": False, "epochs": 0, **kwargs})
    with pytest.raises(ValueError, match="no ModuleList"):
        block_ap(torch.nn.Sequential(torch.nn.Linear(2, 2)), data)
    with pytest.raises(TypeError, match="model is list"):
        block_ap([], data)
    for wrong, words in (("order", "'layers.2' is called as number 0"), ("few", "'layers.2' was not called"), ("chain", "'layers.1' does not take")):
        with pytest.raises(ValueError, match=words):
            block_ap(Keyword(wrong), [torch.randn(2, 10)], progress=False)
    tied = Keyword()
    tied.layers[1].a.weight = tied.layers[0].a.weight
    with pytest.raises(ValueError, match="'layers.0' shares its weights with 'layers.1.a.weight'"):
        block_ap(tied, [torch.randn(2, 10)], progress=False)


def test_a_failure_leaves_the_model_as_it_was(trained):
    model = copy.deepcopy(trained)
    modules, values = list(model.modules()), copy.deepcopy(model.state_dict())

    with torch.no_grad():
        model.blocks[1].down.weight[0, 0] = values["blocks.1.down.weight"][0, 0] = torch.inf
    with pytest.raises(RuntimeError, match="'blocks.1' has a loss of nan"):
        block_ap(model, text(2), 2, progress=False)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True)) and all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_a_model_that_fills_a_cache_by_its_config_does_not_meanwhile():
    """As transformers' models do: with config.use_cache on, every block call would append keys that carry a graph."""
    from types import SimpleNamespace

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(16, 16)

        def forward(self, h, cache=None):
            if cache is not None:
                cache.append(h)
            return h + self.layer(h + (sum(cache) if cache else 0))

    class Caching(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.layers = SimpleNamespace(use_cache=True), torch.nn.ModuleList([Block(), Block()])

        def forward(self, x):
            cache = [] if self.config.use_cache else None
            for layer in self.layers:
                x = layer(x, cache=cache)
            return x

    model = Caching()
    report = block_ap(model, [torch.randn(5, 16) for _ in range(3)], 4, 16, progress=False)
    assert len(report.layers) == 2 and model.config.use_cache is True
    with pytest.raises(ValueError, match="no layer to quantise"):
        block_ap(model, [torch.randn(5, 16)], 4, 16, filter=lambda *_: False, progress=False)
    assert model.config.use_cache is True
