"""BCT: the integer arithmetic by hand and against floats, layers, a transformer block, what is refused, bytes."""
import copy
import math

import pytest
import torch

import gradmill
from gradmill import bct
from gradmill.nn import bct as layers
from gradmill.reference import shifted

from .conftest import LEVELS, assert_same_bits, running


def far(got, want):
    """Relative error, root mean square."""
    return ((got.double() - want.double()).square().mean() / want.double().square().mean().clamp(min=1e-300)).sqrt().item()


def value(q, e):
    return torch.ldexp(q.double(), e)


# --- arithmetic -------------------------------------------------------------------------------------------
def test_shifts_and_lengths_by_hand():
    v = torch.tensor([0, 1, 2, 3, 7, 8, (1 << 40) - 1, 1 << 40, (1 << 62) - 1])
    assert shifted.bit_length(v).tolist() == [x.bit_length() for x in v.tolist()]
    assert shifted.shift(torch.tensor([5, -5, 6, -6, 7, 1]), torch.tensor([-1, -1, -2, -2, 2, -62])).tolist() == [3, -2, 2, -1, 28, 0]
    assert shifted.divide(torch.tensor([7, -7, 5, 6, -1]), torch.tensor([2, 2, 3, 4, 3])).tolist() == [4, -3, 2, 2, 0]
    q, e = shifted.narrow(torch.tensor([[1000, -3, 250], [100, 5, 0], [0, 0, 0]]), torch.tensor([[2], [-1], [4]]), 8)
    assert q.tolist() == [[125, 0, 31], [100, 5, 0], [0, 0, 0]] and e.flatten().tolist() == [5, -1, 4]
    assert shifted.narrow(torch.tensor([[255]]), torch.tensor([[0]]), 8)[0].tolist() == [[127]], "rounded up beyond the range, it stays within"
    q, e = shifted.from_float(torch.tensor([[1.0, 0.5, -0.25], [0.0, 0.0, 0.0], [1e-40, 0.0, 0.0], [3e38, -1e38, 0.0]]), 8)
    assert value(q, e)[0].tolist() == [1.0, 0.5, -0.25] and value(q, e)[1].tolist() == [0, 0, 0] and value(q, e)[3, 0] == pytest.approx(3e38, rel=1 / 64)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="a nan or an inf"):
            shifted.from_float(torch.tensor([[1.0, bad]]), 8)


def test_roots_and_sums():
    v = torch.cat((torch.arange(300), torch.randint(0, 1 << 56, (2000,)), torch.randint(0, 1 << 28, (2000,)).square(), torch.randint(1, 1 << 28, (2000,)).square() - 1))
    assert shifted.root(v).tolist() == [math.isqrt(x) for x in v.tolist()]
    a, b = torch.randint(-(1 << 40), 1 << 40, (50, 8)), torch.randint(-(1 << 15), 1 << 15, (50, 8))
    a_e, b_e = torch.randint(-90, 90, (50, 1)), torch.randint(-90, 90, (50, 1))
    want, got = value(a, a_e) + value(b, b_e), value(*shifted.add(a, a_e, b, b_e))
    size = torch.maximum(value(a, a_e).abs().amax(1), value(b, b_e).abs().amax(1))[:, None]
    assert ((got - want).abs() <= size * 2.0 ** -28).all()


@pytest.mark.parametrize("name", ("relu", "gelu", "gelu_tanh", "silu"))
def test_activations(name):
    f = {"relu": torch.relu, "gelu": torch.nn.functional.gelu, "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"), "silu": torch.nn.functional.silu}[name]
    for scale in (1e-6, 0.01, 1.0, 5.0, 100.0, 1e6):
        q, e = shifted.from_float(torch.randn(7, 300) * scale, 16)
        x = value(q, e)
        y = value(*shifted.activate(q, e, name))
        assert ((y - f(x)).abs() <= 2.0 ** -14 + x.abs() * 2.0 ** -28).all(), (name, scale, (y - f(x)).abs().max())


