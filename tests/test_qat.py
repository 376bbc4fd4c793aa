"""Fake quantisation: values and gradients by hand, against plain torch under autograd, every backend bit for bit."""
import copy
import io
import pickle

import gradmill
import pytest
import torch
from gradmill import functional, use_backend
from gradmill.formats import Format
from gradmill.nn import Linear
from gradmill.recipes import Recipe
from gradmill.ops import fake_quantize, fake_quantize_backward, quantize
from gradmill.reference.quant import EMPTY_STEP, LANES, SMALLEST_STEP, lane_sums
from hypothesis import given, strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from .conftest import FLOATS, FLT_MAX, LEVELS, SPECIAL, assert_native_is_reference, assert_same_bits, layouts, reference, running, threads, wild

BITS = (2, 3, 4, 8)
SHAPES = [(1, 1), (1, 2), (3, 1), (2, 7), (5, 31), (7, 64), (3, 127), (2, 256), (4, 257), (13, 521), (1, 1031), (0, 0), (0, 5), (5, 0)]
NAN = float("nan")


def trained(weight, bits, block):
    """Steps and zero points some way from where they start, so that elements are clamped on both sides."""
    steps, zeros = functional.fake_quantize_parameters(weight, bits, block)
    return steps * (0.4 + torch.rand_like(steps)), zeros + torch.randn_like(zeros)


def plain(weight, steps, zeros, bits, block):
    """The same in torch operations, differentiated by autograd. (rows, columns), groups of ``block``, any tail."""
    def straight(x, y):  # y forward, gradient to x
        return x + (y - x).detach()
    columns, top = weight.shape[1], 2 ** bits - 1
    step, zero = (p.repeat_interleave(block, 1)[:, :columns] for p in (steps, zeros))
    zero = straight(zero, zero.clamp(0, top).round())
    ratio = weight / step
    return ((straight(ratio, ratio.round()) + zero).clamp(0, top) - zero) * step


# --- by hand ----------------------------------------------------------------------------------------------
W = [-0.5, 0.0, 0.25, 0.75, 1.25, 2.0, -1.0, 0.5625]   # / 0.5: -1 0 0.5 1.5 2.5 4 -2 1.125; rounded: -1 0 0 2 2 4 -2 1
VALUES = [-0.5, 0.0, 0.0, 1.0, 1.0, 1.0, -0.5, 0.5]    # codes 0 1 1 3 3 3 0 2 with zero point 1
GRAD = [1.0, 2, 4, 8, 16, 32, 64, 128]
DWEIGHT = [1.0, 2, 4, 8, 16, 0, 0, 128]
DSTEP = 4 * -0.5 + 8 * 0.5 + 16 * -0.5 + 128 * -0.125 + 32 * 2 + 64 * -1
DZERO = -0.5 * (32 + 64)


@pytest.mark.parametrize("variant", ["reference", *LEVELS])
def test_values_and_gradients_worked_out_by_hand(variant):
    weight, one = torch.tensor([W, W]), torch.ones(2, 1)
    with running(variant):
        for zero in (1.0, 0.6, 1.4):  # all round to 1
            arguments = weight, one * 0.5, one * zero, 2, 8
            assert fake_quantize(*arguments, torch.float32).tolist() == [VALUES, VALUES]
            dweight, dsteps, dzeros = fake_quantize_backward(torch.tensor([GRAD, GRAD]), *arguments)
            assert dweight.tolist() == [DWEIGHT, DWEIGHT] and dsteps.tolist() == [[DSTEP]] * 2 and dzeros.tolist() == [[DZERO]] * 2


@pytest.mark.parametrize("variant", ["reference", *LEVELS])
def test_zero_points_are_rounded_half_to_even_and_clamped(variant):
    """A huge weight gets the largest code, so its value is Q - z."""
    zeros = torch.tensor([[0.5], [1.5], [2.5], [-3.0], [-0.4], [9.0], [float("inf")], [-float("inf")]])
    with running(variant):
        got = fake_quantize(torch.full((8, 2), 1e30), torch.ones(8, 1), zeros, 3, 0, torch.float32)
    assert got[:, 0].tolist() == [7.0, 5, 5, 7, 7, 0, 0, 7]


