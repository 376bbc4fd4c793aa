"""Adagrad, its relatives AdaGradNorm and CLASSP, and AdAdaGrad's norm test."""
from __future__ import annotations

from math import ceil, sqrt

import torch

from gradmill.ops.optim import as_matrix_shape
from gradmill.ops.quant import quantize
from gradmill.optim._base import FusedOptimizer, measured
from gradmill.optim.adamw import check_eps, check_lr_and_decay


class Adagrad(FusedOptimizer):
    """torch.optim.Adagrad with low-precision states and weights.

    Source: Duchi, Hazan and Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization".
    Arguments, names and defaults are torch.optim.Adagrad's. The sum of squares only grows; an 8-bit one is dithered, so
    that it keeps growing when a step adds less than a code. With :func:`gradmill.optim.norm_test` choosing the batch size
    it is AdAdaGrad.

    Args:
        params, lr, lr_decay, weight_decay, initial_accumulator_value, eps: as in torch.optim.Adagrad. lr may be a tensor.
        foreach: accepted and ignored.
        maximize, fused, differentiable, states, min_quantized_numel, seed: see :class:`gradmill.optim.FusedOptimizer`.

    Raises:
        ValueError: for hyperparameters out of range. TypeError: for parameters of another dtype than float32,
            float64, bfloat16 or float16. RuntimeError at step for sparse gradients.
    """

    def __init__(self, params, lr=1e-2, lr_decay=0, weight_decay=0, initial_accumulator_value=0, eps=1e-10, foreach=None, **options):
        super().__init__(params, dict(lr=lr, lr_decay=lr_decay, weight_decay=weight_decay, initial_accumulator_value=initial_accumulator_value,
                                      eps=eps), **options)

    def check_group(self, group):
        check_lr_and_decay(group)
        check_eps(group)
        for name in ("lr_decay", "initial_accumulator_value"):
            if not 0.0 <= group[name]:
                raise ValueError(f"Invalid {name} value: {group[name]}")

    def rule(self, group):
        return "adagrad"

    def _new_states(self, state, group, like):
        super()._new_states(state, group, like)
        value = group["initial_accumulator_value"]
        if not value:
            return
        (format,) = self._formats_like(group, like)
        if format.blocked:
            full = torch.full(as_matrix_shape(like), value, dtype=torch.float32, device=self._home(like, group))
            state["sum_codes"], state["sum_scales"], _ = quantize(full, format.code, format.block)
        else:
            state["sum"].fill_(value)


class AdaGradNorm(FusedOptimizer):
    """AdaGrad-Norm: SGD whose one step size is lr over the root of the sum of squared gradient norms.

    Source: Ward, Wu and Bottou, "AdaGrad stepsizes: Sharp convergence over nonconvex landscapes", Algorithm 1; the step of
    AdAdaGrad-Norm (Lau, Liu and Kolar, "AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods"), whose batch
    sizes :func:`gradmill.optim.norm_test` chooses. b^2 <- b^2 + norm(g)^2; theta <- theta - lr g / b, with one b for all
    parameters of a group, as in the papers (AdAdaGrad's code keeps one per row). b^2 is kept in the group, "b_squared".

    Args:
        params, lr: the step size, 1e-2.
        b0: b before the first step, 1e-2.
        maximize, foreach, fused, capturable, differentiable, seed: see :class:`gradmill.optim.FusedOptimizer`. There is no
            state per weight.

    Raises:
        ValueError: for hyperparameters out of range. TypeError: for parameters of another dtype than float32,
            float64, bfloat16 or float16. RuntimeError at step for sparse gradients.
    """

    steps_shards = False
    host_decides = "whose norm the host keeps"
    releases_not = "whose one norm is that of all gradients together"

    def __init__(self, params, lr=1e-2, b0=1e-2, **options):
        super().__init__(params, dict(lr=lr, b0=b0, weight_decay=0.0), **options)

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        self.param_groups[-1].setdefault("b_squared", self.param_groups[-1]["b0"] ** 2)

    def check_group(self, group):
        check_lr_and_decay(group)
        if not 0.0 < group["b0"]:
            raise ValueError(f"b0 is {group['b0']}; it must be above 0")
        if group["weight_decay"]:
            raise ValueError("weight_decay: AdaGradNorm has none")

    def rule(self, group):
        return "sgd"

    def _step_group(self, group, items, factor):
        if not items:
            return
        group["b_squared"] += float(measured([item.grad for item in items])[:, 0].sum()) * factor ** 2
        self.apply_rule(group, items, factor, lr=float(group["lr"]) / sqrt(group["b_squared"]))


