"""Codebooks: the packed product in every backend, gradients, steps of the indices, fitting, what a file holds."""
import copy

import pytest
import torch

import gradmill
from gradmill import codebook, ops
from gradmill.nn import CodebookLinear
from gradmill.reference.codebook import values
from gradmill.reference.quant import pack_bits

from .conftest import FLOATS, LEVELS, assert_same_bits, key, misaligned, running, threads, wild

SHAPES = [(1, 1, 1), (1, 3, 8), (1, 70, 63), (2, 33, 200), (4, 65, 129), (3, 20, 515), (1, 40, 1030), (7, 19, 100), (17, 33, 70), (70, 40, 300), (0, 5, 8), (3, 0, 9), (5, 4, 0)]


def weight(rows, columns, bits, groups=3):
    """(indices, codebooks, row_groups); unused bits of a row's last byte are random."""
    indices = torch.randint(0, 256, (rows, ops.codebook.row_bytes(columns, bits)), dtype=torch.uint8)
    return indices, wild(groups, 1 << bits), torch.randint(0, groups, (rows,)).to(torch.uint8)


def linear(*sizes, dtype=torch.float32):
    layers = [torch.nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])]
    return torch.nn.Sequential(*[part for layer in layers[:-1] for part in (layer, torch.nn.Tanh())], layers[-1]).to(dtype)


