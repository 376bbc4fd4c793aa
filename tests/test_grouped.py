"""grouped: every expert against a layer of its own, whatever the experts' sizes."""
import copy
import pickle

import pytest
import torch

from gradmill import functional
from gradmill.formats import FORMATS, Format
from gradmill.nn import GroupedLinear, Linear
from gradmill.ops import matmul_grouped, matmul_int8, matmul_scaled, quantize, quantize_grouped
from gradmill.recipes import Matmul, Recipe

from .conftest import FLOATS, LEVELS, assert_same_bits, key, reference, running, threads, wild

NAMES = ["int8", "int8_switchback", "int7", "fp8_tensor", "fp8_row", "fp8_row_pow2", "fp8_block", "bf16"]
EXACT = ["int8", "int7"]
SIZES = [[5], [0], [], [3, 0, 70, 1], [0, 0, 0], [0, 130, 17], [64, 65, 66, 0, 1, 2], [9, 9, 9]]


def ends(sizes):
    return torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32)


def parts(x, sizes):
    return x[:sum(sizes)].split(sizes) if sizes else ()


# --- quantize_grouped -------------------------------------------------------------------------------------
@pytest.mark.parametrize("code", ["int8", "int7", "e4m3", "e5m2"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_quantising_over_tokens_is_each_experts_transpose(code, sizes):
    for columns, spare, block, dtype in ((33, 0, 0, torch.float32), (1, 3, 32, torch.bfloat16), (70, 5, 128, torch.float32), (0, 1, 0, torch.float32)):
        x, offs = wild(sum(sizes) + spare, columns, dtype=dtype), ends(sizes)
        if x.numel() > 9:
            x.view(-1)[7] = torch.nan
        for k in (None, key(3, 4)):
            want = reference(quantize_grouped, x, offs, code, block, k, 2 << 8)
            given = torch.rand_like(want[1])
            for variant in LEVELS:
                with running(variant):
                    assert_same_bits(quantize_grouped(x, offs, code, block, k, 2 << 8), want, f"{variant} {block}")
                    assert_same_bits(quantize_grouped(x, offs, code, block, k, 2 << 8, given),
                                     reference(quantize_grouped, x, offs, code, block, k, 2 << 8, given), f"{variant} {block} given")
            at = first = 0
            for e, part in enumerate(parts(x, sizes)):
                codes, scales, _ = quantize(part, code, block, True, k, 2 << 8 | 0 if e == 0 else (2 + e) << 8)
                assert torch.equal(want[0].view(torch.uint8).view(-1)[at:at + codes.numel()], codes.view(torch.uint8).view(-1))
                assert_same_bits(want[1].view(-1)[first:first + scales.numel()].clone(), scales.view(-1))
                at, first = at + codes.numel(), first + scales.numel()


def test_quantising_takes_any_layout_and_thread_count():
    x, offs = torch.randn(90, 20), ends([40, 0, 50])
    want = quantize_grouped(x, offs, "int8")
    for view in (x.t().contiguous().t(), torch.cat((x, x), 1)[:, :20], x.repeat_interleave(2, 0)[::2]):
        assert_same_bits(quantize_grouped(view, offs, "int8"), want)
    x, offs, results = torch.randn(900, 80), torch.arange(50, 901, 50, dtype=torch.int32), []
    for count in (1, 2):
        with threads(count):
            results.append(quantize_grouped(x, offs, "e4m3"))
    assert_same_bits(results[0], results[1])


# --- matmul_grouped ---------------------------------------------------------------------------------------
def operand(x, code, block):
    if not Format(code).blocked:
        return x.to(Format(code).code_dtype), None
    codes, scales, _ = quantize(x.flatten(0, -2), code, block)
    return codes.view(x.shape), scales.view(*x.shape[:-1], scales.shape[1])


def single(a, sa, a_code, a_block, b, sb, b_code, b_block, bias, dtype):
    if {a_code, b_code} <= {"int8", "int7"} and not a_block and not b_block:
        return matmul_int8(a, b, sa, sb, bias, dtype)
    return matmul_scaled(a, sa, None, a_code, a_block, b, sb, None, b_code, b_block, b.shape[1], False, bias, dtype)


PAIRS = [("int8", 0, "int8", 0), ("int7", 0, "int7", 0), ("int8", 0, "int7", 0), ("e4m3", 0, "e4m3", 0), ("e5m2", 0, "e4m3", 0), ("e4m3", 32, "e4m3", 32),
         ("int8", 32, "e4m3", 0), ("fp32", 0, "fp32", 0), ("bf16", 0, "bf16", 0), ("fp16", 0, "fp32", 0)]


@pytest.mark.parametrize("a_code, a_block, b_code, b_block", PAIRS)
def test_a_product_per_expert_is_the_same_bits_as_a_call_of_its_own(a_code, a_block, b_code, b_block):
    """On one instruction set the way a product takes depends on its own shape only: float sums are equal too."""
    for sizes in SIZES:
        for n, k, spare, dtype in ((33, 70, 0, torch.float32), (1, 1, 3, torch.bfloat16), (64, 130, 2, torch.float16), (5, 0, 0, torch.float32)):
            if not sizes:
                continue
            a, b = torch.randn(sum(sizes) + spare, k), torch.randn(len(sizes), n, k)
            (qa, sa), (qb, sb) = operand(a, a_code, a_block), operand(b, b_code, b_block)
            bias = torch.randn(len(sizes), n)
            for variant in LEVELS:
                with running(variant):
                    got = matmul_grouped(qa, sa, a_code, a_block, qb, sb, b_code, b_block, ends(sizes), bias, dtype)
                    scales = parts(sa, sizes) if sa is not None else [None] * len(sizes)
                    want = [single(x, s, a_code, a_block, qb[e], None if sb is None else sb[e], b_code, b_block, bias[e], dtype)
                            for e, (x, s) in enumerate(zip(parts(qa, sizes), scales))]
                assert_same_bits(got, torch.cat((*want, torch.zeros(spare, n, dtype=dtype))), f"{variant} {sizes} {n} {k}")


@pytest.mark.parametrize("a_code, a_block, b_code, b_block", PAIRS)
def test_equal_experts_and_sums_over_tokens(a_code, a_block, b_code, b_block):
    plain = not Format(a_code).blocked
    for variant in ("reference", *LEVELS):
        with running(variant):
            a, b = torch.randn(3, 20, 70), torch.randn(3, 33, 70)
            (qa, sa), (qb, sb) = operand(a, a_code, a_block), operand(b, b_code, b_block)
            got = matmul_grouped(qa, sa, a_code, a_block, qb, sb, b_code, b_block, None, None, torch.float32)
            assert_same_bits(got, torch.stack([single(qa[e], None if plain else sa[e], a_code, a_block, qb[e], None if plain else sb[e], b_code, b_block,
                                                      None, torch.float32) for e in range(3)]), variant)
            for sizes in SIZES:
                x, y, offs = torch.randn(sum(sizes) + 2, 9), torch.randn(sum(sizes) + 2, 40), ends(sizes)
                if plain:
                    qx, qy = (x.to(Format(a_code).code_dtype), None), (y.to(Format(b_code).code_dtype), None)
                else:
                    qx, qy = quantize_grouped(x, offs, a_code, a_block), quantize_grouped(y, offs, b_code, b_block)
                got = matmul_grouped(*qx, a_code, a_block, *qy, b_code, b_block, offs, None, torch.float32)
                assert got.shape == (len(sizes), 9, 40)
                for e, (i, j) in enumerate(zip(parts(qx[0] if plain else x, sizes), parts(qy[0] if plain else y, sizes))):
                    if not len(i):
                        assert not got[e].any()
                    elif plain:
                        assert (got[e] - i.double().t() @ j.double()).abs().max() < 1e-5 * (i.double().abs().t() @ j.double().abs()).max()
                    else:
                        (p, sp, _), (q, sq, _) = quantize(i, a_code, a_block, True), quantize(j, b_code, b_block, True)
                        assert_same_bits(got[e], single(p, sp, a_code, a_block, q, sq, b_code, b_block, None, torch.float32), f"{variant} {sizes} {e}")


@pytest.mark.parametrize("code", ["int8", "int7"])
def test_integers_are_exact_in_every_backend_and_extreme(code):
    top = 127 if code == "int8" else 63
    sizes = [70, 0, 3, 66000]
    a, b = torch.full((sum(sizes), 3), top, dtype=torch.int8), torch.full((sum(sizes), 2), -top, dtype=torch.int8)
    scales = torch.ones(3, 4), torch.ones(2, 4)
    # over tokens: stored transposed expert after expert, all codes alike
    for variant in ("reference", *LEVELS):
        with running(variant):
            got = matmul_grouped(a.t().contiguous(), scales[0], code, 0, b.t().contiguous(), scales[1], code, 0, ends(sizes), None, torch.float32)
        assert got.tolist() == [[[float(torch.tensor(float(-top * top * s)))] * 2] * 3 for s in sizes], variant


def test_threads_do_not_matter():
    x, w, offs, results = torch.randint(-127, 128, (700, 130), dtype=torch.int8), torch.randint(-127, 128, (6, 90, 130), dtype=torch.int8), ends([300, 1, 0, 90, 300, 9]), []
    for count in (1, 2):
        with threads(count):
            results.append(matmul_grouped(x, torch.rand(700, 1).fill_(0.5), "int8", 0, w, torch.full((6, 90, 1), 0.3), "int8", 0, offs, None, torch.float32))
    assert_same_bits(results[0], results[1])


def test_ends_may_be_int64_as_cumsum_makes_them():
    layer, x, experts = GroupedLinear(4, 9, 5), torch.randn(20, 9), torch.randint(0, 4, (17,))
    offs = experts.bincount(minlength=4).cumsum(0)
    assert offs.dtype == torch.int64
    assert_same_bits(layer(x, offs), layer(x, offs.to(torch.int32)))
    for end, message in ((2**32 + 20, "at most 20"), (-2**32, "not negative")):  # what int32 would wrap around to is none of what was given
        with pytest.raises(ValueError, match=message):
            layer(x, torch.full((4,), end))


# --- refusals ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("offs, error, message", [
    (torch.tensor([3, 2], dtype=torch.int32), ValueError, r"offs is \[3, 2\]; it must be ends"), (torch.tensor([3, 9], dtype=torch.int32), ValueError, "at most 8"),
    (torch.tensor([-1, 3], dtype=torch.int32), ValueError, "not negative"), (torch.tensor([3, 8], dtype=torch.int16), TypeError, "int32"),
    (torch.tensor([[3, 8]], dtype=torch.int32), ValueError, "1-D|an end for each"), (torch.tensor([8], dtype=torch.int32), ValueError, "an end for each")])
