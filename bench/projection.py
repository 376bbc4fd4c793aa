"""projection: the parts of a Q-GaLore step and the step itself, its refresh amortised."""
from __future__ import annotations

import copy
import math

import torch

import gradmill
from gradmill import ops
from gradmill.optim.projection import Projection, dct_vectors, find_basis
from gradmill.weight import QuantizedWeight

from .peers import GALORE_QUANTISED
from .quant import torch_zero_point
from .runner import Bench, Work, baseline, case, ours, peer, rival

SIDE, RANK, GROUP, EVERY = 1024, 128, 256, 200


def _sizes(ctx):
    return ctx.pick((SIDE, RANK, GROUP), (256, 32, 64))


def _decaying(ctx, rows, side, seed):
    """A gradient as training has them: singular values falling as 1/i over a floor of noise. Equal seeds give equal
    leading spaces with other noise: successive steps."""
    g = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(n, side, generator=g)).Q for n in (rows, side))
    signal = u * (1 / torch.arange(1, side + 1)) @ v.t()
    return (signal + torch.randn(rows, side, generator=ctx._generator) * (0.02 / side ** 0.5)).to(ctx.device)


def _packed_basis(ctx, side, rank, group):
    """() -> (a random orthonormal basis, the same packed)."""
    def make():
        basis = torch.linalg.qr(ctx.randn(side, rank)).Q.t().contiguous()
        return basis, ops.quantize(basis, "uint4", group)
    return ctx.once(make)


def _in_bytes(basis, group):
    """INT4 as the paper's code keeps it: a byte per value; and its dequantised fp32."""
    codes, scale, zero = torch_zero_point(basis, group, 15)
    return lambda: codes.to(torch.float32).sub_(zero).mul_(scale).view(basis.shape)


#: Of a product of which one side is the rank.
NARROW = "an element of the large matrix is read, and packed or written, for 128 multiply-adds: torch's fp32 product of this shape reaches two thirds of the limit"


# --- project and back -------------------------------------------------------------------------------------
@case("projection")
def project(ctx):
    side, rank, group = _sizes(ctx)
    bases = _packed_basis(ctx, side, rank, group)
    grad = ctx.rotate(lambda: ctx.randn(side, side))

    def make_ours():
        _, packed = bases()
        return lambda i: ops.project(grad(i), *packed, "uint4", group, False)

    def make_torch():
        basis, _ = bases()
        return lambda i: grad(i) @ basis.t()

    def make_in_bytes():
        unpack = _in_bytes(bases()[0], group)
        return lambda i: grad(i) @ unpack().t()
    work = Work(4.0 * side * (side + rank) + side * rank / 2, 2.0 * side * side * rank, "fp32")
    return Bench(f"project {side}x{side} to rank {rank}, INT4 basis", work, [
        ours(make_ours), baseline("torch matmul, fp32 basis", make_torch), rival("torch, INT4 in bytes dequantised", make_in_bytes)], NARROW)


@case("projection")
def project_back(ctx):
    side, rank, group = _sizes(ctx)
    bases, update = _packed_basis(ctx, side, rank, group), ctx.once(lambda: ctx.randn(side, rank))
    weight = ctx.rotate(lambda: ctx.randn(side, side))

    def make_ours():
        (_, packed), r = bases(), update()
        scalars, key = torch.tensor([0.999, -1e-4]), torch.tensor([1, 2], dtype=torch.int64)
        return lambda i: ops.project_back(weight(i), None, None, "fp32", 0, side, r, *packed, "uint4", group, False, scalars, key, 0)

    def make_torch():
        (basis, _), r = bases(), update()
        return lambda i: weight(i).addmm_(r, basis, beta=0.999, alpha=-1e-4)

    def make_in_bytes():
        unpack, r = _in_bytes(bases()[0], group), update()
        return lambda i: weight(i).addmm_(r, unpack(), beta=0.999, alpha=-1e-4)
    work = Work(8.0 * side * side + 4.0 * side * rank, 2.0 * side * side * rank, "fp32")
    return Bench(f"project back into a {side}x{side} fp32 weight, rank {rank}", work, [
        ours(make_ours), baseline("torch addmm_, fp32 basis", make_torch), rival("torch, INT4 in bytes dequantised", make_in_bytes)], NARROW)


