"""Q-GaLore."""
from __future__ import annotations

import warnings

import torch

from gradmill.formats import Format, float_code
from gradmill.ops.projection import project, project_back, subspace_basis
from gradmill.ops.quant import dequantize, quantize
from gradmill.optim._base import CheckpointError, FusedOptimizer, Item, is_sharded
from gradmill.optim.adamw import AdamW
from gradmill.reference.optim import as_matrix
from gradmill.reference.philox import stream
from gradmill.weight import QuantizedWeight

QUEUE = 5  # successive cosines averaged before an interval is doubled


class QGaLoreAdamW(AdamW):
    """AdamW on a low-rank projection of each gradient, with packed bases, 8-bit states and lazy refreshes.

    Source: Zhang et al., "Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients"; Zhao
    et al., "GaLore". For W (rows, columns) the smaller side is projected: rows >= columns R = G B^T, else R = B G, with B
    (rank, side) packed in ``bits``. AdamW runs on R; W <- (W + scale * back-projection) * (1 - lr * weight_decay),
    rounded stochastically where W is bf16 or a QuantizedWeight (GaLore decays after the step).

    Parameter groups with ``rank`` set are projected: their parameters of two or more dimensions (convolutions count as
    ``flatten(1)``) whose smaller side is larger than ``rank``. All others take a plain AdamW step.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, states, options: as in
            :class:`gradmill.optim.AdamW`; betas default to Q-GaLore's (0.9, 0.95), states to "int8".
        rank: rank of the projection; None takes plain steps (set it per group).
        scale: multiplies the projected update (GaLore's alpha, 0.25).
        refresh_every: steps between refreshes of a basis (200).
        adaptive: True doubles a parameter's interval when the mean absolute cosine between the first vectors of its last
            5 refreshes reaches ``cosine_threshold`` (0.4), up to ``max_refresh_every``; the queue then starts anew.
            (The official code uses the signed cosine, never clears the queue and lets the interval grow without bound.)
        max_refresh_every: cap of the interval; None means 16 * refresh_every.
        bits, group_size: the basis is packed in 4 or 8 bits with a zero point, ``group_size`` elements of a basis vector
            sharing a scale.
        iterations: block power iterations of a refresh from the last basis; the first basis takes one more. A refresh
            is two skinny matmuls and a small QR per iteration instead of the paper's SVD.

    Moments are kept across a refresh, as in GaLore. Raises ValueError for options out of range.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, amsgrad=False, *, rank=None, scale=0.25,
                 refresh_every=200, adaptive=True, cosine_threshold=0.4, max_refresh_every=None, bits=4, group_size=256, iterations=1,
                 maximize=False, states="int8", **options):
        FusedOptimizer.__init__(
            self, params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, rank=rank, scale=scale,
                               refresh_every=refresh_every, adaptive=adaptive, cosine_threshold=cosine_threshold,
                               max_refresh_every=max_refresh_every, bits=bits, group_size=group_size, iterations=iterations),
            states=states, maximize=maximize, **options)

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        small = [tuple(p.shape) for p in group["params"] if group["rank"] is not None and p.dim() >= 2 and not self._projects(p, group)]
        if small:
            warnings.warn(f"rank {group['rank']} is not below the smaller side of {len(small)} parameters (the first of shape {small[0]}): "
                          "they take plain AdamW steps, with full-size states and without scale", stacklevel=3)

    def check_group(self, group):
        super().check_group(group)
        if group["rank"] is not None and group["master_weight_bits"] is not None:
            raise ValueError(f"master_weight_bits is {group['master_weight_bits']}; it must be None in a group that is projected")
        want = {"rank": group["rank"] is None or (isinstance(group["rank"], int) and group["rank"] >= 1), "scale": group["scale"] > 0,
                "refresh_every": group["refresh_every"] >= 1, "cosine_threshold": 0 <= group["cosine_threshold"] <= 1,
                "max_refresh_every": group["max_refresh_every"] is None or group["max_refresh_every"] >= group["refresh_every"], "bits": group["bits"] in (4, 8),
                "group_size": group["group_size"] >= 0 and group["group_size"] % 2 == 0, "iterations": group["iterations"] >= 1}
        meaning = {"rank": "None or an int of at least 1", "scale": "positive", "refresh_every": "at least 1", "cosine_threshold": "in [0, 1]",
                   "max_refresh_every": "None or at least refresh_every", "bits": "4 or 8", "group_size": "0 (a whole basis vector) or even",
                   "iterations": "at least 1"}
        for name, good in want.items():
            if not good:
                raise ValueError(f"{name} is {group[name]!r}; it must be {meaning[name]}")

    # --- a projected parameter ----------------------------------------------------------------------------
    @staticmethod
    def _projects(p, group) -> bool:
        return group["rank"] is not None and p.dim() >= 2 and min(p.shape[0], p.shape[1:].numel()) > group["rank"]

    @staticmethod
    def _left(rows, columns) -> bool:
        return rows < columns

    def _compressed(self, p, group) -> torch.Size:
        rows, columns = p.shape[0], p.shape[1:].numel()
        return torch.Size((group["rank"], columns) if self._left(rows, columns) else (rows, group["rank"]))

    def _init_state(self, p, group):
        if not self._projects(p, group):
            return super()._init_state(p, group)
        if is_sharded(p):
            raise TypeError(f"a DTensor parameter of shape {tuple(p.shape)} cannot be projected: a basis needs the whole gradient; set rank to None")
        state = self.state[p]
        state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        state["rng_id"] = self._rng_id(p)
        self._new_states(state, group, torch.empty(self._compressed(p, group), dtype=torch.float32, device=p.device))
        state["refresh_interval"] = group["refresh_every"]
        state["next_refresh"] = 1
        state["cosines"] = torch.zeros(0, dtype=torch.float32, device="cpu")

    def _step_group(self, group, items, factor):
        projected = [item for item in items if "next_refresh" in item.state]
        self.apply_rule(group, [item for item in items if "next_refresh" not in item.state], factor)
        compressed, basis = [], self._basis_format(group)
        for p, grad, state, step, *_ in projected:
            g = as_matrix(grad)
            left = self._left(*g.shape)
            if step >= state["next_refresh"]:
                self._refresh(state, g, left, group, step)
            r = project(g, state["basis_codes"], state["basis_scales"], state["basis_zeros"], basis.code, basis.block, left)
            compressed.append(Item(torch.empty_like(r), r, state, step))
        self.apply_rule(group, compressed, factor, param_code="delta", decay=False)
        decay = 1 - float(group["lr"]) * group["weight_decay"]
        for (p, _, state, step, *_), (update, *_) in zip(projected, compressed):
            self._back(p, state, update, decay, decay * group["scale"], group, step)

    @staticmethod
    def _basis_format(group) -> Format:
        return Format("uint4" if group["bits"] == 4 else "uint8", group["group_size"])

    def _refresh(self, state, g, left, group, step):
        d = g.shape[0] if left else g.shape[1]
        format = self._basis_format(group)
        key = torch.tensor([group["seed"], step], dtype=torch.int64, device="cpu")
        old = self._basis(state, format, d)
        if old is not None and not torch.isfinite(old).all():
            old = None  # a nan gradient spoilt it: start again
        basis = subspace_basis(g, old, group["rank"], group["iterations"] + (old is None), left, key, stream(state["rng_id"], "basis"))
        if old is not None and group["adaptive"]:
            cosine = torch.nn.functional.cosine_similarity(basis[0], old[0], dim=0).abs().cpu()
            state["cosines"] = torch.cat((state["cosines"], cosine[None]))[-QUEUE:]
            if len(state["cosines"]) == QUEUE and float(state["cosines"].mean()) >= group["cosine_threshold"]:
                cap = 16 * group["refresh_every"] if group["max_refresh_every"] is None else group["max_refresh_every"]
                state["refresh_interval"] = min(2 * state["refresh_interval"], cap)
                state["cosines"] = torch.zeros(0, dtype=torch.float32, device="cpu")
        state["next_refresh"] = step + state["refresh_interval"]
        state["basis_codes"], state["basis_scales"], state["basis_zeros"] = quantize(basis, format.code, format.block)

    @staticmethod
    def _basis(state, format, d):
        """The stored basis as fp32 (rank, d), None before the first refresh."""
        if "basis_codes" not in state:
            return None
        return dequantize(state["basis_codes"], state["basis_scales"], state["basis_zeros"], format.code, format.block, d, torch.float32)

    def _back(self, p, state, update, decay, alpha, group, step):
        rows, columns = p.shape[0], p.shape[1:].numel()
        left = self._left(rows, columns)
        basis = self._basis_format(group)
        scalars = torch.tensor([decay, alpha], dtype=torch.float32, device="cpu")
        key = torch.tensor([group["seed"], step], dtype=torch.int64, device="cpu")
        if isinstance(p, QuantizedWeight):
            weight = (p.codes, p.scales, p.zeros if p.format.has_zero_point else None, p.format.code, p.format.block)
            target = None
        else:
            target = p if p.is_contiguous() else p.contiguous()
            weight = (target, None, None, float_code(p.dtype), 0)
        project_back(*weight, columns, update, state["basis_codes"], state["basis_scales"], state["basis_zeros"], basis.code, basis.block,
                     left, scalars, key, stream(state["rng_id"], "weight"))
        if target is not None and target is not p:
            p.copy_(target)

    # --- checkpoints --------------------------------------------------------------------------------------
    def _adopt_states(self, saved, like, group, index):
        if "next_refresh" not in saved and self._projects(like, group):
            raise CheckpointError(f"state {index} is not projected; its parameter of shape {tuple(like.shape)} is, with rank {group['rank']}")
        if "next_refresh" not in saved:
            return super()._adopt_states(saved, like, group, index)
        if not self._projects(like, group):
            raise CheckpointError(f"state {index} is a projected one; its parameter of shape {tuple(like.shape)} is not projected "
                                  f"with rank {group['rank']}")
        super()._adopt_states(saved, torch.empty(self._compressed(like, group), dtype=torch.float32, device=like.device), group, index)
        left = self._left(like.shape[0], like.shape[1:].numel())
        d = like.shape[0] if left else like.shape[1:].numel()
        format = self._basis_format(group)
        blocks = (group["rank"], format.blocks(d))
        if "basis_codes" in saved:
            saved["basis_codes"] = self._adopt_tensor(saved, "basis_codes", (format.code_dtype,), (group["rank"], format.code_columns(d)),
                                                      like.device, index)
            saved["basis_scales"] = self._adopt_tensor(saved, "basis_scales", (torch.float32,), blocks, like.device, index)
            saved["basis_zeros"] = self._adopt_tensor(saved, "basis_zeros", (torch.uint8,), blocks, like.device, index)
        elif saved["step"] > 0:
            raise CheckpointError(f"state {index}: basis_codes is missing")
        length = min(len(saved["cosines"]), QUEUE) if isinstance(saved.get("cosines"), torch.Tensor) and saved["cosines"].dim() == 1 else 0
        saved["cosines"] = self._adopt_tensor(saved, "cosines", (torch.float32,), (length,), "cpu", index)
        for name in ("refresh_interval", "next_refresh"):
            if not isinstance(saved.get(name), int) or saved[name] < 1:
                raise CheckpointError(f"state {index}: {name} is {saved.get(name)!r}; it must be an int of at least 1")
