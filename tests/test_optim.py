"""optim: rules by hand, the fused step against the reference, and the optimizers against torch.optim."""
import copy
import io
import pickle
import warnings
from math import inf, sqrt

import pytest
import torch

import gradmill
from gradmill import CheckpointError, QuantizedWeight, optim
from gradmill.formats import FLOAT_DTYPES, SPLIT, Format
from gradmill.ops import dequantize, fused_step, measure, quantize, scaled_step
from gradmill.optim import AdamW, QGaLoreAdamW
from gradmill.optim._base import QUANTIZED
from gradmill.optim.rules import RULES
from hypothesis import given, strategies as st

from .conftest import (FLOATS, FLT_MAX, LEVELS, SPECIAL, assert_follows_torch, assert_same_bits, key, layouts, parameters, reference, running, scalars_of,
                       threads)

SIGNED = ("exp_avg", "momentum_buffer", "previous_grad", "hessian")  # states that need not be at least 0
WEIGHTS = [("fp32", 0), ("bf16", 0), ("fp16", 0), ("uint8", 256), ("uint8", 64), ("int8", 128), ("int4", 256), ("uint4", 64), ("delta", 0), ("e4m3", 128),
           *((code, 0) for code in SPLIT)]
STATES = ["fp32", "bf16", "fp8", "int8", "int4"]
SHAPES = [(1,), (7,), (1000,), (1, 1), (3, 5), (13, 64), (5, 257), (66, 300), (0,), (4, 3, 3, 3)]


# --- the fused step ---------------------------------------------------------------------------------------
def matrix(shape):
    return (1, torch.Size(shape).numel()) if len(shape) < 2 else (shape[0], torch.Size(shape[1:]).numel())


