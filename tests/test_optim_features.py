"""What the optimizers share beyond a rule: clipping, non-finite gradients, norms' rules, weights in two pieces, released
gradients, groups from names."""
import copy
import io
import pickle
from math import sqrt

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from gradmill import QuantizedWeight, optim
from gradmill.formats import FLOAT_DTYPES, SPLIT
from gradmill.optim import LAMB, LARS, VRGD, AdamW, GaLoreAdamW, Lion, Projection, StableSPAM, param_groups, release_gradients
from gradmill.reference.quant import join_float, split_float

from .conftest import FLT_MAX, LEVELS, SPECIAL, assert_same_bits, running

SHAPES = [(70, 130), (130,), (66, 64), (8, 3, 3, 3), (), (0,)]
CLASSES = {"AdamW": AdamW, "Lion": Lion, "LAMB": LAMB, "LARS": LARS, "StableSPAM": StableSPAM}
#: Every other optimizer, with what it needs to take a step here.
OTHERS = {"Adam": {}, "SGD": {"momentum": 0.9}, "Adagrad": {}, "AdaGradNorm": {}, "CLASSP": {"threshold": 0.01}, "AdaBelief": {"rectify": False},
          "DiffGrad": {}, "Grams": {}, "Muon": {}, "AuON": {}, "HybridAuON": {}, "SWATS": {}, "STEPAdam": {}, "Sophia": {},
          "QGaLoreAdamW": {}}
STATES = ("fp32", "bf16", "fp8", "int8", "int4")


def parameters(seed=0, dtype=torch.float32, shapes=SHAPES):
    g = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in shapes]


def give_gradients(params, seed, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=g)).to(p.dtype)


def close(params, others, rtol=1e-5, atol=1e-6):
    for p, q in zip(params, others):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=rtol, atol=atol)


# --- clipping ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("limit", [0.3, 1e6])
def test_max_grad_norm_is_torchs_clipping_in_the_step(limit):
    ours, theirs = parameters(), parameters()
    groups = lambda ps: [{"params": ps[:2]}, {"params": ps[2:], "lr": 0.03, "weight_decay": 0.2}]
    a, b = AdamW(groups(ours), lr=0.01, max_grad_norm=limit), torch.optim.AdamW(groups(theirs), lr=0.01)
    for step in range(6):
        give_gradients(ours, step, 10.0 ** (step - 3)), give_gradients(theirs, step, 10.0 ** (step - 3))
        before = [p.grad.clone() for p in ours]
        norm = torch.nn.utils.clip_grad_norm_(theirs, limit)
        a.step(), b.step()
        assert a.grad_norm == pytest.approx(float(norm), rel=1e-5)
        assert_same_bits([p.grad for p in ours], before)
        close(ours, theirs)


def test_clipping_counts_every_dtype_and_the_gradscalers_scale():
    params = parameters(dtype=torch.bfloat16, shapes=[(66, 64)]) + parameters(shapes=[(5,)])
    other = copy.deepcopy(params)
    a, b = Lion(params, max_grad_norm=0.5, seed=1), Lion(other, seed=1)
    give_gradients(params, 1), give_gradients(other, 1)
    norm = sqrt(sum(float((p.grad.double() ** 2).sum()) for p in params))
    a.grad_scale, a.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    b.grad_scale, b.found_inf = torch.tensor(4.0 * norm / 4 / 0.5), torch.tensor(0.0)
    a.step(), b.step()
    assert a.grad_norm == pytest.approx(norm / 4, rel=1e-6)
    close(params, other, rtol=2 ** -8)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", CLASSES)
def test_non_finite_gradients_are_skipped_or_raised_with_nothing_changed(name, bad):
    for policy in ("skip", "raise"):
        params = parameters()
        optimizer = CLASSES[name](params, states="int8", min_quantized_numel=1, on_nonfinite=policy)
        for step in range(3):
            give_gradients(params, step)
            optimizer.step()
        before = copy.deepcopy(([p.detach() for p in params], optimizer.state_dict()))
        params[3].grad.view(-1)[7] = bad
        if policy == "raise":
            with pytest.raises(FloatingPointError, match=r"\(8, 3, 3, 3\)"):
                optimizer.step()
        else:
            optimizer.step()
        assert_same_bits(([p.detach() for p in params], optimizer.state_dict()), before)
        give_gradients(params, 9)
        optimizer.step()
        assert not torch.equal(params[0].detach(), before[0][0])
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([p])
    p.grad = torch.tensor([1.0, bad, 1.0])
    optimizer.step()
    assert p.isnan().tolist() == [False, True, False]  # propagate: as torch


@pytest.mark.parametrize("options, match", [(dict(max_grad_norm=0.0), "max_grad_norm is 0.0"), (dict(on_nonfinite="stop"), "on_nonfinite is 'stop'"),
                                            (dict(master_weight_bits=16), "master_weight_bits is 16")])
def test_bad_options_are_refused_by_name(options, match):
    with pytest.raises(ValueError, match=match):
        AdamW(parameters(), **options)


def test_copies_keep_the_optimizers_own_options():
    optimizer = AdamW(parameters(), max_grad_norm=2.0, on_nonfinite="skip")
    for _ in range(2):
        for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            assert (other.max_grad_norm, other.on_nonfinite, other.grad_norm) == (2.0, "skip", optimizer.grad_norm)
            assert {k for k in vars(other) if k[0] != "_"} == {k for k in vars(optimizer) if k[0] != "_"}  # as torch's own test wants
        give_gradients([p for group in optimizer.param_groups for p in group["params"]], 1)
        optimizer.step()


# --- rules with norms -------------------------------------------------------------------------------------
def adam_moments(m, v, g, betas, step):
    m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
    return m, v, m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)


def follow(optimizer, params, rule, steps=12, scale=lambda step: 1.0, tolerance=1e-5):
    """rule(memory, p, g, step) -> p in float64, against the optimizer."""
    mine, memory = [p.detach().double() for p in params], [{} for _ in params]
    for step in range(1, steps + 1):
        give_gradients(params, step, scale(step))
        mine = [rule(state, p, q.grad.double(), step) for state, p, q in zip(memory, mine, params)]
        optimizer.step()
        for p, q in zip(mine, params):
            torch.testing.assert_close(q.detach().double(), p, rtol=tolerance, atol=tolerance)


