"""Projection: any rule on a low-rank image of each gradient (GaLore, Q-GaLore, Fira, FRUGAL, the DCT projection)."""
from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields

import torch

from gradmill.formats import Format, cached, float_code
from gradmill.ops.projection import orthonormal, project, project_back, subspace_basis
from gradmill.ops.quant import dequantize, quantize
from gradmill.reference import philox
from gradmill.reference.optim import as_matrix
from gradmill.weight import QuantizedWeight

__all__ = ["Projection", "param_groups_for_projection"]

QUEUE = 5  # successive cosines averaged before an interval is doubled
BASES = ("svd", "subspace", "dct", "random", "coordinate")


@dataclass(frozen=True)
class Projection:
    """How a matrix gradient G (rows, columns) is projected: R = G B^T or B G with B (rank, side), the rule steps on R, and
    W <- W + scale * (its update projected back) + the residual's step.

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

    def __post_init__(self):
        rank = self.rank
        checks = {
            "rank": (isinstance(rank, int) and rank >= 1 or isinstance(rank, float) and 0 < rank < 1, "an int of at least 1, or a float between 0 and 1"),
            "basis": (self.basis in BASES, f"one of {', '.join(BASES)}"), "bits": (self.bits in (4, 8, 16, 32), "4, 8, 16 or 32"),
            "group_size": (self.group_size >= 0 and self.group_size % 2 == 0, "0 (a whole basis vector) or even"),
            "refresh_every": (self.refresh_every >= 1, "at least 1"), "cosine_threshold": (0 <= self.cosine_threshold <= 1, "in [0, 1]"),
            "max_refresh_every": (self.max_refresh_every is None or self.max_refresh_every >= self.refresh_every, "None or at least refresh_every"),
            "adaptive": (not self.adaptive or self.basis in ("svd", "subspace"), f"False for basis {self.basis!r}, whose vectors do not follow the gradient"),
            "residual": (self.residual in (None, "fira", "sign", "sgd"), "None, 'fira', 'sign' or 'sgd'"),
            "residual_scale": (self.residual_scale >= 0, "at least 0"), "limiter": (self.limiter >= 1, "at least 1"), "scale": (self.scale > 0, "positive"),
            "side": (self.side in ("auto", "left", "right"), "'auto', 'left' or 'right'"),
            "moments": (self.moments in ("keep", "reset", "rotate"), "'keep', 'reset' or 'rotate'"), "iterations": (self.iterations >= 1, "at least 1")}
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
def dct(x: torch.Tensor) -> torch.Tensor:
    """x D along the last dimension, D_ij = sqrt(2/n) cos(i (2j+1) pi / 2n), its first row over sqrt 2 (an orthonormal DCT-III), by one
    FFT of n: O(n log n) a row instead of n^2. fp32."""
    n = x.shape[-1]
    i = torch.arange(n, device=x.device, dtype=torch.float64)
    angle = math.pi * i / (2 * n)
    weight = torch.full((n,), math.sqrt(n / 2), dtype=torch.float64, device=x.device)
    weight[0] = math.sqrt(n)
    # Makhoul: the inverse DCT-II is an inverse FFT of the twisted spectrum v_i e^(i angle), Hermitian with v_(n-i), reordered.
    v = x.to(torch.float32) * weight.to(torch.float32)
    mirrored = torch.cat((torch.zeros_like(v[..., :1]), v[..., 1:].flip(-1)), -1)
    twist = torch.polar(torch.ones_like(angle), angle).to(torch.complex64)
    half = (torch.complex(v, -mirrored) * twist)[..., :n // 2 + 1]
    y = torch.fft.irfft(half, n=n)
    out = torch.empty_like(y)
    out[..., ::2] = y[..., :(n + 1) // 2]
    out[..., 1::2] = y[..., (n + 1) // 2:].flip(-1)
    return out


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


# --- one parameter ----------------------------------------------------------------------------------------
class Projected:
    """A projected parameter for the time of one step: what its state holds, in the words of the paper."""

    def __init__(self, projection: Projection, item, group: dict):
        self.projection, self.state, self.item, self.group = projection, item.state, item, group
        self.grad = as_matrix(item.grad)
        self.left = projection.left(*self.grad.shape)
        self.side = self.grad.shape[0 if self.left else 1]
        self.rank = projection.rank_of(item.grad.shape)
        self.stream = philox.stream(self.state["rng_id"], "basis")

    # --- basis
    def basis(self) -> torch.Tensor | None:
        """The basis as fp32 (rank, side); None before the first refresh."""
        p, state = self.projection, self.state
        if p.stored:
            if "basis_codes" not in state:
                return None
            if not p.format.blocked:
                return state["basis_codes"].to(torch.float32)
            return dequantize(state["basis_codes"], state["basis_scales"], state["basis_zeros"], p.format.code, p.format.block, self.side, torch.float32)
        if "refreshed_at" not in state:
            return None
        if p.basis == "random":
            return random_vectors(self.rank, self.side, self.group["seed"], state["refreshed_at"], self.stream, self.grad.device)
        if p.basis == "dct":
            return dct_vectors(state["basis_indices"], self.side)
        return torch.nn.functional.one_hot(state["basis_indices"], self.side).to(torch.float32)

    @functools.cached_property
    def packed(self) -> tuple:
        """The basis as project and project_back take it, after the refresh: (codes, scales, zeros, code, block)."""
        p, state = self.projection, self.state
        if p.stored and p.format.blocked:
            return state["basis_codes"], state["basis_scales"], state["basis_zeros"], p.format.code, p.format.block
        vectors = state["basis_codes"] if p.stored else self.basis()
        none = torch.empty(self.rank, 1, dtype=torch.float32, device=vectors.device)
        return vectors, none, none.new_empty(0, dtype=torch.uint8), float_code(vectors.dtype), 0

    def refresh(self, optimizer):
        """A new basis, where it is time, and what that does to the moments."""
        p, state, step = self.projection, self.state, self.item.step
        if step < state["next_refresh"]:
            return
        old = self.basis() if p.moments == "rotate" or p.adaptive or p.basis == "subspace" else None
        if old is not None and not torch.isfinite(old).all():
            old = None  # a nan gradient spoilt it: start again
        first, columns = "refreshed_at" not in state, p.compressed(self.grad.shape)[1]
        new = self._new_basis(old)
        if new is not None and p.adaptive and old is not None:
            self._adapt(new, old)
        if not first and p.moments == "reset":
            state["moments_since"] = step - 1
            optimizer.map_moments(self.group, state, columns, torch.zeros_like)
        elif old is not None and p.moments == "rotate":
            rotation = self.basis() @ old.t()
            move = (lambda m, r: r @ m) if self.left else (lambda m, r: m @ r.t())
            optimizer.map_moments(self.group, state, columns, lambda m: move(m, rotation), lambda v: move(v, rotation.square()))
        interval = state["refresh_interval"]
        if first and p.stagger and interval > 1:  # the first intervals end at different steps
            count = max(1, sum(len(g["params"]) for g in optimizer.param_groups))
            interval -= state["rng_id"] * interval // count
        state["next_refresh"] = step + max(1, interval)

    def _new_basis(self, old):
        p, state, g = self.projection, self.state, self.grad
        state["refreshed_at"] = self.item.step
        seed, step = self.group["seed"], self.item.step
        if p.basis == "random":
            return None
        if p.basis == "coordinate":
            state["basis_indices"] = random_indices(self.rank, self.side, seed, step, self.stream).to(g.device)
            return None
        if p.basis == "dct":
            norms = dct(g.t() if self.left else g).abs().sum(0)
            state["basis_indices"] = norms.nan_to_num(math.inf).topk(self.rank).indices.sort().values
            return None
        if p.basis == "svd":
            x = g.to(torch.float32)
            if bool(torch.isfinite(x).all()):
                u, _, vh = torch.linalg.svd(x, full_matrices=False)
                new = (u[:, :self.rank].t() if self.left else vh[:self.rank]).contiguous()
            else:
                new = torch.full((self.rank, self.side), math.nan, device=g.device)
        else:
            key = torch.tensor([seed, step], dtype=torch.int64, device="cpu")
            new = subspace_basis(g, old, self.rank, p.iterations + (old is None), self.left, key, self.stream)
        state.update(p.packed(new))
        return new

    def _adapt(self, new, old):
        p, state = self.projection, self.state
        cosine = torch.nn.functional.cosine_similarity(new[0], old[0], dim=0).abs().cpu()
        state["cosines"] = torch.cat((state["cosines"], cosine[None]))[-QUEUE:]
        if len(state["cosines"]) == QUEUE and float(state["cosines"].mean()) >= p.cosine_threshold:
            cap = 16 * p.refresh_every if p.max_refresh_every is None else p.max_refresh_every
            state["refresh_interval"] = min(2 * state["refresh_interval"], cap)
            state["cosines"] = torch.zeros(0, dtype=torch.float32, device="cpu")

    # --- in and out
    def project(self) -> torch.Tensor:
        """R, fp32."""
        g = self.grad
        if self.projection.basis == "coordinate":
            return g.index_select(0 if self.left else 1, self.state["basis_indices"]).to(torch.float32)
        return project(g, *self.packed, self.left)

    def back(self, low: torch.Tensor, update: torch.Tensor, factor: float, lr: float, decay: float):
        """Moves the weight by the rule's ``update`` of R = ``low``, and by the residual. factor: on the gradient, maximize's sign included."""
        p = self.projection
        before, after = (1.0, decay) if p.decay_after else (decay, 1.0)
        alpha, residual, scales = p.scale, None, None
        packed = self.packed
        if p.residual == "sign":
            residual = self.grad.to(torch.float32, copy=True)
            self._back(residual, low, packed, 1.0, -1.0)
            # The residue of a gradient that the basis spans is rounding, whose sign would be a full-size step of noise.
            noise = 2.0 ** -18 * float(torch.linalg.vector_norm(self.grad, math.inf))
            residual = torch.where(residual.abs() <= noise, residual.new_zeros(()), residual.sign() + residual * 0)
            scales = self._per_index(-lr * p.residual_scale * math.copysign(1.0, factor))
        elif p.residual is not None:
            residual = self.grad
            scales = self._per_index(-lr * p.residual_scale * factor) if p.residual == "sgd" else self._fira(low, update, factor, lr)
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
        outside = (torch.linalg.vector_norm(self.grad, dim=dim, dtype=torch.float32) * abs(factor)).square() - norms.square()
        size = float((phi.square() * outside.clamp(min=0)).sum().sqrt())
        last = state.get("residual_norm", 0.0)
        shrink = min(1.0, self.projection.limiter * last / size) if last > 0 and size > 0 else 1.0
        if size * shrink > 0 and math.isfinite(size):
            state["residual_norm"] = size * shrink
        return phi * (-lr * shrink * factor)

    def _back(self, weight, update, packed, decay, alpha, residual=None, scales=None):
        rows, columns = self.grad.shape
        target, stored = None, weight
        if isinstance(weight, QuantizedWeight):
            stored = (weight.codes, weight.scales, weight.zeros if weight.format.has_zero_point else None, weight.format.code, weight.format.block)
        else:
            target = weight if weight.is_contiguous() else weight.contiguous()
            stored = (target, None, None, float_code(weight.dtype), 0)
        project_back(*stored, columns, update.contiguous(), *packed, self.left, torch.tensor([decay, alpha], dtype=torch.float32, device="cpu"),
                     torch.tensor([self.group["seed"], self.item.step], dtype=torch.int64, device="cpu"),
                     philox.stream(self.state["rng_id"], "weight"), residual, scales)
        if target is not None and target is not weight:
            weight.copy_(target)


# --- groups -----------------------------------------------------------------------------------------------
def param_groups_for_projection(model: torch.nn.Module, rank: int | float, filter=None, **options) -> list[dict]:
    """Two parameter groups: the matrices of the model's linear layers, with ``rank`` and ``options``, and everything else.

    As GaLore does, only attention and MLP weights are projected: of every nn.Linear (and gradmill.nn.Linear) but the head (a layer
    named as ``gradmill.convert`` names heads) and those whose weight is an embedding's.

    Args:
        model, rank: the model; rank as in Projection.
        filter: ``filter(name, layer)`` in place of that choice.
        options: Projection's other arguments; what is left out is as the optimizer has it (FiraAdamW's residual, say), for
            optimizers without a projection of their own as Projection has it.
    """
    from gradmill.convert import HEAD_NAMES

    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    projection, chosen = Projection(rank, **options), {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            take = filter(name, layer) if filter is not None else name.split(".")[-1] not in HEAD_NAMES and id(layer.weight) not in embeddings
            if take and layer.weight.requires_grad and projection.rank_of(layer.weight.shape):
                chosen[id(layer.weight)] = layer.weight
    if not chosen:
        raise ValueError(f"no linear layer of the model has both sides larger than rank {rank}")
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    return [{"params": list(chosen.values()), "rank": rank, **options}, *([{"params": rest, "rank": None}] if rest else [])]
