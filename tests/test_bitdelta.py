"""BitDelta: what is computed, what is trained, how many bytes a tenant takes, what a file holds."""
import copy

import pytest
import torch

import gradmill
from gradmill import bitdelta
from gradmill.nn import BitDeltaLinear


def pair(width=70, scale=0.02, dtype=torch.float32):
    base = torch.nn.Sequential(torch.nn.Linear(width, 33), torch.nn.LayerNorm(33), torch.nn.GELU(), torch.nn.Linear(33, 10)).to(dtype)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(torch.randn(p.shape).to(dtype) * scale)
    return base, tuned


def simulated(base, tuned, alphas=None):
    """The same model in floats: W + alpha sign(delta), 0 counting as +."""
    result = copy.deepcopy(tuned)
    for i in (0, 3):
        delta = tuned[i].weight.detach() - base[i].weight.detach()
        alpha = delta.abs().mean() if alphas is None else alphas[i]
        result[i].weight.data = base[i].weight.detach() + torch.where(delta < 0, -alpha, alpha)
    return result


def test_by_hand():
    base, tuned = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]))
        tuned.weight.copy_(torch.tensor([[2.0, 2.0, 1.0], [-3.0, 0.0, 0.0]]))
        tuned.bias.fill_(0.5)
    layer = BitDeltaLinear.from_linears(base, tuned)
    assert layer.alphas.tolist() == [1.0] and layer.bits.tolist() == [[[4], [1]]]
    # row 0: 1+1, 2+1, 3-1; row 1: -1, 1, 1
    assert torch.equal(layer(torch.tensor([[1.0, 10.0, 100.0]])), torch.tensor([[2.0 + 30 + 200 + 0.5, -1.0 + 10 + 100 + 0.5]]))
    assert layer.tenant_bytes() == 2 + 4 + 8


def test_the_compressed_model_is_the_simulated_one():
    base, tuned = pair()
    model, want, x = bitdelta.compress(base, tuned), simulated(base, tuned), torch.randn(5, 70)
    torch.testing.assert_close(model(x), want(x), rtol=1e-5, atol=1e-5)
    assert model[0].weight is base[0].weight, "the base is shared, not copied"
    assert [n for n, p in model.named_parameters() if p.requires_grad and p is not base[0].weight and p is not base[3].weight] == ["0.alphas", "3.alphas"]
    assert torch.equal(model[1].weight, tuned[1].weight) and model[1].weight is not tuned[1].weight
    kept = bitdelta.compress(base, tuned, filter=lambda name, layer: name != "3", others="base")
    assert type(kept[3]) is torch.nn.Linear and kept[3].weight is base[3].weight


def test_gradients_are_the_simulated_ones():
    base, tuned = pair()
    model, x = bitdelta.compress(base, tuned), torch.randn(5, 70, requires_grad=True)
    alphas = {i: model[i].alphas.detach().clone().requires_grad_() for i in (0, 3)}
    signs = {i: torch.where(tuned[i].weight - base[i].weight < 0, -1.0, 1.0).detach() for i in (0, 3)}
    h = torch.nn.functional.linear(x, base[0].weight.detach() + alphas[0] * signs[0], tuned[0].bias)
    want = torch.nn.functional.linear(tuned[2](tuned[1](h)), base[3].weight.detach() + alphas[3] * signs[3], tuned[3].bias)
    dy = torch.randn(5, 10)
    expected = torch.autograd.grad(want, (x, alphas[0], alphas[3]), dy)
    for backend in (None, "reference"):
        with gradmill.use_backend(backend):
            got = torch.autograd.grad(model(x), (x, model[0].alphas, model[3].alphas), dy)
        for g, w in zip(got, expected):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


def test_distill_trains_the_scales_alone_and_lowers_the_loss():
    base, tuned = pair()
    model = bitdelta.compress(base, tuned)
    before, everything = {k: v.clone() for k, v in model.state_dict().items()}, {k: v.clone() for k, v in tuned.state_dict().items()}
    data = [torch.randn(64, 70)]
    losses = bitdelta.distill(model, tuned, data, steps=60, lr=2e-4, progress=False)
    assert len(losses) == 60 and losses[-1] < losses[0]
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"0.alphas", "3.alphas"} and all(torch.equal(v, everything[k]) for k, v in tuned.state_dict().items())
    assert all(p.grad is None for p in base.parameters())
    with pytest.raises(ValueError, match="no batches"):
        bitdelta.distill(model, tuned, [], progress=False)
    with pytest.raises(ValueError, match="ended after 1 of 5 steps .* steps=1"):
        bitdelta.distill(model, tuned, iter(data), steps=5, progress=False)