def test_lamb_follows_the_paper():
    def rule(s, p, g, step):
        m, v, m_hat, v_hat = adam_moments(s.get("m", 0), s.get("v", 0), g, (0.9, 0.999), step)
        s.update(m=m, v=v)
        u = m_hat / (v_hat.sqrt() + 1e-6) + 0.1 * p
        ratio = p.norm() / u.norm() if p.norm() > 0 and u.norm() > 0 else 1.0
        return p - 0.02 * ratio * u
    params = parameters()
    params[1].data.zero_()  # no norm yet: ratio 1
    follow(LAMB(params, lr=0.02, weight_decay=0.1), params, rule)


def test_lars_follows_the_paper():
    def rule(s, p, g, step):
        ratio = 0.02 * p.norm() / (g.norm() + 0.01 * p.norm()) if p.norm() > 0 and g.norm() > 0 else 1.0
        s["v"] = 0.8 * s.get("v", 0) + 0.5 * ratio * (g + 0.01 * p)
        return p - s["v"]
    params = parameters()
    follow(LARS(params, lr=0.5, momentum=0.8, weight_decay=0.01, trust_coefficient=0.02), params, rule)


@pytest.mark.parametrize("reset", [None, 5])
def test_stable_spam_follows_the_paper(reset):
    def rule(s, p, g, step):
        if reset is not None and s.get("t", 0) == reset:
            s.update(t=0, m=0, v=0)
        s["t"] = s.get("t", 0) + 1
        if not g.numel():
            return p
        s["M"] = 0.99 * s.get("M", 0) + (1 - 0.99) * g.abs().max()
        limit = s["M"] / (1 - 0.99 ** step)
        g = torch.where(g.abs() > limit, g * limit / g.abs().max(), g)
        n = g.norm()
        s["a"], s["b"] = 0.7 * s.get("a", 0) + 0.3 * n, 0.9 * s.get("b", 0) + 0.1 * n * n
        g = g / n * (s["a"] / (1 - 0.7 ** step)) / ((s["b"] / (1 - 0.9 ** step)).sqrt() + 1e-8)
        s["m"], s["v"], m_hat, v_hat = adam_moments(s.get("m", 0), s.get("v", 0), g, (0.9, 0.999), s["t"])
        return p * (1 - 0.01 * 0.1) - 0.01 * m_hat / (v_hat.sqrt() + 1e-8)
    params = parameters()
    follow(StableSPAM(params, lr=0.01, weight_decay=0.1, theta=0.99, reset_every=reset), params, rule,
           scale=lambda step: 100.0 if step % 4 == 0 else 1.0, tolerance=3e-5)


def test_an_element_goes_on_after_its_gradient_spiked():
    """Adam's second moment remembers the spike and the element stands still; Stable-SPAM clips it to what was usual."""
    moves = {}
    for cls in (AdamW, StableSPAM):
        p = torch.nn.Parameter(torch.zeros(64, 64))
        optimizer = cls([p], lr=0.01, betas=(0.9, 0.999), weight_decay=0.0)
        for step in range(150):
            p.grad = torch.randn(64, 64)
            p.grad[0, 0] = -1e4 if step == 29 else 1.0
            if step == 130:
                before = p.detach().clone()
            optimizer.step()
        moves[cls] = float((p.detach() - before)[0, 0].abs())
    assert moves[StableSPAM] > 5 * moves[AdamW]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lamb_steps_alike_however_tensors_are_batched(monkeypatch, dtype):
    first = [torch.randn(shape).to(dtype) for shape in ((33, 65), (7,), (), (0, 4), (20, 128))]
    results = []
    for size in (1, 200, 1 << 30):
        monkeypatch.setattr("gradmill.optim.large_batch.BATCH", size)
        params = [torch.nn.Parameter(p.clone()) for p in first]
        optimizer = LAMB(params, lr=0.1, states="int8", min_quantized_numel=1, seed=3)
        for step in range(2):
            for i, p in enumerate(params):
                p.grad = torch.sin(first[i] * (step + 2))
            optimizer.step()
        results.append(params)
    for params in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(params, results[0]))
    assert not torch.equal(results[0][0], first[0])


