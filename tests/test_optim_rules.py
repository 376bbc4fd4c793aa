"""optim: each rule against torch.optim where torch has it, else against its paper's formula in float64; the first steps by
hand; the traps of the official codes. tests/test_optim.py has what all rules share: formats, backends, checkpoints."""
import contextlib
import copy
import math
from math import sqrt

import pytest
import torch
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

import gradmill
from gradmill import optim
from gradmill.reference.optim import exp2, log2, power

from .conftest import assert_follows_torch, assert_same_bits, parameters

TORCH = {name: next(info for info in optim_db if info.optim_cls is getattr(torch.optim, name)) for name in ("SGD", "Adagrad", "Adam", "AdamW", "Muon")}


# --- torch's own cases ------------------------------------------------------------------------------------
def newton_schulz64(x, coefficients, steps, eps):
    """torch.optim.Muon's iteration, in float64 instead of bf16."""
    a, b, c = coefficients
    y = x.double().t() if x.shape[0] > x.shape[1] else x.double()
    y = y / y.norm().clamp(min=eps)
    for _ in range(steps):
        gram = y @ y.t()
        y = a * y + (b * gram + c * gram @ gram) @ y
    return (y.t() if x.shape[0] > x.shape[1] else y).float()


def pair(name, options, seed=1, **ours):
    """Equal parameters under gradmill's optimizer and torch's: (params, other, optimizer, torch's)."""
    params, other = parameters(seed), parameters(seed)
    if name == "Muon":
        shapes = [(33, 20), (20, 33), (1, 7), (7, 1), (16, 16), (0, 3)]
        params, other = ([torch.nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(i))) for i, s in enumerate(shapes)] for _ in range(2))
    clone = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    if name == "Muon":
        ours.setdefault("ns_dtype", torch.float32)
    return params, other, getattr(optim, name)(params, **options, **ours), getattr(torch.optim, name)(other, **clone)


def size_of_updates(name):
    """For assert_follows_torch: SGD's updates are sums of momentum's 10 gradients of up to 5; Muon's fp32 iteration, whose
    slope of up to 3.4445 a step multiplies rounding errors, is compared with float64."""
    return {"SGD": 64.0, "Muon": 256.0}.get(name, 1.0)


CASES = [(name, case) for name, info in TORCH.items() for case in info.optim_inputs_func(device="cpu")]
MORE = [("SGD", dict(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.2)), ("SGD", dict(lr=0.1, momentum=0.5, nesterov=True, maximize=True)),
        ("SGD", dict(weight_decay=torch.tensor(0.1))), ("Adagrad", dict(lr=0.1, eps=0.1, lr_decay=0.1, initial_accumulator_value=2.0)),
        ("Adam", dict(decoupled_weight_decay=True, weight_decay=0.1)), ("Adam", dict(betas=(torch.tensor(0.8), torch.tensor(0.99)), weight_decay=0.2)),
        ("Adam", dict(lr=torch.tensor([0.01]), amsgrad=True)), ("AdamW", dict(betas=(torch.tensor(0.8), torch.tensor(0.99)))),
        ("Muon", dict(adjust_lr_fn="match_rms_adamw")), ("Muon", dict(nesterov=False, eps=1.0)), ("Muon", dict(lr=0.02, ns_steps=0))]


@pytest.mark.parametrize("name, options", [(name, case.kwargs) for name, case in CASES] + MORE,
                         ids=[f"{name}-{case.desc}" for name, case in CASES] + [f"{name}-{'-'.join(o)}" for name, o in MORE])
def test_the_trajectory_is_torchs(name, options, monkeypatch):
    """Every input of torch's own table, and more; the capturable ones are in tests/test_capturable.py."""
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", newton_schulz64)
    params, other, ours, theirs = pair(name, options)
    assert_follows_torch(ours, theirs, params, other, update=size_of_updates(name), coupled=bool(options.get("weight_decay")))


#: Five steps a y + (b A + c A^2) y whose terms are rounded to bf16: 5 * 2^-9 * (3.45 + 4.78 + 2.03). Seen: .01 to .06; a small
#: matrix with a singular value near zero, where the polynomial's slope is 3.45, .13 once in 300, so means of draws are compared.
BF16_NOISE = 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None], ids=str)
def test_muon_is_torchs_to_the_noise_of_its_bf16(dtype):
    params, other, ours, theirs = pair("Muon", {}, ns_dtype=dtype)
    for p, q in zip(params, other):
        q.grad = p.grad = torch.randn(p.shape)
    before = [p.detach().clone() for p in params]
    ours.step(), theirs.step()
    for p, q, b in zip(params, other, before):
        assert (p - q).norm() <= 2 * BF16_NOISE * (q - b).norm()


ERRORS = [(name, case) for name, info in TORCH.items() for case in info.optim_error_inputs_func(device="cpu", dtype=torch.float32)]


@pytest.mark.parametrize("name, case", ERRORS, ids=[f"{name}-{case.optimizer_error_input.desc}" for name, case in ERRORS])
def test_torchs_own_error_cases(name, case):
    given, cls = case.optimizer_error_input, getattr(optim, name)
    params = given.params  # often None: options are looked at first
    if given.desc == "does not support complex parameters":  # torch says so in the step
        with pytest.raises(TypeError, match="torch.complex64"):
            cls(params, **given.kwargs)
        return
    assert case.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    if issubclass(case.error_type, Warning):
        with pytest.warns(case.error_type, match=case.error_regex):
            cls(params, **given.kwargs)
    else:
        with pytest.raises(case.error_type, match=case.error_regex):
            cls(params, **given.kwargs)


@pytest.mark.parametrize("name", TORCH)
def test_what_torch_has_and_gradmill_has_not_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name}: differentiable=True is not supported"):
        getattr(optim, name)([torch.nn.Parameter(torch.ones(2, 2))], differentiable=True)
    getattr(optim, name)([torch.nn.Parameter(torch.ones(2, 2))], differentiable=False, fused=True)


@pytest.mark.parametrize("name, match", [("SGD", "Nesterov"), ("SGD", "momentum"), ("Adagrad", "initial_accumulator"), ("Muon", "3 values"),
                                         ("Muon", "Number of steps"), ("CLASSP", "power"), ("CLASSP", "threshold"), ("AdaGradNorm", "b0"), ("Sophia", "rho")])