def test_softmax_and_norms():
    for scale in (0.01, 1.0, 30.0, 1e4):
        q, e = shifted.from_float(torch.randn(9, 70) * scale, 16)
        p = value(*layers.BctSoftmax().integers(q, e))
        assert ((p - value(q, e).softmax(-1)).abs() <= 0.004).all() and ((p.sum(-1) - 1).abs() < 0.002).all()
        norm, rms = torch.nn.LayerNorm(70), torch.nn.RMSNorm(70, eps=1e-6)
        with torch.no_grad():
            for t in (*norm.parameters(), *rms.parameters()):
                t.copy_(torch.randn(70))
        x = value(q, e).float()
        for plain, ours in ((norm, layers.BctNorm(norm.weight, norm.bias, norm.eps, True)), (rms, layers.BctNorm(rms.weight, None, 1e-6, False))):
            torch.testing.assert_close(ours(x), plain(x), rtol=1e-3, atol=2e-3)
    assert torch.equal(layers.BctNorm(None, None, 1e-5, True)(torch.full((2, 8), 3.0)), torch.zeros(2, 8))
    tiny = torch.randn(3, 64) * 1e-4  # eps counts
    torch.testing.assert_close(layers.BctNorm(None, None, 1e-5, True)(tiny), torch.nn.functional.layer_norm(tiny, (64,)), rtol=1e-3, atol=2e-4)