@pytest.mark.parametrize("ema", [None, 0.9])
def test_vrgd_weighs_by_what_shards_agree_on(ema):
    p = torch.nn.Parameter(torch.randn(20, 30))
    optimizer = VRGD(torch.optim.SGD([p], lr=0.1), ema=ema)
    average = torch.zeros(20, 30, dtype=torch.float64)
    for step in range(1, 4):
        before, grads = p.detach().double(), torch.randn(4, 20, 30) + 0.5
        for g in grads:
            p.grad = g.clone()
            optimizer.accumulate()
        assert p.grad is None
        g = grads.double()
        ratio = g.mean(0) ** 2 / ((g ** 2).mean(0) - g.mean(0) ** 2 + 1e-12)
        ratio = (ratio / ratio.mean()).clamp(0.1, 1)
        average = 0.9 * average + 0.1 * ratio
        optimizer.step()
        want = before - 0.1 * (ratio if ema is None else average / (1 - 0.9 ** step)) * g.mean(0)
        torch.testing.assert_close(p.detach().double(), want, rtol=1e-4, atol=1e-5)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert_same_bits(other.state_dict(), optimizer.state_dict())
        if step == 2:
            again = VRGD(torch.optim.SGD([p], lr=0.1), ema=ema)
            again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer = again
    with pytest.raises(RuntimeError, match="0 times"):
        optimizer.step()
    with pytest.raises(ValueError, match="floor"):
        VRGD(torch.optim.SGD([p], lr=0.1), floor=2.0)


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("name", (*CLASSES, *OTHERS))
def test_every_optimizer_steps_every_format_and_resumes(name, states):
    cls, options, shapes = getattr(optim, name), OTHERS.get(name, {}), SHAPES[:3:2] if name in ("Muon", "AuON", "HybridAuON") else SHAPES[:3]
    for kind in ("fp32", "bf16", "fp16", "int8", 24, 32):
        def make():
            params = parameters(dtype=FLOAT_DTYPES.get(kind, torch.bfloat16 if kind in (24, 32) else torch.float32), shapes=shapes)
            if kind == "int8":
                params[0] = torch.nn.Parameter(QuantizedWeight.quantize(params[0].detach(), "int8"))
            return params, cls(params, states=states, min_quantized_numel=1, seed=4, master_weight_bits=kind if kind in (24, 32) else None, **options)
        params, optimizer = make()
        start = copy.deepcopy([p.detach() for p in params])
        for step in range(4):
            give_gradients(params, step)
            optimizer.step()
        assert all(not torch.equal(p.detach().float(), q.float()) and p.detach().float().isfinite().all() for p, q in zip(params, start))
        file = io.BytesIO()
        torch.save({"params": params, "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        _, other = make()
        for p, q in zip([p for g in other.param_groups for p in g["params"]], saved["params"]):
            p.data = q.data
        other.load_state_dict(saved["optimizer"])
        others = [p for g in other.param_groups for p in g["params"]]
        for step in range(4, 7):
            give_gradients(params, step), give_gradients(others, step)
            optimizer.step(), other.step()
        assert_same_bits([p.detach() for p in others], [p.detach() for p in params], kind)


# --- weights in two pieces --------------------------------------------------------------------------------
def wide(n=20000):
    """Values of every magnitude, both signs."""
    return torch.randn(n) * 2.0 ** torch.randint(-45, 45, (n,))


def test_pieces_worked_out_by_hand():
    x = torch.tensor([1.0, 1 + 2 ** -8, 1 + 2 ** -7 + 2 ** -9, -(1 + 2 ** -23)])
    high, low = split_float(x, "bf16+16")
    assert high.tolist() == [1.0, 1 + 2 ** -7, 1 + 2 ** -7, -1.0]   # a tie goes away from zero
    assert (low.int() & 0xFFFF).tolist() == [0, 0x8000, 0x4000, 1]
    high, low = split_float(torch.tensor([1 + 2 ** -11, 2 ** -24 * 1.5, 65504.0, 65519.0, 65520.0]), "fp16+16")
    assert high.tolist() == [1 + 2 ** -10, 2 ** -23, 65504.0, 65504.0, float("inf")]
    assert (low.int() & 0xFFFF).tolist() == [0x8000, 0x8000, 0, 0x7800, 0]


@pytest.mark.parametrize("code", SPLIT)
def test_two_pieces_hold_what_is_claimed(code):
    dtype = SPLIT[code][0]
    x = wide() if dtype == torch.bfloat16 else wide().clamp(-65000, 65000)
    for words in (None, torch.randint(2 ** 32, x.shape)):
        high, low = split_float(x, code, words)
        back = join_float(high, low, code)
        if code == "bf16+16":
            assert_same_bits(back, x)
        elif code == "bf16+8":  # 15 fraction bits, rounded either way
            assert ((back - x).abs() <= 2.0 ** -15 * x.abs()).all()
        elif code == "fp16+16":
            exact = x.abs() >= 2.0 ** -17
            assert_same_bits(back[exact], x[exact])
            assert ((back - x).abs() < 2.0 ** -40).all()
        else:
            assert ((back.double() - x.double()).abs() <= (2.0 ** -18 * x.abs().double()).clamp(min=2.0 ** -32)).all()
        # the 16-bit piece is a nearest 16-bit float of what the two hold
        assert ((high.double() - back.double()).abs() <= (back.to(dtype).double() - back.double()).abs()).all()


@pytest.mark.parametrize("code", SPLIT)
def test_two_pieces_of_special_values(code):
    x = torch.tensor(SPECIAL)
    for words in (torch.zeros(len(x), dtype=torch.int64), torch.full((len(x),), 2 ** 32 - 1)):
        high, low = split_float(x, code, words)
        back = join_float(high, low, code)
        assert torch.equal(back.isnan(), x.isnan())
        assert (back[x.isinf()] == x[x.isinf()]).all() and (back[x == 0] == 0).all()
        assert torch.equal(back[~x.isnan()].signbit(), x[~x.isnan()].signbit())
    assert join_float(*split_float(torch.tensor([FLT_MAX]), "bf16+16"), "bf16+16").item() == FLT_MAX
    # a weight that was set to zero from outside has stale low bits: it must not turn into a nan
    for zero in (0.0, -0.0):
        stale = torch.full((1,), -1, dtype=SPLIT[code][1]) if code.endswith("16") else torch.full((1,), 255, dtype=torch.uint8)
        value = join_float(torch.tensor([zero], dtype=SPLIT[code][0]), stale, code)
        assert value.abs() < 1e-6


@pytest.mark.parametrize("code", ["bf16+8", "fp16+8"])
def test_eight_low_bits_are_rounded_without_bias(code):
    words = torch.randint(2 ** 32, (200000,))
    for value in (1.00001, 3.7e-6, 1e-7):
        x = torch.full(words.shape, value)
        back = join_float(*split_float(x, code, words), code).double()
        step = float(back.max() - back.min())
        assert step > 0 and abs(float(back.mean()) - float(x[0])) < 5 * step / sqrt(len(x))


@pytest.mark.parametrize("name", ["AdamW", "LAMB", "LARS", "StableSPAM"])
def test_bf16_weights_with_16_more_bits_train_as_fp32_bit_for_bit(name):
    half, full = parameters(dtype=torch.bfloat16), [torch.nn.Parameter(p.detach().float()) for p in parameters(dtype=torch.bfloat16)]
    a, b = CLASSES[name](half, lr=0.01, master_weight_bits=32), CLASSES[name](full, lr=0.01)
    for step in range(6):
        give_gradients(half, step)
        for p, q in zip(half, full):
            q.grad = p.grad.float()
        a.step(), b.step()
        assert_same_bits([a.value(p) for p in half], [p.detach() for p in full], step)
    assert all((p.detach().float() - q.detach()).abs().max() <= 2.0 ** -8 * q.detach().abs().max() for p, q in zip(half, full) if p.numel())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_24_bit_weights_move_by_updates_too_small_for_16(dtype):
    """An update of a 50th of an ulp a step, 100 steps: plain fp16 stays where it is, 24 bits arrive."""
    p = torch.nn.Parameter(torch.ones(5000, dtype=dtype))
    optimizer = LARS([p], lr=2.0 ** (-7 if dtype == torch.bfloat16 else -10) / 50, momentum=0.0, weight_decay=0.0, trust_coefficient=None,
                     master_weight_bits=24, seed=0)
    p.grad = -torch.ones_like(p)
    for _ in range(100):
        optimizer.step()
    moved = optimizer.value(p).double() - 1
    want = 100 * optimizer.param_groups[0]["lr"]
    assert abs(float(moved.mean()) / want - 1) < 0.01 and (moved / want - 1).abs().max() < 0.5


@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_weight_written_by_hand_keeps_its_low_bits(dtype, bits):
    """As the docstring says: half a step of its dtype off at most, and exact once the low bits are zeroed."""
    (p,) = params = parameters(dtype=dtype, shapes=[(70, 130)])
    optimizer = AdamW(params, master_weight_bits=bits)
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
    written = torch.randn(70, 130).to(dtype)
    with torch.no_grad():
        p.copy_(written)
    step_up = torch.nextafter(written.abs(), torch.full_like(written, float("inf"))).double() - written.abs().double()
    off = (optimizer.value(p).detach().double() - written.double()).abs()
    assert (off <= step_up / 2).all() and (off > 0).any()
    optimizer.state[p]["low_bits"].zero_()
    assert torch.equal(optimizer.value(p).detach(), written.float())


def test_full_precision_state_dict_and_converting_low_bits_on_load():
    model = torch.nn.Sequential(torch.nn.Linear(66, 70), torch.nn.LayerNorm(70)).bfloat16()
    model[1].float()
    params = list(model.parameters())
    optimizer = AdamW(params, lr=0.01, master_weight_bits=32, seed=0)
    give_gradients(params, 1)
    optimizer.step()
    full = optimizer.full_precision_state_dict(model)
    assert set(full) == set(model.state_dict()) and all(v.dtype == torch.float32 for v in full.values())
    assert_same_bits(full["0.weight"].bfloat16().float(), model[0].weight.detach().float())
    assert not torch.equal(full["0.weight"], model[0].weight.detach().float())
    for bits, exact in ((32, True), (24, False), (None, False)):
        again = AdamW(params, lr=1.0, master_weight_bits=bits)
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert again.param_groups[0]["master_weight_bits"] == bits
        error = (again.value(params[0]) - full["0.weight"]).abs().max()
        assert error == 0 if exact else error <= 2.0 ** (-15 if bits == 24 else -8) * full["0.weight"].abs().max()
    damaged = copy.deepcopy(optimizer.state_dict())
    damaged["state"][0]["low_bits"] = damaged["state"][0]["low_bits"][:-1]
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(optim.CheckpointError, match="low_bits"):
        optimizer.load_state_dict(damaged)
    assert_same_bits(optimizer.state_dict(), before)


# --- options as tensors, options that change --------------------------------------------------------------
@pytest.mark.parametrize("name", CLASSES)
def test_lr_and_betas_may_be_tensors(name):
    sides = []
    for tensors in (False, True):
        params = parameters()
        wrap = torch.tensor if tensors else lambda x: x
        options = {"lr": wrap(0.015625)}
        if name != "LARS":
            options["betas"] = (wrap(0.875), wrap(0.96875))
        optimizer = CLASSES[name](params, **options)
        for step in range(3):
            give_gradients(params, step)
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.5
        sides.append([p.detach() for p in params])
    assert_same_bits(*sides)


def test_amsgrad_set_on_a_live_group_starts_its_maximum_then():
    params = parameters()
    optimizer = AdamW(params, states="int8", min_quantized_numel=1)
    give_gradients(params, 0)
    optimizer.step()
    optimizer.param_groups[0]["amsgrad"] = True
    optimizer.step()
    assert "max_exp_avg_sq_codes" in optimizer.state[params[0]] and "max_exp_avg_sq" in optimizer.state[params[1]]
    assert_same_bits(optimizer.state[params[1]]["max_exp_avg_sq"], optimizer.state[params[1]]["exp_avg_sq"])
    optimizer.param_groups[0]["amsgrad"] = False
    optimizer.step()


# --- groups from names ------------------------------------------------------------------------------------
def test_param_groups_from_name_patterns():
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(10, 4), "block": torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)),
                                 "head": torch.nn.Linear(4, 10, bias=False)})
    model["head"].weight = model["embed"].weight  # tied: once
    model["block"][0].bias.requires_grad_(False)
    groups = param_groups(model, {"embed*": {"states": "fp32"}, "*.1.*": {"weight_decay": 0.0}})
    assert [len(g["params"]) for g in groups] == [1, 2, 1]
    assert groups[0]["states"] == "fp32" and groups[1]["weight_decay"] == 0.0 and set(groups[2]) == {"params"}
    optimizer = AdamW(groups, states="int8")
    assert [g["states"] for g in optimizer.param_groups] == ["fp32", "int8", "int8"]
    with pytest.raises(ValueError, match="'nothing\\*'"):
        param_groups(model, {"nothing*": {}})
    with pytest.raises(TypeError, match="dict"):
        param_groups(model, {"embed*": "fp32"})