class Work:
    """Arguments of one fused_step, so that every variant starts from the same."""

    def __init__(self, rule, shapes, weight, state, grad_dtype=torch.float32, special=False):
        code, block = weight
        self.rule, self.code, self.block = rule, code, block
        spec = RULES[rule]
        formats = [QUANTIZED[state].get(c) or Format(c) if state in QUANTIZED else Format(state) for c in spec.state_codes]
        self.state_codes, self.state_block = [f.code for f in formats], max((f.block for f in formats), default=0)
        self.params, self.param_scales, self.param_zeros, self.grads, self.states, self.state_scales = [], [], [], [], [], []
        for shape in shapes:
            rows, columns = matrix(shape)
            if Format(code).blocked:
                codes, scales, zeros = quantize(torch.randn(rows, columns), code, block)
                self.params.append(codes), self.param_scales.append(scales)
                if Format(code).has_zero_point:
                    self.param_zeros.append(zeros)
            else:
                self.params.append(torch.randn(shape).to(Format(code).code_dtype))
            if code in SPLIT:
                self.param_zeros.append(torch.randint(256, shape).to(torch.uint8) if code.endswith("+8") else torch.randint(-2 ** 15, 2 ** 15, shape).to(torch.int16))
            grad = torch.randn(shape) * 10 ** torch.randn(shape)
            if special and grad.numel():
                grad.view(-1)[::7] = torch.tensor(SPECIAL).repeat(-(-grad.numel() // (7 * len(SPECIAL))))[:len(grad.view(-1)[::7])]
            self.grads.append(grad.to(grad_dtype))
            for name, c in zip(spec.states, self.state_codes):
                value = torch.randn(rows, columns) * 0.1
                value = value if name in SIGNED else value ** 2
                if Format(c).blocked:
                    codes, scales, _ = quantize(value, c, self.state_block)
                    self.states.append(codes), self.state_scales.append(scales)
                else:
                    self.states.append(value.view(shape).to(FLOAT_DTYPES[c])), self.state_scales.append(torch.empty(0))
        if not any(Format(c).blocked for c in self.state_codes):
            self.state_scales = []

    def scalars(self, step=3, factor=1.0):
        return scalars_of(self.rule, step, factor=factor)

    def run(self, scalars=None, ids=None, k=None, offsets=None):
        """The step on copies; returns everything that may have changed."""
        changed = [[t.clone() for t in ts] for ts in (self.params, self.param_scales, self.param_zeros, self.states, self.state_scales)]
        params, scales, zeros, states, state_scales = changed
        fused_step(self.rule, params, scales, zeros, self.grads, states, state_scales, self.scalars() if scalars is None else scalars,
                   key(5, 3) if k is None else k, list(range(len(params))) if ids is None else ids, self.code, self.block, self.state_codes, self.state_block, offsets)
        return changed


def check(work, what="", **options):
    want = reference(work.run, **options)
    for level in LEVELS:
        for count in (1, 2):
            with running(level), threads(count):
                assert_same_bits(work.run(**options), want, f"{level} threads {count} {what}")


#: Every weight format under three rules, which have one to three states; the other rules with fp32 and uint8 weights.
RULES_AND_WEIGHTS = [(rule, weight) for rule in RULES for weight in (WEIGHTS if rule in ("adamw", "adamw_amsgrad", "lion") else WEIGHTS[::3][:2])]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("rule, weight", RULES_AND_WEIGHTS, ids=str)
def test_a_step_is_bit_equal_to_the_reference(rule, weight, state):
    for grad_dtype in FLOATS if rule == "adamw" else FLOATS[:1]:
        check(Work(rule, SHAPES if rule == "adamw" else SHAPES[4:8], weight, state, grad_dtype), grad_dtype)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("rule, weight", [pair for pair in RULES_AND_WEIGHTS if pair[1] in WEIGHTS[:5]], ids=str)
def test_a_step_with_special_gradients_is_bit_equal(rule, weight, state):
    check(Work(rule, [(5, 257), (66, 300), (29,)], weight, state, special=True))


class ScaledWork(Work):
    """The same of a scaled_step."""

    def run(self, scalars=None, factor=1.0, k=None, offsets=None):
        changed = [[t.clone() for t in ts] for ts in (self.params, self.param_scales, self.param_zeros, self.states, self.state_scales)]
        params, scales, zeros, states, state_scales = changed
        scaled_step(self.rule, params, scales, zeros, self.grads, states, state_scales, self.scalars(factor=factor) if scalars is None else scalars, key(5, 3) if k is None else k,
                    list(range(len(params))), self.code, self.block, self.state_codes, self.state_block, 0.1, 1.5 if self.rule == "lamb" else 0.01, 0.1, abs(factor), offsets)
        return changed


#: Rows that measuring chunks (4096) cut anywhere, whole tensors above and below what shares a barrier, and what has no norm.
SCALED_SHAPES = [(5, 257), (70, 130), (64, 64), (4097,), (0,), (), (3, 0), (1, 1)]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("weight", [w for w in WEIGHTS if w[0] != "delta"], ids=str)
@pytest.mark.parametrize("rule", ["lamb", "lars"])
def test_a_step_scaled_by_norms_is_bit_equal_to_the_reference(rule, weight, state):
    work = ScaledWork(rule, SCALED_SHAPES, weight, state, FLOATS[len(weight[0]) % 3])
    work.params[2].zero_()  # no norm: the rate is lr
    work.grads[3].zero_()
    check(work, offsets=list(range(0, 7 * 4096 * 8, 7 * 4096)))
    check(ScaledWork(rule, [(66, 300), (29,)], weight, state, special=True), factor=-0.25)


@pytest.mark.parametrize("rule", ["lamb", "lars"])
def test_a_step_scaled_by_norms_of_a_tensor_beyond_one_run(rule):
    """600 x 512 has more than what shares a barrier; the 70 small ones before and after it share theirs."""
    for weight, state in ((("fp32", 0), "fp32"), (("bf16", 0), "int8")):
        check(ScaledWork(rule, [(64,)] * 40 + [(600, 512)] + [(7, 64)] * 30, weight, state))


@pytest.mark.parametrize("rule", ["lamb", "lars"])
def test_a_scaled_step_of_many_threads_waits_for_every_norm(rule):
    """More threads than processors, several runs one after the other in the same room: who begins a piece when differs in every call."""
    work = ScaledWork(rule, [(300, 1024), (1,), (270_001,), (0,), (64, 64), (280, 1000)], ("fp32", 0), "fp32")
    want = work.run()
    for count in (2, 3, 7):
        with threads(count):
            for _ in range(5):
                assert_same_bits(work.run(), want, f"threads {count}")


def test_a_scaled_step_by_hand():
    """LAMB's first step with eps 0 and no decay: the update is the gradient's sign, its norm sqrt(n)."""
    w, g = torch.tensor([3.0, 0.0, 0.0, 4.0]), torch.tensor([1.0, -2.0, 3.0, 4.0])
    h = scalars_of("lamb", step=1, weight_decay=0.0, eps=0.0)
    for cap, ratio in ((inf, 2.5), (0.5, 0.5)):
        p = w.clone()
        scaled_step("lamb", [p], [], [], [g], [torch.zeros(4), torch.zeros(4)], [], h, key(1, 1), [0], "fp32", 0, ["fp32", "fp32"], 0, 0.1, cap, 0.0, 1.0)
        torch.testing.assert_close(p, w - 0.1 * ratio * g.sign())
    p, b = w.clone(), torch.zeros(4)
    scaled_step("lars", [p], [], [], [g], [b], [], scalars_of("lars", weight_decay=0.1), key(1, 1), [0], "fp32", 0, ["fp32"], 0, 0.1, 0.02, 0.1, 1.0)
    torch.testing.assert_close(p, w - 0.1 * 0.02 * 5 / (30 ** 0.5 + 0.1 * 5) * (g + 0.1 * w))
    for arguments, match in ((("adamw", [p, p]), "rule is 'adamw'; it must be lamb or lars"), (("lars", [b]), r"scalars .* it must be fp32 on CPU of shape \(1, 16\)")):
        with pytest.raises(ValueError, match=f"scaled_step: {match}"):
            scaled_step(arguments[0], [p], [], [], [g], [b], [], torch.zeros(2, 16), key(1, 1), [0], "fp32", 0, ["fp32"], 0, 0.1, 0.02, 0.1, 1.0)


@given(rows=st.integers(0, 20), columns=st.integers(0, 600), rule=st.sampled_from(sorted(RULES)), weight=st.sampled_from(WEIGHTS),
       state=st.sampled_from(STATES), step=st.integers(1, 2 ** 31), identity=st.integers(0, 2 ** 24 - 1), rng=st.integers(-2 ** 63, 2 ** 63 - 1))
def test_a_step_of_any_shape_id_and_key(rows, columns, rule, weight, state, step, identity, rng):
    torch.manual_seed(rows * 601 + columns)
    check(Work(rule, [(rows, columns), (columns,)], weight, state), ids=[identity, 0], k=key(rng, step))


def test_large_tensors_split_between_threads():
    for weight in WEIGHTS[:4]:
        for state in STATES:
            check(Work("adamw", [(131, 300), (33001,)], weight, state), weight)


def test_scalars_may_differ_between_tensors():
    work = Work("adamw", [(3, 70), (200,)], ("bf16", 0), "int8")
    check(work, scalars=torch.cat((work.scalars(3, 1.0), work.scalars(9, -0.5))))


@pytest.mark.parametrize("weight", [("bf16", 0), ("bf16+8", 0), ("fp16+8", 0), ("uint8", 64)], ids=str)
@pytest.mark.parametrize("state", ["bf16", "int8", "int4"])
def test_row_shards_step_as_the_whole_tensor_does(weight, state):
    """Each shard given the number of its first element: the same bits, in every backend; an empty shard too."""
    whole = Work("adamw", [(7, 389)], weight, state)
    want = reference(whole.run, ids=[3])
    cuts = (0, 3, 3, 7)
    parts = []
    for first, last in zip(cuts, cuts[1:]):
        part = copy.copy(whole)
        for name in ("params", "param_scales", "param_zeros", "grads", "states", "state_scales"):
            setattr(part, name, [t[first:last].clone() if t.dim() == 2 else t for t in getattr(whole, name)])
        parts.append(part)
    for variant in ("reference", *LEVELS):
        with running(variant):
            got = [part.run(ids=[3], offsets=[first * 389]) for part, first in zip(parts, cuts)]
        for i, tensors in enumerate(want):
            assert_same_bits([torch.cat([g[i][j] for g in got]) if t.dim() == 2 else t for j, t in enumerate(tensors)], tensors, f"{variant} {i}")


# --- norms ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_measure_is_bit_equal_and_right(dtype):
    shapes = [(), (1,), (0,), (31,), (3, 4097), (4096,), (2, 5000, 3), (200001,), (7,)]
    tensors = [(torch.randn(s) * 10 ** torch.randn(s)).clamp(-6e4, 6e4).to(dtype) for s in shapes]
    limits = torch.rand(len(shapes), 2)
    for given in (None, limits):
        want = reference(measure, tensors, given)
        for i, (x, (squares, largest)) in enumerate(zip(tensors, want.tolist())):
            x = x.float()
            x = x if given is None else torch.where(x.abs() > limits[i, 0], x * limits[i, 1], x)
            exact = float((x.double() ** 2).sum())
            assert abs(squares - exact) <= 1e-13 * exact and largest == (float(x.abs().max()) if x.numel() else 0.0)
        for level in LEVELS:
            for count in (1, 2):
                with running(level), threads(count):
                    assert_same_bits(measure(tensors, given), want, f"{level} {count}")


def test_measure_of_special_values_and_layouts(level):
    huge = torch.full((5000,), FLT_MAX)
    assert measure([huge])[0].tolist() == pytest.approx([5000 * FLT_MAX ** 2, FLT_MAX], rel=1e-12)  # fp32 would overflow
    x = torch.randn(300, 40)
    for bad, what in ((float("nan"), "nan"), (float("inf"), "inf"), (-float("inf"), "inf")):
        y = x.clone()
        y[123, 7] = bad
        assert [str(v) for v in measure([y, x])[0].tolist()] == [what, what] and measure([y, x])[1].isfinite().all()
    both = x.clone()
    both[0, 0], both[1, 1] = float("inf"), float("nan")
    assert measure([both]).isnan().all()
    assert_same_bits(measure([x.t()]), measure([x.t().contiguous()]))
    for bad in (torch.ones(3, dtype=torch.float64), torch.ones(3).bfloat16()):
        with pytest.raises(TypeError, match=r"tensors\[1\]"):
            measure([x, bad])
    with pytest.raises(ValueError, match="limits"):
        measure([x], torch.ones(2, 2))


def test_any_layout_of_parameter_gradient_and_state(level):
    work = Work("adamw", [(19, 67)], ("bf16", 0), "fp32")
    want = reference(work.run)
    plain_grad, plain_param, plain_state = work.grads[0], work.params[0], work.states[0]
    for name, grad in layouts(plain_grad):
        for _, param in layouts(plain_param):
            for _, state in layouts(plain_state):
                p, m, v = param, state, work.states[1].clone()
                before = p.clone(), m.clone()
                fused_step("adamw", [p], [], [], [grad], [m, v], [], work.scalars(), key(5, 3), [0], "bf16", 0, ["fp32", "fp32"], 256)
                assert_same_bits((p.contiguous(), m.contiguous(), v), (want[0][0], want[3][0], want[3][1]), name)
                p.copy_(before[0]), m.copy_(before[1])


def test_an_update_that_changes_nothing_keeps_codes_and_scales():
    """Zero gradient, zero moments, no decay: quantised weights must not wander."""
    for weight in WEIGHTS[3:8]:
        work = Work("adamw", [(9, 600)], weight, "fp32")
        work.grads[0].zero_(), work.states[0].zero_()
        scalars = work.scalars()
        scalars[0, 1] = 1.0
        for variant in ("reference", *LEVELS):
            with running(variant):
                changed = work.run(scalars)
            assert_same_bits(changed[:3], [work.params, work.param_scales, work.param_zeros], f"{variant} {weight}")


# --- rounding statistics ----------------------------------------------------------------------------------
def test_bf16_weights_round_up_with_the_probability_of_the_fraction():
    n, steps = 2048, 40
    for seed in (0, 1, 2):
        for fraction in (0.03, 0.5, 0.8):
            ups = 0
            for step in range(1, steps + 1):
                p = torch.ones(1, n, dtype=torch.bfloat16)
                scalars = torch.zeros(1, 16)
                scalars[0, 1], scalars[0, 7] = 1 + fraction * 2 ** -7, 1.0  # decay alone: 1 -> 1 + fraction of an ulp
                fused_step("adamw", [p], [], [], [torch.zeros(1, n)], [torch.zeros(1, n), torch.ones(1, n)], [], scalars, key(seed, step), [0], "bf16", 0,
                           ["fp32", "fp32"], 256)
                assert ((p == 1) | (p == 1 + 2 ** -7)).all()
                ups += int((p > 1).sum())
            total, exact = n * steps, float(scalars[0, 1] - 1) * 2 ** 7
            assert abs(ups - exact * total) < 4 * sqrt(total * exact * (1 - exact))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_second_moment_dither_is_unbiased_in_the_root(seed):
    """A second moment of (1 - beta2) g^2 is coded by its root, linear within a code: over steps the decoded root averages
    to the true one. Elements of a block share one random word a step, so a step's mean error is one sample; 4 sigma."""
    torch.manual_seed(seed)
    grad = torch.rand(4, 256) + 0.1  # roots down to 1/11 of the largest: above the code's floor of 1/32 of a step
    scalars = torch.zeros(1, 16)
    scalars[0, 0], scalars[0, 1], scalars[0, 4] = 1.0, 1.0, 0.01
    true = (torch.tensor(0.01) * grad * grad).double().sqrt()
    errors = []
    for step in range(400):
        codes, scales = torch.zeros(4, 256, dtype=torch.uint8), torch.zeros(4, 1)
        fused_step("adamw", [torch.zeros(4, 256)], [], [], [grad], [torch.zeros(4, 256), codes], [torch.empty(0), scales], scalars, key(seed, step), [0],
                   "fp32", 0, ["fp32", "square8"], 256)
        root = dequantize(codes, scales, torch.empty(0, dtype=torch.uint8), "square8", 256, 256, torch.float32).double().sqrt()
        errors.append((root - true) / scales)
    errors = torch.stack(errors)
    largest = grad == grad.amax(1, keepdim=True)  # saturates, by design
    means = errors[:, ~largest].mean(1)
    assert abs(means.mean()) < 4 * means.std() / 20
    scores = errors[:, ~largest].mean(0) / (errors[:, ~largest].std(0) / 20 + 1e-3)
    assert (scores.abs() < 4).float().mean() > 0.995  # element by element


@pytest.mark.parametrize("states, mean, worst", [("int8", 0.02, 0.25), ("int4", 0.1, 2.0)])
def test_a_quantised_second_moment_does_not_freeze(states, mean, worst):
    """At beta2 = 0.999 a step moves it by less than half a code; nearest rounding would stop at a fraction of the target."""
    p = torch.nn.Parameter(torch.zeros(16, 256))
    optimizer = AdamW([p], lr=0.0, betas=(0.9, 0.999), states=states, min_quantized_numel=1, seed=0)
    p.grad = torch.rand(16, 256) + 0.5
    for _ in range(1500):
        optimizer.step()
    state = optimizer.state[p]
    format = QUANTIZED[states]["square8"]
    v = dequantize(state["exp_avg_sq_codes"], state["exp_avg_sq_scales"], torch.empty(0, dtype=torch.uint8), format.code, format.block, 256, torch.float32)
    ratio = v / (1 - 0.999 ** 1500) / p.grad ** 2
    # int8: a code is 1/32 .. 1/64 of 1 + root, so 6 % of v at most; int4: 1/4 .. 1/8; the mean over 4096 elements is far closer
    assert abs(ratio.mean() - 1) < mean and (ratio - 1).abs().max() < worst


@pytest.mark.parametrize("code, floor", [("square8", 1 / 32 / 251), ("square4", 1 / 4 / 13)])
def test_no_second_moment_collapses_to_zero(code, floor):
    """The codes have no zero: whatever stands beside it, a root decodes to at least the smallest code's share of the largest,
    so that no update divides by eps alone."""
    x = torch.tensor([0.0, 1e-45, 1e-30, 1e-12, 1.0]).repeat(20)[None]
    codes, scales, zeros = quantize(x, code, 100)
    back = dequantize(codes, scales, zeros, code, 100, 100, torch.float32)
    assert back.min().sqrt() >= floor * (1 - 1e-6)
    assert (dequantize(*quantize(torch.zeros(1, 100), code, 100), code, 100, 100, torch.float32) == 0).all()


# --- AdamW against paper and torch ------------------------------------------------------------------------
def test_two_steps_of_adamw_by_hand():
    """lr 0.1, betas (0.5, 0.5), decay 0.1, p = 1, g = 2 then -1:
    m 1, v 2: hats 2, 4: p = 0.99 - 0.1 * 2/2 = 0.89.   m 0, v 1.5: p = 0.89 * 0.99 = 0.8811."""
    p = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = AdamW([p], lr=0.1, betas=(0.5, 0.5), eps=0.0, weight_decay=0.1)
    p.grad = torch.tensor([2.0])
    optimizer.step()
    assert p.item() == pytest.approx(0.89, rel=1e-6)
    assert (optimizer.state[p]["exp_avg"].item(), optimizer.state[p]["exp_avg_sq"].item()) == (1.0, 2.0)
    p.grad = torch.tensor([-1.0])
    optimizer.step()
    assert p.item() == pytest.approx(0.8811, rel=1e-6)
    assert (optimizer.state[p]["exp_avg"].item(), optimizer.state[p]["exp_avg_sq"].item(), float(optimizer.state[p]["step"])) == (0.0, 1.5, 2.0)


def test_two_steps_of_lion_by_hand():
    """lr 0.1, betas (0.5, 0.75), decay 0.1, p = 1, g = 2 then -8: m 0.5, p 0.99 - 0.1; sign(0.25 - 4) = -1: p = 0.8811 + 0.1."""
    p = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = optim.Lion([p], lr=0.1, betas=(0.5, 0.75), weight_decay=0.1)
    p.grad = torch.tensor([2.0])
    optimizer.step()
    assert p.item() == pytest.approx(0.89, rel=1e-6) and optimizer.state[p]["exp_avg"].item() == 0.5
    p.grad = torch.tensor([-8.0])
    optimizer.step()
    assert p.item() == pytest.approx(0.9811, rel=1e-6) and optimizer.state[p]["exp_avg"].item() == 0.375 - 2


@pytest.mark.parametrize("options", [dict(), dict(lr=0.1), dict(weight_decay=0.3), dict(betas=(0.5, 0.9)), dict(eps=1e-3), dict(amsgrad=True),
                                     dict(maximize=True), dict(amsgrad=True, maximize=True, weight_decay=0.2), dict(lr=torch.tensor(0.02)),
                                     dict(lr=torch.tensor([0.02])), dict(weight_decay=0.0), dict(betas=(0.0, 0.9)), dict(fused=True), dict(foreach=True)],
                         ids=str)
def test_adamw_fp32_follows_torch_step_by_step(options):
    params, other = parameters(), parameters()
    assert_follows_torch(AdamW(params, **options), torch.optim.AdamW(other, **{k: v for k, v in options.items() if k != "fused"}), params, other)


def test_groups_added_later_schedulers_and_tensor_lr():
    for scheduler in (lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10), lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5),
                      lambda o: torch.optim.lr_scheduler.OneCycleLR(o, [0.1, 0.2], total_steps=30),
                      lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t))):
        for lr in (0.05, torch.tensor(0.05)):
            sides = []
            for cls in (AdamW, torch.optim.AdamW):
                params = parameters()
                optimizer = cls([{"params": params[:2]}], lr=lr.clone() if isinstance(lr, torch.Tensor) else lr)
                optimizer.add_param_group({"params": params[2:], "lr": 0.01, "weight_decay": 0.2, "betas": (0.8, 0.99), "amsgrad": True})
                sides.append((params, optimizer, scheduler(optimizer)))
            (p, a, sa), (q, b, sb) = sides

            def advance(step):
                sa.step(), sb.step()
                assert [float(g["lr"]) for g in a.param_groups] == [float(g["lr"]) for g in b.param_groups]
            assert_follows_torch(a, b, p, q, 12, advance)