def fake(model):
    """The same model with plain layers that hold the same values."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, CodebookLinear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.dequantize_())
    return model


# --- the product ------------------------------------------------------------------------------------------
def test_by_hand():
    indices, books, groups = torch.tensor([[0b11_01_00_10], [0b00_00_01_11]], dtype=torch.uint8), torch.tensor([[0.0, 1, 2, 3], [0.0, 10, 20, 30]]), torch.tensor([0, 1], dtype=torch.uint8)
    want = torch.tensor([[2.0, 0, 1, 3], [30.0, 10, 0, 0]])
    assert torch.equal(values(indices, books, groups, 2, 4), want)
    x = torch.tensor([[1.0, 10, 100, 1000]])
    for variant in ("reference", *LEVELS):
        with running(variant):
            y = ops.matmul_codebook(x, indices, books, groups, 2, 4, False, torch.tensor([0.5, 0.0]), torch.float32)
            back = ops.matmul_codebook(torch.tensor([[1.0, 100.0]]), indices, books, groups, 2, 4, True, None, torch.float32)
            sums = ops.codebook_sums(torch.arange(8.0).view(2, 4), indices, groups, 2, 2)
        assert y.tolist() == [[3102.5, 130.0]] and back.tolist() == [[3002.0, 1000.0, 1.0, 3.0]], variant
        assert sums.tolist() == [[1, 2, 0, 3], [13, 5, 0, 4]], variant
    indices, books, groups = pack_bits(torch.tensor([[5, 0, 7, 2, 1]]), 3), torch.arange(8.0)[None], torch.zeros(1, dtype=torch.uint8)
    assert indices.tolist() == [[0b11_000_101, 0b0001_010_1]] and values(indices, books, groups, 3, 5).tolist() == [[5, 0, 7, 2, 1]]


@pytest.mark.parametrize("bits", range(1, 9))
def test_products(bits):
    for m, rows, columns in SHAPES:
        w = weight(rows, columns, bits)
        dense = values(w[0], w[1].double(), w[2], bits, columns)
        for dtype in FLOATS:
            for transpose in (False, True):
                x = torch.randn(m, rows if transpose else columns).to(dtype)
                b = dense if transpose else dense.t()
                bias = torch.randn(b.shape[1]) if m != 2 else None
                exact = x.double() @ b + (0 if bias is None else bias.double())
                size = x.double().abs() @ b.abs() + (0 if bias is None else bias.double().abs())
                bound = size * (x.shape[1] + 8) * 2.0 ** -23 + exact.abs() * torch.finfo(dtype).eps
                for variant in ("reference", *LEVELS):
                    with running(variant):
                        got = ops.matmul_codebook(x, *w, bits, columns, transpose, bias, dtype)
                    assert got.dtype == dtype and got.shape == exact.shape
                    finite = exact.abs() < torch.finfo(dtype).max / 2
                    assert ((got.double() - exact).abs() <= bound)[finite].all(), (variant, m, rows, columns, dtype, transpose)


def test_products_of_any_layout_and_threads():
    for bits in (3, 4, 5):
        w, x = weight(130, 300, bits), torch.randn(3, 300)
        for level in LEVELS:
            with running(level):
                want = ops.matmul_codebook(x, *w, bits, 300, False, None, torch.float32)
                odd = ops.matmul_codebook(misaligned(x), *map(misaligned, w), bits, 300, False, None, torch.float32)
                turned = ops.matmul_codebook(x.t().contiguous().t(), *w, bits, 300, False, None, torch.float32)
                with threads(2):
                    both = ops.matmul_codebook(x, *w, bits, 300, False, None, torch.float32)
            for got in (odd, turned, both):
                assert_same_bits(got, want, level)


def test_a_codeword_that_is_not_finite_shows_where_it_is_used():
    for bits in (2, 4, 8):
        indices = pack_bits(torch.zeros(5, 70, dtype=torch.int64), bits)
        indices[2] = pack_bits(torch.ones(1, 70, dtype=torch.int64), bits)
        books, groups = torch.ones(1, 1 << bits), torch.zeros(5, dtype=torch.uint8)
        for value in (float("nan"), float("inf")):
            books[0, 1] = value
            for m in (1, 3, 9, 40):
                for level in LEVELS:
                    with running(level):
                        y = ops.matmul_codebook(torch.ones(m, 70), indices, books, groups, bits, 70, False, None, torch.float32)
                    assert (y[:, [0, 1, 3, 4]] == 70).all() and not y[:, 2].isfinite().any(), (level, m, bits)


# --- sums and steps ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", range(1, 9))
def test_sums(bits):
    for rows, columns in ((1, 1), (13, 70), (40, 515), (0, 3), (3, 0)):
        indices, _, groups = weight(rows, columns, bits)
        dw = wild(rows, columns)
        with running("reference"):
            want = ops.codebook_sums(dw, indices, groups, 3, bits)
            size = ops.codebook_sums(dw.abs(), indices, groups, 3, bits)
        for level in LEVELS[:1]:
            with running(level):
                got = ops.codebook_sums(dw, indices, groups, 3, bits)
                with threads(2):
                    assert_same_bits(ops.codebook_sums(dw, indices, groups, 3, bits), got)
            assert got.dtype == torch.float64 and ((got - want).abs() <= size * (rows * columns + 1) * 2.0 ** -53).all()


def moved(*args):
    """move_indices on copies: (indices, fractions)."""
    indices, fractions = args[0].clone(), args[1].clone()
    ops.move_indices(indices, fractions, *args[2:])
    return indices, fractions


@pytest.mark.parametrize("bits", range(1, 9))
def test_steps_are_bit_equal(bits):
    for rows, columns in ((1, 1), (5, 13), (11, 70), (0, 3), (3, 0)):
        indices, books, groups = weight(rows, columns, bits)
        indices = pack_bits(torch.randint(0, 1 << bits, (rows, columns)), bits)
        fractions = torch.randint(-128, 128, (rows, columns)).to(torch.int8)
        dw = wild(rows, columns)
        if columns > 5:
            dw[0, :6] = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45])
        for ascending in (True, False):
            given = books.sort(1).values if ascending else books
            if rows == 11:
                given = given.clone()
                given[1] = 1.0  # all codewords are equal
                given[2, -1] = float("inf")
            args = (indices, fractions, given, groups, dw, torch.rand(rows, 1), bits, key(7 + (1 << 35), 3), 5 << 8, 17)
            with running("reference"):
                want = moved(*args)
            for level in LEVELS:
                with running(level):
                    assert_same_bits(moved(*args), want, f"{level} {rows} {columns}")
                    with threads(2):
                        assert_same_bits(moved(*args), want, "threads")


def test_a_step_by_hand():
    """Codewords 0, 1, 3: mean distance 1 with a fourth at 3. An index's weight falls with the distance to the next codeword."""
    books, groups, zero = torch.tensor([[0.0, 1.0, 3.0, 3.0]]), torch.zeros(1, dtype=torch.uint8), torch.zeros(1, 4, dtype=torch.int8)
    indices, rates = pack_bits(torch.tensor([[0, 1, 1, 2]]), 2), torch.ones(1, 1)
    dw = torch.tensor([[-0.25, 0.25, -0.3, 0.3]])  # up 1 away, down 1 away, up 2 away, down 2 away
    for variant in ("reference", *LEVELS[:1]):
        with running(variant):
            q, f = moved(indices, zero, books, groups, dw, rates, 2, key(), 0, 0)
            assert torch.equal(q, indices) and f[0, :2].tolist() == [64, -64], variant
            assert f[0, 2].item() in (51, 52) and f[0, 3].item() in (-51, -52), "0.3 * 256 * 2 / (2 + 1), rounded stochastically"
            q, f = moved(indices, f, books, groups, dw, rates, 2, key(), 0, 0)
            q, f = moved(q, f, books, groups, dw, rates, 2, key(), 0, 0)
            assert q.tolist() == pack_bits(torch.tensor([[1, 0, 2, 1]]), 2).tolist() and f[0, 0].item() in (-85, -86) and f[0, 1].item() == 64
            q, f = moved(pack_bits(torch.tensor([[0, 3, 0, 3]]), 2), zero, books, groups, torch.tensor([[9.0, -9.0, 9.0, -9.0]]), rates, 2, key(), 0, 0)
            assert q.tolist() == pack_bits(torch.tensor([[0, 3, 0, 3]]), 2).tolist() and f.tolist() == [[-128, 127, -128, 127]], "the ends hold"