# --- gradients released as they arrive --------------------------------------------------------------------
def small_model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(66, 80), torch.nn.Tanh(), torch.nn.Linear(80, 80), torch.nn.Tanh(), torch.nn.Linear(80, 3)).bfloat16()


@pytest.mark.parametrize("name", CLASSES)
def test_released_gradients_give_the_same_bits(name):
    sides = []
    for released in (False, True):
        model = small_model()
        frozen = model[2].bias.requires_grad_(False)
        optimizer = CLASSES[name](model.parameters(), lr=0.01, states="int8", min_quantized_numel=1, seed=3)
        handle = release_gradients(model, optimizer) if released else None
        torch.manual_seed(9)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(7, 66).bfloat16()).float().square().mean().backward()
            assert not released or all(p.grad is None for p in model.parameters())
            optimizer.step()
        sides.append([p.detach() for p in model.parameters()])
        assert frozen not in optimizer.state or not optimizer.state[frozen]
    assert_same_bits(*sides)
    handle.remove()
    model(torch.randn(7, 66).bfloat16()).float().square().mean().backward()
    assert model[0].weight.grad is not None
    assert_same_bits([p.detach() for p in model.parameters()], sides[1])
    with release_gradients(model, optimizer):
        pass


PROJECTIONS = [dict(basis="svd", bits=32), dict(basis="subspace", bits=4, group_size=8, background=2, moments="rotate"), dict(basis="coordinate", moments="reset"), dict(basis="random"),
               dict(basis="dct")]