def test_groups_stay_within_a_row_and_keep_a_short_tail():
    weight = torch.tensor([[1.0, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]])
    steps = torch.tensor([[1.0, 2], [3, 4]])
    got = fake_quantize(weight, steps, torch.zeros(2, 2), 4, 4, torch.float32)
    assert got.tolist() == [[1, 2, 3, 4, 4, 6], [6, 6, 3, 3, 0, 0]]  # 2.5 to 2 and 1.67 to 2; 0.5 and 0.25 to 0


def test_sums_take_the_stated_order():
    for n in (1, 31, 32, 33, 100, 257):
        x = wild(1, n)[0]
        lanes = [torch.tensor(0.0)] * LANES
        for i in range(n):
            lanes[i % LANES] = lanes[i % LANES] + x[i]
        while len(lanes) > 1:
            half = len(lanes) // 2
            lanes = [lanes[j] + lanes[j + half] for j in range(half)]
        assert_same_bits(lane_sums(x), lanes[0], str(n))


# --- first steps and zero points --------------------------------------------------------------------------
def test_first_parameters_worked_out_by_hand():
    weight = torch.tensor([[-1.0, 2, 0, 0.5], [3, 1, 1, 1], [-6, -1, -2, -3], [0, -0.0, 0, 0]])
    steps, zeros = functional.fake_quantize_parameters(weight, 2, 4)
    assert torch.equal(steps, torch.tensor([[1.0], [1], [2], [EMPTY_STEP]]))
    assert zeros.tolist() == [[1.0], [0], [3], [0]]  # one-sided ranges include zero
    for bad in (NAN, float("inf"), -float("inf")):
        weight[0, 1] = bad
        steps, _ = functional.fake_quantize_parameters(weight, 2, 4)
        assert steps.isnan().flatten().tolist() == [True, False, False, False]
        assert fake_quantize(weight, steps, zeros, 2, 4, torch.float32).isnan().all(1).tolist() == [True, False, False, False]


@pytest.mark.parametrize("bits, code", [(4, "uint4"), (8, "uint8")])
def test_first_parameters_are_those_of_the_packed_codes(bits, code):
    for weight in (wild(9, 70), torch.full((2, 6), FLT_MAX), torch.tensor([[FLT_MAX, -FLT_MAX, 1.0]])):
        steps, zeros = functional.fake_quantize_parameters(weight, bits, 32)
        _, scales, points = quantize(weight, code, 32)
        assert_same_bits((steps, zeros), (scales, points.float()))


@pytest.mark.parametrize("bits", BITS)
def test_at_the_start_every_element_is_within_half_a_step(bits):
    weight = wild(17, 300)
    steps, zeros = functional.fake_quantize_parameters(weight, bits, 64)
    step = steps.repeat_interleave(64, 1)[:, :300].double()
    error = (functional.fake_quantize(weight, steps, zeros, bits, 64).double() - weight.double()).abs()
    # rounding the zero point may clamp one end of the range by another half step
    assert (error <= step * (1 + 2 ** bits * 3 * 2.0 ** -24)).all()
    inside = fake_quantize_backward(torch.ones_like(weight), weight, steps, zeros, bits, 64)[0] == 1
    assert (error <= step * (0.5 + 2 ** bits * 3 * 2.0 ** -24))[inside].all() and inside.float().mean() > 0.8


def test_empty_weights():
    for shape, block, groups in (((0, 5), 4, (0, 2)), ((5, 0), 4, (5, 0)), ((5, 0), 0, (5, 1))):
        weight = torch.empty(shape)
        steps, zeros = functional.fake_quantize_parameters(weight, 4, block)
        assert steps.shape == zeros.shape == groups and functional.fake_quantize(weight, steps, zeros, 4, block).shape == shape


