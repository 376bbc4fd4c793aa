"""qat.pack: a packed layer has the values that the faking one's products saw, and its steps train."""
import dataclasses

import pytest
import torch

import gradmill
from gradmill import QuantizedWeight, functional, recipes
from gradmill.nn import Conv2d, Linear


@pytest.mark.parametrize("name", ["qat_w4", "qat_w3", "qat_w2"])
def test_packing_changes_no_value(name):
    torch.manual_seed(0)
    model = torch.nn.Sequential(Linear(200, 33, recipe=name), torch.nn.ReLU(), Linear(33, 7, recipe=name, bias=False))
    with torch.no_grad():
        for layer in (model[0], model[2]):  # trained: no longer what the range gives
            layer.weight_steps.mul_(torch.rand_like(layer.weight_steps) + 0.5)
            layer.weight_zeros.add_(torch.randn_like(layer.weight_zeros))
        model[2].weight_steps[1] = -1.0
    values = [functional.fake_quantize(m.weight, m.weight_steps, m.weight_zeros, *m.recipe.fake).detach() for m in (model[0], model[2])]
    x = torch.randn(5, 200)
    want, keys = model(x).detach(), {k for k, _ in model.named_parameters()}
    assert gradmill.qat.pack(model) == ["0", "2"] and "0.weight_zeros" in keys
    for layer, value in zip((model[0], model[2]), values):
        assert isinstance(layer.weight, QuantizedWeight) and torch.equal(layer.weight.dequantize(), value)
        assert layer.recipe is recipes.RECIPES[name[4:]] and layer.steps.requires_grad and not layer.weight.requires_grad
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
    optimizer = gradmill.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before, codes = model[0].steps.detach().clone(), model[0].weight.codes.clone()
    model(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model[0].steps, before) and torch.equal(model[0].weight.codes, codes)
    with pytest.raises(ValueError, match="no layer whose recipe fakes"):
        gradmill.qat.pack(model)


def test_convolutions_other_groups_and_nan():
    recipe = dataclasses.replace(recipes.QAT_W4, name="mine", fake=(8, 16))
    conv = Conv2d(4, 6, 3, recipe=recipe)
    with torch.no_grad():
        conv.weight[2, 1, 1, 1] = torch.nan
    want = functional.fake_quantize(conv.weight.flatten(1), conv.weight_steps, conv.weight_zeros, 8, 16).detach()
    assert gradmill.qat.pack(conv, train_steps=False) == [""]
    got = conv.weight.dequantize().flatten(1)
    bad = want.isnan()
    assert bad.any() and got[bad].isnan().all() and torch.equal(got[~got.isnan()], want[~got.isnan()]) and conv.recipe.weight.block == 16
    assert conv._parameters.get("steps") is None
    with pytest.raises(ValueError, match="fakes 5 bits"):
        gradmill.qat.pack(Linear(8, 8, recipe=dataclasses.replace(recipe, fake=(5, 8))))


@pytest.mark.parametrize("bits, group", [(2, 64), (3, 24), (4, 0)])
def test_a_packed_models_state_loads_into_a_fresh_one(bits, group, tmp_path):
    make = lambda: torch.nn.Sequential(torch.nn.Linear(48, 20), torch.nn.ReLU(), torch.nn.Linear(20, 5))
    model, other, x = make(), make(), torch.randn(3, 48)
    gradmill.convert(model, gradmill.recipes.Recipe("qat", fake=(bits, group)), lambda name, layer: name == "0")
    gradmill.qat.pack(model)
    torch.save(model.state_dict(), tmp_path / "x.pt")
    gradmill.convert(other, gradmill.recipes.weight_only(bits, group), lambda name, layer: name == "0")
    assert other.load_state_dict(torch.load(tmp_path / "x.pt")) and torch.equal(other(x), model(x)) and other[0].steps.requires_grad
