"""offload=True: the step through staging memory is the ordinary step, bit for bit.

Without a GPU, parameters on the CPU are sent through it: copies that are done at once (`staged`), and copies on streams that run as late, and
as out of step with one another, as their events allow (`LateStream`), so that a missing event shows as wrong bits.
"""
import copy
import random

import pytest
import torch

from gradmill import QuantizedWeight, optim
from gradmill.formats import FLOAT_DTYPES
from gradmill.optim import AdamW, Lion, large_batch, load_optimizer, release_gradients, save_optimizer, staging

from .conftest import SEED, assert_same_bits

SHAPES = [(70, 130), (130,), (300, 64), (8, 3, 3, 3), (), (0,), (3, 0), (1, 700), (701, 1)]
#: Every optimizer that offloads, with options that show more of it.
OPTIMIZERS = {"AdamW": {}, "Adam": dict(amsgrad=True, weight_decay=0.1), "Lion": {}, "SGD": dict(momentum=0.9, dampening=0.3),
              "Adagrad": dict(initial_accumulator_value=0.1), "CLASSP": dict(threshold=0.01), "AdaBelief": {}, "DiffGrad": {}, "Grams": {}, "Sophia": {},
              "LAMB": dict(max_trust_ratio=2.0), "LARS": dict(lr=1.0), "StableSPAM": dict(reset_every=2), "SWATS": {}, "STEPAdam": {}, "AdaGradNorm": {}}
#: Those whose parameters are matrices.
MATRICES = {"Muon": {}, "AuON": {}, "HybridAuON": {}}
STATES = ("fp32", "bf16", "fp8", "int8", "int4")


@pytest.fixture
def staged(monkeypatch):
    """Offloads parameters on the CPU, in chunks so small that tensors are cut and gathered."""
    monkeypatch.setattr(staging, "staged", lambda device: True)
    monkeypatch.setattr(staging, "CHUNK", 10_000)
    monkeypatch.setattr(staging, "SMALL", 1_500)
    monkeypatch.setattr(large_batch._ScaledByNorms, "in_one_call", lambda self, item: False)  # that is for parameters on the CPU


def weights(kind, seed=0, shapes=SHAPES):
    g, out = torch.Generator().manual_seed(seed), []
    for s in shapes:
        x = torch.randn(s, generator=g).to(FLOAT_DTYPES.get(kind, torch.bfloat16))
        if kind in ("int8", "int4") and len(s) > 1 and x.numel() and s[1] > 1:
            x = QuantizedWeight.quantize(x, kind)
        out.append(torch.nn.Parameter(x))
    return out


def train(params, optimizer, start, stop, dtype=None):
    for step in range(start, stop):
        g = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
        if isinstance(optimizer, optim.Sophia) and step == start:
            optimizer.update_hessian(samples=3)
        optimizer.step()


