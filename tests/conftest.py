"""What the tests share: instruction sets and backends to run in, awkward inputs, comparison of bits.

A run repeats the one before: every test draws its inputs from its own name and one seed, which the header prints. GRADMILL_TEST_SEED=fresh draws
other inputs, GRADMILL_TEST_SEED=<number> those of that seed; a test that fails then has found a defect, in the package or in the test.
"""
import contextlib
import os
import random
import re
import zlib
from pathlib import Path

import hypothesis
import pytest
import torch

import gradmill
from gradmill import _C
from gradmill.formats import CODES, Format
from gradmill.optim.rules import RULES

ROOT = Path(__file__).resolve().parent.parent
REPEATED = "GRADMILL_TEST_SEED" not in os.environ
if os.environ.get("GRADMILL_TEST_SEED") == "fresh":
    os.environ["GRADMILL_TEST_SEED"] = str(random.SystemRandom().randrange(2 ** 31))  # xdist's workers inherit it
SEED = int(os.environ.get("GRADMILL_TEST_SEED", "0"))

hypothesis.settings.register_profile("gradmill", deadline=None, max_examples=25, print_blob=True, derandomize=REPEATED,
                                     suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("gradmill")

_NAMES = ("portable", "avx2", "avx512", "avx512_vnni")
#: Instruction sets this processor has, lowest first.
LEVELS = _NAMES[:_NAMES.index(_C.detected_isa()) + 1] if _C else ()
#: What quantize makes.
BLOCKED = tuple(code for code in CODES if Format(code).blocked and code != "sign")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def fit(code: str, block: int) -> int:
    """The nearest block length from ``block`` up that the code can have."""
    block += -block % Format(code).multiple
    return min(block or 256, 256) if code == "int4_outlier" else block


#: What the scalars of every rule are made from. CLASSP's power is one that needs the polynomials.
HYPERPARAMETERS = dict(betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1, momentum=0.9, dampening=0.25, nesterov=True, lr_decay=0.1, weight_decouple=False,
                       rectify=True, degenerated_to_sgd=True, rho=0.04, samples=4, threshold=0.5, power=1.7, adam_step=2, limit=0.5,
                       share=0.3, scale=0.7)


def scalars_of(rule, step=3, lr=0.01, factor=1.0, **changes):
    """A row of fused_step's scalars."""
    h = [factor, *RULES[rule].scalars({**HYPERPARAMETERS, **changes}, step, lr)]
    return torch.tensor([h + [0.0] * (16 - len(h))])


FLT_MAX = torch.finfo(torch.float32).max
#: nan, infinities, both zeros, denormals, the smallest normal number, the largest, ties.
SPECIAL = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.4e-45, -1e-40, 1.1754944e-38, FLT_MAX, -FLT_MAX, 1.0, -1.0, 0.5, 1.5,
           -2.5, 3e-8)


def pytest_report_header(config):
    return f"gradmill: {', '.join(LEVELS)}; GRADMILL_TEST_SEED={SEED}"


@pytest.fixture(autouse=True)
def fresh_but_repeatable(request):
    """Seeds torch per test; afterwards instruction set and threads are as they were.

    One thread, unless a test says otherwise: on a busy machine torch's small operations wait 20 ms for a second one."""
    torch.manual_seed(SEED ^ zlib.crc32(request.node.nodeid.encode()))
    level, threads = _C.isa(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    _C.set_isa(level)
    torch.set_num_threads(threads)


@contextlib.contextmanager
def isa(level):
    before = _C.isa()
    assert _C.set_isa(level) == level
    try:
        yield
    finally:
        _C.set_isa(before)


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def running(variant):
    """Runs ops in one variant: an instruction set of the native backend, or another backend's name."""
    if variant in _NAMES:
        with isa(variant), gradmill.use_backend("native"):
            yield
    else:
        with gradmill.use_backend(variant):
            yield


@pytest.fixture
def run_page(tmp_path, monkeypatch):
    """run_page("docs/bct.md"): that page's Python blocks as they stand, one after the other, in an empty folder. Gives the names after each."""
    def run(page):
        monkeypatch.chdir(tmp_path)
        names, after = {"__name__": "__main__"}, []
        for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S):
            code = compile(block, page, "exec")
            if 'device="cuda"' not in block or torch.cuda.is_available():
                exec(code, names)
            after.append(dict(names))
        return after
    return run


@pytest.fixture(params=LEVELS)
def level(request):
    """Each instruction set in turn, native backend."""
    with running(request.param):
        yield request.param


def reference(op, *args, **kwargs):
    """What the reference backend gives."""
    with gradmill.use_backend("reference"):
        return op(*args, **kwargs)


def assert_native_is_reference(op, *args, what=""):
    """The native backend's result, at every instruction set, has the reference's bits."""
    want = reference(op, *args)
    for level in LEVELS:
        with running(level):
            assert_same_bits(op(*args), want, f"{level} {what}")
    return want