def test_bad_options_are_refused_by_name(name, match):
    bad = {"Nesterov": dict(nesterov=True), "momentum": dict(momentum=-1), "initial_accumulator": dict(initial_accumulator_value=-1),
           "3 values": dict(ns_coefficients=(1, 2)), "Number of steps": dict(ns_steps=100), "power": dict(power=0.0), "threshold": dict(threshold=-1.0),
           "b0": dict(b0=0.0), "rho": dict(rho=-1.0)}[match]
    with pytest.raises(ValueError, match=match):
        getattr(optim, name)([torch.nn.Parameter(torch.ones(2, 2))], **bad)


MODEL = {"SGD": dict(lr=0.1, momentum=0.9, weight_decay=0.1), "Adagrad": dict(lr=0.1), "Adam": dict(lr=0.1, weight_decay=0.1, amsgrad=True),
         "AdamW": dict(lr=0.1), "Muon": dict(lr=0.1)}


@pytest.mark.parametrize("name", MODEL)
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
def test_groups_and_schedulers_as_in_torch(name, lr, monkeypatch):
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", newton_schulz64)
    params, other, _, _ = pair(name, {})
    sides = []
    for cls, ps in ((getattr(optim, name), params), (getattr(torch.optim, name), other)):
        precise = {"ns_dtype": torch.float32} if cls is optim.Muon else {}
        optimizer = cls([{"params": ps[:1], "lr": 0.03}, {"params": ps[1:], "weight_decay": 0.2}],
                        **{**MODEL[name], **precise, "lr": lr.clone() if isinstance(lr, torch.Tensor) else lr})
        sides.append((optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)))
    (ours, a), (theirs, b) = sides

    def advance(step):
        a.step(), b.step()
        assert [float(g["lr"]) for g in ours.param_groups] == [float(g["lr"]) for g in theirs.param_groups]
    assert_follows_torch(ours, theirs, params, other, 6, advance, update=4 * size_of_updates(name), coupled=True)


def test_cycled_momentum_and_betas_as_in_torch():
    for name, options in (("SGD", dict(lr=0.1, momentum=0.9)), ("AdamW", dict(lr=0.1))):
        params, other, ours, theirs = pair(name, options)
        a, b = (torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=9) for o in (ours, theirs))
        assert_follows_torch(ours, theirs, params, other, 8, lambda step: (a.step(), b.step()), update=4 * size_of_updates(name))


@pytest.mark.parametrize("name", MODEL)
@pytest.mark.parametrize("states", ["fp32", "bf16", "int8"])
def test_a_torch_checkpoint_goes_on_here_and_ours_there(name, states, monkeypatch):
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", newton_schulz64)
    params, other, ours, theirs = pair(name, MODEL[name], states=states, min_quantized_numel=1)
    for q in other:
        q.grad = torch.randn(q.shape)
    theirs.step()
    with torch.no_grad():
        for p, q in zip(params, other):
            p.copy_(q)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert ours.param_groups[0]["states"] == states
    lr, loose = MODEL[name]["lr"], {"fp32": 0.0, "bf16": 2.0 ** -7, "int8": 0.4}[states]

    def assert_close():
        """A moment in 8 bits is a few percent off, but the ratio of two that are tiny beside their block may be anything: so the
        mean error is bounded as well."""
        for p, q in zip(params, other):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=lr * (2 ** -12 + 5 * loose))
            assert states != "int8" or not p.numel() or (p - q).abs().mean() < 0.1 * lr
    for p, q in zip(params, other):
        p.grad = q.grad = torch.randn(p.shape)
    ours.step(), theirs.step()
    assert_close()
    if states == "fp32":
        theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
        for p, q in zip(params, other):
            p.grad = q.grad = torch.randn(p.shape)
        ours.step(), theirs.step()
        assert_close()


def test_a_torch_sgd_checkpoint_without_a_buffer_loads_and_later_momentum_starts_from_the_gradient():
    params, other, ours, theirs = pair("SGD", dict(lr=0.1))
    assert_follows_torch(ours, theirs, params, other, 2)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for optimizer in (ours, theirs):
        optimizer.param_groups[0].update(momentum=0.9, dampening=0.5)
    assert_follows_torch(ours, theirs, params, other, 4, update=64.0)


# --- the papers' formulas ---------------------------------------------------------------------------------
def adam_moments(g, s, t, betas):
    s["m"] = betas[0] * s.get("m", 0) + (1 - betas[0]) * g
    s["v"] = betas[1] * s.get("v", 0) + (1 - betas[1]) * g * g
    return sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)


def adabelief(p, g, s, t, rectify=True, eps=1e-16, weight_decay=0.0, weight_decouple=True, lr=1e-3, betas=(0.9, 0.999), degenerated_to_sgd=True):
    if not weight_decouple:
        g = g + weight_decay * p
        weight_decay = 0.0
    s["m"] = betas[0] * s.get("m", 0) + (1 - betas[0]) * g
    s["s"] = betas[1] * s.get("s", 0) + (1 - betas[1]) * (g - s["m"]) ** 2 + eps
    p = p * (1 - lr * weight_decay)
    m = s["m"] / (1 - betas[0] ** t)
    if not rectify:
        return p - lr * m / ((s["s"] / (1 - betas[1] ** t)).sqrt() + eps)
    limit = 2 / (1 - betas[1]) - 1
    rho = limit - 2 * t * betas[1] ** t / (1 - betas[1] ** t)
    if rho < 5:
        return p - lr * m * degenerated_to_sgd
    r = sqrt((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho))
    return p - lr * r * m * sqrt(1 - betas[1] ** t) / (s["s"].sqrt() + eps)


