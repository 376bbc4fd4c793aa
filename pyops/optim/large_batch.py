"""Rules for large batches: a tensor's step is scaled by norms of the whole tensor (LAMB, LARS).

A norm comes before the step that needs it, so their weights and gradients are read more often than another rule's. On a CPU one native call
does both (``ops.scaled_step``), and tensors that fit the cache are read from memory once; csrc/cpu/optim.cpp has the counts. On a GPU, in Triton and
for shards the two halves are ops of their own.
"""
from __future__ import annotations

import torch

from gradmill.ops.optim import repeats_on, scaled_step
from gradmill.optim._base import FusedOptimizer, is_sharded, local, measured, padded
from gradmill.optim.adamw import check_betas, check_eps, check_lr_and_decay
from gradmill.optim.rules import RULES, number
from gradmill.weight import QuantizedWeight

BATCH = 1 << 21  #: elements whose updates LAMB holds at a time where the CPU steps in two halves (shards), so that the second finds some in the cache


def batches(items):
    """items in runs that end with the tensor that makes them BATCH elements, on a CPU; elsewhere all at once, as every launch costs."""
    runs, size = [], 0
    for item in items:
        if not runs or (size >= BATCH and item.owner.device.type == "cpu"):
            runs.append([])
            size = 0
        runs[-1].append(item)
        size += item.owner.numel()  # of the whole tensor: processes that share it cut alike
    return runs


def stored_as_floats(item) -> bool:
    """Whether the item's parameter is its own value: neither quantised nor in two pieces."""
    return "low_bits" not in item.state and not isinstance(local(item.owner.detach()), QuantizedWeight)


def norms(tensors, items) -> torch.Tensor:
    """L2 norms, float64, of whole tensors where they are sharded; on their device where the items' steps are counted there."""
    return measured(tensors, device=items[0].owner.device if counted(items) else None)[:, 0].sqrt()


def counted(items) -> bool:
    """Whether the device counts these steps, and the host goes on."""
    return isinstance(items[0].step, torch.Tensor)


def at_rates(group, items, ratios):
    """The items, each at the group's rate times its ratio."""
    rates = (number if counted(items) else float)(group["lr"]) * ratios
    return [item._replace(options={"lr": rate}) for item, rate in zip(items, rates if counted(items) else rates.tolist())]


class _ScaledByNorms(FusedOptimizer):
    """A rule of ``scaled_step``: in one call where that has a native kernel, in two halves elsewhere."""

    def in_one_call(self, item) -> bool:
        p = item.owner
        return p.device.type == "cpu" and p.dtype != torch.float64 and not is_sharded(p) and not isinstance(item.step, torch.Tensor) and repeats_on("cpu")

    def scaled(self, group, items, factor, coefficient, decay):
        """Steps items, and returns those that need the two halves."""
        rule = self.rule(group)
        for step, bucket, arguments in self._buckets(rule, [item for item in items if self.in_one_call(item)]):
            lr = float(group["lr"])
            scalars = padded((factor * (-1.0 if group["maximize"] else 1.0), *RULES[rule].scalars(group, step, lr)))
            scaled_step(**arguments, scalars=torch.tensor([scalars], dtype=torch.float32, device="cpu"), lr=lr, coefficient=coefficient, decay=decay,
                        factor=abs(factor), key=torch.tensor([group["seed"], step], dtype=torch.int64, device="cpu"))
        return [item for item in items if not self.in_one_call(item)]