@pytest.mark.parametrize("options", PROJECTIONS, ids=lambda o: o["basis"])
def test_accumulated_gradients_are_kept_projected(options):
    """The weights are those of ordinary accumulation, but for rounding; between refreshes no matrix keeps its gradient."""
    sides, kept = [], []
    for released in (False, True):
        model = small_model().float()
        optimizer = AdamW(model.parameters(), lr=1e-3, eps=1e-3, seed=3, projection=Projection(2, refresh_every=4, stagger=False, **options))
        handle = release_gradients(model, optimizer, accumulate=3) if released else None
        torch.manual_seed(9)
        for step in range(9):
            for part in range(3):
                (model(torch.randn(7, 66)).square().mean() / 3).backward()
                if released:
                    kept.append((step, part, [p.grad is not None for p in model.parameters() if p.dim() == 2][:2]))
            assert not released or all(p.grad is None for p in model.parameters())
            optimizer.step()
            if not released:
                optimizer.zero_grad()
        sides.append([p.detach() for p in model.parameters()])
    for a, b in zip(*sides):
        assert (a - b).abs().max() < 1e-5
    refreshed = (0, 4, 8)
    assert kept == [(step, part, [part < 2 and step in refreshed] * 2) for step in range(9) for part in range(3)]
    assert not handle.low and not handle.counts


def test_a_step_before_the_last_gradient_takes_what_is_there_and_zero_grad_drops_it():
    x = torch.randn(4, 7, 66)
    results = []
    for order in ((0, 1), (0, "zero", 0, 1), (0, 1, "remove", 0, 1)):
        model = small_model().float()
        optimizer = AdamW(model.parameters(), lr=1e-3, eps=1e-3, seed=3, projection=Projection(5, "svd", 32))
        handle = release_gradients(model, optimizer, accumulate=3)
        for part in range(3):
            model(x[3]).square().mean().backward()
        optimizer.step()  # the basis is there
        for what in order:
            if what == "zero":
                optimizer.zero_grad()
            elif what == "remove":
                handle.remove()
                model.zero_grad()
            else:
                model(x[what]).square().mean().backward()
        optimizer.step()
        results.append([p.detach() for p in model.parameters()])
        assert order[-3:-2] == ("remove",) or all(p.grad is None for p in model.parameters())
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert (a - b).abs().max() < 1e-5
    # a parameter that only the first of three parts used is stepped too
    model = small_model().float()
    optimizer = AdamW(model.parameters(), lr=1e-3, projection=Projection(5, "svd", 32))
    with release_gradients(model, optimizer, accumulate=3):
        for parts in ((0, 0, 0), (0, 1, 1)):
            for part in parts:
                (model if part == 0 else model[2:])(x[0] if part == 0 else torch.randn(7, 80)).square().mean().backward()
            before = model[0].weight.detach().clone()
            optimizer.step()
    assert not torch.equal(before, model[0].weight) and optimizer.state[model[0].weight]["step"] == 2 and model[0].weight.grad is None


def test_what_accumulation_refuses():
    model = small_model()
    for residual in ("fira", "sign", "sgd"):
        optimizer = AdamW(model.parameters(), projection=Projection(5, residual=residual))
        with pytest.raises(ValueError, match=f"accumulate is 2.*{residual}"):
            release_gradients(model, optimizer, accumulate=2)
        release_gradients(model, optimizer).remove()
    for accumulate in (0, 1.5):
        with pytest.raises(ValueError, match="accumulate"):
            release_gradients(model, AdamW(model.parameters()), accumulate=accumulate)
    with release_gradients(model, AdamW(model.parameters()), accumulate=2):
        for _ in range(2):
            model(torch.randn(7, 66).bfloat16()).sum().backward()
        with pytest.raises(RuntimeError, match="gradient 3 of.*2 backward passes"):
            model(torch.randn(7, 66).bfloat16()).sum().backward()


def test_a_checkpoint_of_the_first_accumulation_loads():
    """Before any step there is no state, whoever has looked for one."""
    model = torch.nn.Sequential(torch.nn.Linear(24, 16), torch.nn.Linear(16, 20))
    optimizer = GaLoreAdamW(model.parameters(), rank=4)
    with release_gradients(model, optimizer, accumulate=3):
        model(torch.randn(2, 24)).sum().backward()
        saved = optimizer.state_dict()
        assert saved["state"] == {}
        assert not optimizer.state[model[0].weight]  # torch's defaultdict makes an empty one of that
        other = GaLoreAdamW(copy.deepcopy(model).parameters(), rank=4)
        for state_dict in (saved, optimizer.state_dict()):
            other.load_state_dict(state_dict)
            assert not other.state



def test_what_released_gradients_cannot_be_combined_with():
    model = small_model()
    for options in (dict(max_grad_norm=1.0), dict(on_nonfinite="skip"), dict(on_nonfinite="raise")):
        with pytest.raises(ValueError, match="max_grad_norm"):
            release_gradients(model, AdamW(model.parameters(), **options))
    with pytest.raises(TypeError, match="SGD"):
        release_gradients(model, torch.optim.SGD(model.parameters()))
    for name in ("AdaGradNorm", "STEPAdam", "FedSpeed"):  # what they decide, they decide for a group
        with pytest.raises(ValueError, match=f"release_gradients cannot be combined with {name}"):
            release_gradients(model, getattr(optim, name)(model.parameters()))
    optimizer = AdamW(model.parameters())
    handle = release_gradients(model, optimizer)
    with pytest.raises(ValueError, match="already"):
        release_gradients(model, optimizer)
    x = torch.randn(7, 66).bfloat16()
    model(x).sum().backward()
    with pytest.raises(RuntimeError, match="accumulate="):
        model(x).sum().backward()
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(x).sum()).backward()
    with pytest.raises((RuntimeError, AssertionError), match="GradScaler|inf checks"):
        scaler.step(optimizer)
    handle.remove()