def test_steps_are_unbiased():
    """Many keys: the mean movement is the step itself."""
    books, groups = torch.arange(16.0)[None], torch.zeros(1, dtype=torch.uint8)
    indices, dw = pack_bits(torch.full((1, 4000), 8), 4), torch.full((1, 4000), 1e-3)
    total = sum(moved(indices, torch.zeros(1, 4000, dtype=torch.int8), books, groups, dw, torch.ones(1, 1), 4, key(3, step), 0, 0)[1].double().mean() for step in range(20))
    assert total / 20 / 256 == pytest.approx(-1e-3, abs=6 * 0.5 / 256 / 80000 ** 0.5)


# --- layers -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shared", (False, True))
def test_gradients_are_those_of_the_dense_form(shared):
    model = linear(70, 33, 300, 5)
    codebook.fit(model, 3, groups=3, shared=shared, filter=lambda name, layer: name != "0", progress=False)
    x, dy = torch.randn(9, 70, requires_grad=True), torch.randn(9, 5)
    for variant in ("reference", *LEVELS):
        with running(variant):
            parameters = dict(model.named_parameters())
            got = torch.autograd.grad(model(x), [x, *parameters.values()], dy)
        dense = {n: m for n, m in model.named_modules() if isinstance(m, CodebookLinear)}
        h = x
        for name, layer in model.named_children():
            h = torch.nn.functional.linear(h, values(layer.indices, layer.books(), layer.row_groups, 3, layer.in_features), layer.bias) if name in dense else layer(h)
        for name, g, w in zip(("x", *parameters), got, torch.autograd.grad(h, [x, *parameters.values()], dy)):
            torch.testing.assert_close(g, w, rtol=2e-4, atol=1e-5, msg=lambda text: f"{variant} {name}: {text}")
    assert (set(n.split(".")[-1] for n in parameters) == {"weight", "bias", "codebooks"} | ({"scales"} if shared else set()))