@case("projection", goal=("torch", 15))
def refresh(ctx):
    rows, side, rank = ctx.pick((4 * SIDE, SIDE, RANK), (512, 256, 32))
    key = torch.tensor([1, 2], dtype=torch.int64)
    grad = ctx.once(lambda: _decaying(ctx, rows, side, 1))
    previous = ctx.once(lambda: ops.subspace_basis(_decaying(ctx, rows, side, 1), None, rank, 2, False, key, 0))

    def from_last():
        return ops.subspace_basis(grad(), previous(), rank, 1, False, key, 0)

    def from_random():
        return ops.subspace_basis(grad(), None, rank, 2, False, key, 0)

    def svd():
        return torch.linalg.svd(grad(), full_matrices=False)[2][:rank]

    def lowrank():
        return torch.svd_lowrank(grad(), q=rank, niter=2)[2].t()

    def energy(basis):
        return float((grad() @ basis.t()).square().sum() / grad().square().sum())

    def notes():
        best = energy(svd())
        shown = {"before the refresh": previous(), "after it": from_last(), "from random": from_random(), "svd_lowrank": lowrank()}
        return [f"energy of the gradient in the basis: linalg.svd (the most possible) {best:.4f}, of that "
                + ", ".join(f"{name} {energy(basis) / best:.4f}" for name, basis in shown.items())]
    # Two products with G, and Cholesky-QR twice: a Gram matrix and a triangular solve each.
    work = Work(4.0 * rows * (2 * side + 4 * rank), 4.0 * rows * side * rank + 2 * 3.0 * side * rank * rank, "fp32")
    return Bench(f"subspace refresh {rows}x{side}, rank {rank}, from the last basis", work, [
        ours(lambda: lambda i: from_last()), ours(lambda: lambda i: from_random(), "gradmill, first basis (random start)"),
        baseline("torch.linalg.svd", lambda: lambda i: svd()), rival("torch.svd_lowrank(niter=2)", lambda: lambda i: lowrank())],
        "three quarters of one thread's time are the two products with G; the small solves and products of Cholesky-QR do not share well between threads", notes)


@case("projection", goal=("torch", 20))
def dct_columns(ctx):
    """The columns of the DCT matrix with the largest norms, by a fast transform, and R in them."""
    rows, side, rank = ctx.pick((4096, 1024, 128), (256, 128, 32))
    grad, projection = ctx.rotate(lambda: ctx.randn(rows, side)), Projection(rank, "dct")
    matrix = ctx.once(lambda: dct_vectors(torch.arange(side), side).t().contiguous())

    def by_matmul(i):
        transformed = grad(i) @ matrix()
        return transformed.index_select(1, transformed.abs().sum(0).topk(rank).indices)
    work = Work(4.0 * rows * (2 * side + rank), 2.5 * rows * side * math.log2(side), "fp32")
    return Bench(f"DCT columns of {rows}x{side}, rank {rank}", work, [
        ours(lambda: lambda i: find_basis(projection, grad(i), False, rank, None, 0, 1, 0)),
        baseline("torch.linalg.svd", lambda: lambda i: torch.linalg.svd(grad(i), full_matrices=False)[2][:rank]),
        rival("torch matmul with the DCT matrix", lambda: by_matmul)],
                 "counted are the transform's operations; it and its norms read and write the gradient's 16 MB five times, new pages each time: bound by memory")