# --- weights ----------------------------------------------------------------------------------------------
def test_a_matrix_by_hand_and_its_bytes():
    w = torch.tensor([[7.0, -3.0, 0.0, 1.0, 0, 0, 0, 0, 28.0, -8.0, 4.0, 0, 0, 0, 0, 0], [0.5] * 16])
    m = layers.ShiftMatrix(w, 4, 8)
    codes, exponents = m.integers()
    assert torch.equal(value(codes, exponents[:, None]), w.double()) and codes[0, 8:11].tolist() == [28, -8, 4]
    assert {k: t.nbytes for k, t in m.named_buffers()} == {"codes": 2 * 8, "exponents": 2, "offsets": 2}
    for bits in (2, 3, 4, 8):
        for rows, columns, block in ((5, 70, 16), (3, 128, 0), (1, 1, 8), (40, 300, 128)):
            w = torch.randn(rows, columns) * torch.logspace(-2, 2, rows)[:, None]
            m = layers.ShiftMatrix(w, bits, block)
            held = sum(t.nbytes for t in m.buffers())
            blocks = -(-columns // (min(block or columns, columns)))
            assert held == rows * -(-columns * bits // 8) + rows + rows * -(-blocks * 2 // 8)
            codes, exponents = m.integers()
            assert codes.dtype == torch.int8 and codes.abs().max() <= 127
            assert torch.equal(m.integers(torch.tensor([rows - 1]))[0], codes[rows - 1:])
            step = torch.ldexp(torch.ones(rows), w.abs().amax(1).frexp()[1] - (bits - 1))[:, None]  # of the row, nothing clipped
            error = (value(codes, exponents[:, None]) - w).square().sum(1)
            nearest = ((w / step).round().clamp(1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) * step - w).square().sum(1)
            assert (error <= nearest * (1 + 1e-5) + 1e-9).all(), "no worse than the row's plain shift"
    assert not layers.ShiftMatrix(torch.zeros(2, 8), 4, 8).integers()[0].any()
    loud = torch.tensor([1.0] * 8 + [100.0] * 8)  # columns that count
    w = torch.randn(20, 16)
    error = lambda m: ((value(m.integers()[0], m.integers()[1][:, None]) - w).square() * loud).sum()
    assert error(layers.ShiftMatrix(w, 3, 0, loud.double())) <= error(layers.ShiftMatrix(w, 3, 0))


# --- layers -----------------------------------------------------------------------------------------------
def test_a_linear_layer_is_an_exact_integer_product():
    linear = torch.nn.Linear(70, 33)
    for bits in (2, 3, 4, 8):
        ours = layers.BctLinear(layers.ShiftMatrix(linear.weight, bits, 16), linear.bias)
        codes, exponents = ours.matrix.integers()
        x = torch.randn(2, 5, 70)
        q, e = shifted.from_float(x, 8)
        want = value(q, e) @ value(codes, exponents[:, None]).t() + value(*ours.bias.integers())
        for variant in ("reference", *LEVELS):
            with running(variant):
                v, v_e = ours.integers(q, e)
                got = ours(x)
            assert ((value(v, v_e) - want).abs() <= want.abs().amax(-1, keepdim=True) * 2.0 ** -27).all(), variant
            assert got.dtype == torch.float32 and ((got - want).abs() <= want.abs().amax(-1, keepdim=True) * 2.0 ** -14).all()
    assert far(ours(x), linear(x)) < 0.02 and ours(torch.randn(70)).shape == (33,) and ours(torch.randn(0, 70)).shape == (0, 33)
    assert ours(x.bfloat16()).dtype == torch.bfloat16 and not ours(x).requires_grad
    with torch.no_grad():
        assert not ours(x.requires_grad_()).requires_grad
    with pytest.raises(RuntimeError, match="BctLinear comes from gradmill.bct.quantize: it only infers"):  # layers before it would not train
        (ours(x) + x.sum()).sum().backward()
    attention = gradmill.bct.quantize(torch.nn.MultiheadAttention(8, 2, batch_first=True))[0]
    with pytest.raises(RuntimeError, match="BctAttention"):
        attention(*[torch.randn(1, 3, 8, requires_grad=True)] * 3)[0].sum().backward()


@pytest.mark.parametrize("shape", [(0, 5, 16), (3, 0, 16), (0, 16)])
def test_an_empty_batch(shape):
    layer = torch.nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True).eval()
    assert gradmill.bct.quantize(layer)[0](torch.randn(shape)).shape == shape


def test_embeddings_and_ties():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = torch.nn.Embedding(50, 32), torch.nn.Linear(32, 50, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.embedding(x))
    model = Model()
    want = model.embedding.weight.detach()
    small, report = bct.quantize(copy.deepcopy(model), 8)
    assert small.embedding.matrix is small.head.matrix and report.bytes_before == 50 * 32 * 4 and report.bytes_after == 50 * 32 + 50 + 50
    x = torch.randint(0, 50, (3, 4))
    assert small.embedding(x).shape == (3, 4, 32) and far(small.embedding(x), want[x]) < 0.02 and far(small(x), model(x)) < 0.03


@pytest.mark.parametrize("norm_first", (False, True))
@pytest.mark.parametrize("batch_first", (False, True))
def test_a_transformer_block(norm_first, batch_first):
    torch.manual_seed(3)
    plain = torch.nn.TransformerEncoderLayer(64, 4, 128, 0.1, "gelu" if norm_first else "relu", batch_first=batch_first, norm_first=norm_first).eval()
    x = torch.randn(3, 11, 64) if batch_first else torch.randn(11, 3, 64)
    causal, padding = torch.nn.Transformer.generate_square_subsequent_mask(11), torch.zeros(3, 11, dtype=torch.bool)
    padding[1, 7:] = True
    errors = {}
    for bits in (2, 4, 8):
        ours, report = bct.quantize(copy.deepcopy(plain), bits)
        assert type(ours) is layers.BctEncoderLayer and list(report.layers) == [""]
        with torch.no_grad():
            for masks in ({}, {"src_mask": causal, "is_causal": True}, {"src_mask": causal < 0, "src_key_padding_mask": padding}):
                errors[bits] = far(ours(x, **masks), plain(x, **masks))
            assert errors[bits] < {2: 0.9, 4: 0.25, 8: 0.03}[bits], (bits, masks, errors)
            alone = x[:1] if batch_first else x[:, :1]
            torch.testing.assert_close(ours(alone.squeeze(0 if batch_first else 1)), ours(alone).squeeze(0 if batch_first else 1))
    assert errors[8] < errors[4] < errors[2]
    for variant in ("reference", *LEVELS):
        with running(variant):
            assert_same_bits(ours(x), ours(x.clone()))
    results = []
    for variant in ("reference", *LEVELS):
        with running(variant):
            results.append(ours(x))
    assert all(torch.equal(r, results[0]) for r in results), "integers: the same bits everywhere"


def test_attention_is_torchs():
    plain = torch.nn.MultiheadAttention(32, 4, kdim=20, vdim=24, batch_first=True).eval()
    ours, _ = bct.quantize(plain, 8)
    q, k, v = torch.randn(2, 5, 32), torch.randn(2, 7, 20), torch.randn(2, 7, 24)
    with torch.no_grad():
        assert far(ours(q, k, v)[0], plain(q, k, v)[0]) < 0.05
        mask = torch.rand(8, 5, 7) < 0.3
        mask[..., 0] = False
        assert far(ours(q, k, v, attn_mask=mask)[0], plain(q, k, v, attn_mask=mask)[0]) < 0.05
    with pytest.raises(ValueError, match="need_weights"):
        ours(q, k, v, need_weights=True)
    with pytest.raises(ValueError, match="attn_mask is torch.float32"):
        ours(q, k, v, attn_mask=torch.randn(5, 7))


def encoder(depth=2):
    layer = torch.nn.TransformerEncoderLayer(32, 2, 64, 0.0, "gelu", batch_first=True, norm_first=True)
    return torch.nn.Sequential(torch.nn.Embedding(40, 32), torch.nn.TransformerEncoder(layer, depth, enable_nested_tensor=False), torch.nn.LayerNorm(32), torch.nn.Linear(32, 40))


def test_a_tree_of_modules():
    model, x = encoder().eval(), torch.randint(0, 40, (2, 9))
    with torch.no_grad():
        want = model(x)
        small, report = bct.quantize(copy.deepcopy(model), 8, calibration=[x])
        assert far(small(x), want) < 0.06
    assert list(report.layers) == ["0", "1.layers.0", "1.layers.1", "2", "3"] and not report.floats
    before = sum(p.nbytes for p in model.parameters())
    after = sum(t.nbytes for t in small.state_dict().values())
    assert (report.bytes_before, report.bytes_after) == (before, after) and report.factor == before / after and not list(small.parameters())
    assert "times smaller" in str(report)
    other = bct.quantize(encoder().eval(), 8)[0]
    other.load_state_dict(small.state_dict())
    assert_same_bits(other(x), small(x))
    block = model[1].layers[0]  # calibration reaches the layers inside, the module itself being one
    loud = torch.randn(2, 9, 32) * torch.logspace(0, -2, 32)
    with torch.no_grad():
        block.self_attn.in_proj_weight.mul_(torch.logspace(-2, 0, 32))  # small where inputs are loud: a smaller shift is worth it
    weighed, plain = (bct.quantize(copy.deepcopy(block), 2, calibration=data)[0] for data in ([loud], None))
    assert any(not torch.equal(getattr(weighed.self_attn, part).matrix.codes, getattr(plain.self_attn, part).matrix.codes) for part in "qkv")
    part, report = bct.quantize(copy.deepcopy(model), filter=lambda name, module: name != "3")
    assert type(part[3]) is torch.nn.Linear and report.floats == {"3": "Linear"}


def test_compression_factors_are_exact():
    linear = torch.nn.Linear(4096, 64, bias=False)
    for block, bits_a_value in ((0, 4 + 8 / 4096 + 8 / 4096), (128, 4 + 2 / 128 + 8 / 4096)):
        report = bct.quantize(torch.nn.Sequential(copy.deepcopy(linear)), 4, block)[1]
        assert report.factor == pytest.approx(32 / bits_a_value, rel=1e-12)
    assert bct.quantize(torch.nn.Sequential(linear), 4, 0)[1].factor > 7.98


# --- refusals ---------------------------------------------------------------------------------------------
class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))


