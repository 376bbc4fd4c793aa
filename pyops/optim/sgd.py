"""SGD."""
from __future__ import annotations

from gradmill.optim._base import FusedOptimizer
from gradmill.optim.adamw import check_lr_and_decay


class SGD(FusedOptimizer):
    """torch.optim.SGD with low-precision states and weights: momentum, dampening, Nesterov.

    Source: torch.optim.SGD (Sutskever et al., "On the importance of initialization and momentum in deep learning").
    Arguments, names and defaults are torch's, and so is the first step, whose momentum buffer is the undampened gradient.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov: as in torch.optim.SGD. lr and weight_decay may be tensors.
        maximize, foreach, fused, differentiable, states, min_quantized_numel, seed: see
            :class:`gradmill.optim.FusedOptimizer`. (Without momentum there is no state.)

    Raises:
        ValueError: for hyperparameters out of range. TypeError: for parameters of another dtype than float32,
            float64, bfloat16 or float16. RuntimeError at step for sparse gradients.
    """

    made_in_step = ("momentum_buffer",)

    def __init__(self, params, lr=1e-3, momentum=0, dampening=0, weight_decay=0, nesterov=False, **options):
        super().__init__(params, dict(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov), **options)

    def check_group(self, group):
        check_lr_and_decay(group)
        if not 0.0 <= group["momentum"]:
            raise ValueError(f"Invalid momentum value: {group['momentum']}")
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")

        if group.get("capturable") and not self._counts(group):
            raise ValueError("capturable=True cannot be combined with dampening: the first step is another one, and only the device counts them")

    def rule(self, group):
        return "sgd_momentum" if group["momentum"] else "sgd"

    def _counts(self, group):
        return not (group["momentum"] and group["dampening"])

    def _complete(self, group, items):
        """Buffers begin in _step_items, where momentum was 0 until now too: as in torch with an undampened gradient."""

    def _step_items(self, group, items, factor, **options):
        if group["momentum"] and group["dampening"]:
            first = [item for item in items if item.step == 1 or not _has_buffer(item.state)]
        else:
            first = []  # a buffer of zeros does the same
        for item in items:
            if group["momentum"] and not _has_buffer(item.state):  # momentum was 0 until now
                self._new_states(item.state, group, self._stepped(item.owner, group))
        self.apply_rule({**group, "dampening": 0.0}, first, factor, **options)
        self.apply_rule(group, [item for item in items if not any(item is other for other in first)], factor, **options)

    # torch's state has no step, and a buffer only after a step with momentum.
    def _adopt(self, saved, p, group, index):
        saved = {k: v for k, v in saved.items() if v is not None}
        saved.setdefault("step", float(_has_buffer(saved)))
        if _has_buffer(saved):  # it stays where momentum was set to 0 since
            group = {**group, "momentum": group["momentum"] or 1.0}
        return super()._adopt(saved, p, group, index)

    def _adopt_states(self, saved, like, group, index):
        if _has_buffer(saved):
            super()._adopt_states(saved, like, group, index)


def _has_buffer(state) -> bool:
    return "momentum_buffer" in state or "momentum_buffer_codes" in state