# --- against autograd -------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows, columns, block", [(3, 128, 32), (5, 70, 32), (4, 300, 128), (1, 7, 2), (6, 257, 300)])
def test_values_and_gradients_are_those_of_plain_torch(bits, rows, columns, block):
    weight, grad = torch.randn(rows, columns), torch.randn(rows, columns)
    ours = [weight, *trained(weight, bits, block)]
    theirs = [t.clone().requires_grad_() for t in ours]
    ours = [t.clone().requires_grad_() for t in ours]
    got, want = functional.fake_quantize(*ours, bits, block), plain(*theirs, bits, block)
    # x + (y - x) is y but for a rounding: codes and zero points come out a hair off integers
    assert torch.allclose(got, want, rtol=0, atol=ours[1].max().item() * 2 ** bits * 2.0 ** -22)
    got.backward(grad)
    want.backward(grad)
    assert torch.equal(ours[0].grad != 0, (theirs[0].grad != 0) & (grad != 0))
    assert torch.allclose(ours[0].grad, theirs[0].grad, rtol=1e-6, atol=0)
    if bits < 8:
        assert (ours[0].grad == 0).any() or columns < 70, "nothing was clamped: the test shows too little"
    # autograd forms dW^ (q - z) - dW^ W / s before it sums: both terms are rounded, n times
    step = ours[1].detach().repeat_interleave(block, 1)[:, :columns]
    terms = grad.abs() * (2 ** bits + (weight / step).abs())
    total = lane_sums(torch.nn.functional.pad(terms, (0, -columns % block)).view(rows, -1, block))
    bound = total * (min(block, columns) + 8) * 2.0 ** -23
    assert ((ours[1].grad - theirs[1].grad).abs() <= bound).all()
    assert ((ours[2].grad - theirs[2].grad).abs() <= bound * ours[1].detach()).all()


def test_the_step_gradient_is_the_slope_where_it_exists():
    """Where no code changes, W^ is linear in the steps of clamped elements: finite differences of those."""
    weight = torch.tensor([[5.0, -7.0, 9.0, 4.0]])  # Q = 3, zero point 1: all clamped, values (2, -1, 2, 2) s
    steps, zeros, grad = torch.tensor([[0.5]]), torch.ones(1, 1), torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    _, dsteps, dzeros = fake_quantize_backward(grad, weight, steps, zeros, 2, 4)
    slope = [((fake_quantize(weight, steps + ds, zeros + dz, 2, 4, torch.float32) - fake_quantize(weight, steps, zeros, 2, 4, torch.float32)) * grad).sum()
             / (ds + dz) for ds, dz in ((0.25, 0), (0, 1))]
    assert [dsteps.item(), dzeros.item()] == [s.item() for s in slope]


# --- every backend ----------------------------------------------------------------------------------------
def check(weight, grad, steps, zeros, bits, block, dtype, what):
    assert_native_is_reference(fake_quantize, weight, steps, zeros, bits, block, dtype, what=what)
    assert_native_is_reference(fake_quantize_backward, grad, weight, steps, zeros, bits, block, what=what)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_native_is_bit_equal_to_the_reference(bits, dtype):
    for i, shape in enumerate(SHAPES):
        for block in (0, 2, 32, 64, 130, 1000):
            weight, grad = wild(*shape, dtype=dtype), wild(*shape, dtype=FLOATS[i % 3])
            check(weight, grad, *trained(weight, bits, block), bits, block, FLOATS[(i + block) % 3], f"{shape} {block}")


