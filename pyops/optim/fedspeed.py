"""FedSpeed's local step."""
from __future__ import annotations

import torch

from gradmill.optim._base import FusedOptimizer, Item
from gradmill.optim.adamw import check_lr_and_decay
from gradmill.weight import QuantizedWeight


class FedSpeed(FusedOptimizer):
    """A federated client's local step: a gradient mixed with one taken uphill, a proximal term and its correction.

    Source: Sun et al., "FedSpeed: Larger Local Interval, Less Communication Round, and Higher Generalization Accuracy",
    Algorithm 1. g1 at w, e = rho g1 / (norm(g1) + 1e-7) over all parameters, g2 at w + e;
    w <- w - lr ((1-alpha) g1 + alpha g2 + weight_decay w + prox (w - w_t + h)), w_t the weights a round began with. At the end of
    a round h <- h + w_K - w_t. (prox is the paper's 1/lambda.) ::

        optimizer.begin_round()                  # after the server's weights were copied in
        for batch in data: optimizer.step(closure)   # zero_grad, loss, backward; called twice
        optimizer.end_round()

    Args:
        params, lr, rho, alpha, prox, weight_decay: (.1, .1, 1, .1, 0). alpha 1 is the authors' simulator's: the second gradient only.
        maximize, foreach, fused, seed: see :class:`gradmill.optim.FusedOptimizer`. There are two fp32 states per weight,
            "start" and "correction".

    Raises:
        ValueError: for hyperparameters out of range. TypeError: for parameters of another dtype than float32, bfloat16 or
            float16, and for QuantizedWeight. RuntimeError at a step without a closure.
    """

    steps_shards = False
    host_decides = "whose step is made of two gradients"
    releases_not = "whose step is made of two gradients"
    offloads_not = "whose two fp32 states are read with the weights between its two gradients; leave it out"

    def __init__(self, params, lr=0.1, rho=0.1, alpha=1.0, prox=0.1, weight_decay=0.0, **options):
        super().__init__(params, dict(lr=lr, rho=rho, alpha=alpha, prox=prox, weight_decay=weight_decay), **options)
        if self.max_grad_norm is not None or self.on_nonfinite != "propagate":
            raise ValueError("max_grad_norm and on_nonfinite: FedSpeed has neither, its step is made of two gradients")

    def check_group(self, group):
        check_lr_and_decay(group)
        for name in ("rho", "alpha", "prox"):
            if not 0.0 <= group[name] <= (1.0 if name == "alpha" else float("inf")):
                raise ValueError(f"{name} is {group[name]}; it must be at least 0{', at most 1' * (name == 'alpha')}")
        if any(isinstance(p, QuantizedWeight) for p in group.get("params", ())):
            raise TypeError("FedSpeed does not step a QuantizedWeight")
        if any(getattr(p, "dtype", None) == torch.float64 for p in group.get("params", ())):
            raise TypeError("FedSpeed does not step torch.float64 parameters: its two states are fp32")

    def rule(self, group):
        return "sgd"

    def _all(self):
        return [(group, p) for group in self.param_groups for p in group["params"]]

    def _init_state(self, p, group):
        super()._init_state(p, group)
        self.state[p]["start"] = p.detach().to(torch.float32, copy=True)
        self.state[p]["correction"] = torch.zeros(p.shape, dtype=torch.float32, device=p.device)

    def _adopt_states(self, saved, like, group, index):
        for name in ("start", "correction"):
            saved[name] = self._adopt_tensor(saved, name, (torch.float32,), like.shape, like.device, index)

    @torch.no_grad()
    def begin_round(self):
        """Remembers the weights as the round's first."""
        for group, p in self._all():
            if not self.state[p]:
                self._init_state(p, group)
            self.state[p]["start"].copy_(p)

    @torch.no_grad()
    def end_round(self):
        """Adds the round's movement to the correction."""
        for _, p in self._all():
            if self.state[p]:
                self.state[p]["correction"].add_(p.to(torch.float32) - self.state[p]["start"])

    @torch.no_grad()
    def step(self, closure=None):
        """One local step. ``closure`` clears the gradients, computes the loss and calls backward; it runs twice, and the first
        loss, at w, is returned."""
        if closure is None:
            raise RuntimeError("FedSpeed.step needs a closure: it takes a second gradient")
        with torch.enable_grad():
            loss = closure()
        live = [(group, p) for group, p in self._all() if p.grad is not None]
        for _, p in live:
            self._check_gradient(p)
        if not live:
            return loss
        first = [p.grad.to(torch.float32, copy=True) for _, p in live]
        kept = [p.detach().clone() for _, p in live]
        norm = torch.stack([n.cpu() for n in torch._foreach_norm(first)]).square().sum().sqrt()
        for (group, p), g in zip(live, first):
            sign = -1 if group["maximize"] else 1
            p.copy_(p.to(torch.float32) + sign * group["rho"] / (float(norm) + 1e-7) * g)
        with torch.enable_grad():
            closure()
        for (group, p), g, w in zip(live, first, kept):
            p.copy_(w)
            if not self.state[p]:
                self._init_state(p, group)
            state, sign = self.state[p], -1.0 if group["maximize"] else 1.0
            state["step"] += 1
            if p.grad is not None:
                g = g.mul_(1 - group["alpha"]).add_(p.grad, alpha=group["alpha"])
            g = g.mul_(sign).add_(w.to(torch.float32) - state["start"] + state["correction"], alpha=group["prox"])
            self.apply_rule({**group, "maximize": False}, [Item(p, g, state, int(state["step"]))], 1.0)
            torch.autograd.graph.increment_version(p)
        return loss
