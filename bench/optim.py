"""optim: one step over 20 million parameters. Bound by memory: every parameter, gradient and state is read, all but the
gradient are written; nothing stays in cache between two tensors."""
from __future__ import annotations

import statistics
import time

import torch

import gradmill

from .runner import UNCOUNTED, Bench, Work, baseline, case, compiled, knowing, nbytes, ours, peer, rival

BLOCK_SCALE = 4 / 256   # bytes of scale per 8-bit code
SETTINGS = dict(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01)


def _parameters(ctx, dtype=torch.float32):
    """Nineteen layers: a 1024x1024 weight and a bias each, as a model has them, with their gradients."""
    layers, width = ctx.pick((19, 1024), (2, 128))
    params = []
    for _ in range(layers):
        for shape in ((width, width), (width,)):
            p = torch.nn.Parameter(ctx.randn(*shape, dtype=dtype))
            p.grad = ctx.randn(*shape, dtype=dtype)
            params.append(p)
    return params


def _count(ctx):
    layers, width = ctx.pick((19, 1024), (2, 128))
    return layers * (width * width + width)


def _stepper(optimizer):
    optimizer.step()   # makes the states
    return knowing(lambda i: optimizer.step(), lambda: {"state bytes": nbytes(list(optimizer.state.values()))})


def _coded(cycles: int, bytes: float) -> str:
    """Cycles of a thread for 16 parameters whose states are in L2 (csrc/cpu/optim.cpp measured them, busy), beside what their bytes take in minutes of
    fast and of slow memory."""
    return ("bound by instructions where memory is fast: decoding, the rule, the block's largest value and encoding take a thread "
            f"{cycles} cycles for 16 parameters (AVX-512), whose {bytes:.0f} bytes take {bytes * 20 / 257:.0f} to {bytes * 30 / 257:.0f}")


DRAWN = "bound by Philox: four random words for as many weights are ten rounds of 64-bit multiplies"


def _bench(ctx, what, bytes_per_parameter, entries, operations=15.0, why=""):
    n = _count(ctx)
    return Bench(f"{what}, {n / 1e6:.1f}M parameters", Work(bytes_per_parameter * n, operations * n, "update"), entries, why)


def _ours(ctx, dtype=torch.float32, name="AdamW", **options):
    return ours(lambda: _stepper(getattr(gradmill.optim, name)(_parameters(ctx, dtype), **SETTINGS, **options)))


def _torch(ctx, dtype=torch.float32, label="torch AdamW(fused=True)", **options):
    options = options or dict(fused=True)
    return (baseline if "fused" in options else rival)(label, lambda: _stepper(torch.optim.AdamW(_parameters(ctx, dtype), **SETTINGS, **options)))


def _peer(ctx, module, label, get, dtype=torch.float32, **options):
    return peer(module, label, lambda m: _stepper(get(m)(_parameters(ctx, dtype), **SETTINGS, **options)))


def _torchao(name):
    def get(_):
        import torchao.optim
        return getattr(torchao.optim, name)
    return get


def _compiled(ctx):
    def make():
        optimizer = torch.optim.AdamW(_parameters(ctx), **{**SETTINGS, "lr": torch.tensor(SETTINGS["lr"])})   # a float lr recompiles when it changes
        step = torch.compile(optimizer.step)
        step()
        return lambda i: step()
    return compiled("torch AdamW, compiled step", make)


@case("optim", goal=("torch", 1 / 1.02))
def adamw_fp32(ctx):
    return _bench(ctx, "AdamW, fp32 states", 28, [
        _ours(ctx), _torch(ctx), _torch(ctx, label="torch AdamW(foreach=True)", foreach=True), _compiled(ctx),
        _peer(ctx, "bitsandbytes", "bitsandbytes AdamW", lambda m: m.optim.AdamW)],
                  why="torch's fused step moves the same 28 bytes a parameter, and both are bound by them: ahead in one run, behind in another")


@case("optim", goal=("torch", 1 / 0.85))
def adamw_bf16_states(ctx):
    return _bench(ctx, "AdamW, bf16 states", 20, [_ours(ctx, states="bf16"), _torch(ctx, label="torch AdamW(fused=True), fp32 states")],
                  why="bound by root and division, 17 cycles for 16 parameters, and by narrowing states, in minutes when memory is fast")


@case("optim", goal=("torch", 1 / 0.72))
def adamw_int8_states(ctx):
    return _bench(ctx, "AdamW, 8-bit states", 16 + 4 * BLOCK_SCALE, [
        _ours(ctx, states="int8"), _torch(ctx, label="torch AdamW(fused=True), fp32 states"),
        _peer(ctx, "bitsandbytes", "bitsandbytes AdamW8bit", lambda m: m.optim.AdamW8bit),
        _peer(ctx, "torchao", "torchao AdamW8bit (compiled)", _torchao("AdamW8bit")),
        _peer(ctx, "flashoptim", "flashoptim FlashAdamW", lambda m: m.FlashAdamW)], why=_coded(33, 257))