def test_a_batch_of_tenants_is_each_tenant_alone():
    base, tuned = pair()
    others = [pair_of(base) for _ in range(3)]
    models = [bitdelta.compress(base, t, others="base") for t in (tuned, *others)]
    many, x = bitdelta.merge(models), torch.randn(9, 4, 70)
    tenants = torch.tensor([3, 0, -1, 1, 1, 2, 0, 3, -1])
    with bitdelta.serving(tenants):
        y = many(x)
    for i, t in enumerate(tenants.tolist()):
        want = base(x[i:i + 1]) if t < 0 else models[t](x[i:i + 1])
        torch.testing.assert_close(y[i:i + 1], want, rtol=1e-5, atol=1e-5)
    with torch.no_grad(), bitdelta.serving(tenants):  # another product of few rows
        torch.testing.assert_close(many(x[:, 0]), y[:, 0].detach(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="one for each row"), bitdelta.serving(torch.tensor([0, 1])):
        many(x)
    with pytest.raises(ValueError, match="compress with others='base'"):
        bitdelta.merge([bitdelta.compress(base, t) for t in (tuned, others[0])])


def pair_of(base):
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    return tuned


def test_a_tenant_takes_a_sixteenth_of_a_bf16_copy():
    base, tuned = (torch.nn.Sequential(torch.nn.Linear(512, 1024, bias=False), torch.nn.Linear(1024, 256, bias=False)) for _ in range(2))
    model = bitdelta.compress(base, tuned)
    weights = 512 * 1024 + 1024 * 256
    assert bitdelta.tenant_bytes(model) == weights // 8 + 2 * 4 <= 2 * weights / 10
    two = bitdelta.merge([model, model])
    held = sum(t.nbytes for k, t in two.state_dict().items() if not k.endswith(".weight"))
    assert held == 2 * bitdelta.tenant_bytes(model), "and the model holds nothing else"


def test_files(tmp_path):
    base, tuned = pair()
    model, x, path = bitdelta.compress(base, tuned), torch.randn(5, 70), tmp_path / "tenant.safetensors"
    bitdelta.save(model, path)
    assert [p.name for p in tmp_path.iterdir()] == ["tenant.safetensors"]
    assert path.stat().st_size < 4096, "no weight of the base is inside"
    again = bitdelta.load(base, path)
    assert torch.equal(again(x), model(x)) and again[0].weight is base[0].weight
    from safetensors.torch import load_file, save_file
    tensors = load_file(path)
    for bad, words in (({"gradmill_format": "bitdelta 9", "layers": "[]"}, "bitdelta 9"), ({}, "gradmill_format is None")):
        save_file(tensors, path, bad)
        with pytest.raises(gradmill.CheckpointError, match=words):
            bitdelta.load(base, path)
    bitdelta.save(model, path)
    with pytest.raises(gradmill.CheckpointError, match="needs an nn.Linear 0 with a weight of shape"):
        bitdelta.load(pair(71)[0], path)
    with pytest.raises(gradmill.CheckpointError, match="another base: the weight of 0 has other values"):
        bitdelta.load(tuned, path)
    assert torch.equal(bitdelta.load(copy.deepcopy(base).bfloat16(), path)[0].bits, model[0].bits)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(gradmill.CheckpointError, match="not a readable"):
        bitdelta.load(base, path)


def test_bfloat16_and_differing_models():
    base, tuned = pair(dtype=torch.bfloat16)
    model, x = bitdelta.compress(base, tuned), torch.randn(5, 70, dtype=torch.bfloat16)
    assert model(x).dtype == torch.bfloat16
    torch.testing.assert_close(model(x).float(), simulated(base.float(), tuned.float())(x.float()), rtol=0.05, atol=0.05)
    with pytest.raises(ValueError, match="differ in the linear layers 0"):
        bitdelta.compress(pair(71)[0], tuned)
    with pytest.raises(ValueError, match="no nn.Linear"):
        bitdelta.compress(base, tuned, filter=lambda name, layer: False)


def test_examples_of_the_docs_page(run_page, tmp_path):
    fqt, delta, biper, ap, bits = run_page("docs/one_bit.md")
    assert type(fqt["model"][2]) is gradmill.nn.Linear and type(fqt["model"][4]) is torch.nn.Linear
    x = delta["x"]
    assert delta["y"].shape == (4, 10) and torch.allclose(delta["y"][3:], delta["base"](x[3:]), atol=1e-5) and (tmp_path / "tenant.safetensors").exists()
    torch.testing.assert_close(delta["y"][:3], delta["tuned"](x[:3]))
    assert type(biper["model"][2]) is gradmill.nn.BinaryLinear and type(biper["model"][0]) is torch.nn.Linear
    assert ap["model"].layers[0][0].recipe.name == "w2"
    x, w = bits["x"], bits["w"]
    signs = [torch.where(t < 0, -1.0, 1.0) * t.abs().mean(1, keepdim=True) for t in (x, w)]
    torch.testing.assert_close(bits["y"], signs[0] @ signs[1].t())
    assert (bits["y4"] - x @ signs[1].t()).norm() < 0.2 * (x @ signs[1].t()).norm()


@pytest.mark.parametrize("others", ["finetuned", "base"])
def test_compress_changes_no_flag_of_its_arguments(others):
    base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 4))
    tuned = copy.deepcopy(base)
    tuned[2].weight.requires_grad_(False)
    base[0].bias.requires_grad_(False)
    before = [[p.requires_grad for p in m.parameters()] for m in (base, tuned)]
    bitdelta.compress(base, tuned, others=others)
    assert [[p.requires_grad for p in m.parameters()] for m in (base, tuned)] == before
    with pytest.raises(TypeError, match="tenants is a list"), bitdelta.serving([0, 1]):
        pass