def everything(params, optimizer):
    state = optimizer.state_dict()["state"]
    return [p.detach() for p in params], {i: {k: v for k, v in s.items() if isinstance(v, torch.Tensor)} for i, s in state.items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("states", STATES)
def test_the_step_has_the_same_bits(name, states, staged):
    for kind in ("fp32", "bf16", "fp16", "int8", "int4", 24, 32):
        sides = []
        for offload in (False, True):
            params = weights(kind)
            optimizer = getattr(optim, name)(params, states=states, min_quantized_numel=1, seed=5, offload=offload,
                                             master_weight_bits=kind if kind in (24, 32) else None, **OPTIMIZERS[name])
            train(params, optimizer, 0, 3)
            sides.append(everything(params, optimizer))
        assert_same_bits(*sides, f"{kind}")


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("states", ["fp32", "int8"])
def test_rules_of_matrices_have_the_same_bits(name, states, staged):
    for kind in ("fp32", "bf16", 24):
        sides = []
        for offload in (False, True):
            params = weights(kind, shapes=[(70, 130), (300, 64), (1, 700)])
            optimizer = getattr(optim, name)(params, states=states, min_quantized_numel=1, seed=5, offload=offload, master_weight_bits=kind if kind == 24 else None)
            train(params, optimizer, 0, 3)
            sides.append(everything(params, optimizer))
        assert_same_bits(*sides, f"{kind}")


@pytest.mark.parametrize("options", [dict(basis="svd"), dict(basis="svd", bits=4, moments="rotate"), dict(basis="dct", moments="rotate"), dict(basis="random", residual="sign"),
                                     dict(basis="svd", residual="fira", moments="reset"), dict(basis="coordinate", residual="sgd")], ids=str)
@pytest.mark.parametrize("states", ["fp32", "int8"])
def test_projections_have_the_same_bits(options, states, staged):
    sides = []
    for offload in (False, True):
        params = weights("bf16", shapes=[(70, 130), (130,), (300, 64)])
        optimizer = AdamW([{"params": params, "rank": 6, "refresh_every": 2, **options}], lr=0.01, states=states, min_quantized_numel=1, seed=5, offload=offload)
        train(params, optimizer, 0, 5)
        assert "next_refresh" in optimizer.state[params[0]]
        sides.append(everything(params, optimizer))
    assert_same_bits(*sides)


def test_a_basis_stays_where_the_gradient_is(monkeypatch):
    """What is moved when offload is set on a live group: the moments and low bits."""
    params = weights("bf16", shapes=[(70, 130)])
    optimizer = AdamW([{"params": params, "rank": 6}], states="int8", min_quantized_numel=1)
    train(params, optimizer, 0, 1)
    monkeypatch.setattr(AdamW, "_home", staticmethod(lambda t, group: torch.device("meta")))
    optimizer._bring_home(optimizer.param_groups[0], params, False)
    away = {name for name, t in optimizer.state[params[0]].items() if isinstance(t, torch.Tensor) and t.is_meta}
    assert away == {"exp_avg_codes", "exp_avg_scales", "exp_avg_sq_codes", "exp_avg_sq_scales"} and "basis_codes" in optimizer.state[params[0]]


def test_what_has_no_state_steps_where_the_weight_is(staged, monkeypatch):
    """LAMB's and Muon's second half is plain SGD: no reason to move; with low bits in CPU memory there is one."""
    rules = []
    monkeypatch.setattr(staging, "through", lambda transport, items, step: (rules.append(len(items)), step(items))[0])
    for bits, want in ((None, 1), (32, 2)):
        params = weights("bf16", shapes=[(70, 130)])
        rules.clear()
        train(params, optim.LAMB(params, offload=True, master_weight_bits=bits), 0, 1)
        assert len(rules) == want


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_a_run_resumes_from_a_file_and_moves_in_and_out(kind, staged, tmp_path):
    params = weights(kind)
    optimizer = AdamW(params, states="int8", min_quantized_numel=1, seed=5, lr=0.01)
    train(params, optimizer, 0, 6)
    mine = weights(kind)
    first = AdamW(mine, states="int8", min_quantized_numel=1, seed=5, lr=0.01, offload=True)
    train(mine, first, 0, 2)
    save_optimizer(first, tmp_path / "file")
    second = AdamW(mine, states="int8", min_quantized_numel=1, seed=6, offload=False)
    load_optimizer(second, tmp_path / "file")
    assert second.param_groups[0]["offload"] is False  # how states are stored is not the checkpoint's choice
    train(mine, second, 2, 4)
    third = AdamW(mine, states="int8", min_quantized_numel=1, offload=True)
    third.load_state_dict(second.state_dict())
    train(mine, third, 4, 5)
    mine, third = copy.deepcopy((mine, third))
    train(mine, third, 5, 6)
    assert_same_bits([p.detach() for p in mine], [p.detach() for p in params])


def test_any_layout_goes_down_and_up(staged):
    sides = []
    for offload in (False, True):
        g = torch.Generator().manual_seed(3)
        params = [torch.nn.Parameter(t) for t in (torch.randn(130, 70, generator=g).t(), torch.randn(9, 5, generator=g).t(),
                  torch.randn(80, 60, generator=g)[::2, ::3], torch.randn(4, 3, 8, 8, generator=g).to(memory_format=torch.channels_last))]
        optimizer = AdamW(params, offload=offload)
        for step in range(2):
            params[0].grad = torch.randn(70, 1, generator=g).expand(70, 130)
            params[1].grad = torch._neg_view(torch.randn(5, 9, generator=g))
            params[2].grad = torch._neg_view(torch.randn(40, 20, generator=g))
            params[3].grad = torch.randn(4, 3, 8, 8, generator=g)
            optimizer.step()
        sides.append([p.detach() for p in params])
    assert_same_bits(*sides)


def test_groups_choose_and_options_combine(staged, monkeypatch):
    """A group that offloads beside one that does not; clipping, skipping, a GradScaler, released gradients, a schedule."""
    used = []
    through = staging.through
    monkeypatch.setattr(staging, "through", lambda transport, items, step: (used.append(len(items)), through(transport, items, step)))
    sides = []
    for offload in (False, True):
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(66, 80), torch.nn.Tanh(), torch.nn.Linear(80, 3)).bfloat16()
        optimizer = AdamW([{"params": [model[0].weight], "offload": offload}, {"params": [model[0].bias, *model[2].parameters()]}], lr=0.01, states="int8",
                          min_quantized_numel=1, seed=3, max_grad_norm=0.1, on_nonfinite="skip")
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        for step in range(4):
            optimizer.zero_grad()
            loss = model(torch.randn(7, 66).bfloat16()).float().square().mean()
            scaler.scale(loss * (float("inf") if step == 1 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
        optimizer.max_grad_norm, optimizer.on_nonfinite = None, "propagate"
        with release_gradients(model, optimizer):
            for _ in range(2):
                model(torch.randn(7, 66).bfloat16()).float().square().mean().backward()
                assert model[0].weight.grad is None
                optimizer.step()
        sides.append(everything(list(model.parameters()), optimizer))
    assert_same_bits(*sides)
    assert used == [1] * 5


def test_offload_set_and_unset_on_a_live_group(staged):
    sides = []
    for offload in (False, True):
        params = weights("bf16")
        optimizer = Lion(params, states="int8", min_quantized_numel=1, seed=3)
        train(params, optimizer, 0, 3)  # by then the step is one that is repeated
        optimizer.param_groups[0]["offload"] = offload
        train(params, optimizer, 3, 6)
        optimizer.param_groups[0]["offload"] = False
        train(params, optimizer, 6, 9)
        sides.append(everything(params, optimizer))
    assert_same_bits(*sides)


def test_on_the_cpu_nothing_changes():
    sides = []
    for offload in (False, True):
        params = weights("bf16")
        optimizer = AdamW(params, states="int8", offload=offload, seed=3)
        train(params, optimizer, 0, 4)
        assert not hasattr(optimizer, "_transports")
        sides.append(everything(params, optimizer))
    assert_same_bits(*sides)


def test_what_it_cannot_be_combined_with_is_said():
    params = [torch.nn.Parameter(torch.ones(80, 80))]
    with pytest.raises(ValueError, match="offload=True cannot be combined with FedSpeed, whose two fp32 states .*; leave it out"):
        optim.FedSpeed(params, offload=True)
    with pytest.raises(ValueError, match="offload=True cannot be combined with capturable=True"):
        AdamW(params, offload=True, capturable=True)
    with pytest.raises(TypeError, match="offload is 'cpu'; it must be True or False"):
        AdamW(params, offload="cpu")


# --- chunks -----------------------------------------------------------------------------------------------
def test_chunks_cover_everything_once_without_overlap(staged):
    from gradmill.optim._base import Item

    params = weights("int8")
    items = [Item(p, torch.zeros(p.shape), {"exp_avg": torch.arange(p.numel()).view(p.shape), "step": torch.ones(())}, 1, offset=7) for p in params if p.numel()]
    seen, cut = {}, list(staging.chunks(items))
    for chunk in cut:
        taken = sorted((chunk._starts[i], chunk._starts[i] + t.nbytes) for i, t in enumerate(chunk.there))
        assert all(a % staging.ALIGNMENT == 0 for a, _ in taken) and all(b <= c for (_, b), (c, _) in zip(taken, taken[1:]))
        assert taken[-1][1] <= chunk.size and chunk.small_written <= chunk.small <= chunk.size
        for item in chunk.items:
            first = item.state["exp_avg"].flatten()
            assert item.offset == 7 + int(first[0]) and item.grad.shape == item.param.shape == item.state["exp_avg"].shape
            seen.setdefault(id(item.state["step"]), []).extend(first.tolist())
    assert [seen[id(item.state["step"])] for item in items] == [list(range(item.grad.numel())) for item in items]
    assert any(len(chunk.items) > 1 for chunk in cut) and len(cut) > 10


# --- streams ----------------------------------------------------------------------------------------------
class LateStream:
    """A stream whose work waits in a queue until someone needs it. All streams share ``all``, so that whatever may run before, in any
    order, can be made to."""

    all: list = []

    def __init__(self):
        self.queue = []
        LateStream.all.append(self)

    def put(self, work):
        self.queue.append(work)

    def record_event(self):
        event = LateEvent()
        self.queue.append(event)
        return event

    def wait_event(self, event):
        self.queue.append(("wait", event))

    def advance(self) -> bool:
        """Does the first thing in the queue, if it may be done."""
        if not self.queue:
            return False
        first = self.queue[0]
        if isinstance(first, tuple):
            if not first[1].done:
                return False
        elif isinstance(first, LateEvent):
            first.done = True
        else:
            first()
        self.queue.pop(0)
        return True


class LateEvent:
    done = False

    def synchronize(self):
        run_until(lambda: self.done)


def run_until(done):
    """Runs streams at random, each as far as it may, until done."""
    while not done():
        assert any(s.advance() for s in random.sample(LateStream.all, len(LateStream.all))), "all streams wait for one another"


@pytest.fixture
def late(staged, monkeypatch):
    """Transports of CUDA's kind over LateStreams; the caller's stream is returned."""
    monkeypatch.setattr(LateStream, "all", [])
    random.seed(SEED)
    current = LateStream()

    class LateTransport(staging.CudaTransport):
        pinned = False

        def _stream(self):
            return LateStream()

        def _current(self):
            return current

        def _on(self, stream, work):
            stream.put(torch.no_grad()(work))

    monkeypatch.setattr(staging, "transport_of", LateTransport)
    return current


@pytest.mark.parametrize("attempt", range(6))
def test_copies_wait_for_what_they_need_and_for_nothing_else(late, attempt):
    """The caller's stream writes gradients, uses weights after the step and overwrites gradients, all of it late."""
    params, mine = weights("bf16"), weights("bf16")
    optimizer, ours = AdamW(params, states="int8", min_quantized_numel=1, seed=3), AdamW(mine, states="int8", min_quantized_numel=1, seed=3, offload=True)
    used, wanted = [], []
    for p in mine:
        p.grad = torch.full(p.shape, float("nan"), dtype=p.dtype)
    for step in range(4):
        g = torch.Generator().manual_seed(step)
        new = [torch.randn(p.shape, generator=g).to(p.dtype) for p in params]
        for p, value in zip(params, new):
            p.grad = value
        optimizer.step()
        wanted.append([p.detach().clone() for p in params])
        late.put(lambda new=new: [p.grad.copy_(value) for p, value in zip(mine, new)])
        ours.step()
        assert late.queue  # the host has not waited for the last weights
        late.put(lambda: used.append([p.detach().clone() for p in mine]))
        late.put(lambda: [p.grad.fill_(float("nan")) for p in mine])
    run_until(lambda: not late.queue)
    assert_same_bits(used, wanted)
    assert_same_bits([dict(ours.state[p]) for p in mine], [dict(optimizer.state[p]) for p in params])


@pytest.mark.parametrize("lost", ["begin", "arrived", "end", "free"])
def test_the_test_of_streams_can_fail(late, lost, monkeypatch):
    """Without one of the waits some run goes wrong."""
    made = staging.transport_of
    if lost == "begin":
        monkeypatch.setattr(made, "begin", lambda self: None)
    elif lost == "arrived":
        monkeypatch.setattr(made, "arrived", lambda self, slot, chunk: chunk.here(self._memory[slot]))
    elif lost == "end":
        monkeypatch.setattr(made, "end", lambda self: None)
    else:
        up = made.up
        monkeypatch.setattr(made, "up", lambda self, slot, chunk: (up(self, slot, chunk), self._free.__setitem__(slot, None))[0])
    with pytest.raises(AssertionError):
        for attempt in range(20):
            test_copies_wait_for_what_they_need_and_for_nothing_else(late, attempt)


# --- on a GPU ---------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_stay_on_the_cpu_and_weights_get_the_bits_of_a_step_on_the_gpu(name):
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU (torch.cuda.is_available() is false)")
    shapes = [*SHAPES, (4000, 2500), (20000,)]
    for kind, states in (("fp32", "fp32"), ("bf16", "int8"), ("int8", "int4"), (32, "int8")):
        sides = []
        for offload in (False, True):
            params = [torch.nn.Parameter(p.detach().cuda()) for p in weights(kind, shapes=shapes)]
            optimizer = getattr(optim, name)(params, states=states, seed=5, offload=offload, master_weight_bits=32 if kind == 32 else None, **OPTIMIZERS[name])
            for step in range(4):
                g = torch.Generator(device="cuda").manual_seed(step)
                for p in params:
                    p.grad = torch.randn(p.shape, generator=g, device="cuda").to(p.dtype)
                if name == "Sophia":
                    optimizer.update_hessian(samples=3)
                optimizer.step()
                for p in params:
                    p.grad = None  # its memory goes to the next ones
            assert {t.device.type for s in optimizer.state.values() for n, t in s.items()
                    if isinstance(t, torch.Tensor) and n != "step"} <= {"cpu" if offload else "cuda"}  # AdaGradNorm has none
            copied, states_now = everything(params, optimizer)
            sides.append(([p.cpu() for p in copied], {i: {k: v.cpu() for k, v in s.items()} for i, s in states_now.items()}))
        assert_same_bits(*sides, f"{kind}")


def test_nothing_but_empty_tensors_steps_nothing(staged):
    p = torch.nn.Parameter(torch.zeros(0, 5))
    p.grad = torch.zeros(0, 5)
    AdamW([p], offload=True).step()