def test_closures_return_the_loss_and_see_gradients_enabled():
    p = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = AdamW([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (p ** 2).sum()
        loss.backward()
        return loss
    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses[0] == 9.0 and losses == sorted(losses, reverse=True)
    assert optimizer.step() is None


def test_zero_grad_hooks_and_repr():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer, calls = AdamW([p]), []
    optimizer.register_step_pre_hook(lambda o, a, k: calls.append("pre"))
    optimizer.register_step_post_hook(lambda o, a, k: calls.append("post"))
    optimizer.register_state_dict_post_hook(lambda o, d: calls.append("state_dict"))
    optimizer.register_load_state_dict_pre_hook(lambda o, d: calls.append("load pre"))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("load post"))
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["pre", "post", "state_dict", "load pre", "load post"]
    optimizer.zero_grad(set_to_none=False)
    assert (p.grad == 0).all()
    optimizer.zero_grad()
    assert p.grad is None
    assert "AdamW" in repr(optimizer) and "states: fp32" in repr(optimizer)


def test_parameters_that_join_after_a_load_or_a_copy_get_random_bits_of_their_own():
    def parameters(count):
        out = [torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(count)]
        for p in out:
            p.grad = torch.ones_like(p)
        return out
    optimizer = AdamW([{"params": parameters(2)}, {"params": parameters(1)}], lr=1e-4, seed=1)
    optimizer.step()
    for p in optimizer.param_groups.pop(0)["params"]:  # what is left is number 2
        del optimizer.state[p]
    loaded = AdamW(parameters(1), lr=1e-4, seed=1)
    loaded.load_state_dict(optimizer.state_dict())
    for other in (loaded, copy.deepcopy(optimizer), optimizer):
        other.add_param_group({"params": parameters(3)})
        for p in other.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        other.step()
        ids = [other.state[p]["rng_id"] for group in other.param_groups for p in group["params"]]
        assert ids[0] == 2 and len(set(ids)) == 4, ids


def test_a_state_dict_hook_may_replace_it():
    optimizer = AdamW([torch.nn.Parameter(torch.ones(3))])
    optimizer.register_state_dict_post_hook(lambda o, d: {"mine": d["param_groups"][0]["lr"]})
    assert optimizer.state_dict() == {"mine": 1e-3}


def test_a_load_pre_hook_may_replace_the_state_dict():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([p], lr=0.1)
    other = copy.deepcopy(optimizer.state_dict())
    other["param_groups"][0]["lr"] = 0.7
    optimizer.register_load_state_dict_pre_hook(lambda o, d: other)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.7
    optimizer.load_state_dict(optimizer.state_dict())  # the hook is still registered
    assert optimizer.param_groups[0]["lr"] == 0.7


def test_frozen_and_gradientless_parameters_are_left_alone():
    params, other = parameters(), parameters()
    params[1].requires_grad_(False), other[1].requires_grad_(False)
    params[1].grad = other[1].grad = None
    ours = AdamW(params)
    assert_follows_torch(ours, torch.optim.AdamW(other), params, other, gradient=lambda p: None if p.shape in ((70,), (1,)) else torch.randn(p.shape))
    assert params[1] not in ours.state or not ours.state[params[1]]


def test_a_parameter_that_joins_later_counts_its_own_steps():
    params, other = parameters(), parameters()
    ours, theirs, step = AdamW(params), torch.optim.AdamW(other), [0]

    def between(s):
        step[0] = s
    assert_follows_torch(ours, theirs, params, other, 10, between, lambda p: None if p.dim() == 1 and step[0] % 3 else torch.randn(p.shape))
    assert float(ours.state[params[1]]["step"]) < float(ours.state[params[0]]["step"])


@pytest.fixture(params=["native", "reference"])
def backend(request):
    with running(request.param):
        yield


@pytest.mark.parametrize("kind", ["transposed", "channels_last", "strided", "expanded gradient"])
def test_parameters_and_gradients_of_any_layout(kind, backend):
    def make():
        g = torch.Generator().manual_seed(3)
        if kind == "channels_last":
            return torch.nn.Parameter(torch.randn(6, 5, 4, 3, generator=g).to(memory_format=torch.channels_last))
        x = torch.randn(90, 70, generator=g)
        return torch.nn.Parameter({"transposed": x.t(), "strided": x[:, ::2], "expanded gradient": x}[kind])
    p, q = make(), make()
    layout = p.stride()
    gradient = (lambda p: torch.randn(70).expand(90, 70)) if kind == "expanded gradient" else lambda p: torch.randn(p.shape).to(p.device)
    assert_follows_torch(AdamW([p]), torch.optim.AdamW([q]), [p], [q], 6, gradient=gradient)
    assert p.stride() == layout
    # and quantised states number elements in logical order: a contiguous twin gets the same bits
    a, b = make(), torch.nn.Parameter(make().detach().contiguous())
    for p, o in ((a, AdamW([a], states="int8", min_quantized_numel=1, seed=1)), (b, AdamW([b], states="int8", min_quantized_numel=1, seed=1))):
        generator = torch.Generator().manual_seed(8)
        for _ in range(3):
            p.grad = torch.randn(p.shape, generator=generator)
            o.step()
    assert_same_bits(a.detach().contiguous(), b.detach())


@pytest.mark.parametrize("states", STATES)
def test_mixed_dtypes_empty_and_scalar_parameters_in_one_group(states):
    shapes = [(66, 128), (66,), (), (0,), (0, 128), (128, 0), (1, 5)]
    params = [torch.nn.Parameter(torch.ones(s, dtype=d)) for d in FLOATS for s in shapes]
    params.append(torch.nn.Parameter(QuantizedWeight.quantize(torch.ones(66, 300))))
    optimizer = AdamW(params, lr=0.1, states=states, min_quantized_numel=1)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones(p.shape, dtype=p.dtype)
        optimizer.step()
    for p in params:
        value = p.dequantize() if isinstance(p, QuantizedWeight) else p.detach()
        # ones, decay 1e-3 a step, updates of lr: 1 - 0.3 - ~0.003; 8-bit moments are within 2^-4
        torch.testing.assert_close(value.float(), torch.full(p.shape, 0.697), atol=0.04, rtol=0)


@pytest.mark.parametrize("states", STATES[1:])
def test_low_precision_states_train_as_well_as_fp32(states):
    """Linear regression: the loss ends within a tenth of the fp32 optimizer's drop."""
    losses = {}
    x, target = torch.randn(256, 64), torch.randn(64, 64)
    for kind in ("fp32", states):
        w = torch.nn.Parameter(torch.zeros(64, 64))
        optimizer = AdamW([w], lr=0.02, states=kind, min_quantized_numel=1, seed=0)
        for _ in range(150):
            loss = ((x @ (w - target)) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[kind] = loss.item()
    start = ((x @ target) ** 2).mean().item()
    assert losses[states] < losses["fp32"] + 0.1 * (start - losses["fp32"]) and losses[states] < 0.2 * start


# --- GradScaler -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("unscale_first", [False, True])
def test_gradscaler_scales_and_skips_like_torch(unscale_first):
    params, other = parameters(), parameters()
    sides = [(params, AdamW(params), torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)),
             (other, torch.optim.AdamW(other), torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3))]
    for step in range(9):
        seed = int(torch.randint(1000, ()))
        for ps, optimizer, scaler in sides:
            generator = torch.Generator().manual_seed(seed)
            optimizer.zero_grad()
            loss = sum((p * torch.randn(p.shape, generator=generator)).sum() for p in ps)
            scaler.scale(loss * (float("inf") if step == 4 else 1.0)).backward()
            before = [p.detach().clone() for p in ps]
            if unscale_first:
                scaler.unscale_(optimizer)
                if step != 4:
                    torch.nn.utils.clip_grad_norm_(ps, 1.0)
            scaler.step(optimizer)
            scaler.update()
            if step == 4:
                assert_same_bits([p.detach() for p in ps], before)
        assert sides[0][2].get_scale() == sides[1][2].get_scale()
        for p, q in zip(params, other):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)
    assert not hasattr(sides[0][1], "found_inf")
    assert float(sides[0][1].state[params[0]]["step"]) == 8