# --- every backend ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CLASSES)
def test_optimizers_give_the_same_bits_in_every_backend(name):
    def run():
        params = parameters(dtype=torch.bfloat16)
        optimizer = CLASSES[name](params, states="int4", min_quantized_numel=1, seed=4, master_weight_bits=24, max_grad_norm=0.7)
        for step in range(3):
            give_gradients(params, step)
            optimizer.step()
        return [p.detach() for p in params], optimizer.state_dict()["state"]
    with running("reference"):
        want = run()
    for level in LEVELS:
        with running(level):
            assert_same_bits(run(), want, level)


# --- files ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("name", CLASSES)
def test_a_safetensors_file_resumes_bit_equal(name, states, tmp_path):
    params = parameters(dtype=torch.bfloat16)
    make = lambda ps, lr: CLASSES[name]([{"params": ps[:2], "lr": torch.tensor(lr)}, {"params": ps[2:]}], states=states, min_quantized_numel=1,
                                        seed=6, master_weight_bits=24)
    optimizer = make(params, 0.01)
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
    optim.save_optimizer(optimizer, tmp_path / "o.safetensors")
    assert [f.name for f in tmp_path.iterdir()] == ["o.safetensors"]
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = make(others, 0.5)
    optim.load_optimizer(other, tmp_path / "o.safetensors")
    assert_same_bits(other.state_dict(), optimizer.state_dict())
    for step in range(3, 6):
        give_gradients(params, step), give_gradients(others, step)
        optimizer.step(), other.step()
    assert_same_bits([p.detach() for p in others], [p.detach() for p in params])


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("name", (*CLASSES, *OTHERS, "FiraAdamW", "moments reset"))
def test_torchs_distributed_state_dicts_resume_bit_equal(name, flat):
    """set_optimizer_state_dict takes a first step at lr 0 and asks a flattened checkpoint for the names found then: none may come later."""
    options, model_options = dict(OTHERS.get(name, {})), StateDictOptions(flatten_optimizer_state_dict=flat)
    if name == "SWATS":
        options["tolerance"] = 1e9  # switches at once
    extra = {"rank": 4} if name in ("FiraAdamW", "QGaLoreAdamW") else {}
    if name == "moments reset":
        extra = {"projection": Projection(rank=4, refresh_every=2, moments="reset")}

    def make(seed, lr):
        model = torch.nn.Sequential(torch.nn.Linear(70, 64, bias=False), torch.nn.Linear(64, 30, bias=False))
        cls = getattr(optim, "AdamW" if name == "moments reset" else name)
        return model, cls([{"params": list(model.parameters()), **extra}], lr=lr, seed=seed, states="int8", min_quantized_numel=1, **options)

    def train(model, optimizer, x):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    (model, optimizer), (other, again), xs = make(1, 0.01), make(2, 0.5), torch.randn(8, 9, 70)
    for x in xs[:5]:
        train(model, optimizer, x)
    other.load_state_dict(model.state_dict())
    before = [p.detach().clone() for p in other.parameters()]
    set_optimizer_state_dict(other, again, copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=model_options)), options=model_options)
    assert_same_bits([p.detach() for p in other.parameters()], before)
    for x in xs[5:]:
        train(model, optimizer, x), train(other, again, x)
    assert_same_bits([p.detach() for p in other.parameters()], [p.detach() for p in model.parameters()])


def test_a_file_holds_every_option_that_is_documented(tmp_path):
    options = dict(ns_dtype=torch.float32, ns_coefficients=(3.0, -4.0, 2.0), adjust_lr_fn="match_rms_adamw", lr=torch.tensor(0.1))
    p = torch.nn.Parameter(torch.ones(3, 3))
    p.grad = torch.randn(3, 3)
    optimizer, other = optim.Muon([("w", p)], **options), optim.Muon([p])
    optimizer.step()
    optim.save_optimizer(optimizer, tmp_path / "o.safetensors")
    optim.load_optimizer(other, tmp_path / "o.safetensors")
    assert other.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_bad_files_are_refused_and_change_nothing(tmp_path, monkeypatch):
    from safetensors.torch import save_file
    params = parameters()
    optimizer = AdamW(params, states="int8", min_quantized_numel=1)
    give_gradients(params, 1)
    optimizer.step()
    good = tmp_path / "good"
    optim.save_optimizer(optimizer, good)
    before = copy.deepcopy(optimizer.state_dict())
    data = good.read_bytes()
    files = {"cut": data[:-100], "header cut": data[:40], "empty": b"", "noise": bytes(range(256)) * 20,
             "version": data.replace(b'"gradmill_format":"1"', b'"gradmill_format":"9"')}
    assert files["version"] != data
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(optim.CheckpointError, match="'9'" if name == "version" else name.split()[0]):
            optim.load_optimizer(optimizer, tmp_path / name)
    save_file({"a": torch.ones(3)}, tmp_path / "other")
    with pytest.raises(optim.CheckpointError, match="gradmill_format is None"):
        optim.load_optimizer(optimizer, tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        optim.load_optimizer(optimizer, tmp_path / "missing")
    small = AdamW(parameters(shapes=[(70, 130)]))
    with pytest.raises(ValueError, match="doesn't match"):
        optim.load_optimizer(small, good)
    with pytest.raises(optim.CheckpointError):
        optim.load_optimizer(Lion(parameters()), good)
    assert_same_bits(optimizer.state_dict(), before)
    # an interrupted write leaves the old file and nothing beside it
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(OSError, match="disk full"):
        optim.save_optimizer(optimizer, good)
    assert good.read_bytes() == data and not [f for f in tmp_path.iterdir() if f.suffix == ".tmp"]


# --- other projects' checkpoints --------------------------------------------------------------------------
def by_table(x, table, block, most):
    """bitsandbytes' and torchao's way: the nearest entry of a table, blocks over the flat tensor. (codes, scales, values)"""
    flat = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % block)).view(-1, block)
    scales = flat.abs().amax(1)
    codes = ((flat / scales.clamp(min=1e-30)[:, None])[..., None] - table).abs().argmin(-1)
    values = (table[codes] * scales[:, None]).flatten()[:x.numel()].view(x.shape)
    return codes.flatten()[:x.numel()].to(torch.uint8).view(x.shape), scales, values