def test_dtypes_and_autocast():
    model = linear(40, 30, 10, dtype=torch.bfloat16)
    codebook.fit(model, 4, filter=lambda *_: True, progress=False)
    x = torch.randn(3, 2, 40, dtype=torch.bfloat16, requires_grad=True)
    y = model(x)
    assert y.dtype == torch.bfloat16 and y.shape == (3, 2, 10)
    y.float().sum().backward()
    assert x.grad.dtype == torch.bfloat16 and model[0].codebooks.grad.dtype == torch.float32 and model[0].bias.grad.dtype == torch.bfloat16
    torch.testing.assert_close(y, fake(model)(x), rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert codebook_layer()(torch.randn(2, 40)).dtype == torch.bfloat16
    assert codebook_layer()(torch.randn(40)).shape == (10,) and codebook_layer()(torch.randn(0, 40)).shape == (0, 10)
    with pytest.raises(ValueError, match="its last dimension must be 40"):
        codebook_layer()(torch.randn(2, 41))


def codebook_layer():
    model = torch.nn.Sequential(torch.nn.Linear(40, 10))
    codebook.fit(model, 2, progress=False)
    return model[0]


def test_compiles():
    layer, x = codebook_layer(), torch.randn(5, 40)
    assert_same_bits(torch.compile(layer, backend="aot_eager", fullgraph=True)(x).detach(), layer(x).detach())


# --- fitting ----------------------------------------------------------------------------------------------
def test_lloyd_is_near_the_best_codewords():
    """Those that dynamic programming finds over sorted values."""
    ratios = []
    for _ in range(10):
        n, count = 60, 4
        x, w = torch.randn(n, dtype=torch.float64).sort().values, torch.rand(n, dtype=torch.float64)
        m, s, q = (torch.cat((torch.zeros(1), t.cumsum(0))) for t in (w, w * x, w * x * x))
        cost = torch.full((n + 1, n + 1), float("inf"), dtype=torch.float64)  # of one codeword for values a to b
        for a in range(n):
            cost[a, a + 1:] = (q[a + 1:] - q[a]) - (s[a + 1:] - s[a]).square() / (m[a + 1:] - m[a])
        best = cost[0]
        for _ in range(count - 1):
            best = (best[:, None] + cost).min(0).values
        words = codebook.lloyd(x, w, count, 100)
        nearest = (x[:, None] - words).abs().argmin(1)
        assert words.tolist() == sorted(words.tolist())
        ratios.append((w * (x - words[nearest]).square()).sum().item() / best[n].item())
        for k in range(count):  # a fixed point: every codeword is the mean of what is nearest to it
            mine = nearest == k
            assert not mine.any() or words[k].item() == pytest.approx((x[mine] * w[mine]).sum().item() / w[mine].sum().item(), abs=1e-9)
    assert min(ratios) > 1 - 1e-9 and sum(ratios) / len(ratios) < 1.5, ratios
    outlier = torch.cat((torch.randn(500), torch.tensor([60.0])))
    assert codebook.lloyd(outlier, torch.ones(501), 4, 100)[-1].item() == 60
    assert codebook.lloyd(torch.full((5,), 2.0), torch.ones(5), 4, 10).tolist() == [2.0] * 4
    assert codebook.lloyd(torch.tensor([3.0, 1.0]), torch.ones(2), 2, 10).tolist() == [1.0, 3.0]


def test_rows_are_grouped_by_distribution():
    kinds = torch.arange(60)[torch.randperm(60)] % 3
    rows = torch.stack([torch.randn(300) * 0.1 if k == 0 else torch.randn(300) if k == 1 else torch.randn(300).sign() + 0.01 * torch.randn(300) for k in kinds.tolist()])
    found = codebook.row_groups(rows, 3, False)
    assert len({(k, f) for k, f in zip(kinds.tolist(), found.tolist())}) == 3, "those of one size differ in shape"
    assert codebook.row_groups(rows, 1, False).tolist() == [0] * 60
    scales = codebook.row_groups(rows[kinds < 2], 2, True)
    assert len({(k, f) for k, f in zip(kinds[kinds < 2].tolist(), scales.tolist())}) == 2


def test_more_bits_are_nearer_and_bytes_are_exact():
    base, errors = linear(130, 90, 40), []
    for bits in range(1, 9):
        model = copy.deepcopy(base)
        report = codebook.fit(model, bits, rows_per_group=32, progress=False, filter=lambda name, layer: True)
        layer = model[0]
        held = sum(t.nbytes for k, t in layer.state_dict().items() if k != "bias")
        assert held == layer.nbytes() == report.layers["0"].after == 90 * -(-130 * bits // 8) + 90 + 3 * 4 * 2 ** bits and report.layers["0"].groups == 3
        error = (layer.dequantize() - base[0].weight).square().sum() / base[0].weight.square().sum()
        assert error.item() == pytest.approx(report.layers["0"].error, rel=1e-4)
        errors.append(report.layers["0"].error)
        assert "codebook.fit" in str(report)
    assert errors == sorted(errors, reverse=True) and errors[0] < 0.3 and errors[3] < 0.0045 and errors[7] < 2e-5
    for bits, ours in ((2, errors[1]), (4, errors[3])):  # rounded to nearest in groups of 64 of a row
        step = base[0].weight.detach()
        codes = ops.quantize(step, f"uint{bits}", 64)
        nearest = (ops.dequantize(*codes, f"uint{bits}", 64, 130, torch.float32) - step).square().sum() / step.square().sum()
        assert ours < nearest if bits == 2 else ours < 1.5 * nearest
    a, b = copy.deepcopy(base), copy.deepcopy(base)
    codebook.fit(a, 5, shared=True, groups=4, progress=False)
    with threads(2):
        codebook.fit(b, 5, shared=True, groups=4, progress=False)
    assert_same_bits(dict(a.state_dict()), dict(b.state_dict()), "deterministic")
    assert a[0].codebooks.shape == (1, 32) and a[0].scales.shape == (4, 1) and a[0].nbytes() == 90 * -(-130 * 5 // 8) + 90 + 4 * 32 + 4 * 4


def test_calibration_weighs_inputs():
    base, x = linear(64, 48, 8), torch.randn(256, 64) * torch.logspace(1, -2, 64)
    with torch.no_grad():
        base[0].weight.mul_(torch.logspace(-2, 0, 64))  # small where inputs are large: all weights alike, codewords go to the others
    plain, weighed = copy.deepcopy(base), copy.deepcopy(base)
    codebook.fit(plain, 2, progress=False)
    modes = [m.training for m in weighed.modules()]
    codebook.fit(weighed, 2, calibration=[x[:128], (x[128:],)], progress=False)
    assert all(modes)
    error = lambda model: (model[0](x) - base[0](x)).square().mean().item()
    assert error(weighed) < 0.5 * error(plain)
    with pytest.raises(ValueError, match="no batches"):
        codebook.fit(copy.deepcopy(base), 2, calibration=[], progress=False)
    with pytest.raises(ValueError, match="not finite"):
        codebook.fit(copy.deepcopy(base), 2, calibration=[x * float("inf")], progress=False)


def test_what_is_replaced_and_what_is_not():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.a, self.b, self.lm_head = torch.nn.Embedding(9, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 9)
            self.attention, self.hooked, self.tied = torch.nn.MultiheadAttention(8, 2), torch.nn.Linear(8, 8), torch.nn.Linear(8, 9)
            self.b.weight, self.again, self.tied.weight = self.a.weight, self.a, self.embedding.weight
            self.hooked.register_forward_hook(lambda *_: None)
    model = Model()
    bias = model.a.bias
    report = codebook.fit(model, 4, progress=False)
    assert list(report.layers) == ["a", "b", "again"] and report.bytes_before == 256 and report.bytes_after == model.a.nbytes() == 8 * 4 + 8 + 64
    assert {n for n, _ in report.skipped} == {"lm_head", "attention.out_proj", "hooked", "tied"}
    assert model.again is model.a and model.b is not model.a and model.b.codebooks is model.a.codebooks and model.b.indices is model.a.indices
    assert model.a.bias is bias and model.b.bias is not bias
    frozen = torch.nn.Sequential(torch.nn.Linear(8, 8).requires_grad_(False))
    codebook.fit(frozen, 4, progress=False)
    assert not any(p.requires_grad for p in frozen.parameters())
    for bad, words in ((dict(bits=0), "bits is 0"), (dict(bits=9), "bits is 9"), (dict(groups=257), "groups is 257"), (dict(rows_per_group=0), "rows_per_group"),
                       (dict(filter=lambda *_: False), "no nn.Linear")):
        with pytest.raises(ValueError, match=words):
            codebook.fit(linear(8, 8, 8), progress=False, **bad)
    broken = linear(8, 8, 8)
    broken[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="'0' has a nan"):
        codebook.fit(broken, progress=False)
    assert type(broken[2]) is torch.nn.Linear
    with pytest.raises(TypeError, match="model is int"):
        codebook.fit(3)


def test_back_to_plain_layers():
    model, x = linear(70, 33, 10), torch.randn(5, 70)
    codebook.fit(model, 5, filter=lambda *_: True, progress=False)
    plain = fake(model)
    assert type(plain[0]) is torch.nn.Linear and plain[0].weight.requires_grad
    torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-5)


# --- training ---------------------------------------------------------------------------------------------
def test_codebooks_and_indices_train():
    torch.manual_seed(0)
    teacher, x = linear(32, 64, 16), torch.randn(512, 32)
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(2)
    want, losses = teacher(x).detach(), {}
    for which in ("neither", "codebooks", "both"):
        model = copy.deepcopy(teacher)
        codebook.fit(model, 2, groups=2, filter=lambda *_: True, progress=False)
        optimizer, indices = gradmill.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0), codebook.Indices(model, lr=0.03, seed=5)
        schedule = torch.optim.lr_scheduler.LinearLR(indices, 1.0, 0.05, 150)
        before = model[0].indices.clone()
        for _ in range(150 if which != "neither" else 0):
            loss = (model(x) - want).square().mean()
            loss.backward()
            optimizer.step()
            if which == "both":
                indices.step()
                schedule.step()
            optimizer.zero_grad()
            indices.zero_grad()
        losses[which] = (model(x) - want).square().mean().item()
        assert torch.equal(model[0].indices, before) == (which != "both")
    assert losses["both"] < 0.6 * losses["codebooks"] < 0.6 * losses["neither"], losses


def test_a_resumed_run_has_the_same_bits():
    def start():
        torch.manual_seed(1)
        model = linear(40, 300, 10)
        codebook.fit(model, 3, filter=lambda *_: True, progress=False)
        return model, torch.optim.SGD(model.parameters(), lr=0.05), codebook.Indices(model, lr=0.2, seed=9)

    def steps(model, optimizer, indices, which):
        for i in which:
            x = torch.randn(8, 40, generator=torch.Generator().manual_seed(i))
            model(x).square().mean().backward()
            optimizer.step(), indices.step(), optimizer.zero_grad(), indices.zero_grad()
    whole = start()
    steps(*whole, range(6))
    first, second = start(), start()
    steps(*first, range(3))
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(first[1].state_dict())
    second[2].load_state_dict(copy.deepcopy(first[2].state_dict()))
    steps(*second, range(3, 6))
    assert_same_bits(dict(second[0].state_dict()), dict(whole[0].state_dict()))
    assert_same_bits(second[2].state_dict()["state"], whole[2].state_dict()["state"])
    with threads(2):
        again = start()
        steps(*again, range(1))
    once = start()
    steps(*once, range(1))
    torch.testing.assert_close(again[0][0].dequantize(), once[0][0].dequantize())


def test_indices_keep_what_they_need_and_no_more():
    model = linear(40, 20, 10)
    codebook.fit(model, 3, filter=lambda *_: True, progress=False)
    with pytest.raises(ValueError, match="no CodebookLinear"):
        codebook.Indices(linear(3, 3))
    with pytest.raises(ValueError, match="lr is -1"):
        codebook.Indices(model, lr=-1)
    model(torch.randn(3, 40)).sum().backward()
    assert model[0].kept is None
    indices = codebook.Indices(model)
    before = model[0].indices.clone()
    indices.step()
    assert torch.equal(model[0].indices, before), "no backward pass, no step"
    for _ in range(2):
        model(torch.randn(3, 40)).sum().backward()
    assert len(model[0].kept) == 2 and [t.shape[1] for t in model[0].kept[0]] == [40, 20]
    indices.step()
    state = indices.state[model[0].indices]
    assert set(state) == {"step", "fractions"} and state["fractions"].nbytes == 40 * 20 and state["step"] == 1
    model(torch.full((3, 40), float("nan"))).sum().backward()
    indices.zero_grad()
    assert model[0].kept == []
    indices.stop()
    model(torch.randn(3, 40)).sum().backward()
    assert model[0].kept is None


def test_sorting_changes_no_value():
    for shared in (False, True):
        model = linear(70, 300, 5)
        codebook.fit(model, 3, groups=4, shared=shared, progress=False)
        layer = model[0]
        with torch.no_grad():
            layer.codebooks.copy_(torch.randn_like(layer.codebooks))
        before = layer.dequantize()
        layer.sort_()
        assert (layer.codebooks.diff(dim=1) >= 0).all() and torch.equal(layer.dequantize(), before)


# --- files ------------------------------------------------------------------------------------------------
def test_files(tmp_path):
    base, x, path = linear(70, 33, 20, 10), torch.randn(5, 70), tmp_path / "small.safetensors"
    for shared in (False, True):
        model = copy.deepcopy(base)
        codebook.fit(model, 3, groups=3, shared=shared, progress=False)
        codebook.save(model, path)
        assert [p.name for p in tmp_path.iterdir()] == ["small.safetensors"]
        for other in (linear(70, 33, 20, 10), copy.deepcopy(model)):
            again = codebook.load(other, path)
            assert again is other and torch.equal(again(x), model(x)) and type(again[0]) is CodebookLinear
    from safetensors.torch import load_file, save_file
    tensors = load_file(path)
    save_file(tensors, path, {"gradmill_format": "codebook 9", "layers": "{}"})
    with pytest.raises(gradmill.CheckpointError, match="codebook 9"):
        codebook.load(copy.deepcopy(base), path)
    codebook.save(model, path)
    with pytest.raises(gradmill.CheckpointError, match=r"needs a linear layer 0 with a weight of shape \(33, 70\)"):
        codebook.load(linear(71, 33, 20, 10), path)
    with pytest.raises(gradmill.CheckpointError, match="does not fit model"):
        codebook.load(torch.nn.Sequential(*base, torch.nn.LayerNorm(10)), path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(gradmill.CheckpointError, match="not a readable"):
        codebook.load(copy.deepcopy(base), path)
    with pytest.raises(ValueError, match="no CodebookLinear"):
        codebook.save(base, path)


# --- refusals ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("change, error, words", [
    (dict(x=torch.randn(2, 9).double()), TypeError, "matmul_codebook: x is float64"), (dict(x=torch.randn(2, 8)), ValueError, "matmul_codebook: x is"),
    (dict(bits=9), ValueError, "bits is 9; it must be 1 to 8"), (dict(columns=17), ValueError, "indices is uint8"),
    (dict(codebooks=torch.randn(3, 8)), ValueError, "codebooks is"), (dict(codebooks=torch.randn(3, 16).half()), TypeError, "codebooks is float16"),
    (dict(row_groups=torch.zeros(4, dtype=torch.int64)), TypeError, "row_groups is int64"), (dict(row_groups=torch.zeros(5, dtype=torch.uint8)), ValueError, "row_groups is uint8"),
    (dict(row_groups=torch.full((4,), 3, dtype=torch.uint8)), ValueError, "row_groups is 3; it must be below 3"), (dict(dtype=torch.float64), TypeError, "dtype"),
    (dict(bias=torch.randn(9)), ValueError, "bias is"), (dict(indices=torch.zeros(4, 5)), TypeError, "indices is float32"),
])
def test_errors_name_the_argument(change, error, words):
    indices, books, groups = weight(4, 9, 4)
    given = dict(x=torch.randn(2, 9), indices=indices, codebooks=books, row_groups=groups, bits=4, columns=9, transpose=False, bias=None, dtype=torch.float32)
    with pytest.raises(error, match=words):
        ops.matmul_codebook(*{**given, **change}.values())