@case("optim", full=True, goal=("torch", 1 / 0.72))
def adamw_int4_states(ctx):
    return _bench(ctx, "AdamW, 4-bit states", 14 + 4 * 4 / 128, [
        _ours(ctx, states="int4"), _torch(ctx, label="torch AdamW(fused=True), fp32 states"),
        _peer(ctx, "torchao", "torchao AdamW4bit (compiled)", _torchao("AdamW4bit"))], why=_coded(37, 226))


@case("optim", full=True)
def adamw_fp8_states(ctx):
    return _bench(ctx, "AdamW, FP8 states", 16 + 4 * BLOCK_SCALE, [
        _ours(ctx, states="fp8"), _torch(ctx, label="torch AdamW(fused=True), fp32 states"),
        _peer(ctx, "torchao", "torchao AdamWFp8 (compiled)", _torchao("AdamWFp8"))], why=_coded(46, 257))


@case("optim")
def adamw_bf16_weights(ctx):
    bf16 = torch.bfloat16
    return _bench(ctx, "AdamW, bf16 weights (stochastic rounding)", 14, [
        _ours(ctx, bf16, states="bf16"), _torch(ctx, bf16, "torch AdamW(fused=True), bf16, to nearest"),
        _peer(ctx, "torchao", "torchao _AdamW bf16 SR (compiled)", _torchao("_AdamW"), bf16, bf16_stochastic_round=True)], why=DRAWN)


@case("optim", full=True)
def adamw_offloaded(ctx):
    """States in CPU memory, the step on the CPU, for weights on a GPU; for weights on the CPU the same step twice."""
    bf16 = torch.bfloat16
    beside = _ours(ctx, bf16, states="int8")
    return _bench(ctx, "AdamW, bf16 weights, 8-bit states, offload=True", 10 + 4 * BLOCK_SCALE, [
        _ours(ctx, bf16, states="int8", offload=True), rival("gradmill, states beside the weights", beside.make)], why=DRAWN + "; the 8-bit states' codes besides")


@case("optim", goal=("torch", 1.0))
def adamw_many_tensors(ctx):
    """As many small tensors as a large model's norms and biases: what a step costs for each."""
    count, size = ctx.pick(10_000, 20), 64

    def make(cls, **options):
        params = [torch.nn.Parameter(x) for x in ctx.randn(count, size).unbind()]
        for p, g in zip(params, ctx.randn(count, size).unbind()):
            p.grad = g
        return _stepper(cls(params, **SETTINGS, **options))
    return Bench(f"AdamW, fp32 states, {count} tensors of {size}", UNCOUNTED, [
        ours(lambda: make(gradmill.optim.AdamW)), baseline("torch AdamW(fused=True)", lambda: make(torch.optim.AdamW, fused=True)),
        rival("torch AdamW(foreach=True)", lambda: make(torch.optim.AdamW, foreach=True))])


# --- Lion -------------------------------------------------------------------------------------------------
class TorchLion(torch.optim.Optimizer):
    """Chen et al., "Symbolic Discovery of Optimization Algorithms", in torch's multi-tensor ops."""

    def __init__(self, params, lr, betas, weight_decay):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, (beta1, beta2), lr = group["params"], group["betas"], group["lr"]
            grads = [p.grad for p in params]
            moments = [self.state[p].setdefault("exp_avg", torch.zeros_like(p)) for p in params]
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            update = torch._foreach_lerp(moments, grads, 1 - beta1)
            torch._foreach_sign_(update)
            torch._foreach_add_(params, update, alpha=-lr)
            torch._foreach_lerp_(moments, grads, 1 - beta2)


@case("optim")
def lion_int8_states(ctx):
    def make():
        return _stepper(gradmill.optim.Lion(_parameters(ctx), **SETTINGS, states="int8"))
    return _bench(ctx, "Lion, 8-bit states", 14 + 2 * BLOCK_SCALE, [
        ours(make), baseline("torch foreach ops, fp32 states", lambda: _stepper(TorchLion(_parameters(ctx), **SETTINGS))),
        _peer(ctx, "lion_pytorch", "lion-pytorch", lambda m: m.Lion), _peer(ctx, "pytorch_optimizer", "pytorch-optimizer Lion", lambda m: m.Lion),
        _peer(ctx, "bitsandbytes", "bitsandbytes Lion8bit", lambda m: m.optim.Lion8bit)], operations=8.0, why=_coded(21, 225))


# --- the other rules --------------------------------------------------------------------------------------
# Bytes per parameter with fp32 and 8-bit states: weight in and out, gradient in, every state in and out.
PYTORCH_OPTIMIZER = ("AdaBelief", "DiffGrad", "Grams")   # rules of that package's that torch has not


#: A step with fp32 states, one bare loop: what may keep it under its limit, and behind another rule's.
FLOATS = "several streams are read and written, where the limit has one; torch's fused steps, of as many bytes or fewer, are as far from it"
WHY_RULES = {"DiffGrad": "beside AdamW, the nearest that torch has: three states instead of two, 36 bytes a parameter instead of 28, and an exponential"}


