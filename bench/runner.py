"""The one runner: a case says what is to be timed, the runner times all of it in turns and compares.

A family file defines cases::

    @case("quant", goal=("torch", 1.0))
    def quantize_rows(ctx):
        x = ctx.rotate(lambda: ctx.randn(4096, 1024))
        return Bench("quantize ...", Work(bytes=..., ops=..., bound="copy"), [
            ours(lambda: lambda i: gradmill.ops.quantize(x(i), "int8")),
            baseline("torch expression", lambda: lambda i: ...),
            peer("bitsandbytes", "quantize_blockwise", lambda bnb: lambda i: ...)])

Calling a case allocates nothing: an entry's ``make`` does, once, and returns what is timed, ``run(i)``, where i counts
calls so that inputs can rotate. An operation whose cost is a mixture returns {name: (weight, run)}: its time is the
weighted sum. A run that knows more than its time says so in ``run.facts()``, called once after the timing
(:func:`knowing`): {what: number}; bytes where the name ends so.
"""
from __future__ import annotations

import functools
import gc
import importlib
import math
import os
import statistics
import time
from dataclasses import dataclass, field
from typing import Callable

import torch

from . import limits as machine
from .peers import PATIENCE, explain, quiet, within

FAMILIES = ("quant", "matmul", "conv", "optim", "projection", "binary", "codebook", "overhead", "training", "scaling")
LATER = "torch, seconds more"   # a goal's kind: an allowance on top of torch's time
DISTURBED = 0.05  # share of the processors that others may have during a job
SAMPLE = 0.002  # seconds: a shorter call is timed several times in a row


# --- what a case is made of -------------------------------------------------------------------------------
@dataclass(frozen=True)
class Work:
    """What gradmill's way of doing the job costs at the least. bound names the limit (limits.MEANING) that it can reach
    at best: with a bandwidth, bytes / limit is the shortest possible time; with an arithmetic peak, ops / limit."""

    bytes: float
    ops: float
    bound: str

    @property
    def amount(self) -> float:
        """What the limit counts."""
        return self.bytes if machine.MEANING[self.bound][0] == "B/s" else self.ops


#: The work of jobs that no limit binds: call overhead, whole training steps.
UNCOUNTED = Work(0.0, 0.0, "")


@dataclass(frozen=True)
class Entry:
    kind: str               # "ours", "torch" (the baseline ratios are taken to) or "peer"
    label: str
    make: Callable          # () -> run(i) or {name: (weight, run)}; a peer's is called with its module
    module: str | None = None
    full: bool = False      # in full runs only, because it takes long to make ready


def ours(make, label="gradmill") -> Entry:
    return Entry("ours", label, make)


def baseline(label, make) -> Entry:
    return Entry("torch", label, make)


def rival(label, make) -> Entry:
    """Another way to do it in torch, shown beside the baseline."""
    return Entry("peer", label, make)


def peer(module, label, make, full=False) -> Entry:
    """An optional package's way: left out with the reason where it cannot be imported or does not run."""
    return Entry("peer", label, make, module, full)


def compiled(label, make) -> Entry:
    """A way under torch.compile: in full runs only, because a compilation takes longer than the quick runs' timing."""
    return Entry("peer", label, make, full=True)


def knowing(run: Callable, facts: Callable[[], dict]) -> Callable:
    """``run`` with what it can say of itself after the timing."""
    run.facts = facts
    return run


@dataclass
class Bench:
    title: str
    work: Work
    entries: list[Entry]
    why: str = ""         # what keeps it under 70% of its limit, or behind torch or a peer, where something does: a test asks for it
    notes: Callable[[], list[str]] = lambda: []   # said under the table, after the timing
    point: tuple[str, str, float] | None = None   # (series, what varies, its value): where this job stands in a scaling plot
    per_call: tuple[float, str] | None = None     # (1024, "tokens"): what a call gets done, for rates
    threads: int | None = None                    # of this job, where it is not the run's