@case("projection", goal=("torch", 1 / 1.5))
def galore_step(ctx):
    """GaLoreAdamW's step between refreshes, INT4 basis, against the two products that it cannot do without."""
    rows, side, rank = ctx.pick((1024, 4096, 128), (128, 256, 32))
    grad = ctx.rotate(lambda: ctx.randn(rows, side))

    def make_ours(cls, **options):
        def make():
            p = torch.nn.Parameter(ctx.randn(rows, side))
            optimizer = cls([p], lr=1e-3, **{"rank": rank, **options})
            p.grad = grad(0)
            optimizer.step()

            def run(i):
                p.grad = grad(i)
                optimizer.state[p]["next_refresh"] = 1 << 60
                optimizer.step()
            return run
        return make

    def pair():
        basis = torch.linalg.qr(ctx.randn(rows, rank)).Q
        return lambda i: basis @ (basis.t() @ grad(i))
    work = Work(4.0 * rows * side * 3 + 8.0 * rank * side, 4.0 * rows * side * rank, "fp32")
    optim = gradmill.optim
    return Bench(f"GaLore step {rows}x{side}, rank {rank}, between refreshes", work, [
        ours(make_ours(optim.GaLoreAdamW, basis="subspace", bits=4)), ours(make_ours(optim.FiraAdamW), "gradmill, Fira"),
        ours(make_ours(optim.FrugalAdamW, rank=0.25), "gradmill, FRUGAL on coordinates"), baseline("two fp32 products, no step", pair)],
        "besides the products it packs G for the first, decodes the basis for both and steps R and W")


# --- Q-GaLore ---------------------------------------------------------------------------------------------
class TorchQGaLore:
    """Q-GaLore's step in plain torch, for one weight whose columns are projected.

    Zhang et al., "Q-GaLore": the basis in INT4 codes with a zero point, a byte per value, dequantised at each use, from
    torch.linalg.svd of the gradient; AdamW on the projected gradient, two 8-bit states; an INT8 weight with a zero point,
    dequantised, updated and rounded stochastically. The passes over memory are those of the official code, which clones what it
    will overwrite, dequantises the basis for each product and looks for nan; its dynamic 8-bit map is the cheaper linear one here.
    """

    def __init__(self, weight, rank, group):
        self.rank, self.group, self.t = rank, group, 0
        self.lr, self.beta1, self.beta2, self.eps, self.scale = 1e-3, 0.9, 0.95, 1e-8, 0.25
        self.weight = torch_zero_point(weight, group, 255)
        self.moments = [self.store(torch.zeros(weight.shape[0], rank, device=weight.device), signed) for signed in (True, False)]

    def store(self, x, signed):
        blocks = x.view(-1, min(256, x.numel()))
        scale = (blocks.abs().amax(1, keepdim=True) if signed else blocks.amax(1, keepdim=True)).clamp_(min=1e-30) / (127 if signed else 255)
        return (blocks / scale).round_().to(torch.int8 if signed else torch.uint8), scale

    def refresh(self, grad):
        self.set_basis(torch.linalg.svd(grad, full_matrices=False)[2][:self.rank].contiguous())

    def set_basis(self, basis):
        self.basis = torch_zero_point(basis, self.group, 15)

    def float_basis(self):
        codes, scale, zero = self.basis
        return (scale * (codes.to(torch.float32) - zero)).view(self.rank, -1)

    def direction(self, r):
        """What AdamW would take from the weight in the projected space, negative; its moments updated."""
        self.t += 1
        m, v = (codes.to(torch.float32).mul_(scale).view(r.shape) for codes, scale in self.moments)
        m.lerp_(r, 1 - self.beta1)
        v.mul_(self.beta2).addcmul_(r, r, value=1 - self.beta2)
        denominator = v.sqrt().mul_((1 - self.beta2 ** self.t) ** -0.5).add_(self.eps)
        self.moments = [self.store(m, True), self.store(v, False)]
        return (m / denominator).mul_(-self.lr / (1 - self.beta1 ** self.t))

    def step(self, grad):
        codes, scale, zero = self.weight
        w = (scale * (codes.to(torch.float32) - zero)).clone()
        r = grad @ self.float_basis().t()
        saved = w.clone()
        saved.view(grad.shape).add_(self.direction(r) @ self.float_basis() * self.scale)
        w = saved.clone()
        high, low = w.amax(-1, keepdim=True), w.amin(-1, keepdim=True)
        scale = (high - low).clamp(min=1e-5) / 255
        zero = (-torch.round(low / scale)).clamp_(0, 255)
        assert torch.isnan(scale).sum() == 0 and torch.isnan(w).sum() == 0
        codes = w / scale
        down = codes.floor()
        codes = torch.where(torch.rand_like(codes) < codes - down, codes.ceil(), down)
        self.weight = torch.clamp(codes + zero, 0, 255).to(torch.uint8), scale, zero