def diffgrad(p, g, s, t, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    g = g + weight_decay * p
    friction = 1 / (1 + torch.exp(-(s.get("before", 0) - g).abs()))
    s["before"] = g
    return p - lr * adam_moments(g, s, t, betas) * friction * s["m"] / (s["v"].sqrt() + eps)


def grams(p, g, s, t, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0):
    correction = adam_moments(g, s, t, betas)
    return p * (1 - lr * weight_decay) - lr * correction * g.sign() * s["m"].abs() / (s["v"].sqrt() + eps)


def lion(p, g, s, t, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
    m = s.get("m", torch.zeros_like(g))
    s["m"] = betas[1] * m + (1 - betas[1]) * g
    return p * (1 - lr * weight_decay) - lr * (betas[0] * m + (1 - betas[0]) * g).sign()


def classp(p, g, s, t, lr=0.2, threshold=0.5, eps=1e-5, power=1.0):
    total = s.get("S", torch.zeros_like(g))
    grown = total + g.abs() ** power
    large = g * g > threshold
    s["S"] = torch.where(large, grown, total)
    return torch.where(large, p - lr * g / (eps + grown) ** (1 / power), p)


def adagrad_norm(p, g, s, t, lr=1e-2, b0=1e-2):
    s["b2"] = s.get("b2", b0 ** 2) + float(g.square().sum())
    return p - lr * g / sqrt(s["b2"])


def auon(p, g, s, t, lr=0.24, momentum=0.95, weight_decay=0.0, gamma=1.5, eps=1e-8, ns_steps=0, ns_dtype=None):
    s["m"] = momentum * s.get("m", 0) + (1 - momentum) * g
    u = (1 - momentum) * g + momentum * s["m"]
    if ns_steps:
        u = newton_schulz64(u.view(6, 8), optim.muon.COEFFICIENTS, ns_steps, 1e-7).double().flatten()
    r = torch.cosh(gamma * u / u.norm()).square().mean().sqrt()
    return p * (1 - lr * weight_decay) - lr * u / (r + eps)


FORMULAS = [
    (optim.AdaBelief, adabelief, dict(lr=0.01)), (optim.AdaBelief, adabelief, dict(lr=0.01, rectify=False, weight_decay=0.1)),
    (optim.AdaBelief, adabelief, dict(lr=0.01, weight_decay=0.1, weight_decouple=False, eps=1e-8)),
    (optim.AdaBelief, adabelief, dict(lr=0.01, degenerated_to_sgd=False)), (optim.AdaBelief, adabelief, dict(lr=0.01, betas=(0.8, 0.9))),
    (optim.DiffGrad, diffgrad, dict(lr=0.01)), (optim.DiffGrad, diffgrad, dict(lr=0.01, weight_decay=0.1, betas=(0.5, 0.9))),
    (optim.Grams, grams, dict(lr=0.01)), (optim.Grams, grams, dict(lr=0.01, weight_decay=0.1)),
    (optim.Lion, lion, dict(lr=0.01, weight_decay=0.1)),
    (optim.CLASSP, classp, dict(lr=0.01)), (optim.CLASSP, classp, dict(lr=0.01, threshold=0.01, power=2.0)),
    (optim.CLASSP, classp, dict(lr=0.01, threshold=0.01, power=0.5)), (optim.CLASSP, classp, dict(lr=0.01, threshold=0.0, power=3.3)),
    (optim.AdaGradNorm, adagrad_norm, dict(lr=0.1)),
    (optim.AuON, auon, dict(lr=0.01, weight_decay=0.1)), (optim.HybridAuON, auon, dict(lr=0.01, ns_steps=1, ns_dtype=torch.float32)),
    (optim.HybridAuON, auon, dict(lr=0.01, ns_steps=5, ns_dtype=torch.float32)),
]


def convex(x):
    """Condition number 50; the minimum is at 1/2."""
    return 0.5 * (torch.linspace(0.1, 5.0, x.numel(), dtype=x.dtype) * (x - 0.5) ** 2).sum()


def rosenbrock(x):
    """Not convex; scaled so that gradients are near 1."""
    return (10 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum() / 10


@pytest.mark.parametrize("problem", [convex, rosenbrock])
@pytest.mark.parametrize("cls, formula, options", FORMULAS, ids=[f"{c.__name__}-{'-'.join(o)}" for c, _, o in FORMULAS])
def test_the_trajectory_is_the_formulas(cls, formula, options, problem):
    """Gradients come from the float64 trajectory, so that a chaotic problem does not amplify rounding. fp32 rounds a weight by
    2^-24 of itself and an update, which is at most some lr, by 2^-18 of it (as assert_follows_torch; the cancellation in
    AdaBelief's g - m is of the same kind)."""
    x = (torch.randn(48) * 0.5).double()  # both start at the same numbers
    p = torch.nn.Parameter(x.float().view(6, 8))
    optimizer, state = cls([p], **options), {"x0": x}
    first, scale = problem(x), 1.0
    for t in range(1, 61):
        leaf = x.clone().requires_grad_()
        problem(leaf).backward()
        g = leaf.grad.float()
        p.grad = g.view(6, 8).clone()
        before = x
        x = formula(x, g.double(), state, t, **options)
        optimizer.step()
        scale = max(scale, float((x - before).abs().max()) / options["lr"])
        tolerance = t * (options["lr"] * scale * 2.0 ** -17 + 2.0 ** -23)
        torch.testing.assert_close(p.detach().double().flatten(), x, rtol=0, atol=tolerance)
    assert problem(x) < first


def test_sophia_follows_algorithm_3():
    """With both estimators, refreshed every 4 steps; the clip decides some elements and not others."""
    for way in ("samples", "estimates"):
        x = torch.randn(40, dtype=torch.float64)
        p = torch.nn.Parameter(x.float())
        optimizer = optim.Sophia([p], lr=0.01, rho=0.5)
        m = h = torch.zeros_like(x)
        clipped = 0
        for t in range(1, 41):
            if t % 4 == 1:
                e = torch.randn(40)
                if way == "samples":
                    p.grad = e
                    optimizer.update_hessian(samples=16)
                    h = 0.99 * h + 0.01 * 16 * e.double() ** 2
                else:
                    optimizer.update_hessian(estimates=[e])
                    h = 0.99 * h + 0.01 * e.double()
            g = torch.randn(40)
            p.grad = g
            optimizer.step()
            m = 0.965 * m + 0.035 * g.double()
            ratio = m / torch.clamp(0.5 * h, min=1e-12)
            clipped += int((ratio.abs() >= 1).sum())
            x = x * (1 - 0.01 * 0.1) - 0.01 * ratio.clamp(-1, 1)
            torch.testing.assert_close(p.detach().double(), x, rtol=0, atol=t * 2.0 ** -22)
        assert 0 < clipped < 40 * 40


# --- by hand ----------------------------------------------------------------------------------------------
#: optimizer with decay and lr that make the numbers short, gradients, the weight after each step from 1
BY_HAND = {
    # b = 2, p = 1 - .1 * 2;  b = .5 * 2 + .5 * -1 = .5
    "SGD dampened": (lambda p: optim.SGD(p, lr=0.1, momentum=0.5, dampening=0.5), (2.0, -1.0), (0.8, 0.75)),
    # b = 2, u = 2 + .5 * 2;  b = 1 - 1 = 0, u = -1 + 0
    "SGD Nesterov": (lambda p: optim.SGD(p, lr=0.1, momentum=0.5, nesterov=True), (2.0, -1.0), (0.7, 0.8)),
    # sum 4, p = 1 - .5 * 2/2;  lr .5/2, sum 13, p = .5 - .25 * 3/sqrt(13)
    "Adagrad": (lambda p: optim.Adagrad(p, lr=0.5, lr_decay=1.0), (2.0, 3.0), (0.5, 0.5 - 0.75 / sqrt(13))),
    # decay: g = 2 + .5 * 1 = 2.5;  m^/sqrt(v^) = 1
    "Adam L2": (lambda p: optim.Adam(p, lr=0.1, weight_decay=0.5, eps=0.0), (2.0,), (0.9,)),
    # t = 1, rho < 5: p = 1 - .1 * m^ = 1 - .1 * 2
    "AdaBelief": (lambda p: optim.AdaBelief(p, lr=0.1), (2.0,), (0.8,)),
    # m 1, s = .5 (2 - 1)^2 = .5; 2 / sqrt(.5/.5) = 2
    "AdaBelief unrectified": (lambda p: optim.AdaBelief(p, lr=0.1, betas=(0.5, 0.5), rectify=False, eps=0.0), (2.0,), (0.8,)),
    # friction 1/(1 + e^-2), Adam's first step 1;  friction 1/2: m^ = v^ = 2, 4 again
    "DiffGrad": (lambda p: optim.DiffGrad(p, lr=0.1, eps=0.0), (2.0, 2.0), (1 - 0.1 / (1 + math.exp(-2)), 0.95 - 0.1 / (1 + math.exp(-2)))),
    # m 1, v 2;  m .5 * 1 + .5 * -.5 = .25, m^ = 1/3, v = 1 + .125, v^ = 1.5: against m's sign, with g's
    "Grams": (lambda p: optim.Grams(p, lr=0.1, betas=(0.5, 0.5), eps=0.0), (2.0, -0.5), (0.9, 0.9 + 0.1 / 3 / sqrt(1.5))),
    # 4 > .5: S = 2, p = 1 - .2 * 2/2;  .01 <= .5: nothing;  S = 3
    "CLASSP": (lambda p: optim.CLASSP(p, eps=0.0), (2.0, 0.1, -1.0), (0.8, 0.8, 0.8 + 0.2 / 3)),
    # b = sqrt(9 + 16) = 5
    "AdaGradNorm": (lambda p: optim.AdaGradNorm(p, lr=1.0, b0=3.0), (4.0,), (0.2,)),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_first_steps_by_hand(name):
    make, gradients, weights = BY_HAND[name]
    p = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = make([p])
    for g, want in zip(gradients, weights):
        p.grad = torch.tensor([g])
        optimizer.step()
        assert p.item() == pytest.approx(want, rel=1e-6)


# --- traps ------------------------------------------------------------------------------------------------
def test_classp_decides_element_by_element_and_applies_its_power():
    g = torch.tensor([2.0, 0.1, -1.0, 0.7])
    p = torch.nn.Parameter(torch.zeros(4))
    optimizer = optim.CLASSP([p], lr=1.0, eps=0.0)
    p.grad = g
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([-1.0, 0.0, 1.0, 0.0]))
    torch.testing.assert_close(optimizer.state[p]["sum"], torch.tensor([2.0, 0.0, 1.0, 0.0]))
    a, b = (torch.nn.Parameter(torch.ones(50)) for _ in range(2))
    classp, adagrad = optim.CLASSP([a], lr=0.1, threshold=0.0, eps=0.0, power=2.0), optim.Adagrad([b], lr=0.1, eps=0.0)
    for _ in range(5):
        a.grad = b.grad = torch.randn(50)
        classp.step(), adagrad.step()
    assert_same_bits(a.detach(), b.detach())


def test_diffgrad_keeps_a_copy_of_the_gradient():
    """An alias would compare the gradient with itself: a friction of 1/2 at every step but the first."""
    p = torch.nn.Parameter(torch.zeros(4))
    optimizer = optim.DiffGrad([p], lr=1.0, betas=(0.0, 0.0), eps=0.0)
    p.grad = torch.full((4,), 1.0)
    optimizer.step()
    p.grad.fill_(-2.0)  # in place, as zero_grad(set_to_none=False) and backward() do
    before = p.detach().clone()
    optimizer.step()
    torch.testing.assert_close(p.detach() - before, torch.full((4,), 1 / (1 + math.exp(-3))))


def test_sophia_takes_sign_steps_before_its_first_refresh():
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = optim.Sophia([p], lr=0.1, weight_decay=0.0)
    p.grad = torch.tensor([3.0, -1e-4, 0.0])
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([-0.1, 0.1, 0.0]))


def test_sophias_estimators_find_the_diagonal():
    """Hutchinson on a quadratic: u H u with diagonal H is exact, and with others right on average. Gauss-Newton-Bartlett on
    logits themselves: the mean of p - p^2 per logit and sample."""
    a = torch.randn(6, 6, dtype=torch.float64)
    h = a @ a.t()
    x = torch.randn(6, dtype=torch.float64, requires_grad=True)
    unused = torch.randn(2, requires_grad=True)
    exact, missing = optim.hutchinson((torch.diagonal(h) * x ** 2).sum() / 2, [x, unused])
    assert missing is None
    torch.testing.assert_close(exact, torch.diagonal(h))
    draws = torch.stack([optim.hutchinson(x @ h @ x / 2, [x])[0] for _ in range(2000)])
    assert ((draws.mean(0) - torch.diagonal(h)).abs() < 5 * draws.std(0) / sqrt(2000) + 1e-9).all()

    logits = torch.randn(1, 5).expand(4000, 5).clone().requires_grad_()
    bias = torch.zeros(5, requires_grad=True)
    estimates = []
    for _ in range(300):
        bias.grad = None
        optim.gauss_newton_bartlett((logits[:40] + bias)).backward()
        estimates.append(40 * bias.grad ** 2)
    q = logits[0].detach().softmax(-1)
    estimates = torch.stack(estimates)
    assert ((estimates.mean(0) - (q - q * q)).abs() < 5 * estimates.std(0) / sqrt(300)).all()
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = optim.Sophia([p])
    for bad in (dict(), dict(samples=1, estimates=[None]), dict(estimates=[])):
        with pytest.raises(ValueError, match="update_hessian"):
            optimizer.update_hessian(**bad)


def test_sophia_takes_no_projection():
    """Its estimates are of weights: update_hessian would look for states of the gradient's shape."""
    with pytest.raises(ValueError, match="Sophia.* no projection"):
        optim.Sophia([torch.nn.Parameter(torch.ones(64, 64))], projection=optim.Projection(rank=4))


@pytest.mark.parametrize("states", ["fp32", "int8"])
def test_updating_the_hessian_leaves_weights_and_momentum_alone(states):
    weights = [torch.randn(66, 300), torch.randn(66, 300).bfloat16(), gradmill.QuantizedWeight.quantize(torch.randn(66, 300))]
    params = [torch.nn.Parameter(w) for w in weights]
    optimizer = optim.Sophia(params, states=states, min_quantized_numel=1)
    for p in params:
        p.grad = torch.randn(p.shape).to(p.dtype)
    optimizer.step()
    before = copy.deepcopy(([p.detach() for p in params], [{k: v for k, v in optimizer.state[p].items() if k != "hessian"} for p in params]))
    optimizer.update_hessian(samples=8)
    assert_same_bits(([p.detach() for p in params], [{k: v for k, v in optimizer.state[p].items() if k != "hessian"} for p in params]), before)
    for p in params:
        want = 0.01 * 8 * p.grad.float() ** 2
        torch.testing.assert_close(optimizer.state[p]["hessian"].float(), want, rtol=2.0 ** -8 if states == "int8" else 1e-6, atol=1e-9)


@pytest.mark.parametrize("given, match", [(dict(estimates=[torch.ones(3, 3), torch.ones(4)]), r"estimates\[1\] is float32 of shape \(4,\)"),
                                          (dict(estimates=[torch.ones(3, 3), torch.ones(3).double()]), r"estimates\[1\] is float64"),
                                          (dict(estimates=[torch.ones(3, 3).to_sparse(), None]), r"estimates\[0\].*must be dense"),
                                          (dict(estimates=[None]), "1 estimates for 2"), (dict(samples=0), "samples is 0"), ({}, "either")])
def test_a_refused_estimate_leaves_the_hessian_untouched(given, match):
    params = [torch.nn.Parameter(torch.ones(3, 3)), torch.nn.Parameter(torch.ones(3))]
    optimizer = optim.Sophia(params)
    with pytest.raises(ValueError, match=match):
        optimizer.update_hessian(**given)
    assert not optimizer.state


def test_adagrad_norm_has_one_step_size_for_the_whole_group_and_saves_it():
    params = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2))]
    optimizer = optim.AdaGradNorm(params, lr=1.0, b0=1.0)
    for p, value in zip(params, (2.0, 3.0)):
        p.grad = torch.full(p.shape, value)
    optimizer.step()
    assert optimizer.param_groups[0]["b_squared"] == pytest.approx(1 + 3 * 4 + 4 * 9)
    torch.testing.assert_close(params[0].detach(), torch.full((3,), -2 / 7.0))
    other = optim.AdaGradNorm([torch.nn.Parameter(p.detach().clone()) for p in params], lr=1.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0]["b_squared"] == optimizer.param_groups[0]["b_squared"]