@dataclass(frozen=True)
class Case:
    family: str
    name: str
    build: Callable[["Context"], Bench]
    goal: tuple[str, float] | None   # ("torch", 1.1): on CPU at least 1.1 times as fast as torch's entry; (LATER, 1e-5): at most 10 us later
    full: bool                       # measured in full runs, or when asked for by name


CASES: dict[str, Case] = {}


def case(family: str, goal: tuple[str, float] | None = None, full: bool = False, name: str = ""):
    def register(build):
        CASES[f"{family}.{name or build.__name__}"] = Case(family, name or build.__name__, build, goal, full)
        return build
    return register


def load(families=FAMILIES) -> list[Case]:
    """The cases of ``families``, in their files' order."""
    for family in families:
        importlib.import_module(f".{family}", __package__)
    return [c for c in CASES.values() if c.family in families]


class Context:
    """What cases are built with: device, sizes, reproducible inputs."""

    def __init__(self, device: str = "cpu", tiny: bool = False, full: bool = False):
        import gradmill
        self.device, self.tiny, self.full = device, tiny, full
        self.isa = gradmill._C.isa() if gradmill._C else "none"
        self.cache_bytes = machine.cache_bytes()
        self._generator = torch.Generator().manual_seed(0)

    def pick(self, size, tiny):
        """``size``, or ``tiny`` under --tiny, which only shows that everything runs."""
        return tiny if self.tiny else size

    def randn(self, *shape, dtype=torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator).to(self.device, dtype)

    def once(self, make: Callable[[], object]) -> Callable[[], object]:
        """() -> what make() gave the first time it was needed."""
        return functools.cache(make)

    def rotate(self, make: Callable) -> Callable[[int], object]:
        """i -> one of several inputs, together larger than the cache, for inputs that a user's call would find in memory.
        On CUDA one, because the timer flushes L2."""
        @functools.cache
        def ring():
            first = make()
            size = max(nbytes(first), 1)
            count = 1 if self.device == "cuda" or self.tiny else min(max(1, math.ceil(2 * self.cache_bytes / size)), 64)
            return [first, *(make() for _ in range(count - 1))]

        def at(i):
            inputs = ring()
            return inputs[i % len(inputs)]
        return at


def nbytes(x) -> int:
    """Bytes that tensors hold, in lists and dicts and as parts of a wrapper (gradmill's or torchao's) too."""
    if isinstance(x, torch.Tensor):
        if hasattr(x, "__tensor_flatten__"):
            return sum(nbytes(getattr(x, name)) for name in x.__tensor_flatten__()[0])
        return x.numel() * x.element_size()
    if isinstance(x, dict):
        x = list(x.values())
    return sum(map(nbytes, x)) if isinstance(x, (tuple, list)) else 0


# --- timing -----------------------------------------------------------------------------------------------
class CpuTimer:
    settle = True  # one untimed call first: another library's threads and pages have just been at work

    def sample(self, run, start: int, inner: int) -> float:
        begin = time.perf_counter()
        for i in range(start, start + inner):
            run(i)
        return (time.perf_counter() - begin) / inner


class CudaTimer:
    """Events around each call, L2 overwritten before it; the overwriting also hides the launch of what follows."""

    settle = False

    def __init__(self):
        self.flush = torch.empty(max(256 << 20, 4 * torch.cuda.get_device_properties(0).L2_cache_size), dtype=torch.int8, device="cuda")

    def sample(self, run, start: int, inner: int) -> float:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(inner)]
        for i, (begin, end) in enumerate(events, start):
            self.flush.zero_()
            begin.record()
            run(i)
            end.record()
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1000


def timer(device: str):
    return CudaTimer() if device == "cuda" else CpuTimer()