class LeanTorchQGaLore(TorchQGaLore):
    """The same with no copy that plain torch can do without: in place, the basis dequantised once a step."""

    def step(self, grad):
        codes, scale, zero = self.basis
        basis = codes.to(torch.float32).sub_(zero).mul_(scale).view(self.rank, -1)
        update = self.direction(grad @ basis.t()).mul_(self.scale)
        codes, scale, zero = self.weight
        w = codes.to(torch.float32).sub_(zero).mul_(scale)
        w.view(grad.shape).addmm_(update, basis)
        low, high = w.amin(-1, keepdim=True).clamp_(max=0), w.amax(-1, keepdim=True).clamp_(min=0)
        scale = (high - low).div_(255)
        zero = (-low / scale).round_()
        codes = w.div_(scale).add_(zero).add_(torch.rand_like(w)).floor_().clamp_(0, 255).to(torch.uint8)
        self.weight = codes, scale, zero


def _amortised(step, refresh):
    return {"step": ((EVERY - 1) / EVERY, step), "refresh": (1 / EVERY, refresh)}


class Amortised:
    """A weight (rows, side) whose steps and refreshes are timed apart and mixed as they come, once in EVERY."""

    def __init__(self, ctx):
        self.ctx, (self.rows, self.side, self.rank, self.group) = ctx, ctx.pick((4 * SIDE, SIDE, RANK, GROUP), (512, 256, 32, 64))
        shape = self.rows, self.side
        self.grads = ctx.rotate(lambda: ctx.randn(*shape))
        self.start = ctx.once(lambda: ctx.randn(*shape) / self.side ** 0.5)
        self.real = ctx.once(lambda: (_decaying(ctx, *shape, 2), _decaying(ctx, *shape, 2)))   # what the first and a later refresh see
        self.title = f"{self.rows}x{self.side}, rank {self.rank}, refreshed every {EVERY} steps"

    def ours(self, make, nbytes):
        """make() -> (parameter, optimizer), nbytes of them."""
        def one():
            p, optimizer = make()
            p.grad = self.real()[0]
            optimizer.step()
            return p, optimizer

        def made():
            many = [one() for _ in range(_copies(self.ctx, nbytes))]

            def run(i, due):
                p, optimizer = many[i % len(many)]
                p.grad = self.real()[1] if due else self.grads(i)
                optimizer.state[p]["next_refresh"] = int(optimizer.state[p]["step"]) + (1 if due else 1000)
                optimizer.step()
            return _amortised(lambda i: run(i, False), lambda i: run(i, True))
        return made

    def galore_torch(self, name):
        def make(m):
            p = torch.nn.Parameter(self.start().clone())
            quantised = name.startswith("Q")
            more = {**GALORE_QUANTISED, "quant_group_size": self.group} if quantised else {}
            optimizer = getattr(m, name)([{"params": [p], "rank": self.rank, "update_proj_gap": EVERY, "scale": 0.25, "proj_type": "std", **more}], lr=1e-3,
                                         **({} if quantised else {"no_deprecation_warning": True}))
            p.grad = self.real()[0]
            optimizer.step()

            def run(i, due):
                p.grad = self.real()[1] if due else self.grads(i)
                optimizer.state[p]["projector"].update_proj_gap = 1 if due else 1 << 60
                optimizer.step()
            return _amortised(lambda i: run(i, False), lambda i: run(i, True))
        return make


