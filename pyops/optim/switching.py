"""SWATS and STEP's Adam: optimizers that turn into another one when their statistics have settled."""
from __future__ import annotations

from math import sqrt

import torch

from gradmill.ops.quant import dequantize
from gradmill.optim._base import CheckpointError, FusedOptimizer, Item, full_precision, stored_format
from gradmill.optim.adamw import AdamW
from gradmill.reference.optim import as_matrix


class SWATS(AdamW):
    """SWATS: Adam that switches each tensor to SGD with momentum once the rate SGD would need has settled.

    Source: Keskar and Socher, "Improving Generalization Performance by Switching from Adam to SGD", Algorithm 1. With Adam's
    step p and p.g != 0: gamma = p.p / -p.g, lambda = EMA(gamma, beta2); when t > 1 and abs(lambda/bc2 - gamma) < tolerance
    and lambda > 0: v = beta1 v + g, theta <- theta - (1-beta1) (lambda/bc2) v from then on. The paper's Algorithm does this for
    all weights at once; here, as its text suggests, each tensor has its own rate and switches by itself. (Other
    implementations scale the momentum buffer in place, or switch a whole group with its first tensor.) v takes exp_avg's
    place; state: "gamma_avg" (lambda) and "sgd_lr" (0 until switched). lr schedules scale both phases' rates.

    Args:
        params, lr, betas, eps: (1e-3, (.9, .999), 1e-9); eps is added to the uncorrected root.
        tolerance: 1e-9, the paper's; with float gradients 1e-5 switches in practice.
        The other options and what is raised: as in :class:`gradmill.optim.AdamW`.
    """

    steps_shards = False
    host_decides = "whose switch to SGD the host decides, tensor by tensor"

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-9, tolerance=1e-9, **options):
        FusedOptimizer.__init__(self, params, dict(lr=lr, betas=betas, eps=eps, tolerance=tolerance, weight_decay=0.0), **options)

    def check_group(self, group):
        super().check_group(group)
        if group["weight_decay"]:
            raise ValueError("weight_decay: SWATS has none")

    def _init_state(self, p, group):
        super()._init_state(p, group)
        self.state[p].update(gamma_avg=0.0, sgd_lr=0.0)

    def _adopt(self, saved, p, group, index):
        for name in ("gamma_avg", "sgd_lr"):  # an AdamW checkpoint has none
            if not isinstance(saved.setdefault(name, 0.0), (int, float)):
                raise CheckpointError(f"state {index}: {name} is {saved[name]!r}; it must be a number")
        return super()._adopt(saved, p, group, index)

    def _step_group(self, group, items, factor):
        beta1, beta2 = map(float, group["betas"])
        lr, plain = float(group["lr"]), {**group, "maximize": False}
        sgd = {**group, "momentum": beta1, "dampening": 0.0, "nesterov": False}
        for item in items:
            state = item.state
            if state["sgd_lr"]:
                buffer = {k.replace("exp_avg", "momentum_buffer"): v for k, v in state.items() if not k.startswith("exp_avg_sq")}
                self.apply_rule(sgd, [item._replace(state=buffer)], factor, rule="sgd_momentum", lr=(1 - beta1) * lr * state["sgd_lr"])
                continue
            bc2 = 1 - beta2 ** item.step
            step = torch.empty(item.grad.shape, dtype=full_precision(item.param), device=item.grad.device)
            self.apply_rule({**group, "eps": group["eps"] / sqrt(bc2)}, [item._replace(param=step)], factor, param_code="delta")
            self.apply_rule(plain, [Item(item.param, step, state, item.step)], 1.0, rule="sgd", lr=-1.0)
            along = float((step * item.grad).sum()) * factor * (-1 if group["maximize"] else 1)
            if along == 0:
                continue
            gamma = float(step.square().sum()) / -along
            state["gamma_avg"] = beta2 * state["gamma_avg"] + (1 - beta2) * gamma
            settled = state["gamma_avg"] / bc2
            if item.step > 1 and abs(settled - gamma) < group["tolerance"] and settled > 0 and lr > 0:
                state["sgd_lr"] = settled / lr
                for name in ("exp_avg", "exp_avg_codes", "exp_avg_scales"):
                    if name in state:
                        state[name].zero_()


class STEPAdam(AdamW):
    """STEP's Adam: the second moment is frozen when it has stopped changing, and preconditions from then on.

    Source: Lu et al., "STEP: Learning N:M Structured Sparsity Masks from Scratch with Precondition", Algorithm 1 and AutoSwitch
    (the mask-learning phase is not here). z_t = mean(abs(v_t - v_(t-1))) over a group's parameters; when the mean of its last
    1/(1-beta2) values is below ``threshold`` and t > ``min_steps``, v stays as v*, and theta <- theta - lr m^ / (sqrt(v*) + eps),
    without a correction of v*. The threshold is absolute: small gradients meet it at once, so set ``min_steps``. The group keeps
    "changes" (the window) and "frozen_at" (0: not yet).

    Args:
        params, lr, betas, eps, weight_decay: as in :class:`gradmill.optim.AdamW`, decoupled decay of 0.
        threshold, min_steps: 1e-8 and 0.
        The other options and what is raised: as in :class:`gradmill.optim.AdamW`.
    """

    steps_shards = False
    host_decides = "of whose second moment the host decides when it settles"
    releases_not = "whose second moments settle together"

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, threshold=1e-8, min_steps=0, **options):
        FusedOptimizer.__init__(self, params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, threshold=threshold,
                                                   min_steps=min_steps), **options)

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        self.param_groups[-1].setdefault("changes", [])
        self.param_groups[-1].setdefault("frozen_at", 0)

    def _step_group(self, group, items, factor):
        beta1, beta2 = map(float, group["betas"])
        if group["frozen_at"]:
            return super()._step_group({**group, "betas": (beta1, 1.0)}, items, factor)
        total = 0.0
        for item in items:
            variance = self._variance(item)  # in CPU memory with offload=True
            total += float((variance - as_matrix(item.grad).to(variance).mul(factor).square()).abs().sum())
        count = sum(item.grad.numel() for item in items)
        super()._step_group(group, items, factor)
        if not count:
            return
        window = max(1, round(1 / (1 - beta2)))
        group["changes"] = [*group["changes"], (1 - beta2) * total / count][-window:]
        step = max(item.step for item in items)
        if len(group["changes"]) == window and step > group["min_steps"] and sum(group["changes"]) / window < group["threshold"]:
            group["frozen_at"], group["changes"] = step, []

    @staticmethod
    def _variance(item):
        """exp_avg_sq as an fp32 (or float64) matrix."""
        state = item.state
        if "exp_avg_sq" in state:
            return as_matrix(state["exp_avg_sq"]).to(full_precision(state["exp_avg_sq"]))
        codes, scales, columns = state["exp_avg_sq_codes"], state["exp_avg_sq_scales"], as_matrix(item.grad).shape[1]
        format = stored_format("square8", codes, columns)  # what is stored, not the group's option, which may have changed
        return dequantize(codes, scales, scales.new_empty(0, dtype=torch.uint8), format.code, format.block, columns, torch.float32)