# --- results ----------------------------------------------------------------------------------------------
@dataclass
class Timed:
    """One entry's samples; by_round keeps which round each came from, so that ratios pair neighbours in time."""

    kind: str
    label: str
    by_round: dict[int, float] = field(default_factory=dict)
    parts: dict[str, list[float]] = field(default_factory=dict)
    reason: str = ""      # why it was not timed
    ratio: tuple[float, float, float] | None = None   # its time / ours: median and quartiles
    tie: bool = False
    of_limit: float | None = None
    facts: dict[str, float] = field(default_factory=dict)   # of knowing()

    @property
    def median(self) -> float:
        return statistics.median(self.by_round.values())

    @property
    def quartiles(self) -> tuple[float, float]:
        return quartiles(list(self.by_round.values()))


@dataclass
class Result:
    case: Case
    title: str
    work: Work
    entries: list[Timed]
    notes: list[str]
    goal: tuple[str, float] | None
    others: float | None = None   # share of the processors that other processes had meanwhile
    point: tuple[str, str, float] | None = None
    per_call: tuple[float, str] | None = None

    @property
    def disturbed(self) -> bool:
        return self.others is not None and self.others > DISTURBED

    def find(self, kind: str) -> list[Timed]:
        return [e for e in self.entries if e.kind == kind and not e.reason]

    @property
    def ours(self) -> Timed | None:
        return next(iter(self.find("ours")), None)

    @property
    def torch(self) -> Timed | None:
        return next(iter(self.find("torch")), None)

    @property
    def best_peer(self) -> Timed | None:
        return min((e for e in self.find("peer") if not e.label.startswith("gradmill")), key=lambda e: e.median, default=None)

    @property
    def failed(self) -> str:
        """Why gradmill's own entry did not run, or ""."""
        return next((e.reason for e in self.entries if e.kind == "ours" and e.reason), "")

    @property
    def goal_said(self) -> str:
        """"met", "MISSED", "unclear" where the spread is wider than the distance to the goal or other work disturbed the
        timing, "" where there is nothing to say. No slower than torch (a goal of 1) is met by a tie within 3%."""
        if self.disturbed and self.goal is not None:
            return "unclear"
        if self.goal is None or self.ours is None or self.torch is None:
            return ""
        (middle, low, high), want = self.torch.ratio, self.goal[1]
        if self.goal[0] == LATER:
            return "met" if self.ours.median - self.torch.median <= want else "MISSED"
        if want == 1.0 and self.torch.tie and middle >= 0.97 and high / low < 1.1:
            return "met"
        if math.log(high / low) > abs(math.log(middle / want)):
            return "unclear"
        return "met" if middle >= want else "MISSED"


def quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def compare(mine: Timed, other: Timed):
    """Sets other.ratio and other.tie from the rounds that both were in."""
    logs = [math.log(other.by_round[r] / mine.by_round[r]) for r in other.by_round if r in mine.by_round]
    low, high = quartiles(logs)
    middle = statistics.median(logs)
    other.ratio = math.exp(middle), math.exp(low), math.exp(high)
    other.tie = high - low > abs(middle)  # the spread is wider than the difference


# --- the run ----------------------------------------------------------------------------------------------
def build(entry: Entry) -> dict[str, tuple[float, Callable]]:
    """{part: (weight, run)} of an entry, warmed up; raises with the reason where it cannot run."""
    with quiet(), within(2 * PATIENCE):
        made = entry.make(importlib.import_module(entry.module)) if entry.module else entry.make()
        parts = made if isinstance(made, dict) else {"": (1.0, made)}
        for _, run in parts.values():
            run(0)
    return parts


def entry_parts(bench: Bench, peers: bool, full: bool):
    """Yields (entry, parts or None, reason) for all entries of a case."""
    for entry in bench.entries:
        if entry.module and not peers:
            continue
        if entry.full and not full:
            yield entry, None, "it takes long to make ready: --full"
            continue
        try:
            yield entry, build(entry), ""
        except Exception as error:
            yield entry, None, explain(error)


