"""gradmill.optim where torch.optim was: float64 parameters, one parameter named twice, and what else torch's own tests ask of an optimizer.
tests/test_optim_rules.py has torch's inputs and error inputs in fp32."""
import copy
import io
import pickle

import pytest
import torch
from torch.testing._internal.common_optimizers import optim_db

from gradmill import optim
from gradmill.optim import _base, rules

from .conftest import assert_same_bits
from .test_capturable import MATRICES, OPTIMIZERS, Waiting, counting  # noqa: F401  (a fixture)

SHAPES = [(130, 131), (130,), (8, 3, 3, 3), (1,), (), (0,), (3, 0)]
TORCH = ("SGD", "Adagrad", "Adam", "AdamW")
#: What steps float64 in each way that a rule can take; FedSpeed's states are fp32, QGaLoreAdamW's int8.
EVERY = {**OPTIMIZERS, **MATRICES, "StableSPAM": dict(reset_every=2), "SWATS": {}, "STEPAdam": {}, "AdaGradNorm": {}, "GaLoreAdamW": {}}


def doubles(shapes=SHAPES, seed=1, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64).to(dtype)) for s in shapes]


def give(step, *sides, scale=1.0):
    """The same gradients to each list of parameters, in its dtype."""
    g = torch.Generator().manual_seed(step)
    for same in zip(*sides):
        grad = scale * torch.randn(same[0].shape, generator=g, dtype=torch.float64)
        for p in same:
            p.grad = grad.to(p.dtype, copy=True)


def agree(params, other, ours=None, theirs=None, tolerance=1e-12):
    for p, q in zip(params, other):
        assert p.dtype == q.dtype
        torch.testing.assert_close(p.detach(), q.detach(), rtol=tolerance, atol=tolerance)
        if ours is not None:
            for name, value in theirs.state[q].items():
                if isinstance(value, torch.Tensor) and (name != "step" or not isinstance(theirs, torch.optim.SGD)):
                    torch.testing.assert_close(ours.state[p][name], value, rtol=tolerance, atol=tolerance, check_dtype=name != "step")


# --- float64 ----------------------------------------------------------------------------------------------
def precise(x):
    """torch computes with an fp32 tensor, an lr say, in fp32; with a float64 one in float64."""
    return x.double() if isinstance(x, torch.Tensor) else tuple(map(precise, x)) if isinstance(x, tuple) else x


CASES = [(name, case) for name in TORCH for case in next(info for info in optim_db if info.optim_cls is getattr(torch.optim, name)).optim_inputs_func(device="cpu")]
MORE = [("SGD", dict(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.2)), ("SGD", dict(lr=0.1, momentum=0.5, nesterov=True, maximize=True)),
        ("Adagrad", dict(lr=0.1, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=2.0, maximize=True)), ("Adam", dict(decoupled_weight_decay=True, weight_decay=0.1)),
        ("Adam", dict(betas=(torch.tensor(0.8), torch.tensor(0.99)), weight_decay=0.2, amsgrad=True))]


@pytest.mark.parametrize("name, options", [(name, case.kwargs) for name, case in CASES] + MORE,
                         ids=[f"{name}-{case.desc}" for name, case in CASES] + [f"{name}-{'-'.join(o)}" for name, o in MORE])
def test_float64_is_torchs_float64(name, options):
    """Trajectory and states; halfway each goes on from the other's state_dict."""
    options = {k: precise(v) for k, v in options.items()}
    params, other = doubles(), doubles()
    make = lambda: (getattr(optim, name)(params, **copy.deepcopy(options)), getattr(torch.optim, name)(other, **copy.deepcopy(options)))
    ours, theirs = make()
    for step in range(20):
        give(step, params, other)
        ours.step(), theirs.step()
        agree(params, other, ours, theirs)
        if step == 9:
            saved, (ours, theirs) = (theirs.state_dict(), ours.state_dict()), make()
            ours.load_state_dict(saved[0]), theirs.load_state_dict(saved[1])
    assert all(t.dtype == torch.float64 for p in params for n, t in ours.state[p].items() if isinstance(t, torch.Tensor) and n != "step")