def test_norm_test_grows_the_batch_as_far_as_the_noise_wants():
    """Samples of mean 1 and standard deviation 2 in 50 dimensions: 4 * 50 / b = eta^2 * 50 at a batch of 4 / eta^2."""
    parts = [[1 + 2 * torch.randn(64, 50).mean(0)] for _ in range(200)]
    got = optim.norm_test(parts, 64 * 200, eta=0.01)
    assert 0.9 < got / (4 / 0.01 ** 2) < 1.1
    assert optim.norm_test(parts, 64 * 200, eta=0.1) == 64 * 200  # never shrinks
    assert optim.norm_test([[torch.ones(3)], [torch.ones(3)]], 8) == 8
    with pytest.raises(ValueError, match="parts"):
        optim.norm_test([[torch.ones(3)]], 8)


def test_auons_r_is_one_on_real_shapes():
    for shape in ((64, 64), (768, 768), (300, 4096)):
        u = torch.randn(shape)
        _, scale = optim.AuON([torch.nn.Parameter(torch.zeros(shape))]).direction(u, dict(gamma=1.5, eps=0.0))
        assert 1.0 <= 1 / scale <= 1.0006


# --- Newton-Schulz ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (7, 3), (1, 9), (600, 600), (530, 700), (0, 3), (4, 0)])
def test_newton_schulz_moves_singular_values_near_one(shape):
    x = torch.randn(shape)
    got = optim.newton_schulz(x, dtype=torch.float32)
    assert got.shape == x.shape and got.dtype == x.dtype
    if not x.numel():
        return
    want = newton_schulz64(x, optim.muon.COEFFICIENTS, 5, 1e-7)
    torch.testing.assert_close(got, want, rtol=0, atol=2.0 ** -12)
    if min(shape) < 100:
        values = torch.linalg.svdvals(got)
        assert values.max() < 1.3 and (values.min() > 0.5 or min(shape) > 1)
    torch.testing.assert_close(optim.newton_schulz(x * 1e6, dtype=torch.float32), got, rtol=0, atol=1e-4)
    draws = [torch.randn(shape) for _ in range(20 if x.numel() < 100 else 1)]
    noise = [(optim.newton_schulz(d, dtype=torch.bfloat16) - y).norm() / y.norm() for d in draws for y in [optim.newton_schulz(d, dtype=torch.float32)]]
    assert sum(noise) <= BF16_NOISE * len(noise)
    assert not optim.newton_schulz(torch.zeros(shape)).any()