# --- comparison -------------------------------------------------------------------------------------------
def bits(x):
    """x as integers, every nan the same."""
    if not x.dtype.is_floating_point:
        return x
    x = torch.where(x.isnan(), torch.full_like(x, float("nan")), x)
    return x.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_same_bits(got, want, what=""):
    """Same type, shape and bits, in tensors or (nested) tuples, lists and dicts of them. Any two nans are the same."""
    if isinstance(want, dict):
        assert got.keys() == want.keys(), what
        for k in want:
            assert_same_bits(got[k], want[k], f"{what}[{k!r}]")
        return
    if isinstance(want, (tuple, list)):
        assert len(got) == len(want), what
        for i, (a, b) in enumerate(zip(got, want)):
            assert_same_bits(a, b, f"{what}[{i}]")
        return
    if not isinstance(want, torch.Tensor):
        assert got == want, what
        return
    if isinstance(want, gradmill.QuantizedWeight):
        assert_same_bits((got.codes, got.scales, got.zeros), (want.codes, want.scales, want.zeros), what)
        return
    assert got.dtype == want.dtype and got.shape == want.shape, f"{what}: {got.dtype} {tuple(got.shape)} is not {want.dtype} {tuple(want.shape)}"
    differ = (bits(got.detach()) != bits(want.detach())).flatten().nonzero()
    if len(differ):
        i = int(differ[0])
        raise AssertionError(f"{what}: {len(differ)} of {want.numel()} differ, first at {i}: {got.flatten()[i].item()!r} is not "
                             f"{want.flatten()[i].item()!r}")


# --- inputs -----------------------------------------------------------------------------------------------
def wild(rows, columns, dtype=torch.float32, generator=None):
    """Normal numbers whose rows and columns differ in magnitude by a few powers of ten."""
    x = torch.randn(rows, columns, generator=generator)
    x = x * 10 ** (2 * torch.randn(rows, 1, generator=generator)) * 10 ** torch.randn(1, columns, generator=generator)
    return x.to(dtype)


def layouts(x):
    """(name, view): tensors with x's values, in other layouts."""
    rows, columns = x.shape
    odd = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(rows, columns)
    odd.copy_(x)
    wide = torch.full((rows, columns + 3), float("nan"), dtype=x.dtype)
    wide[:, 2:2 + columns] = x
    sparse = torch.full((2 * rows, 3 * columns), float("nan"), dtype=x.dtype)
    sparse[::2, ::3] = x
    yield "contiguous", x.contiguous()
    yield "misaligned", odd
    yield "transposed", x.t().contiguous().t()
    yield "padded rows", wide[:, 2:2 + columns]
    yield "strided", sparse[::2, ::3]


def misaligned(x):
    """x as a contiguous tensor whose first byte lies off every alignment but its own."""
    out = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    out.copy_(x)
    return out


def key(seed=0, step=0):
    return torch.tensor([seed, step], dtype=torch.int64)


# --- optimizers -------------------------------------------------------------------------------------------
def parameters(generator_seed=0):
    g = torch.Generator().manual_seed(generator_seed)
    shapes = [(70, 130), (70,), (8, 3, 3, 3), (1,), (), (0,), (3, 0)]
    return [torch.nn.Parameter(torch.randn(s, generator=g)) for s in shapes]


def assert_follows_torch(ours, theirs, params, other, steps=25, between=lambda step: None, gradient=None, update=1.0, coupled=False):
    """Step by step. Both compute in fp32 with a few differently rounded operations. A first moment of gradients up to G is
    off by 2^-23 G a step, and so, over the root of a second moment that remembers them (at least 1/32 G), an update of lr
    by 2^-18 lr; a weight is rounded by 2^-24 of itself a step. A second moment has no cancellation: relative error, unless
    the gradient itself is a sum, with a decay in it.
    ``update``: how large an update is, in units of lr, where it is not the ratio of two moments."""
    largest = 1.0
    for step in range(1, steps + 1):
        for p, q in zip(params, other):
            g = torch.randn(p.shape) if gradient is None else gradient(p)
            largest = max(largest, 0 if g is None or not g.numel() else float(g.abs().max()))
            p.grad, q.grad = (None, None) if g is None else (g.clone(), g.clone())
        ours.step()
        theirs.step()
        between(step)
        lr = max(float(g["lr"]) for g in theirs.param_groups)
        for p, q in zip(params, other):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=step * 2.0 ** -23, atol=step * lr * update * 2.0 ** -18 + step * 2.0 ** -24)
            for name, value in theirs.state[q].items():
                size = largest if name in ("exp_avg", "momentum_buffer") else largest ** 2 if coupled else 0
                torch.testing.assert_close(ours.state[p][name], value, rtol=step * 2.0 ** -22, atol=step * 2.0 ** -23 * size)