@pytest.mark.parametrize("name", EVERY)
def test_every_rule_steps_float64_as_fp32_but_more_precisely(name):
    shapes = [(12, 70), (90, 65)] if name in MATRICES else SHAPES
    options = {**EVERY[name], **({"ns_dtype": torch.float64} if name in ("Muon", "HybridAuON") else {})}
    params, single = doubles(shapes), doubles(shapes, dtype=torch.float32)
    for p, q in zip(params, single):
        p.data.copy_(q)  # the same numbers
    cls = getattr(optim, name)
    wide, narrow = cls(params, max_grad_norm=50.0, **options), cls(single, max_grad_norm=50.0, **{**options, **({"ns_dtype": torch.float32} if "ns_dtype" in options else {})})
    for step in range(6):
        give(step, single)
        for p, q in zip(params, single):
            p.grad = q.grad.double()
        wide.step(), narrow.step()
    rate = max(float(g["lr"]) for g in wide.param_groups)
    # fp32 rounds a moment by 2^-24 of itself, an update by a few times that; the polynomial of the Muon family magnifies it by its slope, 3.4^5.
    agree(params, [q.double() for q in single], tolerance=2.0 ** -17 * max(rate, 1.0) * (64 if name in MATRICES else 1))
    assert any((p != q.double()).any() for p, q in zip(params, single)), "nothing is more precise than fp32"
    assert all(t.dtype == torch.float64 for p in params for n, t in wide.state[p].items() if isinstance(t, torch.Tensor) and n != "step")
    # The resumed run is the uninterrupted one, bit for bit.
    file = io.BytesIO()
    torch.save(wide.state_dict(), file)
    file.seek(0)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    again = cls(copies, max_grad_norm=50.0, **options)
    again.load_state_dict(torch.load(file, weights_only=True))
    third, fourth = copy.deepcopy((params, wide)), pickle.loads(pickle.dumps((params, wide)))
    for step in range(6, 9):
        give(step, params, copies, third[0], fourth[0])
        for optimizer in (wide, again, third[1], fourth[1]):
            optimizer.step()
    for some in (copies, third[0], fourth[0]):
        assert_same_bits([p.detach() for p in some], [p.detach() for p in params])


@pytest.mark.parametrize("states", ["fp32", "int8"])
def test_float64_and_float32_in_one_group_each_step_alone(states):
    """1-D ones are in full precision whatever states says, float64 ones too."""
    def side(order):
        made = {"double": torch.nn.Parameter(torch.linspace(-1, 1, 5000, dtype=torch.float64)), "single": torch.nn.Parameter(torch.linspace(-1, 1, 6400).view(64, 100)),
                "half": torch.nn.Parameter(torch.linspace(-1, 1, 6400).view(64, 100).bfloat16())}
        optimizer = optim.AdamW([made[n] for n in order], lr=0.01, states=states, seed=1)
        for step in range(3):
            g = torch.Generator().manual_seed(step)
            for n, p in made.items():  # in one order, whatever the optimizer's
                draw = torch.randn(p.shape, generator=g).to(p.dtype)
                p.grad = draw if n in order else None
            optimizer.step()
        return made, optimizer
    mixed, optimizer = side(["single", "double", "half"])
    for name in ("double", "single"):
        alone, other = side([name])
        assert_same_bits(mixed[name].detach(), alone[name].detach())
        if name == "double":
            assert optimizer.state[mixed[name]]["exp_avg"].dtype == torch.float64
    assert ("exp_avg_codes" in optimizer.state[mixed["single"]]) == (states == "int8")