@case("projection")
def galore_amortised(ctx):
    """GaLore as galore-torch has it, nothing quantised, its refreshes included, beside full-rank AdamW."""
    a = Amortised(ctx)
    n, r = a.rows * a.side, a.rows * a.rank

    def make(basis):
        p = torch.nn.Parameter(a.start().clone())
        return p, gradmill.optim.GaLoreAdamW([p], lr=1e-3, rank=a.rank, refresh_every=EVERY, basis=basis)
    nbytes = 4.0 * (n + 2 * r)

    def full_rank():
        p = torch.nn.Parameter(a.start().clone())
        optimizer = torch.optim.AdamW([p], lr=1e-3, fused=True)

        def run(i):
            p.grad = a.grads(i)
            optimizer.step()
        return run
    work = Work(12.0 * n + 8.0 * r + 16.0 * r + 8.0 * a.side * a.rank, 2 * 2.0 * n * a.rank * (1 + 1 / EVERY), "fp32")
    return Bench(f"GaLore step {a.title}", work, [
        ours(a.ours(lambda: make("subspace"), nbytes), "gradmill GaLoreAdamW, basis='subspace'"),
        rival("gradmill GaLoreAdamW, exact SVD", a.ours(lambda: make("svd"), nbytes)), baseline("torch AdamW(fused=True), full rank", full_rank),
        peer("galore_torch", "galore-torch GaLoreAdamW", a.galore_torch("GaLoreAdamW"))],
        "besides the products it packs G for the first and steps R and W; a full-rank AdamW multiplies nothing, and has eight times the states")


@case("projection", goal=("torch", 4.0))
def qgalore_step(ctx):
    a = Amortised(ctx)
    rows, side, rank, group, grads, start, real = a.rows, a.side, a.rank, a.group, a.grads, a.start, a.real

    def make_ours():
        p = torch.nn.Parameter(QuantizedWeight.quantize(start(), gradmill.formats.Format("uint8", group)))
        return p, gradmill.optim.QGaLoreAdamW([p], lr=1e-3, rank=rank, refresh_every=EVERY, adaptive=False, group_size=group, states="int8")

    def make_torch(cls):
        def make():
            first = cls(start(), rank, group)
            first.refresh(real()[0])
            many = [copy.deepcopy(first) for _ in range(_copies(ctx, rows * side * 1.03 + rows * rank * 3))]

            def run(i, due):
                optimizer, grad = many[i % len(many)], real()[1] if due else grads(i)
                if due:
                    optimizer.refresh(grad)
                optimizer.step(grad)
            return _amortised(lambda i: run(i, False), lambda i: run(i, True))
        return make

    # A plain step: gradient in, projected gradient out and in, two 8-bit states, 8-bit weight in and out, basis twice; two
    # products. A refresh adds about as much as two products, once in EVERY steps.
    n, r = rows * side, rows * rank
    work = Work(4.0 * n + 2.0 * n + 8.0 * r + 4.0 * r + side * rank, 2 * 2.0 * n * rank * (1 + 1 / EVERY), "fp32")
    return Bench(f"Q-GaLore step {a.title}", work, [
        ours(a.ours(make_ours, rows * side * 1.02 + rows * rank * 2.6)), baseline("plain torch, the official code's passes", make_torch(TorchQGaLore)),
        rival("plain torch without needless copies", make_torch(LeanTorchQGaLore)),
        peer("galore_torch", "galore-torch AdamW, nothing quantised", a.galore_torch("GaLoreAdamW")),
        peer("q_galore_torch", "q-galore-torch AdamW8bit", a.galore_torch("QGaLoreAdamW8bit"))],
        "besides the products, at their peak, it packs G for the first and makes random words and codes for the INT8 weight: a fifth of one thread's time")


def _copies(ctx, nbytes):
    """How many weights with their states it takes to leave the cache."""
    return 2 if ctx.tiny else 1 if ctx.device == "cuda" else min(32, int(2 * ctx.cache_bytes / nbytes) + 1)