@pytest.mark.parametrize("n", [511, 512, 513, 700, 1024])
def test_a_symmetric_product_is_the_product(n):
    x = torch.randint(-4, 5, (n, 37)).float()  # exact in any order
    assert torch.equal(optim.muon.symmetric_product(x), x @ x.t())


# --- the polynomials --------------------------------------------------------------------------------------
def test_exp_log_and_power_are_within_their_bounds():
    x = torch.cat([torch.linspace(-126, 127.5, 200001), torch.rand(1000) * 1e-6])
    want = torch.exp2(x.double())
    assert ((exp2(x).double() - want).abs() <= want * (1 + x.abs().double()) * 2.0 ** -23).all()
    assert exp2(torch.tensor([-1e30, 1e30])).tolist() == [2.0 ** -126, exp2(torch.tensor([127.75])).item()]
    x = torch.cat([torch.rand(100000) * 3, 10 ** (torch.rand(100000) * 70 - 37), 1 + torch.randn(1000) * 1e-6])
    want = torch.log2(x.double())
    assert ((log2(x).double() - want).abs() <= 2.0 ** -22 * want.abs().clamp(min=1)).all()
    for y in (1 / 3, 0.7, 1.5, 3.0, 4.0, 1.0, 2.0, 0.5):
        want = x.double() ** y
        inside = (want > 2.0 ** -120) & (want < 2.0 ** 120)
        bound = want * (4 + (y * torch.log2(x.double())).abs()) * 2.0 ** -23
        assert ((power(x, y).double() - want).abs() <= bound)[inside].all()
    assert power(torch.tensor([0.0, float("inf")]), 0.7).tolist() == [0.0, float("inf")] and power(torch.tensor([float("nan")]), 0.7).isnan()