def test_examples_of_the_docs_page(run_page):
    names = run_page("docs/codebook.md")[-1]
    x = names["batches"][0]
    assert type(names["model"][0]) is CodebookLinear and torch.equal(names["fresh"](x), names["model"](x))


def test_a_model_may_look_at_a_layers_weight():
    class Feed(torch.nn.Module):  # as T5's does
        def __init__(self):
            super().__init__()
            self.wo = torch.nn.Linear(12, 8, bias=False)

        def forward(self, x):
            return self.wo(x.to(self.wo.weight.dtype) if isinstance(self.wo.weight, torch.Tensor) and x.dtype != self.wo.weight.dtype else x)
    model, x = torch.nn.Sequential(Feed(), torch.nn.ModuleList([torch.nn.ModuleDict({"fc_out": torch.nn.Linear(8, 8)})])), torch.randn(3, 12)
    report = codebook.fit(model, 4, progress=False)
    assert set(report.layers) == {"0.wo", "1.0.fc_out"}  # GPT-J's fc_out is no head
    layer = model[0].wo
    assert torch.equal(layer.weight, layer.dequantize()) and layer.weight.shape == (8, 12) and "weight" not in dict(layer.named_parameters()) | layer.state_dict()
    assert model[0](x.bfloat16()).dtype == torch.float32