# --- refusals ---------------------------------------------------------------------------------------------
def snapshot(optimizer, params):
    return copy.deepcopy(([p.detach() for p in params], {k: dict(v) for k, v in optimizer.state_dict()["state"].items()}))


@pytest.mark.parametrize("make", [AdamW, lambda ps: QGaLoreAdamW([{"params": ps, "rank": 4}])], ids=["AdamW", "QGaLore"])
def test_a_refused_gradient_leaves_weights_and_state_untouched(make):
    params = [torch.nn.Parameter(torch.randn(30, 20)), torch.nn.Parameter(torch.randn(5)), torch.nn.Parameter(torch.randn(30, 20))]
    optimizer = make(params)
    for steps in (0, 1):
        for bad, error in ((torch.randn(30, 20).to_sparse(), RuntimeError), (torch.randn(30, 20, dtype=torch.float64), TypeError)):
            for p in params:
                p.grad = torch.randn(p.shape)
            before = snapshot(optimizer, params)
            last = params[2]
            last.grad = None
            if bad.dtype == torch.float64:
                last.grad_dtype = torch.float64
            last.grad = bad
            with pytest.raises(error, match="sparse" if bad.is_sparse else "float64"):
                optimizer.step()
            assert_same_bits(snapshot(optimizer, params), before)
            last.grad = None
            last.grad_dtype = torch.float32
        for p in params:
            p.grad = torch.randn(p.shape)
        optimizer.step()


