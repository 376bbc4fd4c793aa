"""Sophia, and its two estimators of the Hessian's diagonal."""
from __future__ import annotations

import torch

from gradmill.ops._registry import describe, short
from gradmill.ops.quant import FLOATS
from gradmill.optim._base import FusedOptimizer, Item, full_precision
from gradmill.optim.adamw import AdamW


class Sophia(AdamW):
    """Sophia: momentum over a moving average of the Hessian's diagonal, clipped element by element.

    Source: Liu et al., "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model Pre-training", Algorithm 3;
    defaults are the authors' code's. theta <- theta (1 - lr wd) - lr clip(m / max(rho h, eps), 1). Every k = 10 steps call
    :meth:`update_hessian`, and once before the first step: while h is 0 every step is lr times the momentum's sign.

    Gauss-Newton-Bartlett (Sophia-G): gradients of a loss whose labels are drawn from the model itself::

        gauss_newton_bartlett(model(x)).backward()      # do not clip these gradients
        optimizer.update_hessian(samples)               # how many rows of logits the loss is the mean of
        optimizer.zero_grad()

    (The authors' code keeps an average of the squared gradient alone and multiplies it by ``rho * bs`` at each step; here, as
    in the paper, h includes the number of samples.) Hutchinson (Sophia-H)::

        optimizer.update_hessian(estimates=hutchinson(loss, parameters))

    Under states="int8" the hessian is bf16: it is signed, and 1 % of a difference would be lost to nearest in 8 bits.

    Args:
        params, lr, betas, rho, weight_decay, eps: (1e-4, (.965, .99), .04, .1, 1e-12). betas[1] is the hessian's.
        The other options and what is raised: as in :class:`gradmill.optim.AdamW`.
    """

    steps_shards = False

    def __init__(self, params, lr=1e-4, betas=(0.965, 0.99), rho=0.04, weight_decay=0.1, eps=1e-12, **options):
        FusedOptimizer.__init__(self, params, dict(lr=lr, betas=betas, rho=rho, weight_decay=weight_decay, eps=eps), **options)

    def check_group(self, group):
        super().check_group(group)
        if group.get("projection") is not None:
            raise ValueError("Sophia's Hessian is estimated weight by weight, so it takes no projection")
        if not 0.0 <= group["rho"]:
            raise ValueError(f"rho is {group['rho']}; it must be at least 0")

    def rule(self, group):
        return "sophia"

    @torch.no_grad()
    def update_hessian(self, samples: int | None = None, *, estimates=None):
        """h <- beta2 h + (1 - beta2) e with e = samples * grad^2, or one of ``estimates``.

        Args:
            samples: the parameters' ``grad`` is that of :func:`gauss_newton_bartlett`, a mean over so many samples.
            estimates: instead, estimates of the diagonal, one tensor (or None) per parameter in the groups' order.
        """
        if (samples is None) == (estimates is None):
            raise ValueError("update_hessian: give either samples or estimates")
        params = [p for group in self.param_groups for p in group["params"]]
        estimates = [p.grad for p in params] if estimates is None else list(estimates)
        if len(estimates) != len(params):
            raise ValueError(f"update_hessian: {len(estimates)} estimates for {len(params)} parameters")
        if samples is not None and not samples > 0:
            raise ValueError(f"update_hessian: samples is {samples!r}; it must be above 0")
        for i, (p, e) in enumerate(zip(params, estimates)):  # before anything is changed
            if e is not None and (e.shape != p.shape or e.dtype not in (*FLOATS, full_precision(p)) or e.layout != torch.strided):
                raise ValueError(f"update_hessian: estimates[{i}] is {describe(e)}; it must be dense {short(FLOATS)} of its parameter's shape {tuple(p.shape)}")
        of = dict(zip(params, estimates))
        for group in self.param_groups:
            items = []
            for p in group["params"]:
                if of[p] is None:
                    continue
                if not self.state[p]:
                    self._init_state(p, group)
                items.append(Item(p, of[p], self.state[p], int(self.state[p]["step"])))
            self.apply_rule({**group, "samples": samples, "maximize": False}, items, 1.0, rule="sophia_hessian")


def gauss_newton_bartlett(logits: torch.Tensor, generator=None) -> torch.Tensor:
    """The loss whose squared gradient, times the number of samples, estimates the diagonal of the Gauss-Newton matrix: the
    mean cross-entropy of ``logits`` (..., classes) with labels drawn from them. Source: Liu et al., "Sophia", Algorithm 2."""
    logits = logits.flatten(0, -2).to(torch.float32)
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    return torch.nn.functional.cross_entropy(logits, labels)


def hutchinson(loss: torch.Tensor, params, generator=None) -> list[torch.Tensor | None]:
    """u * (H u) for each of ``params``, u of random signs: an unbiased estimate of the Hessian's diagonal (None where ``loss``
    does not depend on it). Source: Liu et al., "Sophia", Algorithm 1. The loss must be twice differentiable."""
    params = list(params)
    grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
    signs = [None if g is None else torch.randint(0, 2, g.shape, generator=generator, device=g.device).to(g.dtype) * 2 - 1 for g in grads]
    live = [(g, u) for g, u in zip(grads, signs) if g is not None and g.requires_grad]
    if not live:
        return [None] * len(params)
    products = torch.autograd.grad([g for g, _ in live], params, [u for _, u in live], allow_unused=True)
    return [None if u is None or h is None else u * h for u, h in zip(signs, products)]
