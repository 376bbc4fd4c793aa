"""Muon, AuON and HybridAuON: updates that are whole matrices."""
from __future__ import annotations

from math import sqrt

import torch

from gradmill.optim._base import FusedOptimizer, Item, full_precision
from gradmill.optim.adamw import check_eps, check_lr_and_decay
from gradmill.optim.rules import number

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's: the largest slope at 0 of quintics that stay near 1
BLOCK = 256    # rows of a block of a symmetric product: smaller ones save more and run slower (1024 rows of fp32 on one Zen 4 core:
               # 0.79 of the time without blocks, 0.87 with 512, 0.94 with 128; 2048 rows: 0.73, 0.80, 0.77)


def symmetric_product(x: torch.Tensor) -> torch.Tensor:
    """x x^T, each pair of rows once, by blocks."""
    n = x.shape[0]
    if x.is_cuda or n < 2 * BLOCK:
        return x @ x.t()
    out = x.new_empty(n, n)
    for i in range(0, n, BLOCK):
        part = out[i:, i:i + BLOCK]
        torch.mm(x[i:], x[i:i + BLOCK].t(), out=part)
        out[i:i + BLOCK, i + BLOCK:] = part[BLOCK:].t()
    return out


def matmul_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU and on a CPU with bf16 instructions that torch is not held from (ATEN_CPU_CAPABILITY); elsewhere torch's bf16
    matmul is some 100 times slower than fp32's."""
    has = any(getattr(torch.cpu, f"_is_{name}_supported", lambda: False)() for name in ("avx512_bf16", "amx_tile"))
    held = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX", "AVX2")
    return torch.bfloat16 if device.type != "cpu" or has and not held else torch.float32


def newton_schulz(x: torch.Tensor, steps: int = 5, coefficients=COEFFICIENTS, eps: float = 1e-7, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Nearly the orthogonal factor of ``x`` (rows, columns): its singular values are moved to about 0.7 to 1.2.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks"; torch.optim.Muon. x over its Frobenius
    norm (at least ``eps``), then ``steps`` times a x + (b A + c A^2) x with A = x x^T. Computed in ``dtype``, by default in bf16
    where that is fast (on GPUs and CPUs with bf16 instructions), as torch does everywhere, else in fp32; the result has x's
    dtype. The products A and A^2 are symmetric: on CPU each half is computed once.
    """
    a, b, c = coefficients
    y = x.to(dtype or matmul_dtype(x.device))
    if x.shape[0] > x.shape[1]:
        y = y.t()
    y = y / y.norm().clamp(min=eps)
    for _ in range(steps):
        gram = symmetric_product(y)
        update = symmetric_product(gram).mul_(c).add_(gram, alpha=b)  # gram is symmetric
        y = torch.addmm(y, update, y, beta=a)
    return (y.t() if x.shape[0] > x.shape[1] else y).to(x.dtype)


class _MatrixOptimizer(FusedOptimizer):
    """Momentum into an fp32 direction, what a subclass makes of it, and that applied to the weight: two fused calls."""

    steps_shards = False

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.ndim != 2:
                self.param_groups.pop()
                raise ValueError(f"{type(self).__name__} only supports 2D parameters whereas we found a parameter with size: {p.size()}; "
                                 "give embeddings, norms and biases to an optimizer of their own, AdamW say")

    def check_group(self, group):
        check_lr_and_decay(group)
        check_eps(group)
        if not 0.0 <= group["momentum"]:
            raise ValueError(f"momentum should be >= 0 but is: {group['momentum']}")

    def rule(self, group):
        return "sgd_momentum"

    def direction(self, update: torch.Tensor, group: dict) -> tuple[torch.Tensor, float | torch.Tensor]:
        """The direction to step in, from the momentum's, and the factor on lr."""
        raise NotImplementedError

    def _step_group(self, group, items, factor):
        counted = bool(items) and isinstance(items[0].step, torch.Tensor)  # by the device: the host goes on
        lr = (number if counted else float)(group["lr"])
        average = {**group, "dampening": group["momentum"]}  # b = momentum b + (1-momentum) g
        plain = {**group, "maximize": False, "weight_decay": 0.0, "factor": 1 - lr * group["weight_decay"]}
        for item in items:  # one by one: only one matrix's direction is held at a time
            if not item.grad.numel():
                continue
            update = torch.empty(item.grad.shape, dtype=full_precision(item.param), device=item.grad.device)
            self.apply_rule(average, [item._replace(param=update)], factor, lr=-1.0, param_code="delta", decay=False)
            update, scale = self.direction(update, group)
            scale = scale if counted else float(scale)
            self.apply_rule(plain, [Item(item.param, update, item.state, item.step)], 1.0, rule="sgd", lr=lr * scale)


class Muon(_MatrixOptimizer):
    """torch.optim.Muon with low-precision states and weights: momentum, orthogonalised by a Newton-Schulz iteration.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks"; Liu et al., "Muon is Scalable for LLM
    Training". Arguments, names and defaults are torch.optim.Muon's (Jordan's own: lr .02, weight_decay 0). Its bf16 leaves
    a few percent of noise in an update, so results differ by that much from torch's, and between dtypes of the iteration.
    For matrices only; embeddings, heads, norms and biases want AdamW.

    Args:
        params, lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps: as in torch.optim.Muon. lr may be a
            tensor. Parameters are 2-D.
        adjust_lr_fn: "original" (None): lr sqrt(max(1, rows/columns)); "match_rms_adamw": .2 lr sqrt(max(rows, columns)).
        ns_dtype: of the iteration: None, torch.float32 or torch.bfloat16; see :func:`newton_schulz`.
        maximize, foreach, fused, capturable, differentiable, states, min_quantized_numel, seed: see
            :class:`gradmill.optim.FusedOptimizer`.

    Raises:
        ValueError: for hyperparameters out of range or a parameter that is not 2-D. TypeError: for parameters of another
            dtype than float32, float64, bfloat16 or float16 (complex ones too). RuntimeError at step for sparse gradients.
    """

    def __init__(self, params, lr=1e-3, weight_decay=0.1, momentum=0.95, nesterov=True, ns_coefficients=COEFFICIENTS, eps=1e-7, ns_steps=5,
                 adjust_lr_fn=None, *, ns_dtype=None, **options):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov, ns_coefficients=ns_coefficients,
                                      eps=eps, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn, ns_dtype=ns_dtype), **options)

    def check_group(self, group):
        super().check_group(group)
        if group["adjust_lr_fn"] not in (None, "original", "match_rms_adamw"):
            raise ValueError(f"Adjust learning rate function {group['adjust_lr_fn']} is not supported")
        if len(group["ns_coefficients"]) != 3:
            raise ValueError("Coefficients must be a tuple of exactly 3 values")
        if not 0 <= group["ns_steps"] < 100:
            raise ValueError("Number of steps must be less than 100 for computational efficiency")

    def direction(self, update, group):
        rows, columns = update.shape
        scale = 0.2 * sqrt(max(rows, columns)) if group["adjust_lr_fn"] == "match_rms_adamw" else sqrt(max(1, rows / columns))
        return newton_schulz(update, group["ns_steps"], group["ns_coefficients"], group["eps"], group["ns_dtype"]), scale

    # torch's state has no step
    def _adopt(self, saved, p, group, index):
        saved.setdefault("step", 1.0)
        return super()._adopt(saved, p, group, index)