# --- SWATS, STEP, FedSpeed, XGrad -------------------------------------------------------------------------
def test_swats_switches_each_tensor_to_its_own_sgd():
    """Algorithm 1 in float64. Gradients that hardly change settle at once; random ones never."""
    options = dict(lr=0.01, betas=(0.9, 0.9), tolerance=1e-7)
    x = [torch.randn(20, dtype=torch.float64) for _ in range(2)]
    params = [torch.nn.Parameter(t.float()) for t in x]
    optimizer = optim.SWATS(params, **options)
    states, steady, switched = [{}, {}], torch.rand(20) + 0.5, [None, None]
    for t in range(1, 31):
        for i, (p, s) in enumerate(zip(params, states)):
            p.grad = steady.clone() if i == 0 else torch.randn(20)
            g = p.grad.double()
            if switched[i] is not None:
                s["buffer"] = 0.9 * s.get("buffer", 0) + g
                x[i] = x[i] - (1 - 0.9) * switched[i] * s["buffer"]
                continue
            correction = adam_moments(g, s, t, options["betas"])
            step = -0.01 * correction * s["m"] / (s["v"].sqrt() + 1e-9)
            x[i] = x[i] + step
            gamma = float(step @ step / -(step @ g))
            s["lambda"] = 0.9 * s.get("lambda", 0) + 0.1 * gamma
            settled = s["lambda"] / (1 - 0.9 ** t)
            if t > 1 and abs(settled - gamma) < 1e-7 and settled > 0:
                switched[i] = settled
        optimizer.step()
        for p, want in zip(params, x):
            torch.testing.assert_close(p.detach().double(), want, rtol=0, atol=t * 2.0 ** -20)
    assert switched[0] is not None and switched[1] is None
    assert [optimizer.state[p]["sgd_lr"] > 0 for p in params] == [True, False]
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    again = optim.SWATS(copies, **options)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(params, copies):
        p.grad = q.grad = torch.randn(20)
    optimizer.step(), again.step()
    assert_same_bits([p.detach() for p in copies], [p.detach() for p in params])


@pytest.mark.parametrize("states", ["fp32", "int8"])
def test_step_freezes_a_settled_variance(states):
    """beta2 = .9, a window of 10: with a steady gradient abs(v_t - v_(t-1)) = .1 * .9^(t-1) g^2."""
    x = (torch.rand(4, 128) + 0.5).double()
    g = torch.full((4, 128), 0.5)
    p = torch.nn.Parameter(x.float())
    optimizer = optim.STEPAdam([p], lr=0.01, betas=(0.8, 0.9), threshold=1e-4, min_steps=50, states=states, min_quantized_numel=1)
    v = m = frozen = 0
    changes = []
    for t in range(1, 120):
        p.grad = g * (1 if not frozen else 3)
        m = 0.8 * m + 0.2 * p.grad.double()
        if frozen:
            x = x - 0.01 * m / (1 - 0.8 ** t) / (v.sqrt() + 1e-8)
        else:
            new = 0.9 * v + 0.1 * p.grad.double() ** 2
            changes, v = [*changes, float((new - v).abs().mean())], new
            x = x - 0.01 * m / (1 - 0.8 ** t) / ((v / (1 - 0.9 ** t)).sqrt() + 1e-8)
            if t > 50 and sum(changes[-10:]) / 10 < 1e-4:
                frozen = t
        optimizer.step()
        torch.testing.assert_close(p.detach().double(), x, rtol=0, atol=t * (2.0 ** -22 if states == "fp32" else 2.0 ** -8 * 0.01))
        if states == "fp32":
            assert optimizer.param_groups[0]["frozen_at"] == frozen
    assert optimizer.param_groups[0]["frozen_at"] >= 51
    name = "exp_avg_sq" if states == "fp32" else "exp_avg_sq_codes"
    kept = optimizer.state[p][name].clone()
    p.grad = g * 100
    optimizer.step()
    assert (optimizer.state[p][name] == kept).float().mean() > 0.999  # re-encoding may move a code by one, once in 10^4