@pytest.mark.parametrize("options, match", [(dict(states="bf16"), "states='bf16'"), (dict(states="fp8"), "states='fp8'"), (dict(states="int8"), "states='int8'"),
                                            (dict(states="int4"), "states='int4'"), (dict(projection=optim.Projection(rank=4)), "projection=Projection")], ids=str)
def test_float64_refuses_what_is_not_full_precision_and_names_it(options, match):
    p = doubles([(70, 130)])
    with pytest.raises(TypeError, match=rf"shape \(70, 130\) is torch.float64.*{match}"):
        optim.AdamW(p, **options)
    optimizer = optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(TypeError, match="float64"):
        optimizer.add_param_group({"params": p, **options})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(TypeError, match="FedSpeed does not step torch.float64"):
        optim.FedSpeed(p)


def test_float64_clips_skips_raises_and_scales_as_torch():
    for limit in (0.3, 1e6):
        params, other = doubles(), doubles()
        ours, theirs = optim.AdamW(params, lr=0.01, max_grad_norm=limit), torch.optim.AdamW(other, lr=0.01)
        for step in range(5):
            give(step, params, other, scale=10.0 ** (step - 2))
            norm = torch.nn.utils.clip_grad_norm_(other, limit)
            ours.step(), theirs.step()
            assert ours.grad_norm == pytest.approx(float(norm), rel=1e-13)
            agree(params, other)
    for value in (float("nan"), float("inf")):
        params = doubles()
        optimizer = optim.Adam(params, on_nonfinite="skip")
        give(0, params)
        params[0].grad[3, 4] = value
        before = copy.deepcopy(params)
        optimizer.step()
        assert_same_bits([p.detach() for p in params], [p.detach() for p in before])
        optimizer.on_nonfinite = "raise"
        with pytest.raises(FloatingPointError, match="parameter 0 of group 0"):
            optimizer.step()
    # A GradScaler hands over its scale, and says when to skip.
    params, other = doubles(), doubles()
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2) for _ in range(2)]
    pairs = list(zip(scalers, (optim.SGD(params, lr=0.1, momentum=0.9), torch.optim.SGD(other, lr=0.1, momentum=0.9)), (params, other)))
    for step in range(6):
        for scaler, optimizer, ps in pairs:
            optimizer.zero_grad()
            scaler.scale(sum(((p - step) ** 2).sum() for p in ps)).backward()
            if step == 3:
                ps[0].grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        agree(params, other)
        assert scalers[0].get_scale() == scalers[1].get_scale()


def test_gradients_of_float64_parameters_of_any_layout_and_dtype():
    x, g = torch.randn(6, 8, dtype=torch.float64), torch.randn(8, 6, dtype=torch.float64)
    memory = torch.zeros(6, 16, dtype=torch.float64)
    memory[:, ::2] = x
    plain, strided = torch.nn.Parameter(x.clone()), torch.nn.Parameter(memory[:, ::2])
    images = torch.nn.Parameter(torch.randn(4, 3, 5, 2, dtype=torch.float64))
    last = torch.nn.Parameter(images.detach().clone(memory_format=torch.channels_last))
    optimizer = optim.AdamW([plain, strided, images, last], lr=0.1)
    for _ in range(2):
        plain.grad, strided.grad = g.t().contiguous(), g.t()
        images.grad = torch.randn(images.shape, dtype=torch.float64)
        last.grad = images.grad.clone(memory_format=torch.channels_last)
        optimizer.step()
    assert_same_bits(strided.detach(), plain.detach())
    assert_same_bits(last.detach(), images.detach())
    assert (memory[:, 1::2] == 0).all()
    plain.grad = None
    plain.grad_dtype = None
    plain.grad = g.t().float()
    optimizer.step()
    plain.grad = g.t().to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