class CLASSP(FusedOptimizer):
    """CLASSP: only weights with a large gradient learn, and the less the more they have learned.

    Source: Ludwig, "CLASSP: a Biologically-Inspired Approach to Continual Learning through Adjustment Suppression and Sparsity
    Promotion". Where g^2 > threshold: S <- S + abs(g)^power, theta <- theta - lr g / (eps + S)^(1/power); elsewhere both
    stay. power 2 and threshold 0 is Adagrad with eps inside the root. (The official code tests whether *any* element of the
    tensor is above the threshold, and never applies the power; this follows the paper.)

    Args:
        params, lr, threshold, eps, power: .2, .5, 1e-5 and 1 by default, the paper's. Powers other than 1 and 2 are computed
            by polynomials, within 2^-18 of themselves for gradients (and sums) between 2^-7 and 2^7.
        maximize, foreach, fused, capturable, differentiable, states, min_quantized_numel, seed: see
            :class:`gradmill.optim.FusedOptimizer`.

    Raises:
        ValueError: for hyperparameters out of range. TypeError: for parameters of another dtype than float32,
            float64, bfloat16 or float16. RuntimeError at step for sparse gradients.
    """

    def __init__(self, params, lr=0.2, threshold=0.5, eps=1e-5, power=1.0, **options):
        super().__init__(params, dict(lr=lr, threshold=threshold, eps=eps, power=power, weight_decay=0.0), **options)

    def check_group(self, group):
        check_lr_and_decay(group)
        check_eps(group)
        if not 0.0 <= group["threshold"]:
            raise ValueError(f"threshold is {group['threshold']}; it must be at least 0")
        if not 0.25 <= group["power"] <= 4.0:
            raise ValueError(f"power is {group['power']}; it must be between 1/4 and 4")
        if group["weight_decay"]:
            raise ValueError("weight_decay: CLASSP has none")

    def rule(self, group):
        return "classp"


def norm_test(gradients, batch_size: int, eta: float = 0.1) -> int:
    """The batch size that AdAdaGrad goes on with, from the gradients of one batch's equal parts.

    Source: Lau, Liu and Kolar, "AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods", the norm test:
    max(batch_size, ceil(sum of the samples' variances / (eta^2 norm(mean gradient)^2))). A sample's variance is estimated
    by that between parts of batch_size / k samples each, times their size.

    Args:
        gradients: k >= 2 lists of tensors, each the mean gradient of one micro-batch (or of one worker's share).
        batch_size: samples in all parts together. eta: the paper's .1; larger grows the batch later.
    """
    gradients = [list(part) for part in gradients]
    if len(gradients) < 2 or batch_size < len(gradients):
        raise ValueError(f"gradients has {len(gradients)} parts of {batch_size} samples; a variance needs at least 2, of a sample each")
    variance = square = 0.0
    for parts in zip(*gradients):
        stacked = torch.stack([g.detach().to(torch.float32) for g in parts])
        variance += float(stacked.var(0).sum())
        square += float(stacked.mean(0).square().sum())
    if not variance or not square:
        return batch_size
    return max(batch_size, ceil(variance * batch_size / len(gradients) / (eta ** 2 * square)))