def test_fedspeed_follows_algorithm_1():
    options = dict(lr=0.05, rho=0.3, alpha=0.7, prox=0.2, weight_decay=0.1)
    x = [torch.randn(6, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)]
    params = [torch.nn.Parameter(t.float()) for t in x]
    optimizer = optim.FedSpeed(params, **options)
    slope = torch.rand(12).double() + 0.5

    def loss_of(tensors):
        z = torch.cat([t.flatten().double() for t in tensors])
        return (slope * (z - 1) ** 2).sum() + (z[1:] * z[:-1]).cos().sum()

    def closure():
        optimizer.zero_grad()
        loss = loss_of(params)
        loss.backward()
        return loss

    h = [torch.zeros_like(t) for t in x]
    for _ in range(3):
        optimizer.begin_round()
        start = [t.clone() for t in x]
        for _ in range(4):
            leaves = [t.clone().requires_grad_() for t in x]
            first = torch.autograd.grad(loss_of(leaves), leaves)
            norm = sqrt(sum(float(g.square().sum()) for g in first))
            uphill = [(t + 0.3 * g / (norm + 1e-7)).requires_grad_() for t, g in zip(x, first)]
            second = torch.autograd.grad(loss_of(uphill), uphill)
            x = [t - 0.05 * (0.3 * a + 0.7 * b + 0.1 * t + 0.2 * (t - s + c)) for t, a, b, s, c in zip(x, first, second, start, h)]
            before = float(loss_of(params).detach())
            assert float(optimizer.step(closure).detach()) == before
        h = [c + t - s for c, t, s in zip(h, x, start)]
        optimizer.end_round()
        for p, want, c in zip(params, x, h):
            torch.testing.assert_close(p.detach().double(), want, rtol=0, atol=1e-5)
            torch.testing.assert_close(optimizer.state[p]["correction"].double(), c, rtol=0, atol=1e-5)
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    del saved["state"][0]["start"]
    with pytest.raises(gradmill.CheckpointError, match="start"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("make, decoupled, decay", [(lambda p: optim.SGD(p, lr=0.05, momentum=0.9), None, 0.0),
                                                    (lambda p: optim.AdamW(p, lr=0.05, weight_decay=0.2), True, 0.2),
                                                    (lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.2), True, 0.2)])
@pytest.mark.parametrize("s", [0, 1, 2])
def test_xgrad_takes_gradients_at_the_predicted_weights(make, decoupled, decay, s):
    p, q = (torch.nn.Parameter(torch.full((5,), 2.0)) for _ in range(2))
    optimizer, inner = optim.XGrad(make([p]), s, decoupled=decoupled), make([q])
    predicted = q.detach().clone()
    for t in range(6):
        (p ** 4).sum().backward()
        before = q.detach().clone()
        q.grad = 4 * predicted ** 3
        torch.testing.assert_close(p.grad, q.grad)
        optimizer.step()
        inner.step()
        optimizer.zero_grad()
        predicted = q.detach() + s * (q.detach() - before * (1 - 0.05 * decay))
        torch.testing.assert_close(p.detach(), predicted)
        with optimizer.weights():
            torch.testing.assert_close(p.detach(), q.detach())
        torch.testing.assert_close(p.detach(), predicted)


def test_xgrad_resumes_and_refuses():
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = optim.XGrad(optim.Adam([p], lr=0.1))

    def closure(optimizer, p):
        optimizer.zero_grad()
        loss = (p ** 2).sum()
        loss.backward()
        return loss
    for _ in range(3):
        loss = optimizer.step(lambda: closure(optimizer, p))
    assert loss < 4
    q = torch.nn.Parameter(p.detach().clone())
    again = optim.XGrad(optim.Adam([q], lr=5.0))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for o, w in ((optimizer, p), (again, q)):
        for _ in range(2):
            o.step(lambda: closure(o, w))
    assert_same_bits(q.detach(), p.detach())
    with pytest.raises(ValueError, match="decoupled"):
        optim.XGrad(optim.AdamW([p]))
    with pytest.raises(ValueError, match="s is"):
        optim.XGrad(optim.SGD([p]), -1)
    with pytest.raises(TypeError, match="QuantizedWeight"):
        optim.XGrad(optim.SGD([torch.nn.Parameter(gradmill.QuantizedWeight.quantize(torch.ones(2, 256)))]))
    with pytest.raises(ValueError, match="not those"):
        again.load_state_dict({"optimizer": optimizer.optimizer.state_dict(), "weights": [torch.ones(3)]})