def test_bad_offs_are_refused(offs, error, message):
    x, w = torch.randn(8, 4), torch.randn(2, 3, 4)
    with pytest.raises(error, match=message):
        functional.grouped_linear(x, w, offs)
    with pytest.raises(error, match=message):
        matmul_grouped(x, None, "fp32", 0, w, None, "fp32", 0, offs, None, torch.float32)
    if len(offs.shape) == 1 and len(offs) == 2:
        with pytest.raises(error, match=message):
            quantize_grouped(x, offs, "int8")


def test_bad_arguments_are_refused_by_name():
    x, w, offs = torch.randn(8, 4), torch.randn(2, 3, 4), ends([3, 5])
    for arguments, error, message in [
            ((x, w[0], offs), ValueError, "weight has shape"), ((x[0], w, offs), ValueError, "input has shape"), ((x[:, :3], w, offs), ValueError, "input has shape"),
            ((x, w, offs, torch.zeros(3)), ValueError, "bias has shape"), ((x.double(), w, offs), TypeError, "input is torch.float64"),
            ((x, w, offs, None, "w4"), ValueError, "recipe is w4"), ((x, w, offs, None, "int4"), ValueError, "recipe is int4"),
            ((x, w, offs, None, "fp4"), ValueError, "Hadamard"), ((x, w, offs, None, "qat_w4"), ValueError, "few bits"),
            ((x, w, offs, None, "int8_weights"), ValueError, "few bits"), ((x, w, [3, 8]), TypeError, "offs is list"),
            ((x, w, offs, None, Recipe("mine", y=Matmul(FORMATS["int8_row"], FORMATS["bf16"]))), ValueError, "both quantised")]:
        with pytest.raises(error, match=message):
            functional.grouped_linear(*arguments)
    for arguments, message in [((x, None, "int4", 0, w, None, "int4", 0, offs, None, torch.float32), "a_code is 'int4'"),
                               ((x, None, "fp32", 0, w, None, "int8", 0, offs, None, torch.float32), "both quantised"),
                               ((x, None, "fp32", 0, w, None, "fp32", 0, None, None, torch.float32), "offs is None"),
                               ((x.to(torch.int8), None, "int8", 0, w.to(torch.int8), None, "int8", 0, offs, None, torch.float32), "a_scales is None"),
                               ((x, None, "fp32", 0, w, None, "fp32", 0, offs, torch.zeros(2, 4), torch.float32), "bias")]:
        with pytest.raises(ValueError, match=message):
            matmul_grouped(*arguments)
    with pytest.raises(ValueError, match="recipe is fp4"):
        GroupedLinear(2, 4, 4, recipe="fp4")