@given(rows=st.integers(0, 9), columns=st.integers(0, 700), block=st.integers(0, 300), bits=st.integers(2, 8), seed=st.integers(0, 2 ** 40))
def test_native_is_bit_equal_for_any_shape_and_group(rows, columns, block, bits, seed):
    torch.manual_seed(seed)
    weight, grad = torch.randn(rows, columns), torch.randn(rows, columns)
    check(weight, grad, *trained(weight, bits, 2 * block), bits, 2 * block, torch.float32, "")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_special_values_are_bit_equal_to_the_reference(dtype):
    special = torch.tensor(SPECIAL)
    n = len(special)
    weight, grad = special.repeat(n, 1), special[:, None].repeat(1, n)
    for steps, zeros in ((special, torch.ones(n)), (torch.ones(n), special), (special, special), (special, special.flip(0)), (torch.rand(n), 3 * torch.rand(n))):
        check(weight.to(dtype), grad, steps[:, None], zeros[:, None], 2, 0, dtype, "row steps")
        check(grad.to(dtype), weight, steps[:, None].repeat(1, n // 2), zeros[:, None].repeat(1, n // 2), 4, 2, torch.float32, "pairs")


@pytest.mark.parametrize("variant", ["reference", *LEVELS])
def test_nan_and_inf_show(variant):
    one = torch.ones(1, 2)
    with running(variant):
        for bad in (NAN, float("inf"), -float("inf")):
            got = fake_quantize(torch.tensor([[1.0, bad, 1, 1, 1]]), one, one, 4, 4, torch.float32)
            assert got.isnan().tolist() == [[False, True, False, False, False]], bad
        for steps, zeros in ((torch.tensor([[NAN, 1]]), one), (torch.tensor([[float("inf"), 1]]), one), (one, torch.tensor([[NAN, 1]]))):
            got = fake_quantize(torch.ones(1, 5), steps, zeros, 4, 4, torch.float32)
            assert got.isnan().tolist() == [[True] * 4 + [False]]
        grad = torch.tensor([[1.0, NAN, 1, 1, 1]])
        _, dsteps, _ = fake_quantize_backward(grad, torch.ones(1, 5) * 0.3, one, one, 4, 4)
        assert dsteps.isnan().tolist() == [[True, False]]


@pytest.mark.parametrize("variant", ["reference", *LEVELS])
def test_a_step_that_is_not_positive_counts_as_the_smallest_and_can_come_back(variant):
    weight, grad = torch.tensor([[1.0, -1.0, 0.0, 2.0]]), torch.ones(1, 4)
    with running(variant):
        want = fake_quantize(weight, torch.tensor([[SMALLEST_STEP]]), torch.ones(1, 1), 2, 4, torch.float32)
        assert want.isfinite().all() and want.tolist() == [[2 * SMALLEST_STEP, -SMALLEST_STEP, 0, 2 * SMALLEST_STEP]]
        for step in (0.0, -0.0, -1.0, 1e-40, -float("inf")):
            arguments = weight, torch.tensor([[step]]), torch.ones(1, 1), 2, 4
            assert_same_bits(fake_quantize(*arguments, torch.float32), want)
            assert fake_quantize_backward(grad, *arguments)[1].item() == 2 - 1 + 2


def test_threads_and_levels_give_the_same_bits():
    weight, grad = wild(257, 700), wild(257, 700)
    steps, zeros = trained(weight, 3, 64)
    results = []
    for level in LEVELS:
        for count in (1, 2):
            with running(level), threads(count):
                results.append((fake_quantize(weight, steps, zeros, 3, 64, torch.float32), *fake_quantize_backward(grad, weight, steps, zeros, 3, 64)))
    for other in results[1:]:
        assert_same_bits(other, results[0])


def test_any_layout(level):
    for dtype in FLOATS:
        weight, grad = wild(19, 67, dtype), wild(19, 67, dtype)
        steps, zeros = trained(weight, 4, 32)
        values = reference(fake_quantize, weight, steps, zeros, 4, 32, dtype)
        gradients = reference(fake_quantize_backward, grad, weight, steps, zeros, 4, 32)
        for (name, w), (_, g), (_, s), (_, z) in zip(layouts(weight), layouts(grad), layouts(steps), layouts(zeros)):
            assert_same_bits(fake_quantize(w, s, z, 4, 32, dtype), values, name)
            assert_same_bits(fake_quantize_backward(g, w, s, z, 4, 32), gradients, name)


# --- under autograd ---------------------------------------------------------------------------------------
def leaves(rows=6, columns=70, bits=3, group=32, dtype=torch.float32):
    weight = torch.randn(rows, columns).to(dtype)
    return [t.requires_grad_() for t in (weight, *trained(weight, bits, group))]


def gradients(function, tensors):
    value = function(*tensors)
    return value.detach(), torch.autograd.grad(value.float().square().sum(), tensors)


def test_compile_checkpoint_and_a_forced_backend_give_the_same_bits():
    tensors = leaves()

    def eager(w, s, z):
        return functional.fake_quantize(w, s, z, 3, 32)
    want = gradients(eager, tensors)
    assert_same_bits(gradients(torch.compile(eager, fullgraph=True, backend="aot_eager"), tensors), want)
    assert_same_bits(gradients(lambda *t: checkpoint(eager, *t, use_reentrant=False), tensors), want)
    with use_backend("reference"):
        value = eager(*tensors)
    assert_same_bits((value.detach(), torch.autograd.grad(value.square().sum(), tensors)), want)


def test_autocast_decides_the_outputs_dtype_and_gradients_keep_their_own():
    tensors = leaves()
    full = functional.fake_quantize(*tensors, 3, 32)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            value = functional.fake_quantize(*tensors, 3, 32)
        assert_same_bits(value.detach(), full.detach().to(dtype))
        assert [g.dtype for g in torch.autograd.grad(value.sum(), tensors)] == [torch.float32] * 3
    half = leaves(dtype=torch.bfloat16)
    value = functional.fake_quantize(*half, 3, 32)
    assert value.dtype == torch.bfloat16
    assert [g.dtype for g in torch.autograd.grad(value.sum(), half)] == [torch.bfloat16, torch.float32, torch.float32]


def test_only_what_needs_a_gradient_gets_one_and_there_is_no_second():
    for chosen in range(3):
        tensors = [t.detach().requires_grad_(i == chosen) for i, t in enumerate(leaves())]
        functional.fake_quantize(*tensors, 3, 32).sum().backward()
        assert [t.grad is not None for t in tensors] == [i == chosen for i in range(3)]
    tensors = leaves()
    first, = torch.autograd.grad(functional.fake_quantize(*tensors, 3, 32).square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("wrong, error, message", [
    (dict(weight=[1.0]), TypeError, "fake_quantize: weight is a builtins.list"),
    (dict(weight=torch.ones(4, 6, dtype=torch.float64)), TypeError, "fake_quantize: weight is torch.float64"),
    (dict(weight=torch.ones(6)), ValueError, "weight is .*it must be 2-D"),
    (dict(steps=torch.ones(4, 2, dtype=torch.float64)), TypeError, "fake_quantize: steps is torch.float64"),
    (dict(zeros=torch.ones(4, 3)), ValueError, r"zeros is .*of shape \(4, 2\)"),
    (dict(bits=9), ValueError, "bits is 9; it must be 2 to 8"),
    (dict(group=5), ValueError, "block is 5"),
    (dict(group=-2), ValueError, "block is -2"),
], ids=str)
def test_bad_arguments_are_refused_by_name(wrong, error, message):
    arguments = dict(weight=torch.ones(4, 6), steps=torch.ones(4, 2), zeros=torch.ones(4, 2), bits=4, group=4)
    with pytest.raises(error, match=message):
        functional.fake_quantize(**{**arguments, **wrong})
    if not {"steps", "zeros"} & wrong.keys():
        with pytest.raises(error, match=message.replace("fake_quantize:", "fake_quantize_parameters:")):
            functional.fake_quantize_parameters(**{k: v for k, v in {**arguments, **wrong}.items() if k not in ("steps", "zeros")})


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_training_beats_rounding_to_nearest(bits):
    """Block-AP in small: a layer's output is matched by training weight, steps and zero points (AdamW, no decay)."""
    mix = torch.randn(64, 64) / 8
    x, weight = torch.randn(512, 64) @ mix, torch.randn(32, 64)  # correlated inputs: what rounding ignores
    target = x @ weight.t()
    steps, zeros = functional.fake_quantize_parameters(weight, bits, 32)
    tensors = [t.clone().requires_grad_() for t in (weight, steps, zeros)]
    optimizer = torch.optim.AdamW([{"params": tensors[:1], "lr": 2e-3}, {"params": tensors[1:], "lr": 1e-3}], weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    losses = []
    for _ in range(200):
        loss = (x @ functional.fake_quantize(*tensors, bits, 32).t() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses[::40]  # 0.64 to 0.78 over bits and five seeds


# --- layers -----------------------------------------------------------------------------------------------
RECIPES = ("qat_w4", "qat_w3", "qat_w2")


def values_of(layer):
    return reference(fake_quantize, layer.weight.detach(), layer.weight_steps.detach(), layer.weight_zeros.detach(), *layer.recipe.fake, torch.float32)


def disturbed(layer):
    """Steps and zero points some way from where they start, as training leaves them."""
    with torch.no_grad():
        layer.weight_steps.mul_(0.4 + torch.rand_like(layer.weight_steps))
        layer.weight_zeros.add_(torch.randn_like(layer.weight_zeros))
    return layer


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_layer_multiplies_by_the_faked_weight_and_trains_all_three(recipe):
    layer = disturbed(Linear(300, 7, recipe=recipe))
    group = layer.recipe.fake[1]
    assert dict(layer.named_parameters()).keys() == {"weight", "bias", "weight_steps", "weight_zeros"}
    assert layer.weight_steps.shape == layer.weight_zeros.shape == (7, -(-300 // group)) and layer.weight.dtype == torch.float32
    x = torch.randn(2, 5, 300)
    y = layer(x)
    assert_same_bits(y.detach(), nn.functional.linear(x.view(10, 300), values_of(layer), layer.bias.detach()).view(2, 5, 7))
    grad = torch.randn_like(y)
    y.backward(grad)
    dvalues = (grad.view(10, 7).t() @ x.view(10, 300)).contiguous()
    want = reference(fake_quantize_backward, dvalues, *(p.detach() for p in (layer.weight, layer.weight_steps, layer.weight_zeros)), *layer.recipe.fake)
    assert_same_bits([p.grad for p in (layer.weight, layer.weight_steps, layer.weight_zeros)], list(want))
    assert want[2].abs().sum() > 0
    functional_y = functional.linear(x, layer.weight, layer.bias, recipe, layer.weight_steps, layer.weight_zeros)
    assert_same_bits(functional_y.detach(), y.detach())


@pytest.mark.parametrize("recipe", RECIPES)
def test_state_dicts_with_and_without_steps(recipe):
    plain, layer = nn.Linear(70, 8), disturbed(Linear(70, 8, recipe=recipe))
    for assign in (False, True):
        layer.load_state_dict(plain.state_dict(), assign=assign)  # strict: the steps are made, not missing
        assert_same_bits((layer.weight_steps.detach(), layer.weight_zeros.detach()),
                         functional.fake_quantize_parameters(plain.weight.detach(), *layer.recipe.fake))
        disturbed(layer)
    other = nn.Sequential(Linear(70, 8, recipe=recipe))
    file = io.BytesIO()
    torch.save({f"0.{k}": v for k, v in layer.state_dict().items()}, file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same_bits(dict(other[0].state_dict()), dict(layer.state_dict()))
    state = layer.state_dict()
    del state["weight_zeros"]
    with pytest.raises(RuntimeError, match="Missing.*weight_zeros"):
        layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(nn.Linear(71, 8).state_dict())


@pytest.mark.parametrize("recipe", RECIPES)
def test_dequantize_folds_the_values_into_a_plain_layer(recipe):
    layer, x = disturbed(Linear(70, 8, recipe=recipe)), torch.randn(3, 70)
    plain = layer.dequantize_()
    assert type(plain) is nn.Linear and plain.state_dict().keys() == {"weight", "bias"}
    assert_same_bits(plain(x).detach(), layer(x).detach())
    nn.Linear(70, 8).load_state_dict(plain.state_dict())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_compute_alike_and_train_apart(clone):
    layer, x = disturbed(Linear(70, 8, recipe="qat_w3")), torch.randn(3, 70)
    want, other = layer(x).detach(), clone(layer)
    assert_same_bits(other(x).detach(), want)
    optimizer = gradmill.optim.AdamW(other.parameters(), lr=0.1)
    other(x).sum().backward()
    optimizer.step()
    assert_same_bits(layer(x).detach(), want)
    assert not torch.equal(other(x), want)


def test_meta_device_casts_and_reset():
    layer = Linear(70, 8, recipe="qat_w4", device="meta")
    assert layer.weight_steps.is_meta and layer(torch.empty(3, 70, device="meta")).shape == (3, 8)
    assigned = copy.deepcopy(layer)
    assigned.load_state_dict(nn.Linear(70, 8).state_dict(), assign=True)
    assert assigned(torch.ones(3, 70)).isfinite().all()
    layer.to_empty(device="cpu").reset_parameters()
    nn.init.normal_(layer.weight)
    layer.reset_steps_()
    assert_same_bits(layer.weight_steps.detach(), functional.fake_quantize_parameters(layer.weight.detach(), 4)[0])
    half = layer.to(torch.bfloat16)
    y = half(torch.randn(3, 70, dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype == half.weight.grad.dtype == torch.bfloat16 and half.weight_steps.grad.dtype == torch.float32
    assert half.dequantize_().weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="recipe is int8; only one that fakes"):
        Linear(4, 4).reset_steps_()


def test_a_layer_compiles_checkpoints_and_runs_under_autocast():
    layer, x = disturbed(Linear(70, 8, recipe="qat_w2")), torch.randn(5, 70)

    def gradients(function):
        layer.zero_grad()
        y = function(x)
        y.square().sum().backward()
        return [y.detach(), *(p.grad.clone() for p in layer.parameters())]
    want = gradients(layer)
    assert_same_bits(gradients(torch.compile(layer, fullgraph=True, backend="aot_eager")), want)
    assert_same_bits(gradients(lambda x: checkpoint(layer, x, use_reentrant=False)), want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients(layer)
    assert [g.dtype for g in got] == [torch.bfloat16] + [torch.float32] * 4
    torch.testing.assert_close(got[0].float(), want[0], rtol=0.05, atol=0.1)
    x = torch.randn(0, 70, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == (0, 70)


def test_convert_makes_layers_that_train_and_keeps_ties():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 64).requires_grad_(False))
    model[2].weight = model[0].weight
    weight = model[0].weight
    report = gradmill.convert(model, "qat_w4")
    assert report.new_parameters and "new parameters" in str(report) and report.bytes_after == report.bytes_before + 2 * 2 * 64 * 4  # a tie counts once
    assert model[0].weight is model[2].weight is weight and model[0].weight_steps is model[2].weight_steps
    assert not model[3].weight_steps.requires_grad
    optimizer = gradmill.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    x, target = torch.randn(64, 64), torch.randn(64, 64)
    losses = []
    for _ in range(30):
        loss = (model(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(p.isfinite().all() for p in model.parameters())


def test_fake_combines_with_quantised_products():
    layer = disturbed(Linear(64, 8, recipe=Recipe("mine", "int8", "int8", "int8", fake=(4, 32))))
    x = torch.randn(5, 64)
    y = layer(x)
    assert_same_bits(y.detach(), functional.linear(x, values_of(layer), layer.bias.detach(), "int8"))
    y.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("arguments, message", [
    (dict(fake=(1, 128)), "fake is"), (dict(fake=(4, 3)), "fake is"), (dict(fake=(4, -2)), "fake is"),
    (dict(fake=(4, 128), weight=Format("uint8", 256)), "weight is .* must be None"),
], ids=str)
def test_recipes_check_fake(arguments, message):
    with pytest.raises(ValueError, match=message):
        Recipe("mine", **arguments)


def test_linear_refuses_steps_and_zeros_that_do_not_fit_the_recipe():
    x, weight, steps = torch.ones(2, 128), torch.ones(4, 128), torch.ones(4, 1)
    with pytest.raises(ValueError, match="steps and zeros are missing; recipe qat_w4 needs both"):
        functional.linear(x, weight, None, "qat_w4")
    with pytest.raises(ValueError, match="steps and zeros are given; recipe int8 takes no zeros"):
        functional.linear(x, weight, None, "int8", steps, steps)
    with pytest.raises(ValueError, match=r"zeros is .*of shape \(4, 1\)"):
        functional.linear(x, weight, None, "qat_w4", steps, torch.ones(4, 2))