@pytest.mark.parametrize("name, options", [("SGD", {}), ("SGD", dict(momentum=0.9)), ("SGD", dict(momentum=0.9, nesterov=True)), ("Adagrad", {}), ("Adam", {}),
                                           ("AdamW", {}), ("AdaBelief", {}), ("AdaBelief", dict(weight_decouple=False)), ("DiffGrad", {}), ("Grams", {}), ("Lion", {})],
                         ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_mask_in_a_weight_stays(level, name, options, dtype):
    """-inf with a gradient of 0, as attention's masks have it: without a decay it stays, as with torch; 0 times inf would be nan."""
    mask = torch.randn(7, 9).masked_fill(torch.rand(7, 9) < 0.3, -math.inf).to(dtype)
    p = torch.nn.Parameter(mask.clone())
    optimizer = getattr(optim, name)([p], lr=0.01, **options)
    for _ in range(3):
        p.grad = torch.randn(7, 9).to(dtype).masked_fill(mask == -math.inf, 0.0)
        optimizer.step()
    assert torch.equal(p == -math.inf, mask == -math.inf) and not p.isnan().any()
    assert (p != mask)[mask > -math.inf].any()


# --- what every optimizer does ----------------------------------------------------------------------------
EVERY = [cls for name in optim.__all__ if isinstance(cls := getattr(optim, name), type) and issubclass(cls, torch.optim.Optimizer)
         and name not in ("FusedOptimizer", "FedSpeed", "QGaLoreAdamW")]


@pytest.mark.parametrize("cls", EVERY, ids=lambda c: c.__name__)
def test_any_layout_shape_dtype_and_missing_gradient(cls):
    """Transposed parameters step like their contiguous twins, to the bit; empty, 0-d and gradient-less ones pass; copies go on alike."""
    matrices = cls.__name__ in ("Muon", "AuON", "HybridAuON")
    for dtype in (torch.float32, torch.bfloat16):
        values = [torch.randn(90, 70), torch.randn(5, 128), torch.randn(0, 3)] + ([] if matrices else [torch.randn(()), torch.randn(0), torch.randn(7)])
        a = [torch.nn.Parameter(v.to(dtype).t().contiguous().t() if v.dim() == 2 else v.to(dtype)) for v in values]
        b = [torch.nn.Parameter(v.to(dtype).clone()) for v in values]
        frozen = torch.nn.Parameter(torch.ones(3, 3))
        lr = torch.tensor(0.01)
        other = torch.nn.Parameter(torch.ones(3, 3))
        ours = [cls([*ps, extra], lr=lr, states="int8", min_quantized_numel=1, seed=3) for ps, extra in ((a, frozen), (b, other))]
        for _ in range(3):
            for p, q in zip(a, b):
                p.grad = torch.randn(p.shape).to(dtype)
                q.grad = p.grad.clone()
            for o in ours:
                o.step()
        assert_same_bits([p.detach().contiguous() for p in a], [q.detach() for q in b])
        assert not a[0].is_contiguous() and (frozen == 1).all() and not ours[0].state.get(frozen)
        params, optimizer = copy.deepcopy((b, ours[1]))
        for p, q in zip(params, b):
            p.grad = q.grad.clone()  # a parameter's copy has none
        ours[1].step(), optimizer.step()
        assert_same_bits([p.detach() for p in params], [q.detach() for q in b])
        assert any((q.detach().float() != v.to(dtype).float()).any() for q, v in zip(b, values))


@contextlib.contextmanager
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("around", [lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.device("meta"), float64_by_default, torch.inference_mode],
                         ids=["autocast", "default device", "default dtype", "inference mode"])
@pytest.mark.parametrize("cls", [*EVERY, optim.QGaLoreAdamW], ids=lambda c: c.__name__)
def test_a_step_is_the_same_whatever_mode_it_is_taken_in(cls, around):
    """A step inside ``with torch.autocast`` is common, and Newton-Schulz and projections are matmuls."""
    sides = []
    for mode in (contextlib.nullcontext, around):
        params = [torch.nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(1))) for s in ((90, 70), (70, 128))]
        options = {"ns_dtype": torch.float32} if cls.__name__ in ("Muon", "HybridAuON") else {"rank": 8} if "GaLore" in cls.__name__ else {}
        groups = [{"params": params, **({"rank": options.pop("rank")} if "rank" in options else {})}]
        optimizer = cls(groups, lr=0.01, states="int8", min_quantized_numel=1, seed=3, max_grad_norm=5.0, **options)
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(9 * step + i))
            with mode():
                optimizer.step()
        sides.append([p.detach() for p in params])
    assert_same_bits(*sides)


@pytest.mark.parametrize("cls", EVERY, ids=lambda c: c.__name__)
@pytest.mark.parametrize("states", ["fp32", "bf16", "int8"])
def test_maximising_the_negative_is_minimising(cls, states):
    values = torch.randn(16, 128)
    p, q = (torch.nn.Parameter(values.clone()) for _ in range(2))
    a, b = cls([p], states=states, min_quantized_numel=1, seed=1), cls([q], states=states, min_quantized_numel=1, seed=1, maximize=True)
    for _ in range(4):
        p.grad = torch.randn(16, 128)
        q.grad = -p.grad
        a.step(), b.step()
    assert_same_bits(q.detach(), p.detach())
    assert (p != values).any()


@pytest.mark.parametrize("name, options", [("SGD", dict(lr=1.0, momentum=0.9)), ("Adagrad", dict(lr=0.5)), ("Adam", dict(lr=0.02)), ("AdaBelief", dict(lr=0.02)),
                                           ("DiffGrad", dict(lr=0.02)), ("Grams", dict(lr=0.02)), ("Sophia", dict(lr=0.02)), ("Lion", dict(lr=0.01, betas=(0.9, 0.9))),
                                           ("CLASSP", dict(lr=0.3, threshold=1e-8)), ("Muon", dict(lr=0.1, weight_decay=0.0)), ("AuON", dict(lr=1.0)),
                                           ("HybridAuON", dict(lr=0.1)), ("STEPAdam", dict(lr=0.02)), ("SWATS", dict(lr=0.02))])
@pytest.mark.parametrize("states", ["bf16", "int8"])
def test_low_precision_states_train_as_well_as_fp32(name, options, states):
    """Linear regression: the loss ends within a tenth of the fp32 optimizer's drop, which is most of the loss. (Lion's own beta2
    of .99 is too slow for an 8-bit momentum rounded to nearest, as its docstring says.)"""
    x, target, losses = torch.randn(256, 64), torch.randn(64, 64), {}
    start = ((x @ target) ** 2).mean().item()
    for kind in ("fp32", states):
        w = torch.nn.Parameter(torch.zeros(64, 64))
        optimizer = getattr(optim, name)([w], states=kind, min_quantized_numel=1, seed=0, **options)
        for step in range(150):
            if name == "Sophia" and step % 10 == 0:
                optimizer.update_hessian(estimates=[2 / 64 * x.square().mean(0)[:, None].expand(64, 64) * (1 + 0.5 * torch.randn(64, 64))])
            loss = ((x @ (w - target)) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[kind] = loss.item()
    assert losses["fp32"] < 0.5 * start
    assert losses[states] < losses["fp32"] + 0.1 * (start - losses["fp32"])


@pytest.mark.parametrize("has, capability, dtype", [(True, "AVX512", torch.bfloat16), (True, "AVX2", torch.float32), (True, "DEFAULT", torch.float32),
                                                    (False, "AVX512", torch.float32)])
def test_newton_schulz_takes_bf16_where_torch_uses_its_instructions(has, capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert optim.muon.matmul_dtype(torch.device("cpu")) == dtype
    assert optim.muon.matmul_dtype(torch.device("cuda")) == torch.bfloat16