# --- the layer --------------------------------------------------------------------------------------------
def run(layer, x, *rest, dy):
    x = x.clone().requires_grad_()
    y = layer(x, *rest)
    y.backward(dy)
    return y.detach(), x.grad


def loop(layer, x, sizes, dy):
    """The same by one gradmill.nn.Linear per expert."""
    outs, grads, dws, dbs = [], [], [], []
    for e, (part, g) in enumerate(zip(parts(x, sizes), parts(dy, sizes))):
        one = Linear(layer.in_features, layer.out_features, layer.bias is not None, recipe=layer.recipe, dtype=layer.weight.dtype)
        one.weight.data = layer.weight.data[e].clone()
        if layer.bias is not None:
            one.bias.data = layer.bias.data[e].clone()
        y, dx = run(one, part, dy=g)
        outs.append(y), grads.append(dx), dws.append(one.weight.grad), dbs.append(one.bias.grad if layer.bias is not None else None)
    return torch.cat(outs), torch.cat(grads), torch.stack(dws), dbs


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("sizes", [s for s in SIZES if s], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_grouped_layer_is_a_loop_of_layers(name, sizes, dtype):
    tokens = sum(sizes)
    layer = GroupedLinear(len(sizes), 70, 33, recipe=name, dtype=dtype)
    x, dy = torch.randn(tokens, 70).to(dtype), torch.randn(tokens, 33).to(dtype)
    y, dx = run(layer, x, ends(sizes), dy=dy)
    want_y, want_dx, want_dw, want_db = loop(layer, x, sizes, dy)
    eps = max(1e-6, torch.finfo(dtype).eps)

    def close(got, want, what):
        assert got.shape == want.shape and got.dtype == want.dtype
        if name in EXACT:
            return assert_same_bits(got, want, what)
        assert (got.double() - want.double()).abs().max() <= 4 * eps * want.double().abs().max() if want.numel() else True, what

    if name == "bf16":  # torch's own product rounds its sums to 16 bits where the processor has instructions for it
        eps = max(eps, 2.0 ** -8)
    close(y, want_y, "Y")
    close(dx, want_dx, "dX")
    close(layer.weight.grad, want_dw, "dW")
    for got, want in zip(layer.bias.grad, want_db):
        assert torch.allclose(got.double(), want.double(), atol=1e-5 + eps * 20, rtol=eps)
    for e, size in enumerate(sizes):
        if not size:
            assert not layer.weight.grad[e].any() and not layer.bias.grad[e].any()


@pytest.mark.parametrize("name", NAMES)
def test_tokens_of_nobody_and_what_needs_a_gradient(name):
    layer, x = GroupedLinear(3, 16, 8, recipe=name), torch.randn(12, 16)
    offs = ends([4, 0, 5])
    y, dx = run(layer, x, offs, dy=torch.ones(12, 8))
    assert not y[9:].any() and not dx[9:].any() and y[:9].any()
    grad = layer.weight.grad.clone()
    layer.zero_grad()
    layer(x, offs).sum().backward()  # an input that needs none
    assert_same_bits(layer.weight.grad, grad)
    layer.requires_grad_(False)
    assert_same_bits(run(layer, x, offs, dy=torch.ones(12, 8))[1], dx)
    assert layer(torch.zeros(0, 16), ends([0, 0, 0])).shape == (0, 8)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_nan_and_inf_show_at_their_own_expert_only(name, bad):
    layer, x, offs = GroupedLinear(2, 40, 8, recipe=name), torch.randn(9, 40), ends([4, 5])
    x[5, 3] = bad
    dy = torch.randn(9, 8)
    y, _ = run(layer, x, offs, dy=dy)
    assert not y[5].isfinite().any() and y[:4].isfinite().all()
    assert not layer.weight.grad[1].isfinite().all() and layer.weight.grad[0].isfinite().all()
    dy[6, 2] = bad
    _, dx = run(layer, x, offs, dy=dy)
    assert not dx[6].isfinite().all() and dx[:4].isfinite().all()


def test_stochastic_rounding_is_unbiased_and_repeatable():
    recipe = Recipe("mine", "int8", "int8", "int8", gradient_rounding="stochastic")
    layer, x, offs = GroupedLinear(2, 24, 12, bias=False, recipe=recipe), torch.randn(20, 24), ends([7, 13])
    dy, draws = torch.randn(20, 12), []
    plain = GroupedLinear(2, 24, 12, bias=False, recipe=Recipe("plain", "int8", None, None))
    plain.weight.data = layer.weight.data
    for seed in (*range(80), 0):
        torch.manual_seed(seed)
        layer.zero_grad()
        run(layer, x, offs, dy=dy)
        draws.append(layer.weight.grad.double().clone())
    assert torch.equal(draws.pop(), draws[0]) and not torch.equal(draws[0], draws[1])
    run(plain, x, offs, dy=dy)
    one = torch.stack([(d - draws[0].mean(0)).norm() for d in draws]).mean()
    noise = torch.stack([(d - torch.stack(draws).mean(0)).norm() for d in draws]).mean()
    bias = (torch.stack(draws).mean(0) - plain.weight.grad).norm()
    assert one > 0 and bias < noise / 80 ** 0.5 * 1.5 + 0.01 * plain.weight.grad.norm()  # X's own rounding is not random


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_like_any_other(name):
    layer = GroupedLinear(3, 20, 12, recipe=name)
    x, offs = torch.randn(30, 20), ends([10, 8, 12])
    want = layer(x, offs)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same_bits(other(x, offs).detach(), want.detach())
    fresh = GroupedLinear(3, 20, 12, recipe=name, device="meta").to_empty(device="cpu")
    fresh.load_state_dict(layer.state_dict())
    assert list(layer.state_dict()) == ["weight", "bias"] and torch.equal(fresh(x, offs), want)
    assert repr(layer) == f"GroupedLinear(num_experts=3, in_features=20, out_features=12, bias=True, recipe={name})"
    assert layer.weight.std() > 0.05
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x, offs).dtype == torch.bfloat16
    leaf = x.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(layer, leaf, offs, use_reentrant=False).sum().backward()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_compile_fullgraph(name):
    layer, x, offs = GroupedLinear(3, 20, 12, recipe=name), torch.randn(30, 20), ends([10, 8, 12])
    torch._dynamo.reset()
    results = []
    for f in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        results.append((*run(f, x, offs, dy=torch.ones(30, 12)), layer.weight.grad.clone()))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results))
