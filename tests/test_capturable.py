"""Steps counted, skipped and clipped on the device: capturable=True, GradScaler and on_nonfinite="skip" without waiting for it.

Without a GPU the CPU plays the device (`counting`), in the reference backend: results must be those of the ordinary step, and nothing may
read a tensor's value on the way (`Waiting`). tests/test_cuda.py runs the kernels that read scalars and steps from memory. With a GPU:
captured steps against eager ones, under torch's own check for waits.
"""
import contextlib
import copy

import pytest
import torch
from torch.testing._internal.common_optimizers import optim_db
from torch.utils._python_dispatch import TorchDispatchMode

import gradmill
from gradmill import QuantizedWeight, optim
from gradmill.formats import FLOAT_DTYPES
from gradmill.optim import AdamW, Lion, _base, rules

from .conftest import assert_same_bits

SHAPES = [(12, 70), (70,), (3, 2, 40), (), (0,)]
#: Every optimizer that can be captured.
OPTIMIZERS = {"AdamW": {}, "Adam": dict(amsgrad=True, weight_decay=0.1), "Lion": {}, "SGD": dict(momentum=0.9, nesterov=True, weight_decay=0.1),
              "Adagrad": dict(lr_decay=0.1), "CLASSP": dict(threshold=0.01), "AdaBelief": {}, "DiffGrad": {}, "Grams": {}, "Sophia": {},
              "LAMB": dict(max_trust_ratio=2.0, weight_decay=0.1), "LARS": {}}
#: Those whose parameters are matrices.
MATRICES = {"Muon": {}, "AuON": dict(weight_decay=0.1), "HybridAuON": {}}
STATES = ("fp32", "bf16", "fp8", "int8", "int4")


