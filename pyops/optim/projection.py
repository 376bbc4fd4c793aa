"""Projection: any rule on a low-rank image of each gradient (GaLore, Q-GaLore, Fira, FRUGAL, the DCT projection)."""
from __future__ import annotations

import contextvars
import functools
import math
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields

import torch

from gradmill.formats import Format, cached, float_code
from gradmill.ops.projection import dct, orthonormal, project, project_back, subspace_basis
from gradmill.ops.quant import dequantize, quantize
from gradmill.reference import philox
from gradmill.reference.optim import as_matrix
from gradmill.weight import QuantizedWeight

__all__ = ["Projection", "param_groups_for_projection"]

COMING = "coming_"  # state names of a basis that is computed but not yet taken
QUEUE = 5  # successive cosines averaged before an interval is doubled
BASES = ("svd", "subspace", "dct", "random", "coordinate")
FOLLOWING = BASES[:3]  # computed from the gradient


@dataclass(frozen=True)
class Projection:
    """How a matrix gradient G (rows, columns) is projected: R = G B^T or B G with B (rank, side), the rule steps on R, and
    W <- W + scale * (its update projected back) + the residual's step.

    Of a DTensor (FSDP2) every process keeps the whole basis and steps its rows of the weight; a refresh gathers the gradient. Projected to the right,
    R's rows and its states are sharded as the weight's; to the left R is summed over the processes, and its states are whole.

    Sources: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection"; Zhang et al., "Q-GaLore";
    Chen et al., "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?"; Zmushko et al., "FRUGAL"; Modoranu
    et al., "SVD-Free Low-Rank Adaptive Gradient Optimization" (dct).

    Args:
        rank: basis vectors; a float in (0, 1) is a fraction of the projected side (FRUGAL's density).
        basis: "svd" (the leading singular vectors, exact), "subspace" (block power iteration from the last basis with QR),
            "dct" (the columns of the DCT matrix on which G's rows have the largest l1 norm; indices only are stored), "random"
            (orthonormal, from the seed and the step of the refresh: never stored), "coordinate" (rows or columns drawn
            from the seed: indices only).
        bits: the basis is stored in 4 or 8 bits with a zero point, ``group_size`` elements of a vector sharing a scale (0: all
            of it), in bf16 (16) or fp32 (32). Nothing is stored for dct, random and coordinate but indices.
        refresh_every: steps between refreshes. Parameters refresh at different steps (``stagger``) after their first.
        adaptive: Q-GaLore's lazy refresh, for svd and subspace: a parameter's interval doubles when the mean absolute cosine
            between the first vectors of its last 5 refreshes reaches ``cosine_threshold``, up to ``max_refresh_every`` (None:
            16 * refresh_every); the queue then starts anew. (The official code uses the signed cosine, never clears the
            queue and lets the interval grow without bound.)
        residual: what happens to what the basis does not span, G - B^T B G: None (dropped: GaLore); "fira" (stepped by plain SGD,
            scaled per index by norm(rule's step) / norm(R), its norm growing by at most ``limiter`` a step); "sign" or "sgd"
            (FRUGAL: signSGD or SGD at lr * ``residual_scale``; differences within rounding of 0 have sign 0).
        scale: multiplies the projected update (GaLore's alpha).
        side: "auto" projects the smaller side (rows >= columns: R = G B^T, "right"), "left" or "right" that one.
        moments: what a refresh does to the rule's states: "keep" (GaLore), "reset" (FRUGAL: zeros, and the rule counts its steps
            anew) or "rotate" (first moments go into the new basis by B_new B_old^T, second moments by its squares; for dct and
            coordinate that is a match of indices).
        decay_after: weight decay multiplies the weight after the step (GaLore's code) instead of before.
        iterations: block power iterations of a refresh from the last basis; the first basis takes one more.
        background: 0 computes a new basis within the step whose gradient it comes from; k, less than ``refresh_every``, beside the
            next k steps, on a thread (and on CUDA a stream) of its own: they use the old basis, and the k-th, once it has
            the new one, takes it. So results depend on k, not on how long it took. The first basis is always computed in its
            step. A copy of the gradient lives as long; what fails is raised by the step that waits. For svd, subspace and dct.

    Raises:
        ValueError: for values out of range.
    """

    rank: int | float
    basis: str = "subspace"
    bits: int = 4
    group_size: int = 256
    refresh_every: int = 200
    adaptive: bool = False
    cosine_threshold: float = 0.4
    max_refresh_every: int | None = None
    residual: str | None = None
    residual_scale: float = 1.0
    limiter: float = 1.01
    scale: float = 0.25
    side: str = "auto"
    moments: str = "keep"
    decay_after: bool = True
    iterations: int = 1
    stagger: bool = True
    background: int = 0

    def __post_init__(self):
        rank, every, most = self.rank, self.refresh_every, self.max_refresh_every
        whole = lambda x, least: isinstance(x, int) and x >= least  # a float would do until a checkpoint with it is loaded
        real = lambda x, least: isinstance(x, (int, float)) and x >= least
        checks = {
            "rank": (whole(rank, 1) or isinstance(rank, float) and 0 < rank < 1, "an int of at least 1, or a float between 0 and 1"),
            "basis": (self.basis in BASES, f"one of {', '.join(BASES)}"), "bits": (self.bits in (4, 8, 16, 32), "4, 8, 16 or 32"),
            "group_size": (whole(self.group_size, 0) and self.group_size % 2 == 0, "0 (a whole basis vector) or even"),
            "refresh_every": (whole(every, 1), "an int of at least 1"),
            "cosine_threshold": (real(self.cosine_threshold, 0) and self.cosine_threshold <= 1, "in [0, 1]"),
            "max_refresh_every": (most is None or whole(every, 1) and whole(most, every), "None or an int of at least refresh_every"),
            "adaptive": (not self.adaptive or self.basis in ("svd", "subspace"), f"False for basis {self.basis!r}, whose vectors do not follow the gradient"),
            "residual": (self.residual in (None, "fira", "sign", "sgd"), "None, 'fira', 'sign' or 'sgd'"),
            "residual_scale": (real(self.residual_scale, 0), "at least 0"), "limiter": (real(self.limiter, 1), "at least 1"),
            "scale": (real(self.scale, 0) and self.scale > 0, "positive"),
            "side": (self.side in ("auto", "left", "right"), "'auto', 'left' or 'right'"),
            "moments": (self.moments in ("keep", "reset", "rotate"), "'keep', 'reset' or 'rotate'"), "iterations": (whole(self.iterations, 1), "an int of at least 1"),
            "background": (whole(self.background, 0) and whole(every, 1) and self.background < every and (not self.background or self.basis in FOLLOWING),
                           f"0 or, for basis {', '.join(FOLLOWING)}, up to refresh_every - 1 (refresh_every is {every!r})")}
        for name, (good, meaning) in checks.items():
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {meaning}")

    # --- shapes -------------------------------------------------------------------------------------------
    def left(self, rows: int, columns: int) -> bool:
        """Whether rows are projected (R = B G)."""
        return rows < columns if self.side == "auto" else self.side == "left"

    def rank_of(self, shape) -> int:
        """The rank for a weight of ``shape``; 0 where it is not projected: fewer than two dimensions, or a side not larger than the rank."""
        if len(shape) < 2:
            return 0
        rows, columns = shape[0], math.prod(shape[1:])
        side = rows if self.left(rows, columns) else columns
        rank = max(1, round(self.rank * side)) if isinstance(self.rank, float) else self.rank
        return rank if rank < min(rows, columns) else 0

    def compressed(self, shape) -> torch.Size:
        """R's shape."""
        rows, columns = shape[0], math.prod(shape[1:])
        return torch.Size((self.rank_of(shape), columns) if self.left(rows, columns) else (rows, self.rank_of(shape)))

    @property
    def format(self) -> Format:
        """How the basis is stored, where it is."""
        return cached(*{4: ("uint4", self.group_size), 8: ("uint8", self.group_size), 16: ("bf16",), 32: ("fp32",)}[self.bits])

    @property
    def stored(self) -> bool:
        """Whether the basis is stored as vectors."""
        return self.basis in ("svd", "subspace")

    def packed(self, vectors: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state's tensors for a basis (rank, side) fp32."""
        if not self.format.blocked:
            return {"basis_codes": vectors.to(self.format.code_dtype)}
        return dict(zip(("basis_codes", "basis_scales", "basis_zeros"), quantize(vectors, self.format.code, self.format.block)))

    def basis_tensors(self, rank: int, side: int) -> list[tuple]:
        """(name, dtypes, shape) of what a state holds of the basis."""
        if not self.stored:
            return [] if self.basis == "random" else [("basis_indices", (torch.int64,), (rank,))]
        format = self.format
        if not format.blocked:
            return [("basis_codes", (format.code_dtype,), (rank, side))]
        blocks = (rank, format.blocks(side))
        return [("basis_codes", (format.code_dtype,), (rank, format.code_columns(side))), ("basis_scales", (torch.float32,), blocks),
                ("basis_zeros", (torch.uint8,), blocks)]


FIELDS = tuple(f.name for f in fields(Projection))


# --- bases ------------------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=32)
def _cosines(n: int, device: torch.device) -> torch.Tensor:
    """cos(k pi / 2n) sqrt(2/n) for k in [0, 4n): every entry of D is one of them. fp32."""
    return (torch.cos(torch.arange(4 * n, dtype=torch.float64) * (math.pi / (2 * n))) * math.sqrt(2 / n)).to(device, torch.float32)


def dct_vectors(indices: torch.Tensor, n: int) -> torch.Tensor:
    """Columns ``indices`` of D as rows (rank, n), fp32."""
    i = torch.arange(n, device=indices.device)
    out = _cosines(n, indices.device)[(2 * indices[:, None] + 1) * i % (4 * n)]
    out[:, 0] *= math.sqrt(0.5)
    return out


def random_vectors(rank: int, n: int, seed: int, step: int, stream: int, device) -> torch.Tensor:
    """Orthonormal rows (rank, n) fp32 that depend on the key only: random signs, one bit of a Philox word each, orthonormalised."""
    count = -(-rank * n // 32)
    words = philox.words(seed, step, stream, 0, count)
    bits = words[:, None] >> torch.arange(32) & 1
    signs = bits.flatten()[:rank * n].view(rank, n).to(torch.float32) * 2 - 1
    return orthonormal(signs.to(device).t()).t().contiguous()


def random_indices(rank: int, n: int, seed: int, step: int, stream: int) -> torch.Tensor:
    """``rank`` of n indices, in order: those with the smallest Philox words."""
    return philox.words(seed, step, stream, 0, n).argsort(stable=True)[:rank].sort().values


def find_basis(p: Projection, g: torch.Tensor, left: bool, rank: int, old: torch.Tensor | None, seed: int, step: int, stream: int) -> dict[str, torch.Tensor]:
    """What a refresh at ``step`` finds from gradient g (rows, columns): the basis as the state keeps it, and where they come with it
    "cosine", between its first vector and that of ``old`` (rank, side) fp32, and "low", g in that basis."""
    side = g.shape[0 if left else 1]
    if p.basis == "random":
        return {}
    if p.basis == "coordinate":
        return {"basis_indices": random_indices(rank, side, seed, step, stream).to(g.device)}
    if p.basis == "dct":
        transformed = dct(g, left)
        norms = transformed.abs().sum(1 if left else 0)  # vector_norm over dimension 0 takes ten times as long
        indices = norms.nan_to_num(math.inf).topk(rank).indices.sort().values
        return {"basis_indices": indices, "low": transformed.index_select(0 if left else 1, indices)}
    if p.basis == "svd":
        x = g.to(torch.float32)
        if bool(torch.isfinite(x).all()):
            u, _, vh = torch.linalg.svd(x, full_matrices=False)
            new = (u[:, :rank].t() if left else vh[:rank]).contiguous()
        else:
            new = torch.full((rank, side), math.nan, device=g.device)
    else:
        key = torch.tensor([seed, step], dtype=torch.int64, device="cpu")
        new = subspace_basis(g, old, rank, p.iterations + (old is None), left, key, stream)
    found = p.packed(new)
    if p.adaptive and old is not None:
        found["cosine"] = torch.nn.functional.cosine_similarity(new[0], old[0], dim=0).abs().cpu()
    return found


# --- beside training --------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=None)
def _thread() -> ThreadPoolExecutor:
    """The one thread that computes bases, in order."""
    return ThreadPoolExecutor(1, thread_name_prefix="gradmill-basis")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_thread.cache_clear)  # a fork has no such thread


@functools.lru_cache(maxsize=None)
def _stream(device: torch.device):
    return torch.cuda.Stream(device)


def later(work, device: torch.device) -> Future:
    """work() on that thread, with the caller's use_backend and without gradients; on CUDA on a stream of its own, after all that
    the caller has queued so far, and to its end."""
    context, ready = contextvars.copy_context(), None
    if device.type == "cuda":
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(device))

    def run():
        with torch.no_grad():
            if ready is None:
                return context.run(work)
            stream = _stream(device)
            with torch.cuda.stream(stream):
                stream.wait_event(ready)
                found = context.run(work)
                stream.synchronize()
            return found
    return _thread().submit(run)