@pytest.mark.parametrize("model, arguments, error, words", [
    (3, {}, TypeError, "model is int"), (torch.nn.Linear(3, 3), dict(bits=5), ValueError, "bits is 5; it must be one of 2, 3, 4, 8"),
    (torch.nn.Linear(3, 3), dict(block=12), ValueError, "block is 12"), (torch.nn.Sequential(torch.nn.Linear(3, 3), Own()), {}, ValueError, "'1', a Own with Parameters of its own"),
    (torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3)), {}, ValueError, "'0', a Conv2d"), (torch.nn.LayerNorm((3, 4)), {}, ValueError, "more than the last dimension"),
    (torch.nn.Softmax(1), {}, ValueError, "dim=-1"), (torch.nn.Sequential(torch.nn.Dropout()), {}, ValueError, "nothing to quantise"),
    (torch.nn.TransformerEncoderLayer(8, 2, activation=torch.tanh), {}, ValueError, "its activation is tanh"),
    (torch.nn.Embedding(4, 4, max_norm=1.0), {}, ValueError, "max_norm"), (torch.nn.MultiheadAttention(8, 2, add_bias_kv=True), {}, ValueError, "bias_k"),
    (torch.nn.Linear(3, 3), dict(calibration=[]), ValueError, "no batches"),
])
def test_refusals(model, arguments, error, words):
    with pytest.raises(error, match=words):
        bct.quantize(model, **arguments)


def test_a_weight_that_is_not_finite_is_refused_and_nothing_changes():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    model[1].bias.data[0] = float("inf")
    with pytest.raises(ValueError, match="1.bias has a nan or an inf"):
        bct.quantize(model)
    assert type(model[0]) is torch.nn.Linear
    small = bct.quantize(torch.nn.Linear(3, 3))[0]
    with pytest.raises(ValueError, match="an input has a nan or an inf"):
        small(torch.full((2, 3), float("nan")))


def test_examples_of_the_docs_page(run_page):
    names, = run_page("docs/bct.md")
    assert names["y"].shape == (4, 32, 500) and not list(names["model"].parameters())


def test_integers_and_wrong_widths_are_refused_by_name():
    model = bct.quantize(torch.nn.Sequential(torch.nn.Linear(16, 4)), block=16)[0]
    with pytest.raises(TypeError, match="x is torch.int64"):
        model(torch.ones(2, 16, dtype=torch.int64))
    with pytest.raises(ValueError, match="last dimension must be 16"):
        model(torch.ones(2, 15))