@pytest.mark.parametrize("options, error, match", [
    (dict(lr=-1.0), ValueError, "learning rate"), (dict(eps=-1.0), ValueError, "epsilon"), (dict(betas=(1.0, 0.9)), ValueError, "index 0"),
    (dict(betas=(0.9, -0.1)), ValueError, "index 1"), (dict(weight_decay=-1), ValueError, "weight_decay"), (dict(states="int3"), ValueError, "states"),
    (dict(min_quantized_numel=None), TypeError, "min_quantized_numel is None"),
    (dict(seed="x"), TypeError, "seed"), (dict(differentiable=True), ValueError, "differentiable"),
    (dict(lr=torch.ones(2)), ValueError, "1-element"), (dict(lr=float("nan")), ValueError, "learning rate"),
])
def test_bad_options_are_refused_by_name(options, error, match):
    with pytest.raises(error, match=match):
        AdamW([torch.nn.Parameter(torch.ones(3))], **options)


@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64], ids=str)
def test_parameters_of_other_dtypes_are_refused_and_the_group_is_not_added(dtype):
    with pytest.raises(TypeError, match=str(dtype).removeprefix("torch.")):
        AdamW([torch.nn.Parameter(torch.ones(3, dtype=dtype))])
    optimizer = AdamW([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(TypeError):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3, dtype=dtype))]})
    assert len(optimizer.param_groups) == 1