def plan(parts, clock, device: str):
    """[(name, weight, run, calls in a row, an untimed call first?)] and what a round of them costs."""
    once = {name: clock.sample(run, 1, 1) for name, (_, run) in parts.items()}
    # Long enough for the clock; in a mixture a tenth of the slow part, so that the rest is not one call.
    least = max(SAMPLE, 0.1 * max(once.values()) if len(once) > 1 else 0)
    rows = [(name, weight, run, 5 if device == "cuda" else max(1, min(200, math.ceil(least / max(once[name], 1e-7)))), clock.settle and once[name] < 0.02)
            for name, (weight, run) in parts.items()]
    return rows, sum(clock.sample(run, 2, 1) * (inner + settle) for _, _, run, inner, settle in rows)


def measure(the_case: Case, ctx: Context, clock, *, seconds: float, rounds: int, peers: bool = True) -> Result:
    """Times a case's entries in turns for about ``seconds`` (longer where ``rounds`` turns of the slow ones take longer).
    What fails, even half-way, is an entry with its reason; a case that cannot be built is one such entry."""
    goal = the_case.goal if ctx.device == "cpu" else None
    threads = torch.get_num_threads()
    try:
        bench = the_case.build(ctx)
        if bench.threads:
            torch.set_num_threads(bench.threads)
        entries, live = [], []
        for entry, parts, reason in entry_parts(bench, peers, ctx.full):
            timed = Timed(entry.kind, entry.label, reason=reason)
            entries.append(timed)
            if parts is not None:
                try:
                    live.append((timed, *plan(parts, clock, ctx.device)))
                    timed.parts.update((name, []) for name in parts)
                except Exception as error:
                    timed.reason = explain(error)
        watch = machine.OtherWork()
        if live:
            _take_turns(live, clock, seconds, rounds)
        others = watch.share()
        live = [job for job in live if not job[0].reason]
        for timed, rows, _ in live:
            timed.facts = {k: v for _, _, run, *_ in rows for k, v in getattr(run, "facts", dict)().items()}
        mine = next((t for t, *_ in live if t.kind == "ours"), None)
        if mine is not None:
            for timed, *_ in live:
                if timed is not mine:
                    compare(mine, timed)
        return Result(the_case, bench.title, bench.work, entries, [] if mine is None else [*filter(None, [bench.why]), *bench.notes()], goal, others, bench.point, bench.per_call)
    except Exception as error:
        return Result(the_case, the_case.name, UNCOUNTED, [Timed("ours", "gradmill", reason=explain(error))], [], goal)
    finally:
        torch.set_num_threads(threads)


def _take_turns(live, clock, seconds: float, rounds: int):
    """Rounds of one sample each. An entry too slow for that takes part in ``rounds`` of them, evenly spread."""
    share = seconds / len(live)
    cap = share / rounds
    total = max(rounds, min(200, int(seconds / sum(min(cost, cap) for *_, cost in live))))
    wanted = [total if cost <= cap or timed.kind == "ours" else min(total, max(rounds, int(share / cost))) for timed, _, cost in live]
    counter = 3
    gc.collect()
    gc.disable()
    try:
        for r in range(total):
            for (timed, rows, _), want in zip(live, wanted):
                if timed.reason or (r + 1) * want // total == r * want // total:
                    continue
                value = 0.0
                try:
                    for name, weight, run, inner, settle in rows:
                        if settle:
                            run(counter)
                            counter += 1
                        one = clock.sample(run, counter, inner)
                        counter += inner
                        timed.parts[name].append(one)
                        value += weight * one
                    timed.by_round[r] = value
                except Exception as error:
                    timed.reason = explain(error)
    finally:
        gc.enable()


def score(result: Result, limits: dict[str, float]):
    """Sets of_limit: gradmill's counted work per second as a fraction of the measured limit."""
    limit = limits.get(result.work.bound)   # none for UNCOUNTED
    for timed in result.find("ours")[:1]:
        timed.of_limit = result.work.amount / timed.median / limit if limit else None


def pin(threads: int):
    """torch's threads, and the processors any other library's threads may use."""
    torch.set_num_threads(threads)
    if hasattr(os, "sched_setaffinity"):
        available = sorted(os.sched_getaffinity(0))
        if threads < len(available):
            os.sched_setaffinity(0, available[:threads])
