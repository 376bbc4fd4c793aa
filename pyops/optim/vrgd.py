"""VRGD: gradients weighted by their signal-to-noise ratio."""
from __future__ import annotations

import torch

from gradmill.optim._base import full_precision


class VRGD:
    """A wrapper that scales each element of the gradient by how much the shards of a batch agree on it.

    Source: Jiang et al., "Accelerating Large Batch Training via Gradient Signal to Noise Ratio (GSNR)". From k shard
    gradients g_d: r = mean(g_d)^2 / (mean(g_d^2) - mean(g_d)^2 + eps), divided by its mean over the tensor, clipped to
    [floor, 1]; the wrapped optimizer then steps with r mean(g_d). With ``ema`` (the paper's Adam form) r is replaced by its
    bias-corrected moving average. Between ``zero_grad`` and ``step``, run backward for each shard of the batch, at least two::

        for shard in batch.chunk(8):
            loss(shard).backward()
            optimizer.accumulate()
        optimizer.step()

    Under DDP it needs the gradients before their all-reduce: shards are those of one process. Means and squared
    deviations are kept in fp32 (of float64 parameters in float64), two buffers of the parameters' size.

    Args:
        optimizer: any torch optimizer; SGD, Adam, LARS and LAMB in the paper. Its attributes are reachable through this one.
        floor: the smallest ratio, 0.1. eps: 1e-12. ema: None, or the average's beta3 (0.9 in the paper's Adam form).

    Raises:
        ValueError: for arguments out of range. RuntimeError: ``step`` after fewer than two shards.
    """

    def __init__(self, optimizer, *, floor=0.1, eps=1e-12, ema=None):
        if not 0.0 <= floor <= 1.0 or not eps > 0 or not (ema is None or 0.0 <= ema < 1.0):
            raise ValueError(f"floor, eps and ema are {floor!r}, {eps!r} and {ema!r}; they must be in [0, 1], positive, and None or in [0, 1)")
        self.optimizer, self.floor, self.eps, self.ema = optimizer, floor, eps, ema
        self._sums: dict = {}     # parameter -> (mean of g, sum of (g - mean)^2)
        self._ratios: dict = {}   # parameter -> moving average of r, kept between steps
        self._shards = self._steps = 0

    def __getattr__(self, name):
        if name.startswith("__"):  # copy and pickle ask, before there is an optimizer
            raise AttributeError(name)
        return getattr(self.__dict__["optimizer"], name)

    def _params(self):
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @torch.no_grad()
    def accumulate(self):
        """Takes the gradients as those of one shard and clears them."""
        self._shards += 1
        for p in self._params():
            if p.grad is None and p not in self._sums:
                continue
            if p not in self._sums:  # its gradient was zero in the shards before, which leaves both so
                self._sums[p] = tuple(torch.zeros_like(p.grad, dtype=full_precision(p)) for _ in range(2))
            mean, squares = self._sums[p]
            delta = -mean if p.grad is None else p.grad.to(mean) - mean
            mean.add_(delta, alpha=1 / self._shards)  # Welford's update: the mean of squares less the mean's square would cancel
            squares.addcmul_(delta, delta, value=1 - 1 / self._shards)
            p.grad = None

    @torch.no_grad()
    def step(self):
        """Weighs the shards' mean gradients and steps the wrapped optimizer."""
        if self._shards < 2:
            raise RuntimeError(f"accumulate() was called {self._shards} times since the last step or zero_grad (do not clear between shards); "
                               "VRGD needs the gradients of at least 2 shards")
        self._steps += 1
        for p, (mean, squares) in self._sums.items():
            ratio = mean * mean / (squares / self._shards + self.eps)
            ratio = (ratio / ratio.mean().clamp(min=torch.finfo(torch.float32).tiny)).clamp_(self.floor, 1.0)
            if self.ema is not None:
                average = self._ratios.setdefault(p, torch.zeros_like(ratio))
                average.mul_(self.ema).add_(ratio, alpha=1 - self.ema)
                ratio = average / (1 - self.ema ** self._steps)
            p.grad = (ratio * mean).to(p.dtype)
        self._sums, self._shards = {}, 0
        self.optimizer.step()

    def zero_grad(self, set_to_none=True):
        """Forgets gradients and what was accumulated."""
        self._sums, self._shards = {}, 0
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self):
        """The wrapped optimizer's, and the moving averages in the order of its parameters."""
        return {"optimizer": self.optimizer.state_dict(), "steps": self._steps, "ratios": [self._ratios.get(p) for p in self._params()]}

    def load_state_dict(self, state_dict):
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self._steps = state_dict["steps"]
        self._ratios = {p: r.clone() for p, r in zip(self._params(), state_dict["ratios"]) if r is not None}