class LAMB(_ScaledByNorms):
    """LAMB: Adam's update, with the decay in it, scaled to the norm of its weight.

    Source: You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", Algorithm 2: with u the
    update m^ / (sqrt(v^) + eps) + weight_decay w, w <- w - lr phi(|w|) / |u| u; phi is the identity, and the ratio is 1 where
    a norm is 0. The update of a tensor (on a GPU: of a group) exists as fp32. Norms are summed in double in a fixed order.

    Args:
        params, lr, betas, eps, weight_decay: the paper's, lr 1e-3, eps 1e-6, weight_decay 0.01.
        max_trust_ratio: None, or the largest |w| / |u| taken.
        maximize, options: see :class:`gradmill.optim.FusedOptimizer`.

    Raises:
        ValueError: for hyperparameters out of range. TypeError: for parameters of another dtype than float32,
            float64, bfloat16 or float16. RuntimeError at step for sparse gradients.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, *, max_trust_ratio=None, maximize=False, **options):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, max_trust_ratio=max_trust_ratio),
                         maximize=maximize, **options)

    def check_group(self, group):
        check_lr_and_decay(group)
        check_eps(group)
        check_betas(group)
        if group["max_trust_ratio"] is not None and not group["max_trust_ratio"] > 0:
            raise ValueError(f"max_trust_ratio is {group['max_trust_ratio']!r}; it must be None or positive")

    def rule(self, group):
        return "lamb"

    def _step_group(self, group, items, factor):
        cap = float("inf") if group["max_trust_ratio"] is None else group["max_trust_ratio"]
        runs = batches(self.scaled(group, items, factor, cap, 0.0))
        # One piece of memory for all batches: fresh memory costs a page fault per 4 KB, more than the arithmetic.
        room = torch.empty(max((sum(item.owner.numel() for item in run if item.owner.device.type == "cpu") for run in runs), default=0), dtype=torch.float32, device="cpu")
        for run in runs:
            self._step_batch(group, run, factor, cap, room)

    def _step_batch(self, group, items, factor, cap, room):
        updates = []  # a copy of each weight, which the rule turns into its update
        for item in items:
            p = item.owner.detach()
            if p.device.type == "cpu" and p.dtype != torch.float64 and not is_sharded(p) and stored_as_floats(item):
                updates.append(room[:p.numel()].view(p.shape).copy_(p))
                room = room[p.numel():]
            else:
                updates.append(self.value(item.owner, item.state))
        before = norms(updates, items)
        self.apply_rule(group, [item._replace(param=local(u)) for item, u in zip(items, updates)], factor)
        after = norms(updates, items)
        ratios = torch.where((before > 0) & (after > 0), (before / after).clamp(max=cap), 1.0)
        self.apply_rule({**group, "maximize": False}, at_rates(group, [item._replace(grad=local(u)) for item, u in zip(items, updates)], ratios), 1.0,
                        rule="sgd", decay=False)


class LARS(_ScaledByNorms):
    """LARS: momentum SGD whose rate is scaled, tensor by tensor, to the norms of weight and gradient.

    Source: You et al., "Large Batch Training of Convolutional Networks", Algorithm 1: with the local rate
    r = trust_coefficient |w| / (|g| + weight_decay |w|), v <- momentum v + lr r (g + weight_decay w), w <- w - v. The ratio
    is 1 where a norm is 0.

    Args:
        params, lr, momentum, weight_decay: the paper's (momentum 0.9, weight_decay 5e-4).
        trust_coefficient: the paper's eta, 0.001; None in a group (biases and norms, as is usual) takes plain SGD steps.
        maximize, options: see :class:`gradmill.optim.FusedOptimizer`.

    Raises: as :class:`LAMB`.
    """

    def __init__(self, params, lr=0.1, momentum=0.9, weight_decay=5e-4, *, trust_coefficient=1e-3, maximize=False, **options):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust_coefficient=trust_coefficient),
                         maximize=maximize, **options)

    def check_group(self, group):
        check_lr_and_decay(group)
        if not 0.0 <= group["momentum"] < 1.0:
            raise ValueError(f"Invalid momentum value: {group['momentum']}")
        if group["trust_coefficient"] is not None and not group["trust_coefficient"] > 0:
            raise ValueError(f"trust_coefficient is {group['trust_coefficient']!r}; it must be None or positive")

    def rule(self, group):
        return "lars"

    def _step_group(self, group, items, factor):
        if group["trust_coefficient"] is not None:
            items = self.scaled(group, items, factor, group["trust_coefficient"], group["weight_decay"])
        if group["trust_coefficient"] is not None and items:
            weights = norms([item.owner.detach() if stored_as_floats(item) else self.value(item.owner, item.state) for item in items], items)
            grads = norms([item.owner.grad for item in items], items)
            ratios = group["trust_coefficient"] * weights / (abs(factor) * grads + group["weight_decay"] * weights)
            items = at_rates(group, items, torch.where((weights > 0) & (grads > 0), ratios, 1.0))
        self.apply_rule(group, items, factor)