TABLES = [torch.linspace(-1, 1, 256), torch.linspace(0, 1, 256)]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block", [256, 2048])
@pytest.mark.parametrize("states", STATES)
def test_a_bitsandbytes_checkpoint_loads(states, block, nested):
    params = parameters(shapes=[(70, 130), (5,)])
    m, v = torch.randn(70, 130) * 0.1, torch.rand(70, 130) * 0.01
    state, values = {"step": 7}, []
    for number, (x, table) in enumerate(((m, TABLES[0]), (v, TABLES[1])), 1):
        codes, scales, value = by_table(x, table, block, 1)
        state.update({f"state{number}": codes, f"qmap{number}": table, f"absmax{number}": scales})
        values.append(value)
    if nested:
        state = {"step": 7, "__bnb_optimizer_quant_state__": {k: t for k, t in state.items() if k != "step"}}
    small = {"step": 7, "state1": torch.ones(5), "state2": torch.full((5,), 2.0)}
    group = dict(lr=0.3, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.1, alpha=0.0, params=[0, 1])
    saved = {"state": {0: state, 1: small}, "param_groups": [group]}
    kept = copy.deepcopy(saved)
    optimizer, plain = AdamW(params, states=states, min_quantized_numel=1), AdamW(params)
    optimizer.load_state_dict(saved), plain.load_state_dict(saved)
    assert_same_bits(saved, kept)
    assert_same_bits([plain.state[params[0]][k] for k in ("exp_avg", "exp_avg_sq")], values)
    assert plain.state[params[1]]["exp_avg"].tolist() == [1.0] * 5 and float(plain.state[params[0]]["step"]) == 7
    assert optimizer.param_groups[0]["lr"] == 0.3 and optimizer.param_groups[0]["states"] == states
    assert ("exp_avg_codes" in optimizer.state[params[0]]) == (states in ("fp8", "int8", "int4"))
    give_gradients(params, 1)
    optimizer.step()
    inner = kept["state"][0].get("__bnb_optimizer_quant_state__", kept["state"][0])
    for damage in (lambda s: s.pop("absmax1"), lambda s: s.update(absmax1=s["absmax1"][:-1]), lambda s: s.update(state2=s["state2"][:-1]),
                   lambda s: s.update(qmap2=s["qmap2"][:17]), lambda s: s.pop("state2")):
        bad = copy.deepcopy(kept)
        damage(bad["state"][0].get("__bnb_optimizer_quant_state__", bad["state"][0]))
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(optim.CheckpointError, match="state 0"):
            optimizer.load_state_dict(bad)
        assert_same_bits(optimizer.state_dict(), before)
    assert inner["state1"].dtype == torch.uint8


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_a_torchao_checkpoint_loads(name):
    torchao = pytest.importorskip("torchao.optim")
    params, other = parameters(shapes=[(64, 256), (7,)]), parameters(shapes=[(64, 256), (7,)])
    theirs = getattr(torchao, name)(other, lr=0.01)
    give_gradients(other, 1)
    theirs.step()
    for states in ("fp32", "int8", "int4"):
        ours = AdamW(params, states=states)
        ours.load_state_dict(theirs.state_dict())
        if states == "fp32":
            for p, q in zip(params, other):
                value = theirs.state[q]["exp_avg_sq"]
                value = value.dequantize() if hasattr(value, "tensor_attrs") else value
                torch.testing.assert_close(ours.state[p]["exp_avg_sq"], value.float(), rtol=0, atol=0)
        give_gradients(params, 2)
        ours.step()


@pytest.mark.parametrize("name", ["Adam8bit", "Lion8bit"])
def test_bitsandbytes_own_checkpoint_loads(name):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    other = parameters(shapes=[(64, 256), (7,)])
    theirs = getattr(bitsandbytes.optim, name)(other, lr=0.01)
    give_gradients(other, 1)
    theirs.step()
    params = [torch.nn.Parameter(q.detach().clone()) for q in other]
    ours = (AdamW if "Adam" in name else Lion)(params, states="int8")
    ours.load_state_dict(theirs.state_dict())
    m = theirs.state[other[1]]["state1"]
    assert_same_bits(ours.state[params[1]]["exp_avg"], m.float())
    give_gradients(params, 2), give_gradients(other, 2)
    ours.step(), theirs.step()
    close(params, other, atol=0.02)


# --- a step repeated without its checks -------------------------------------------------------------------
def mixed_parameters():
    """fp32, bf16 and fp16, matrices and vectors: several launches in one group."""
    return [p for dtype in (torch.float32, torch.bfloat16, torch.float16) for p in parameters(dtype=dtype, shapes=[(70, 130), (130,), ()])]


def recorded(optimizer, monkeypatch):
    """A list that gets, at every step, whether the first group's step was a repetition."""
    repeat, found = optimizer._repeat, []

    def wrapper(group, *rest):
        result = repeat(group, *rest)
        if group is optimizer.param_groups[0]:
            found.append(result)
        return result
    monkeypatch.setattr(optimizer, "_repeat", wrapper)
    return found