def test_weights_cast_to_and_from_float64_in_mid_run():
    model = torch.nn.Linear(64, 70)
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    for dtype in (torch.float32, torch.float64, torch.float32, torch.float64, torch.bfloat16):
        model.to(dtype)
        optimizer.zero_grad()
        model(torch.ones(2, 64, dtype=dtype)).square().sum().backward()
        for _ in range(3):
            optimizer.step()
        assert {optimizer.state[p]["exp_avg"].dtype for p in model.parameters()} == {torch.float64 if dtype == torch.float64 else torch.float32}
    # Checkpoints convert as well.
    for here, there in ((torch.float64, torch.float32), (torch.float32, torch.float64)):
        ps, qs = doubles(dtype=here), doubles(dtype=there)
        a, b = optim.Adam(ps), optim.Adam(qs)
        give(0, ps)
        a.step()
        b.load_state_dict(a.state_dict())
        for p, q in zip(ps, qs):
            assert_same_bits(b.state[q]["exp_avg"], a.state[p]["exp_avg"].to(there))
    for options in (dict(states="int8", min_quantized_numel=1), dict(projection=optim.Projection(rank=4))):
        model = torch.nn.Linear(64, 70)
        optimizer = optim.AdamW(model.parameters(), lr=0.01, **options)
        for dtype in (torch.float32, torch.float64):
            model.to(dtype)
            optimizer.zero_grad()
            model(torch.ones(2, 64, dtype=dtype)).square().sum().backward()
            if dtype == torch.float32:
                optimizer.step()
                continue
            before = copy.deepcopy(optimizer.state_dict()["state"])
            with pytest.raises(TypeError, match="has become torch.float64"):
                optimizer.step()
            assert_same_bits(optimizer.state_dict()["state"], before)


@pytest.mark.parametrize("name", [*OPTIMIZERS, *MATRICES])
def test_float64_steps_are_counted_on_the_device_without_waiting(name, counting, monkeypatch):  # noqa: F811
    sides, shapes = [], [(12, 70), (90, 65)] if name in MATRICES else [(12, 70), (70,), (), (0,)]
    for capturable in (False, True):
        params = doubles(shapes)
        optimizer = getattr(optim, name)(params, capturable=capturable, max_grad_norm=3.0, on_nonfinite="skip", **{**OPTIMIZERS, **MATRICES}[name])
        for step in range(8):
            give(step, params)
            if step == 2:
                params[0].grad[3, 7] = float("nan")
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(0.1 / (step + 1), dtype=torch.float64)
            with Waiting():
                optimizer.step()
        assert float(optimizer.state[params[0]]["step"]) == 7
        sides.append([p.detach() for p in params])
    assert_same_bits(*sides)
    monkeypatch.setattr(_base, "counts_on", lambda device: False)  # what the host decides gives the same numbers
    monkeypatch.setattr(rules, "known", lambda device: True)
    params = doubles(shapes)
    optimizer = getattr(optim, name)(params, max_grad_norm=3.0, on_nonfinite="skip", **{**OPTIMIZERS, **MATRICES}[name])
    for step in range(8):
        give(step, params)
        if step == 2:
            params[0].grad[3, 7] = float("nan")
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (step + 1)
        optimizer.step()
    agree(params, sides[0])


def test_released_gradients_wrappers_and_closures_in_float64():
    sides = []
    for released in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).double()
        optimizer = optim.AdamW(model.parameters(), lr=0.05)
        handle = optim.release_gradients(model, optimizer) if released else None
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.ones(3, 8, dtype=torch.float64)).sum().backward()
            optimizer.step()
        sides.append([p.detach() for p in model.parameters()])
    assert handle is not None
    assert_same_bits(*sides)
    p = torch.nn.Parameter(torch.tensor([1.0 + 2.0 ** -40], dtype=torch.float64))
    predicting = optim.XGrad(optim.SGD([p], lr=2.0 ** -30))
    p.grad = torch.ones_like(p)
    predicting.step()
    assert float(p.detach()) == 1.0 + 2.0 ** -40 - 2.0 ** -29  # theta - lr, and the same once more, predicted
    weighing = optim.VRGD(optim.SGD([p], lr=1.0), floor=1.0)
    start = float(p.detach())
    for g in (1.0, 1.0 + 2.0 ** -40):
        p.grad = torch.full_like(p, g)
        weighing.accumulate()
    weighing.step()
    assert float(p.detach()) == start - (1.0 + 2.0 ** -41)
    x = torch.nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    optimizer = optim.SGD([x], lr=0.5)

    def closure():
        optimizer.zero_grad()
        loss = (x ** 2).sum()
        loss.backward()
        return loss
    assert float(optimizer.step(closure).detach()) == 9.0 and float(x.detach()) == 0.0