# --- checkpoints ------------------------------------------------------------------------------------------
def weights_of(kind):
    g = torch.Generator().manual_seed(4)
    shapes = [(70, 130), (130,), (66, 64), ()]
    out = []
    for s in shapes:
        x = torch.randn(s, generator=g)
        if kind in FLOAT_DTYPES:
            x = x.to(FLOAT_DTYPES[kind])
        elif len(s) == 2:
            x = QuantizedWeight.quantize(x, kind)
        out.append(torch.nn.Parameter(x))
    return out


def train(params, optimizer, start, stop):
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


OPTIMIZERS = {name: getattr(optim, name) for name in ("AdaBelief", "AdaGradNorm", "Adagrad", "Adam", "AdamW", "CLASSP", "DiffGrad", "Grams", "Lion", "Sophia")}
OPTIMIZERS["AdamW amsgrad"] = lambda ps, **o: AdamW(ps, amsgrad=True, **o)
OPTIMIZERS["SGD"] = lambda ps, **o: optim.SGD(ps, momentum=0.9, dampening=0.3, **o)
for matrices_only in ("Muon", "AuON", "HybridAuON"):
    OPTIMIZERS[matrices_only] = lambda ps, cls=getattr(optim, matrices_only), **o: cls([p for p in ps if p.ndim == 2], **o)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16", "int8", "int4"])