def interfere(kind, optimizer, params):
    """Something between two steps that a repetition has to notice."""
    group, p = optimizer.param_groups[0], params[0]
    if kind == "state replaced":
        optimizer.state[p]["exp_avg_scales"] = optimizer.state[p]["exp_avg_scales"] * 2
    elif kind == "state moved":
        optimizer.state[p]["exp_avg_scales"].data = optimizer.state[p]["exp_avg_scales"].clone() * 2
    elif kind == "state forgotten":
        optimizer.state[p].clear()
    elif kind == "step set":
        optimizer.state[p]["step"] = torch.tensor(40.0)
    elif kind == "step zeroed":
        optimizer.state[p]["step"].zero_()
    elif kind == "step of another dtype":
        optimizer.state[p]["step"] = torch.tensor(40)
    elif kind == "number":
        optimizer.state[p]["rng_id"] = 77
    elif kind == "gradient negated":
        p.grad = torch._neg_view(p.grad)
    elif kind == "weight replaced":
        p.data = p.data.clone() + 1
    elif kind == "gradient transposed":
        p.grad = p.grad.t().contiguous().t()
    elif kind == "gradient missing":
        p.grad = None
    elif kind == "hyperparameters":
        group.update(lr=0.3, betas=(0.5, 0.7), weight_decay=0.0, eps=0.1, maximize=True, seed=7)
    elif kind == "amsgrad":
        group["amsgrad"] = True
    elif kind == "loaded":
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"][0]["exp_avg_scales"] *= 3
        optimizer.load_state_dict(saved)
    elif kind == "group":
        more = torch.nn.Parameter(torch.ones(3))
        more.grad = torch.ones(3)
        optimizer.add_param_group({"params": [more], "lr": 0.5})


@pytest.mark.parametrize("kind", ["nothing", "state replaced", "state moved", "state forgotten", "step set", "step zeroed", "step of another dtype", "number", "weight replaced", "gradient negated", "gradient transposed",
                                  "gradient missing", "hyperparameters", "amsgrad", "loaded", "group"])
def test_a_repeated_step_is_the_step(kind, monkeypatch):
    ours, theirs = mixed_parameters(), mixed_parameters()
    a, b = (AdamW(ps, lr=0.01, states="int8", min_quantized_numel=1, seed=3) for ps in (ours, theirs))
    monkeypatch.setattr(b, "_repeat", lambda *_: False)
    repeated = recorded(a, monkeypatch)
    for step in range(8):
        for optimizer, params in ((a, ours), (b, theirs)):
            give_gradients(params, step)
            if step == 4:
                interfere(kind, optimizer, params)
            optimizer.step()
        assert_same_bits(ours, theirs)
        assert_same_bits([t for s in a.state.values() for t in s.values() if isinstance(t, torch.Tensor)],
                         [t for s in b.state.values() for t in s.values() if isinstance(t, torch.Tensor)])
    assert repeated[:4] == [False, False, True, True] and repeated[4] == (kind in ("nothing", "hyperparameters", "group"))
    assert repeated[7] == (kind != "step of another dtype")


def test_plans_keep_no_state_alive_and_forget_groups():
    import gc
    import weakref
    params = parameters(shapes=[(70, 130), (130,)])
    optimizer = AdamW([{"params": [p]} for p in params])
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
    moments = [weakref.ref(optimizer.state[p]["exp_avg"]) for p in params]
    optimizer.state.clear()
    gc.collect()
    assert [m() for m in moments] == [None, None]
    optimizer.param_groups.pop()
    params.pop()
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
    assert len(optimizer._plans) == len(optimizer._seen) == 1


def test_meta_parameters_take_every_step():
    p = torch.nn.Parameter(torch.empty(8, 9, device="meta"))
    optimizer = AdamW([p])
    for _ in range(4):
        p.grad = torch.empty(8, 9, device="meta")
        optimizer.step()


@pytest.mark.parametrize("name", ["SGD", "Lion", "Grams", "Adagrad"])
def test_a_repeated_step_keeps_versions_and_obeys_use_backend(name, monkeypatch):
    from gradmill import use_backend
    params = parameters(shapes=[(70, 130), (130,)])
    optimizer = getattr(optim, name)(params, **OTHERS.get(name, {}))
    repeated = recorded(optimizer, monkeypatch)
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
    assert repeated[2]
    monkeypatch.undo()
    versions = [p._version for p in params]
    give_gradients(params, 5)
    twin = copy.deepcopy((params, optimizer))
    assert not hasattr(twin[1], "_plans")  # it would hold the first one's tensors
    give_gradients(twin[0], 5)
    optimizer.step()
    assert all(p._version > v for p, v in zip(params, versions))
    with use_backend("reference"):
        twin[1].step()
    close(params, twin[0])


# --- torch.compile ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["AdamW", "Muon", "StableSPAM", "QGaLoreAdamW"])
def test_a_compiled_training_step_is_the_eager_one_and_compiles_once(name):
    from torch._dynamo.testing import CompileCounter

    def run(compiler):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 70, bias=False), torch.nn.GELU(), torch.nn.Linear(70, 64, bias=False))
        group = {"params": list(model.parameters()), **({"rank": 8, "refresh_every": 3} if name == "QGaLoreAdamW" else {})}
        optimizer = getattr(optim, name)([group], lr=0.01, seed=1, **({"states": "int8", "min_quantized_numel": 1} if name == "AdamW" else {}))
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
        x = torch.randn(5, 64)

        def train():
            optimizer.zero_grad()
            (model(x) - x).square().mean().backward()
            optimizer.step()
        step = train if compiler is None else torch.compile(train, backend=compiler)
        counts = []
        for _ in range(5):
            step()
            scheduler.step()
            counts.append(compiler.frame_count if compiler else 0)
        return list(model.parameters()), counts

    torch._dynamo.reset()
    eager, _ = run(None)
    compiled, counts = run(CompileCounter())
    close(compiled, eager)
    assert counts[-1] == counts[1] > 0, counts  # the first step makes the gradients, which the second finds


def test_weights_cast_in_mid_run_get_their_low_bits():
    params = parameters(shapes=[(70, 130), (130,)])
    optimizer = AdamW(params, lr=0.01, master_weight_bits=32)
    give_gradients(params, 0)
    optimizer.step()
    for p in params:
        p.data, p.grad = p.data.to(torch.bfloat16), None
    give_gradients(params, 1)
    optimizer.step()
    assert all(optimizer.state[p]["low_bits"].shape == (*p.shape, 2) for p in params)


def test_raise_names_the_parameter():
    model = torch.nn.Linear(4, 3)
    for given, said in ((model.named_parameters(), "'bias'"), (model.parameters(), r"parameter 1 of group 0, of shape \(3,\)")):
        optimizer = AdamW(given, on_nonfinite="raise")
        model.weight.grad, model.bias.grad = torch.ones(3, 4), torch.tensor([0.0, float("nan"), 0.0])
        with pytest.raises(FloatingPointError, match=said):
            optimizer.step()