# --- one parameter, twice ---------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_parameter_named_twice_steps_twice_as_in_torch(name, dtype):
    (a, b), (c, d) = doubles([(70, 130), (5,)], dtype=dtype), doubles([(70, 130), (5,)], dtype=dtype)
    options = {"momentum": 0.9} if name == "SGD" else {}
    sides = []
    for cls, first, second in ((getattr(optim, name), a, b), (getattr(torch.optim, name), c, d)):
        with pytest.warns(UserWarning, match="duplicate parameters"):
            sides.append(cls([first, second, first, first], lr=0.01, **options))
    ours, theirs = sides
    for step in range(4):
        give(step, [a, b], [c, d])
        ours.step(), theirs.step()
        agree([a, b], [c, d], tolerance=1e-12 if dtype == torch.float64 else 1e-5)
        for p, q in ((a, c), (b, d)):
            if "step" in theirs.state[q]:
                assert float(ours.state[p]["step"]) == float(theirs.state[q]["step"])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        again = getattr(optim, name)([a, b, a, a], lr=0.01, **options)
    again.load_state_dict(theirs.state_dict())
    give(9, [a, b], [c, d])
    again.step(), theirs.step()
    agree([a, b], [c, d], tolerance=1e-12 if dtype == torch.float64 else 1e-5)


def test_a_parameter_in_two_groups_is_refused_as_in_torch():
    p, q = doubles([(3,), (3,)], dtype=torch.float32)
    for cls in (optim.AdamW, torch.optim.AdamW):
        with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
            cls([{"params": [p]}, {"params": [q, p]}])
        optimizer = cls([p])
        with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
            optimizer.add_param_group({"params": p})
        assert len(optimizer.param_groups) == 1


# --- what torch's own tests, and a comparison of thousands of random runs with torch's, ask besides ---------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sgds_momentum_may_be_set_and_cleared_on_a_live_group(dtype):
    """A momentum that is set later begins with an undampened gradient; a buffer stays, in checkpoints too, while momentum is 0."""
    params, other = doubles(dtype=dtype), doubles(dtype=dtype)
    sides = [(cls, cls(ps, lr=0.1, dampening=0.4), ps) for cls, ps in ((optim.SGD, params), (torch.optim.SGD, other))]
    for step, momentum in enumerate([0, 0, 0.9, 0.9, 0, 0, 0.5, 0.5]):
        give(step, params, other)
        for i, (cls, optimizer, ps) in enumerate(sides):
            optimizer.param_groups[0]["momentum"] = momentum
            optimizer.step()
            if step in (1, 5, 6):
                again = cls(ps, lr=0.3)
                again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                sides[i] = cls, again, ps
        agree(params, other, tolerance=1e-12 if dtype == torch.float64 else 1e-5)
    quantised = optim.SGD(doubles([(64, 100)], dtype=torch.float32), lr=0.1, momentum=0.9, states="int8")
    give(0, quantised.param_groups[0]["params"])
    quantised.step()
    quantised.param_groups[0]["momentum"] = 0
    saved, (state,) = copy.deepcopy(quantised.state_dict()), quantised.state.values()
    quantised.load_state_dict(saved)
    assert_same_bits(quantised.state[quantised.param_groups[0]["params"][0]]["momentum_buffer_codes"], state["momentum_buffer_codes"])
