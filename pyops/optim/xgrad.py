"""XGrad: weight prediction around any optimizer."""
from __future__ import annotations

import contextlib

import torch

from gradmill.optim._base import full_precision
from gradmill.weight import QuantizedWeight


class XGrad:
    """Forward and backward at the weights the optimizer is about to reach, the step from where it is.

    Source: Guan et al., "XGrad: Boosting Gradient-Based Optimizers With Weight Prediction". After a step theta_t -> theta_t+1 the
    parameters hold theta^ = theta_t+1 + s (theta_t+1 - theta_t): the next update is predicted to be ``s`` times the last one,
    weight decay aside. ``step`` puts theta back from a copy, steps with the gradient taken at theta^, and predicts again::

        optimizer = XGrad(gradmill.optim.AdamW(model.parameters(), weight_decay=0.1), decoupled=True)
        loss.backward(); optimizer.step(); optimizer.zero_grad()
        with optimizer.weights():       # theta itself: for evaluation, and to save the model alone
            evaluate(model)

    Costs a copy of every parameter. Schedulers and GradScaler take ``.optimizer``; ``state_dict`` holds the copies too, and
    belongs to a model saved outside :meth:`weights`.

    Args:
        optimizer: any torch.optim.Optimizer over plain parameters.
        s: steps to predict, 1.
        decoupled: whether the optimizer multiplies weights by 1 - lr * weight_decay (AdamW), which is left out of the
            prediction. Must be said when a group has a weight_decay; a decay inside the gradient (SGD) is part of the update.

    Raises TypeError for a QuantizedWeight, whose predicted value would have to be quantised, ValueError for bad arguments.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, s: float = 1, *, decoupled: bool | None = None):
        if s < 0:
            raise ValueError(f"s is {s}; it must be at least 0")
        if decoupled is None and any(float(g.get("weight_decay", 0)) for g in optimizer.param_groups):
            raise ValueError("the optimizer has weight_decay: pass XGrad(optimizer, decoupled=True) where it multiplies the weights, as in AdamW, or decoupled=False where it is part of the gradient")
        if any(isinstance(p, QuantizedWeight) for g in optimizer.param_groups for p in g["params"]):
            raise TypeError("XGrad does not predict a QuantizedWeight")
        self.optimizer, self.s, self.decoupled = optimizer, s, bool(decoupled)
        self._kept: list[torch.Tensor] = []  # theta, while the parameters hold theta^

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True):
        self.optimizer.zero_grad(set_to_none)

    def _params(self):
        return [p for g in self.param_groups for p in g["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        """Performs one step. ``closure`` is evaluated at the predicted weights; its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = self._params()
        self._kept += [p.detach().clone() for p in params[len(self._kept):]]  # groups added since
        for p, kept in zip(params, self._kept):
            p.copy_(kept)
        self.optimizer.step()
        kept = iter(self._kept)
        for group in self.param_groups:
            factor = 1 - float(group["lr"]) * float(group.get("weight_decay", 0)) if self.decoupled else 1.0
            for p, before in zip(group["params"], kept):
                if p.grad is None:
                    continue
                new = p.to(full_precision(p))
                predicted = new + self.s * (new - before.to(new) * factor)
                before.copy_(p)
                p.copy_(predicted)
        return loss

    @contextlib.contextmanager
    def weights(self):
        """The parameters hold theta inside, theta^ again afterwards."""
        params = self._params()[:len(self._kept)]
        predicted = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p, kept in zip(params, self._kept):
                p.copy_(kept)
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(params, predicted):
                    p.copy_(value)

    def state_dict(self) -> dict:
        return {"optimizer": self.optimizer.state_dict(), "weights": [t.clone() for t in self._kept]}

    def load_state_dict(self, state_dict: dict):
        params, kept = self._params(), state_dict["weights"]
        if any(t.shape != p.shape for t, p in zip(kept, params)) or len(kept) > len(params):
            raise ValueError("XGrad: the saved weights are not those of these parameters")
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self._kept = [t.detach().to(p.device, p.dtype, copy=True) for t, p in zip(kept, params)]