def _rule(name, states, torch_name=None, **options):
    """A case for a rule with ``states`` states: fp32 and 8-bit ones, beside torch's optimizer of the rule, or its AdamW."""
    settings = {"lr": 1e-3, **options}

    def build(ctx):
        def make(**more):
            return lambda: _stepper(getattr(gradmill.optim, name)(_parameters(ctx), **settings, **more))

        def theirs():
            params = _parameters(ctx)
            return _stepper(getattr(torch.optim, torch_name)(params, fused=True, **settings) if torch_name else torch.optim.AdamW(params, fused=True))
        return _bench(ctx, name, 12 + 8 * states, [
            ours(make()), rival("gradmill, 8-bit states", make(states="int8")), baseline(f"torch {torch_name or 'AdamW'}(fused=True)", theirs),
            *([peer("pytorch_optimizer", f"pytorch-optimizer {name}", lambda m: _stepper(getattr(m, name)(_parameters(ctx), lr=1e-3)))] if name in PYTORCH_OPTIMIZER else [])],
            why=WHY_RULES.get(name, FLOATS))
    build.__name__ = name.lower()
    return case("optim")(build)


for _arguments in (("SGD", 1, "SGD"), ("Adagrad", 1, "Adagrad"), ("Adam", 2, "Adam"), ("AdaBelief", 2), ("DiffGrad", 3), ("Grams", 2), ("Sophia", 2),
                   ("CLASSP", 1)):
    _rule(*_arguments, **({"momentum": 0.9} if _arguments[0] == "SGD" else {"weight_decay": 0.01} if _arguments[0] == "Adam" else {}))


@case("optim", goal=("torch", 1.0))
def muon(ctx):
    """Fifteen products of squares, two thirds of them symmetric: 32 GFLOP, of which blocks save a quarter. torch computes in bf16
    everywhere; so does gradmill where the CPU has instructions for it, and in fp32 where it has not."""
    n = ctx.pick(1024, 64)

    def make(cls):
        p = torch.nn.Parameter(ctx.randn(n, n))
        p.grad = ctx.randn(n, n)
        return _stepper(cls([p]))
    return Bench(f"Muon, one {n} x {n}", Work(20 * n * n, 0.75 * 5 * 6 * n ** 3, "fp32"), [
        ours(lambda: make(gradmill.optim.Muon)), baseline("torch Muon", lambda: make(torch.optim.Muon))])


#: Element-wise rules, with what they need to be one; and bytes a parameter has in each state format beside weight and gradient.
RULES = {"SGD": {"momentum": 0.9}, "Lion": {}, "Adagrad": {}, "CLASSP": {}, "AdamW": {}, "AdamW amsgrad": {"amsgrad": True}, "AdaBelief": {}, "Grams": {},
         "Sophia": {}, "DiffGrad": {}, "LAMB": {}, "LARS": {}, "StableSPAM": {}}
#: Bytes besides, of rules with norms, as if nothing stayed in the cache: LAMB's update (out, in) and its weight again; LARS's and StableSPAM's norms.
BESIDES = {"LAMB": 12, "LARS": 8, "StableSPAM": 4}
STATES = ("fp32", "bf16", "fp8", "int8", "int4")


@case("optim", full=True)
def rules_by_states(ctx):
    """AdamW against a bare pass over its bytes; beside it every element-wise rule with every format of its states."""
    n = _count(ctx)

    def bare():
        x = ctx.randn(28 * n // 8)   # x.mul_ moves 8 bytes an element
        return lambda i: x.mul_(1.0000001)

    def table():
        params, pass_over = _parameters(ctx), bare()
        lines = ["ns a parameter, bytes of states a parameter, share of the bandwidth of x.mul_ that the counted bytes come to:",
                 f"{'':<14}" + "".join(f"{s:^17}" for s in STATES)]
        for label, options in RULES.items():
            cells = []
            for states in STATES:
                optimizer = getattr(gradmill.optim, label.split()[0])(params, lr=1e-6, states=states, **options)
                optimizer.step(), optimizer.step()
                mine, limit = [], []
                for _ in range(5):
                    mine.append(_timed(optimizer.step))
                    limit.append(_timed(lambda: pass_over(0)))
                size = gradmill.optim.state_nbytes(optimizer) / n
                # weight in and out, gradient in, states in and out
                share = (12 + BESIDES.get(label, 0) + 2 * size) * n / statistics.median(mine) / (28 * n / statistics.median(limit))
                cells.append(f"{statistics.median(mine) / n * 1e9:5.2f} {size:5.2f} {100 * share:3.0f}%")
            lines.append(f"{label:<14}" + "".join(f"{c:^17}" for c in cells))
        return lines
    return Bench(f"AdamW and a bare pass, {n / 1e6:.1f}M parameters", Work(28 * n, 15 * n, "update"), [
        _ours(ctx), baseline("x.mul_ over the same bytes", bare)], "coded states are bound by instructions: with AVX2 5 (SGD, Lion 6, AdamW 9) to 17 (DiffGrad) a parameter in 8 bits "
                 "where fp32 states take 1.5 to 7 (instructions.json); LAMB, LARS and StableSPAM need norms before they step; the bare pass has one stream, AdamW seven", notes=table)


def _timed(run):
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