class AuON(_MatrixOptimizer):
    """AuON: Nesterov momentum over r = sqrt(mean(cosh(gamma G / norm(G))^2)).

    Source: Maity, "AuON: A Linear-time Alternative to Semi-Orthogonal Momentum Updates". m = beta m + (1-beta) g;
    G = (1-beta) g + beta m; theta <- theta (1 - lr wd) - lr G / (r + 1e-8). Note that an element of G / norm(G) is about
    1 / sqrt(size): r is 1.0000 to 1.0006 for matrices of real sizes, so that this is SGD with a Nesterov moving average and
    a decoupled decay; :class:`HybridAuON` is the one that does something else.

    Args:
        params, lr, momentum, weight_decay, gamma: (.24, .95, 0, 1.5); momentum is the paper's beta.
        eps: added to r. Parameters are 2-D.
        maximize, foreach, fused, capturable, differentiable, states, min_quantized_numel, seed, and what is raised: as in
            :class:`gradmill.optim.Muon`.
    """

    def __init__(self, params, lr=0.24, momentum=0.95, weight_decay=0.0, gamma=1.5, eps=1e-8, **options):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, gamma=gamma, eps=eps, nesterov=True), **options)

    def direction(self, update, group):
        norm = update.norm().clamp(min=1e-30)
        r = torch.cosh(update * (group["gamma"] / norm)).square().mean().sqrt()
        return update, 1 / (r.double() + group["eps"])


class HybridAuON(AuON):
    """HybridAuON: :class:`AuON` on a Newton-Schulz iterate of the momentum.

    Source: as AuON. G goes through ``ns_steps`` steps of :func:`newton_schulz` first (the paper's text takes one, its code
    five; one by default).
    """

    def __init__(self, params, lr=0.24, momentum=0.95, weight_decay=0.0, gamma=1.5, eps=1e-8, ns_steps=1, *, ns_dtype=None,
                 **options):
        FusedOptimizer.__init__(self, params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, gamma=gamma, eps=eps, ns_steps=ns_steps,
                                                   ns_dtype=ns_dtype, nesterov=True), **options)

    def direction(self, update, group):
        return super().direction(newton_schulz(update, group["ns_steps"], dtype=group["ns_dtype"]), group)
