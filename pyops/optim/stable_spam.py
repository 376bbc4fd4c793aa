"""Stable-SPAM."""
from __future__ import annotations

from math import cos, inf, pi, sqrt

import torch

from gradmill.optim._base import FusedOptimizer, local, measured
from gradmill.optim.adamw import check_betas, check_eps, check_lr_and_decay


class StableSPAM(FusedOptimizer):
    """AdamW that survives spiking gradients, as low-precision training has them.

    Source: Huang et al., "Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam", Algorithm 1. Tensor by tensor,
    t counting its steps: AdaClip: M <- theta M + (1 - theta) max|g|, M^ = M / (1 - theta^t); elements beyond M^ are scaled by
    M^ / max|g|. AdaGN: with n the norm of what results and a, b averages of n and n^2 (gamma1, gamma2, bias-corrected),
    g <- g / n a / (sqrt(b) + eps). Then AdamW; every ``reset_every`` steps both moments and Adam's own step count start
    again. (The official code reuses the old moments with t = 1 and resets M's count too; here M, a and b keep theirs.)

    Args:
        params, lr, betas, eps, weight_decay: as in AdamW, weight_decay 0.
        gammas: (0.7, 0.9). theta: 0.999. reset_every: 1000 (the paper: 500 for 4-bit training), None for never.
        decay_steps: None, or the number of steps in which beta1 and gamma1 fall to half by a cosine, as the paper's long runs do.
        maximize, options: see :class:`gradmill.optim.FusedOptimizer`. A nan or an inf in a gradient would stay in M:
            take on_nonfinite="skip" where they occur.

    Raises:
        ValueError: for hyperparameters out of range. TypeError: for parameters of another dtype than float32,
            float64, bfloat16 or float16. RuntimeError at step for sparse gradients.
    """

    host_decides = "whose limits and norms the host keeps and compares"

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, *, gammas=(0.7, 0.9), theta=0.999, reset_every=1000,
                 decay_steps=None, maximize=False, **options):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, gammas=gammas, theta=theta,
                                      reset_every=reset_every, decay_steps=decay_steps), maximize=maximize, **options)

    def check_group(self, group):
        check_lr_and_decay(group)
        check_eps(group)
        check_betas(group)
        for name, value in (("gammas[0]", group["gammas"][0]), ("gammas[1]", group["gammas"][1]), ("theta", group["theta"])):
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{name} is {value!r}; it must be at least 0 and below 1")
        for name in ("reset_every", "decay_steps"):
            if group[name] is not None and not group[name] >= 1:
                raise ValueError(f"{name} is {group[name]!r}; it must be None or at least 1")

    def rule(self, group):
        return "stable_spam"

    def _init_state(self, p, group):
        super()._init_state(p, group)
        self.state[p].update(adam_step=0, norm_step=0, largest=0.0, norm=0.0, norm_sq=0.0)

    def _adopt_states(self, saved, like, group, index):
        super()._adopt_states(saved, like, group, index)
        saved.setdefault("adam_step", int(saved["step"]))  # AdamW's checkpoint: its moments go on, the norms start anew
        self._adopt_numbers(saved, ("adam_step", "norm_step", "largest", "norm", "norm_sq"), index)

    def _step_group(self, group, items, factor):
        theta, (gamma1, gamma2), (beta1, beta2) = group["theta"], group["gammas"], map(float, group["betas"])
        grads, size = [item.owner.grad for item in items], abs(factor)
        found = measured(grads)
        limits = torch.full((len(items), 2), inf, dtype=torch.float32, device="cpu")
        plans = []
        for i, item in enumerate(items):
            state, largest = item.state, size * float(found[i, 1])
            if group["reset_every"] is not None and state["adam_step"] == group["reset_every"]:
                state["adam_step"] = 0
                for name, value in state.items():
                    if name.startswith("exp_avg"):
                        local(value).zero_()
            state["adam_step"] += 1
            state["norm_step"] += 1
            state["largest"] = theta * state["largest"] + (1 - theta) * largest
            limit = state["largest"] / (1 - theta ** state["norm_step"])
            plans.append((limit, limit / largest) if largest > limit else (inf, 1.0))
            limits[i, 0], limits[i, 1] = plans[-1][0] / size if size else inf, plans[-1][1]
        clipped = [i for i, (limit, _) in enumerate(plans) if limit < inf]
        if clipped:
            found[clipped] = measured([grads[i] for i in clipped], limits[clipped])
        ready = []
        for item, (limit, share), (squares, _) in zip(items, plans, found.tolist()):
            state, step, norm = item.state, item.state["norm_step"], size * sqrt(squares)
            half = 1.0 if group["decay_steps"] is None else 0.75 + 0.25 * cos(pi * min(item.step / group["decay_steps"], 1.0))
            state["norm"] = half * gamma1 * state["norm"] + (1 - half * gamma1) * norm
            state["norm_sq"] = gamma2 * state["norm_sq"] + (1 - gamma2) * norm * norm
            mean, root = state["norm"] / (1 - (half * gamma1) ** step), sqrt(state["norm_sq"] / (1 - gamma2 ** step))
            scale = mean / (root + group["eps"]) / norm if norm > 0 else 1.0
            ready.append(item._replace(options={"adam_step": state["adam_step"], "limit": limit, "share": share, "scale": scale,
                                                "betas": (half * beta1, beta2)}))
        self.apply_rule(group, ready, factor)