class Waiting(TorchDispatchMode):
    """Refuses to read a value; what gradmill's ops do inside is their own."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def counting(monkeypatch):
    monkeypatch.setattr(_base, "counts_on", lambda device: True)
    monkeypatch.setattr(rules, "known", lambda device: False)
    with gradmill.use_backend("reference"):
        yield


def weights(kind="fp32", shapes=SHAPES, device="cpu"):
    g, out = torch.Generator().manual_seed(0), []
    for s in shapes:
        x = torch.randn(s, generator=g).to(FLOAT_DTYPES.get(kind, torch.bfloat16))
        out.append(torch.nn.Parameter((QuantizedWeight.quantize(x, kind) if kind in ("int8", "int4") and len(s) == 2 else x).to(device)))
    return out


def give(params, step, spoil=False, scale=1.0):
    g = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=g)).to(p.device, p.dtype)
    if spoil:
        params[1].grad[7] = float("nan")


def take_steps(optimizer, params, count, capturable):
    """Falling rates; a capturable step may wait for nothing."""
    for step in range(count):
        give(params, step)
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(0.1 / (step + 1), dtype=torch.float64) if capturable else 0.1 / (step + 1)
        with Waiting() if capturable else contextlib.nullcontext():
            optimizer.step()


def everything(params, optimizer):
    return [p.detach() for p in params], [dict(optimizer.state[p]) for p in params]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("states", STATES)
def test_a_capturable_step_is_the_step_and_waits_for_nothing(name, states, counting):
    for kind in ("fp32", "bf16", "int4", 24):
        sides = []
        for capturable in (False, True):
            params = weights(kind)
            optimizer = getattr(optim, name)(params, states=states, min_quantized_numel=1, seed=5, capturable=capturable,
                                             master_weight_bits=kind if kind == 24 else None, **OPTIMIZERS[name])
            take_steps(optimizer, params, 8, capturable)  # AdaBelief's rectification sets in at the sixth
            sides.append(everything(params, optimizer))
        assert_same_bits(*sides, f"{kind}")


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("kind", ["fp32", "bf16", 24])
def test_rules_of_matrices_wait_for_nothing(name, kind, counting):
    sides = []
    for capturable in (False, True):
        params = weights(kind, [(12, 70), (90, 65)])
        optimizer = getattr(optim, name)(params, states="int8", min_quantized_numel=1, seed=5, capturable=capturable, master_weight_bits=kind if kind == 24 else None,
                                         **MATRICES[name])
        take_steps(optimizer, params, 4, capturable)
        sides.append(everything(params, optimizer))
    assert_same_bits(*sides)


@pytest.mark.parametrize("name", ["LAMB", "LARS", "Muon"])
def test_rules_with_norms_skip_and_clip_on_the_device(name, monkeypatch):
    sides = []
    for device in (False, True):
        monkeypatch.setattr(_base, "counts_on", lambda _, device=device: device)
        params = weights("bf16", [(12, 70), (90, 65)])
        optimizer = getattr(optim, name)(params, states="int8", min_quantized_numel=1, seed=2, max_grad_norm=0.3, on_nonfinite="skip")
        with gradmill.use_backend("reference"):
            for step in range(4):
                give(params, step)
                if step == 2:
                    params[1].grad[3, 7] = float("nan")
                if device:
                    with Waiting():
                        optimizer.step()
                else:
                    optimizer.step()
        sides.append(everything(params, optimizer))
        assert float(optimizer.state[params[0]]["step"]) == 3
    assert_same_bits(*sides)


def test_the_test_of_waiting_can_fail():
    with Waiting(), pytest.raises(AssertionError, match="waits"):
        bool(torch.ones(()) > 0)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("unscale_first", [False, True])
def test_a_gradscaler_skips_on_the_device(capturable, unscale_first, counting):
    params, other = weights(), weights()
    sides = [(params, AdamW(params, capturable=capturable), torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)),
             (other, torch.optim.AdamW(other), torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3))]
    for step in range(6):
        for ps, optimizer, scaler in sides:
            g = torch.Generator().manual_seed(step)
            optimizer.zero_grad()
            loss = sum((p * torch.randn(p.shape, generator=g)).sum() for p in ps)
            scaler.scale(loss * (float("inf") if step in (2, 3) else 1.0)).backward()
            before = copy.deepcopy(everything(ps, optimizer))
            if unscale_first:
                scaler.unscale_(optimizer)
            if ps is params:
                with Waiting():
                    scaler.step(optimizer)
            else:
                scaler.step(optimizer)
            scaler.update()
            if step in (2, 3):
                assert_same_bits(everything(ps, optimizer), before)
        for p, q in zip(params, other):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)
    assert [float(sides[0][1].state[p]["step"]) for p in params] == [4.0] * len(params)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize("limit", [None, 0.3])
def test_skipping_and_clipping_are_those_of_the_host(name, limit, monkeypatch):
    sides, norms = [], []
    for device in (False, True):
        monkeypatch.setattr(_base, "counts_on", lambda _, device=device: device)
        params = weights("bf16")
        optimizer = getattr(optim, name)(params, lr=0.01, states="int8", min_quantized_numel=1, seed=2, max_grad_norm=limit, on_nonfinite="skip", **OPTIMIZERS[name])
        with gradmill.use_backend("reference"):
            for step in range(5):
                give(params, step, spoil=step == 2)
                if device:
                    with Waiting():
                        optimizer.step()
                else:
                    optimizer.step()
        sides.append(everything(params, optimizer))
        norms.append(float(optimizer.grad_norm))
        assert isinstance(optimizer.grad_norm, torch.Tensor) == device
        assert float(optimizer.state[params[0]]["step"]) == 4
    assert_same_bits(*sides)
    assert norms[0] == norms[1]


def test_a_run_moves_between_counting_here_and_there(counting):
    """From the host's counts to the device's and back, through state dicts and on a live optimizer."""
    params, mine, saved = weights("bf16"), weights("bf16"), None
    optimizer, other = AdamW(params, states="int8", min_quantized_numel=1, seed=2), AdamW(mine, states="int8", min_quantized_numel=1, seed=2, capturable=True)
    for step in range(8):
        give(params, step), give(mine, step)
        optimizer.step()
        if step in (2, 4):
            other = AdamW(mine, states="int8", min_quantized_numel=1, seed=9, capturable=step == 4)
            other.load_state_dict(copy.deepcopy(saved))
            assert other.param_groups[0]["capturable"] is (step == 4)
        if step == 6:
            other.param_groups[0]["capturable"] = False
        other.step()
        saved = other.state_dict()
    assert_same_bits(everything(mine, other), everything(params, optimizer))


#: The cases of torch's table that are capturable, as for CUDA.
CASES = [(name, case) for name in ("Adam", "AdamW") for info in optim_db if info.optim_cls is getattr(torch.optim, name)
         for case in info.optim_inputs_func(device="cuda") if case.kwargs.get("capturable")]


def clone(options):
    return {k: tuple(v) if isinstance(v, list) else v.clone() if isinstance(v, torch.Tensor) else v for k, v in options.items()}


@pytest.mark.parametrize("name, case", CASES, ids=[f"{name}-{case.desc}" for name, case in CASES])
def test_torchs_capturable_cases(name, case, counting):
    params, other = weights(), weights()
    ours = getattr(optim, name)(params, **clone(case.kwargs))
    theirs = getattr(torch.optim, name)(other, **{**clone(case.kwargs), "capturable": False, "foreach": False})
    for step in range(5):
        give(params, step), give(other, step)
        with Waiting():
            ours.step()
        theirs.step()
        for p, q in zip(params, other):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)


def test_on_the_cpu_it_is_refused_at_the_step_as_in_torch():
    for make in (AdamW, torch.optim.AdamW):
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        optimizer = make([p], capturable=True)
        with pytest.raises(AssertionError, match="If capturable=True, params and state_steps must be on supported devices"):
            optimizer.step()
        assert torch.equal(p.detach(), torch.ones(3))


def test_what_it_cannot_be_combined_with_is_said():
    params = [torch.nn.Parameter(torch.ones(80, 80))]
    for name in ("StableSPAM", "SWATS", "STEPAdam", "AdaGradNorm", "FedSpeed"):
        with pytest.raises(ValueError, match=f"capturable=True cannot be combined with {name}, .* host .*; capture forward and backward|FedSpeed, whose step is made of two"):
            getattr(optim, name)(params, capturable=True)
    with pytest.raises(ValueError, match="capturable=True cannot be combined with projection"):
        AdamW([{"params": params, "rank": 4}], capturable=True)
    with pytest.raises(ValueError, match="capturable=True cannot be combined with dampening"):
        optim.SGD(params, momentum=0.9, dampening=0.1, capturable=True)
    with pytest.raises(TypeError, match="capturable is 1"):
        AdamW(params, capturable=1)


class Pretended:
    """What the optimizer asks of a parameter on a GPU before it steps."""

    is_cuda, device = True, torch.device("cuda", 0)


def test_what_a_capture_refuses_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    p = Pretended()
    for options, match in ((dict(), "capturable is False"), (dict(offload=True), "capturable is False"), (dict(capturable=True), "no state yet")):
        optimizer = AdamW(weights(), **options)
        for state in ({}, {"step": torch.zeros(())}):  # counted on the host: would be copied at every replay
            optimizer.state[p] = state
            with pytest.raises(RuntimeError, match=match):
                optimizer._is_counted_there(optimizer.param_groups[0], [p], 1.0, None)
    optimizer = AdamW(weights(), capturable=True, on_nonfinite="raise")
    with pytest.raises(RuntimeError, match="only the host can raise"):
        optimizer._deciding([(optimizer.param_groups[0], [p])])


def test_what_is_decided_on_a_gpu_and_what_on_the_host(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    here, there = Pretended(), Pretended()
    there.device = torch.device("cuda", 1)
    for name, options, params, want in (("AdamW", {}, [here], here.device), ("AdamW", {}, [here, there], None), ("AdamW", dict(offload=True), [here], None),
                                        ("AdamW", dict(on_nonfinite="raise"), [here], None), ("LAMB", {}, [here], here.device), ("StableSPAM", {}, [here], None),
                                        ("AdamW", {}, [], None),
                                        ("SGD", dict(momentum=0.9, dampening=0.1), [here], None), ("SGD", dict(momentum=0.9), [here], here.device)):
        optimizer = getattr(optim, name)(weights(), **options)
        assert optimizer._deciding([(optimizer.param_groups[0], params)]) == want, (name, options)
    optimizer = AdamW([{"params": weights(shapes=[(80, 80)]), "rank": 4}])
    assert optimizer._deciding([(optimizer.param_groups[0], [here])]) is None


# --- on a GPU ---------------------------------------------------------------------------------------------
def on_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU (torch.cuda.is_available() is false)")


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_replays_are_eager_steps(name):
    """Weights are bf16 (random bits), moments dithered, the lr a tensor that changes between the replays; the third step is skipped."""
    on_gpu()
    shapes = [(300, 700), (700,), (64, 64), (33,)]
    sides = []
    for captured in (False, True):
        params, lr = weights("bf16", shapes, "cuda"), torch.tensor(0.01, device="cuda")
        optimizer = getattr(optim, name)(params, lr=lr, states="int8", min_quantized_numel=1, seed=5, capturable=True, max_grad_norm=3.0, on_nonfinite="skip",
                                         **OPTIMIZERS[name])
        give(params, 0)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        graph, grads = torch.cuda.CUDAGraph(), [p.grad for p in params]
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step()
        for step in range(1, 6):
            give(params, step, spoil=step == 3)
            for g, p in zip(grads, params):
                g.copy_(p.grad)
                p.grad = g
            lr.fill_(0.02 / step)
            graph.replay() if captured else optimizer.step()
        assert float(optimizer.state[params[0]]["step"]) == 5
        sides.append([t.cpu() for p in params for t in (p.detach(), *[v for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)])])
    assert_same_bits(*sides)


@pytest.mark.gpu
def test_a_gradscaler_does_not_wait_on_a_gpu():
    on_gpu()
    for capturable in (False, True):
        params = weights("fp32", device="cuda")
        optimizer = Lion([p for p in params if p.numel()], lr=0.01, states="int8", min_quantized_numel=1, capturable=capturable, max_grad_norm=1.0, on_nonfinite="skip")
        scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
        for step in range(6):
            give(params, step, spoil=step == 3, scale=1024.0)
            scaler.scale(torch.ones((), device="cuda"))  # makes its tensors
            before = [p.detach().clone() for p in params]
            torch.cuda.synchronize()
            if step:
                torch.cuda.set_sync_debug_mode("error")
            try:
                scaler.step(optimizer)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            scaler.update()
            assert all(torch.equal(p, b) for p, b in zip(params, before)) == (step == 3)
        assert float(optimizer.state[params[0]]["step"]) == 5
        assert torch.isfinite(optimizer.grad_norm)


@pytest.mark.gpu
@pytest.mark.parametrize("name, case", CASES, ids=[f"{name}-{case.desc}" for name, case in CASES])
def test_torchs_capturable_cases_on_a_gpu(name, case):
    on_gpu()
    params, other = weights(device="cuda"), weights(device="cuda")
    ours, theirs = getattr(optim, name)(params, **clone(case.kwargs)), getattr(torch.optim, name)(other, **clone(case.kwargs))
    for step in range(5):
        give(params, step), give(other, step)
        ours.step(), theirs.step()
        for p, q in zip(params, other):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_what_a_capture_refuses():
    on_gpu()
    for options, match in ((dict(), "capturable is False"), (dict(capturable=True), "no state yet"),
                           (dict(capturable=True, on_nonfinite="raise"), "only the host can raise")):
        p = torch.nn.Parameter(torch.ones(8, device="cuda"))
        p.grad = torch.ones_like(p)
        optimizer = AdamW([p], **options)
        with pytest.raises(RuntimeError, match=match), torch.cuda.graph(torch.cuda.CUDAGraph()):
            optimizer.step()
        torch.cuda.synchronize()
        assert torch.equal(p.detach(), torch.ones_like(p))