# --- one parameter ----------------------------------------------------------------------------------------
class Projected:
    """A projected parameter for the time of one step: what its state holds, in the words of the paper."""

    def __init__(self, projection: Projection, item, group: dict):
        self.projection, self.state, self.item, self.group = projection, item.state, item, group
        self.grad = as_matrix(item.grad)
        shape = item.owner.shape
        self.shape = shape[0], math.prod(shape[1:])
        self.left = projection.left(*self.shape)
        self.dim = 0 if self.left else 1  # the projected one
        self.side = self.shape[self.dim]
        self.rank = projection.rank_of(shape)
        # A DTensor's rows: the basis is whole on every process. To the right each row is projected by itself; to the left R is a sum.
        self.groups = [item.owner.device_mesh.get_group(i) for i, placement in enumerate(getattr(item.owner, "placements", ())) if placement.is_shard()]
        start = item.offset // max(1, self.shape[1])
        self.rows = slice(start, start + len(self.grad))
        self.stream = philox.stream(self.state["rng_id"], "basis")
        self.low = None

    # --- basis
    def basis(self) -> torch.Tensor | None:
        """The basis as fp32 (rank, side); None before the first refresh, and for coordinates."""
        p, state = self.projection, self.state
        if p.stored:
            if "basis_codes" not in state:
                return None
            if not p.format.blocked:
                return state["basis_codes"].to(torch.float32)
            return dequantize(state["basis_codes"], state["basis_scales"], state["basis_zeros"], p.format.code, p.format.block, self.side, torch.float32)
        if "refreshed_at" not in state or p.basis == "coordinate":
            return None
        if p.basis == "random":
            return random_vectors(self.rank, self.side, self.group["seed"], state["refreshed_at"], self.stream, self.grad.device)
        return dct_vectors(state["basis_indices"], self.side)

    @functools.cached_property
    def packed(self) -> tuple:
        """The basis as project and project_back take it, after the refresh: (codes, scales, zeros, code, block)."""
        p, state = self.projection, self.state
        if p.stored and p.format.blocked:
            return state["basis_codes"], state["basis_scales"], state["basis_zeros"], p.format.code, p.format.block
        return self._plain(state["basis_codes"] if p.stored else self.basis())

    @functools.cached_property
    def here(self) -> tuple:
        """`packed` for this process's rows."""
        return self._plain(self.basis()[:, self.rows].contiguous()) if self.left and self.groups else self.packed

    def reduce(self, t: torch.Tensor, op=None) -> torch.Tensor:
        """t summed (or by ``op``) in place over the processes that share the parameter."""
        for group in self.groups:
            torch.distributed.all_reduce(t, torch.distributed.ReduceOp.SUM if op is None else op, group=group)
        return t

    @staticmethod
    def _plain(vectors: torch.Tensor) -> tuple:
        none = torch.empty(len(vectors), 1, dtype=torch.float32, device=vectors.device)
        return vectors, none, none.new_empty(0, dtype=torch.uint8), float_code(vectors.dtype), 0

    def refresh(self, optimizer):
        """A new basis, where it is time, or the start of its computation, and what that does to the moments."""
        p, state, step = self.projection, self.state, self.item.step
        self.adopt(optimizer)
        if not self.due:
            return
        first, old = "refreshed_at" not in state, self._old(p.adaptive or p.basis == "subspace" or p.moments == "rotate" and p.basis != "dct")
        state["refreshed_at"] = step
        whole = as_matrix(self.item.owner.grad.full_tensor()) if self.groups else self.grad  # every process computes the same basis
        arguments = self.left, self.rank, old, self.group["seed"], step, self.stream
        if p.background and not first:
            g = whole.clone()  # the gradient itself is overwritten meanwhile
            state["adopt_at"] = step + p.background
            optimizer.refresh_later(self.item.owner, lambda: find_basis(p, g, *arguments))
            return
        found = find_basis(p, whole, *arguments)
        self.low = found.pop("low", None)
        if self.low is not None and self.groups and not self.left:
            self.low = self.low[self.rows].contiguous()
        self._take(optimizer, found, first, old)

    @property
    def due(self) -> bool:
        """Whether this step takes its gradient for a new basis."""
        return self.item.step >= self.state["next_refresh"] and "adopt_at" not in self.state

    def adopt(self, optimizer):
        """Takes the basis that was computed beside the last steps, where it is time. Looks at no gradient."""
        if self.item.step >= self.state.get("adopt_at", math.inf):
            optimizer.settle([self.item.owner])
            found = {name[len(COMING):]: self.state.pop(name) for name in list(self.state) if name.startswith(COMING)}
            del self.state["adopt_at"]
            self._take(optimizer, found, False, self._old(self.projection.moments == "rotate"))

    def _old(self, wanted) -> torch.Tensor | None:
        old = self.basis() if wanted else None
        return None if old is None or not torch.isfinite(old).all() else old  # a nan gradient spoilt it: start again

    def _take(self, optimizer, found, first, old):
        """The new basis into the state; moments, from the ``old`` one where that is vectors, and the next refresh."""
        p, state, columns = self.projection, self.state, self.projection.compressed(self.shape)[1]
        indices, cosine = state.get("basis_indices"), found.pop("cosine", None)
        state.update(found)
        if cosine is not None:
            self._adapt(cosine)
        if not first and p.moments == "reset":
            state["moments_since"] = self.item.step - 1
            optimizer.map_moments(self.group, state, columns, self.grad.device, torch.zeros_like)
        elif not first and p.moments == "rotate" and indices is not None:
            new = state["basis_indices"]
            place = torch.searchsorted(indices, new).clamp_(max=self.rank - 1)
            kept = indices[place] == new
            kept = kept[:, None] if self.left else kept
            optimizer.map_moments(self.group, state, columns, self.grad.device, lambda m: torch.where(kept, m.index_select(self.dim, place), 0.0))
        elif not first and p.moments == "rotate" and old is not None:
            rotation = self.basis() @ old.t()
            move = (lambda m, r: r @ m) if self.left else (lambda m, r: m @ r.t())
            optimizer.map_moments(self.group, state, columns, self.grad.device, lambda m: move(m, rotation), lambda v: move(v, rotation.square()))
        interval = state["refresh_interval"]
        if first and p.stagger and interval > 1:  # the first intervals end at different steps
            count = max(1, sum(len(g["params"]) for g in optimizer.param_groups))
            interval -= state["rng_id"] * interval // count
        state["next_refresh"] = state["refreshed_at"] + max(1, interval)

    def _adapt(self, cosine):
        p, state = self.projection, self.state
        state["cosines"] = torch.cat((state["cosines"], cosine[None]))[-QUEUE:]
        if len(state["cosines"]) == QUEUE and float(state["cosines"].mean()) >= p.cosine_threshold:
            cap = 16 * p.refresh_every if p.max_refresh_every is None else p.max_refresh_every
            state["refresh_interval"] = min(2 * state["refresh_interval"], cap)
            state["cosines"] = torch.zeros(0, dtype=torch.float32, device="cpu")

    # --- in and out
    def project(self) -> torch.Tensor:
        """R, fp32."""
        if self.low is not None:
            return self.low
        if self.projection.basis == "coordinate":
            place, at = self._coordinates()
            low = self.grad.index_select(self.dim, place).to(torch.float32)
            if at is not None:
                low = low.new_zeros(self.rank, self.shape[1]).index_copy_(0, at, low)
        elif self.grad.numel():
            low = project(self.grad, *self.here, self.left)
        else:  # a shard without rows
            low = torch.zeros((self.rank, self.shape[1]) if self.left else (0, self.rank), dtype=torch.float32, device=self.grad.device)
        return self.reduce(low) if self.left else low

    def _coordinates(self) -> tuple:
        """Which rows or columns of this process's gradient are in the basis; which of R's rows they are, None: all."""
        indices = self.state["basis_indices"]
        if not (self.left and self.groups):
            return indices, None
        at = ((indices >= self.rows.start) & (indices < self.rows.stop)).nonzero()[:, 0]
        return indices[at] - self.rows.start, at

    def back(self, low: torch.Tensor, update: torch.Tensor, factor: float, lr: float, decay: float):
        """Moves the weight by the rule's ``update`` of R = ``low``, and by the residual. factor: on the gradient, maximize's sign included."""
        p = self.projection
        before, after = (1.0, decay) if p.decay_after else (decay, 1.0)
        alpha, residual, scales = p.scale, None, None
        if p.residual == "sign":
            scales = self._per_index(-lr * p.residual_scale * math.copysign(1.0, factor))
        elif p.residual == "sgd":
            scales = self._per_index(-lr * p.residual_scale * factor)
        elif p.residual == "fira":
            scales = self._fira(low, update, factor, lr)
        if p.basis == "coordinate":
            # Nothing is multiplied: the update and the residual lie in different rows or columns. All of it goes as a residual.
            moved = torch.zeros(self.grad.shape, dtype=torch.float32, device=low.device) if scales is None else self.grad.to(torch.float32)
            if scales is not None:
                moved = (moved.sign() + moved * 0 if p.residual == "sign" else moved) * (scales if self.left else scales[:, None])
            place, at = self._coordinates()
            moved.index_copy_(self.dim, place, (update if at is None else update[at]) * alpha)
            rows, columns = self.grad.shape
            nothing = moved.new_zeros((1, columns) if self.left else (rows, 1))
            self._back(self.item.param, nothing, self._plain(moved.new_zeros(1, self.grad.shape[self.dim])), before * after, 1.0, moved, self._per_index(after))
            return
        packed = self.here
        if p.residual == "sign":
            residual = self.grad.to(torch.float32, copy=True)
            self._back(residual, low, packed, 1.0, -1.0)
            # The residue of a gradient that the basis spans is rounding, whose sign would be a full-size step of noise.
            largest = torch.stack((-self.grad.amin(), self.grad.amax())).amax().to(torch.float32) if self.grad.numel() else torch.zeros((), device=low.device)
            noise = 2.0 ** -18 * float(self.reduce(largest, torch.distributed.ReduceOp.MAX if self.groups else None))
            for part in residual.split(max(1, 2 ** 16 // residual.shape[1])):  # in cache
                small = part.abs() <= noise
                part.copy_(part.sign() if math.isfinite(noise) else part.sign() + part * 0).masked_fill_(small, 0.0)
        elif p.residual is not None:
            residual = self.grad
            update = update * alpha - low * (scales if self.left else scales[:, None])
            alpha = 1.0
        self._back(self.item.param, update, packed, before * after, alpha * after, residual, None if scales is None else scales * after)

    def _per_index(self, value: float):
        return torch.full((self.grad.shape[1 if self.left else 0],), value, dtype=torch.float32, device=self.grad.device)

    def _fira(self, low, update, factor, lr):
        """-lr phi * limiter * factor: what the residual of the raw gradient is multiplied by."""
        dim, state = 0 if self.left else 1, self.state
        if lr == 0:
            return self._per_index(0.0)
        norms = torch.linalg.vector_norm(low, dim=dim) * abs(factor)
        phi = torch.linalg.vector_norm(update, dim=dim) / lr / (norms + 1e-8)
        # |G - B^T R|^2 = |G|^2 - |R|^2 for an orthonormal B: no product of full size.
        # (vector_norm over dimension 0 takes ten times as long as this.)
        squares = self.grad.to(torch.float32).square().sum(dim)
        outside = (self.reduce(squares) if self.left else squares) * factor ** 2 - norms.square()
        total = (phi.square() * outside.clamp(min=0)).sum()
        size = float((total if self.left else self.reduce(total)).sqrt())
        last = state.get("residual_norm", 0.0)
        shrink = min(1.0, self.projection.limiter * last / size) if last > 0 and size > 0 else 1.0
        if size * shrink > 0 and math.isfinite(size):
            state["residual_norm"] = size * shrink
        return phi * (-lr * shrink * factor)

    def _back(self, weight, update, packed, decay, alpha, residual=None, scales=None):
        rows, columns = self.grad.shape
        if not rows * columns:
            return
        target, stored = None, weight
        if isinstance(weight, QuantizedWeight):
            stored = (weight.codes, weight.scales, weight.zeros if weight.format.has_zero_point else None, weight.format.code, weight.format.block)
        else:
            target = weight if weight.is_contiguous() else weight.contiguous()
            stored = (target, None, None, float_code(weight.dtype), 0)
        project_back(*stored, columns, update.contiguous(), *packed, self.left, torch.tensor([decay, alpha], dtype=torch.float32, device="cpu"),
                     torch.tensor([self.group["seed"], self.item.step], dtype=torch.int64, device="cpu"),
                     philox.stream(self.state["rng_id"], "weight"), residual, scales, self.item.offset)
        if target is not None and target is not weight:
            weight.copy_(target)


# --- groups -----------------------------------------------------------------------------------------------
def param_groups_for_projection(model: torch.nn.Module, rank: int | float, filter=None, **options) -> list[dict]:
    """Two parameter groups: the matrices of the model's linear layers, with ``rank`` and ``options``, and everything else; frozen ones too, which are stepped
    from when they get gradients.

    As GaLore does, only attention and MLP weights are projected: of every nn.Linear (and gradmill.nn.Linear) but the head (a layer
    named as ``gradmill.convert`` names heads) and those whose weight is an embedding's.

    Args:
        model, rank: the model; rank as in Projection.
        filter: ``filter(name, layer)`` in place of that choice.
        options: Projection's other arguments; what is left out is as the optimizer has it (FiraAdamW's residual, say), for
            optimizers without a projection of their own as Projection has it.
    """
    from gradmill.convert import in_blocks, named_as_head

    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    projection, chosen, blocks = Projection(rank, **options), {}, in_blocks(model)
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            take = filter(name, layer) if filter is not None else not named_as_head(name.split(".")[-1], id(layer) in blocks) and id(layer.weight) not in embeddings
            if take and projection.rank_of(layer.weight.shape):
                chosen[id(layer.weight)] = layer.weight
    if not chosen:
        raise ValueError(f"no linear layer of the model has both sides larger than rank {rank}")
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [{"params": list(chosen.values()), "rank": rank, **options}, *([{"params": rest, "rank": None}] if rest else [])]