def test_resume_from_a_file_is_bit_equal_to_going_on(name, states, kind):
    params = weights_of(kind)
    optimizer = OPTIMIZERS[name](params, states=states, min_quantized_numel=1, seed=11)
    train(params, optimizer, 0, 4)
    file = io.BytesIO()
    torch.save({"params": params, "optimizer": optimizer.state_dict()}, file)
    train(params, optimizer, 4, 9)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = saved["params"]
    resumed = OPTIMIZERS[name](again, states=states, min_quantized_numel=1, lr=3.0, seed=12)  # the file's lr and seed win
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, 4, 9)
    assert_same_bits([p.detach() for p in again], [p.detach() for p in params])
    assert_same_bits(resumed.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_copies_of_an_optimizer_go_on_alike(clone, kind):
    params = weights_of(kind)
    optimizer = AdamW(params, states="int8", min_quantized_numel=1, seed=2)
    train(params, optimizer, 0, 2)
    others, other = clone((params, optimizer))
    train(params, optimizer, 2, 5)
    train(others, other, 2, 5)
    assert_same_bits([p.detach() for p in others], [p.detach() for p in params])
    new = torch.nn.Parameter(torch.ones(3))
    other.add_param_group({"params": [new]})
    new.grad = torch.ones(3)
    other.step()
    assert (new != 1).all()


def test_loading_does_not_share_tensors_with_the_state_dict():
    params = weights_of("fp32")
    optimizer = AdamW(params, states="int8", min_quantized_numel=1)
    train(params, optimizer, 0, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    other = AdamW(weights_of("fp32"), states="int8", min_quantized_numel=1)
    other.load_state_dict(saved)
    train([p for g in other.param_groups for p in g["params"]], other, 2, 4)
    assert_same_bits(saved, kept)


@pytest.mark.parametrize("states", STATES)
def test_a_torch_checkpoint_loads_and_training_goes_on_from_it(states):
    params, other = parameters(), parameters()
    theirs = torch.optim.AdamW(other, lr=0.01, amsgrad=True)
    for _ in range(3):
        for p in other:
            p.grad = torch.randn(p.shape)
        theirs.step()
    for p, q in zip(params, other):
        p.data.copy_(q.data)
    ours = AdamW(params, lr=5.0, states=states, min_quantized_numel=1)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert ours.param_groups[0]["lr"] == 0.01 and ours.param_groups[0]["states"] == states and ours.param_groups[0]["amsgrad"]
    for p, q in zip(params, other):
        p.grad = q.grad = torch.randn(p.shape)
    ours.step(), theirs.step()
    # with 8-bit moments an update, about lr, is off by the codes' relative error, 2^-5 + 2 * 2^-6 beside larger ones
    for p, q in zip(params, other):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol={"fp32": 1e-7, "bf16": 1e-4, "fp8": 1e-2, "int8": 5e-3, "int4": 2e-2}[states])
    assert float(ours.state[params[0]]["step"]) == 4


def test_our_fp32_checkpoint_loads_into_torch():
    params, other = parameters(), parameters()
    ours = AdamW(params, lr=0.01)
    train(params, ours, 0, 3)
    theirs = torch.optim.AdamW(other)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    for p, q in zip(params, other):
        q.data.copy_(p.data)
    for p, q in zip(params, other):
        p.grad = q.grad = torch.randn(p.shape)
    ours.step(), theirs.step()
    for p, q in zip(params, other):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("saved_as", STATES)
@pytest.mark.parametrize("loaded_as", STATES)
def test_states_saved_in_one_format_load_into_another(saved_as, loaded_as):
    params = weights_of("fp32")
    a = AdamW(params, states=saved_as, min_quantized_numel=1)
    train(params, a, 0, 3)
    saved = copy.deepcopy(a.state_dict())
    for g in saved["param_groups"]:
        del g["states"]  # so that the new optimizer's option holds
    b = AdamW(weights_of("fp32"), states=loaded_as, min_quantized_numel=1)
    b.load_state_dict(saved)
    state = b.state_dict()["state"][0]
    assert ("exp_avg_codes" in state) == (loaded_as in QUANTIZED)
    if loaded_as in QUANTIZED:
        format = QUANTIZED[loaded_as]["moment8"]
        assert state["exp_avg_codes"].dtype == format.code_dtype and state["exp_avg_scales"].shape == (70, format.blocks(130))
    else:
        assert state["exp_avg"].dtype == FLOAT_DTYPES[loaded_as]
    train([p for g in b.param_groups for p in g["params"]], b, 3, 5)


def test_an_unstepped_and_a_partial_state_dict_load():
    params = parameters()
    optimizer = AdamW(params)
    optimizer.load_state_dict(AdamW(parameters()).state_dict())
    train(params, optimizer, 0, 1)
    saved = optimizer.state_dict()
    del saved["state"][0]
    other_params = parameters()
    other = AdamW(other_params)
    other.load_state_dict(saved)
    train(other_params, other, 0, 1)
    assert float(other.state[other_params[0]]["step"]) == 1 and float(other.state[other_params[1]]["step"]) == 2


DAMAGE = {
    "missing state": lambda d: d["state"][0].pop("exp_avg_codes"),
    "missing scales": lambda d: d["state"][0].pop("exp_avg_sq_scales"),
    "wrong shape": lambda d: d["state"][0].update(exp_avg_codes=d["state"][0]["exp_avg_codes"][:-1]),
    "wrong scale shape": lambda d: d["state"][0].update(exp_avg_scales=d["state"][0]["exp_avg_scales"].flatten()),
    "codes cast to float": lambda d: d["state"][0].update(exp_avg_codes=d["state"][0]["exp_avg_codes"].bfloat16()),
    "integer scales": lambda d: d["state"][0].update(exp_avg_scales=d["state"][0]["exp_avg_scales"].int()),
    "plain state of wrong shape": lambda d: d["state"][1].update(exp_avg=torch.zeros(3)),
    "plain state of integers": lambda d: d["state"][1].update(exp_avg=torch.zeros(130, dtype=torch.int64)),
    "plain state not a tensor": lambda d: d["state"][1].update(exp_avg="x"),
    "codes not a tensor": lambda d: d["state"][0].update(exp_avg_codes=[1, 2]),
    "step not a number": lambda d: d["state"][0].update(step="three"),
    "step of two elements": lambda d: d["state"][0].update(step=torch.zeros(2)),
    "step of inf": lambda d: d["state"][0].update(step=torch.tensor(float("inf"))),
    "step of nan": lambda d: d["state"][0].update(step=float("nan")),
    "rng_id not an int": lambda d: d["state"][0].update(rng_id="x"),
    "rng_id too large": lambda d: d["state"][0].update(rng_id=1 << 40),
    "seed not an int": lambda d: d["param_groups"][0].update(seed="x"),
    "fewer parameters": lambda d: d["param_groups"][0]["params"].pop(),
    "more groups": lambda d: d["param_groups"].append(d["param_groups"][0]),
    "negative lr": lambda d: d["param_groups"][0].update(lr=-1.0),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_changes_nothing(damage):
    params = weights_of("fp32")
    optimizer = AdamW(params, states="int8", min_quantized_numel=1)
    train(params, optimizer, 0, 2)
    before = copy.deepcopy(optimizer.state_dict())
    bad = copy.deepcopy(before)
    DAMAGE[damage](bad)
    # torch's own ValueError for groups that do not match, CheckpointError (a ValueError) for the rest
    with pytest.raises(ValueError if "fewer" in damage or "groups" in damage else CheckpointError):
        optimizer.load_state_dict(bad)
    assert_same_bits(optimizer.state_dict(), before)
    train(params, optimizer, 2, 3)


@pytest.mark.parametrize("cls", [AdamW, gradmill.optim.STEPAdam])
@pytest.mark.parametrize("states", ["fp32", "int4"])
def test_changing_the_states_option_of_a_live_group_keeps_what_is_stored(cls, states):
    sides = []
    for changed in (False, True):
        params = weights_of("fp32")
        optimizer = cls(params, states="int8", min_quantized_numel=1)
        train(params, optimizer, 0, 2)
        if changed:
            optimizer.param_groups[0]["states"] = states
        train(params, optimizer, 2, 4)
        sides.append(params)
    assert "exp_avg_codes" in optimizer.state[params[0]]
    assert_same_bits([p.detach() for p in sides[0]], [p.detach() for p in sides[1]])


def test_the_parameters_place_numbers_its_random_bits_and_the_seed_matters():
    def run(seed, order):
        ps = [torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(2)]
        o = AdamW([ps[i] for i in order], lr=1e-4, seed=seed)
        for p in ps:
            p.grad = torch.ones_like(p)
        o.step()
        return [p.detach() for p in ps]
    a, b = run(1, (0, 1))
    assert not torch.equal(a, b)
    assert torch.equal(run(1, (1, 0))[0], b)
    assert not torch.equal(run(2, (0, 1))[0], a)
    torch.manual_seed(5)
    assert AdamW([torch.nn.Parameter(torch.ones(1))]).param_groups[0]["seed"] == 5
    assert AdamW([torch.nn.Parameter(torch.ones(1))], seed=2 ** 64 - 1).param_groups[0]["seed"] == -1
    assert AdamW([{"params": torch.nn.Parameter(torch.ones(1)), "seed": 2 ** 64 - 1}]).param_groups[0]["seed"] == -1  # a group's, too


def test_no_warning_in_an_ordinary_step():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params = weights_of("int8")
        train(params, AdamW(params, states="int8", min_quantized_numel=1), 0, 2)


def test_a_rule_wants_its_number_of_states():
    p, g, s = torch.zeros(4), torch.ones(4), torch.zeros(4)
    for count in (1, 40):
        with pytest.raises(ValueError, match="state_codes"):
            gradmill.ops.fused_step("adamw", [p], [], [], [g], [s] * count, [], torch.ones(1, 16), torch.tensor([0, 1]), [0], "fp32", 0,
                                    ["fp32"] * count, 0)


def test_scalar_rows_follow_their_tensors_past_empty_ones():
    params, scalars = [torch.zeros(0), torch.zeros(2)], torch.zeros(2, 16)
    scalars[:, :3], scalars[0, 4], scalars[1, 4] = 1, 100, 1  # decay 1, 1 - beta1 = 1, then lr
    gradmill.ops.fused_step("lion", params, [], [], [torch.ones(0), torch.ones(2)], [torch.zeros(0), torch.zeros(2)], [], scalars,
                            torch.tensor([0, 1]), [0, 1], "fp32", 0, ["fp32"], 0)
    assert torch.equal(params[1], torch.full((2,), -1.0))


def test_torchs_default_dtype_and_device_do_not_reach_the_state():
    p = torch.nn.Parameter(torch.randn(80, 128))
    p.grad = torch.randn_like(p)
    for dtype in (torch.bfloat16, torch.float64):
        optimizer = gradmill.optim.AdamW([p], states="int8")
        torch.set_default_dtype(dtype)
        try:
            for _ in range(300):
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        assert optimizer.state[p]["step"].item() == 300 and optimizer.state[p]["exp_avg_scales"].dtype == torch.float32


def test_a_step_is_seen_by_autograd():
    w = torch.nn.Parameter(torch.ones(3))
    loss = (w * w * torch.ones(3, requires_grad=True)).sum()
    loss.backward(retain_graph=True)
    gradmill.optim.AdamW([w]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_checkpoint_does_not_change_how_states_are_stored():
    p = torch.nn.Parameter(torch.randn(80, 128))
    p.grad = torch.randn_like(p)
    plain, packed = gradmill.optim.AdamW([p]), gradmill.optim.AdamW([p], states="int8")
    plain.step()
    packed.load_state_dict(plain.state_dict())
    assert packed.param_groups[0]["states"] == "int8" and "exp_avg_codes" in packed.state[p]
    with pytest.raises(gradmill.CheckpointError, match="another optimizer's"):
        gradmill.optim.Lion([p]).load_state_dict(plain.state_dict())
    with pytest.raises(gradmill.CheckpointError, match="not projected"):
        gradmill.optim.QGaLoreAdamW([p], rank=16).load_state_dict(plain.state_dict())
