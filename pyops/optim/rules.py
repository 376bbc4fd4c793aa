"""The scalars each rule's kernels read, computed here in double precision and rounded to fp32 once.

A rule's formula stands in csrc/common/rules.h, kernels/optim.py and pyops/reference/optim.py; this table is its
fourth and last line: state names, and scalars(group, step, lr) -> h[1:] (h[0] multiplies the gradient). The step may be a float64
tensor of many steps that only its device knows (capturable=True): then what follows from it is one too.
"""
from __future__ import annotations

import math
from typing import Callable, NamedTuple

import torch


class Rule(NamedTuple):
    states: tuple[str, ...]     #: state names, torch's where torch has the rule
    state_codes: tuple[str, ...]  #: the code of each state under states="int8"; an accumulator that no 8-bit code suits may stay plain
    scalars: Callable[[dict, int, float], tuple[float, ...]]


def known(device: torch.device) -> bool:
    """Whether the host can read a tensor there without waiting."""
    return device.type == "cpu"


def number(x):
    """x, a number or a tensor of one element, as a float; on a GPU as a float64 tensor there, for which nobody waits."""
    return float(x) if not isinstance(x, torch.Tensor) or known(x.device) else x.to(torch.float64).reshape(())


def sqrt(x):
    return x.sqrt() if isinstance(x, torch.Tensor) else math.sqrt(x)


def _betas(group):
    return tuple(map(number, group["betas"]))  # they may be tensors


def _adam(group, step, lr, decay=0.0):
    """``decay`` is the decoupled one. A beta2 of 1 freezes the second moment, and leaves it uncorrected."""
    beta1, beta2 = _betas(group)
    return (1 - lr * decay, 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1 ** step),
            1.0 if isinstance(beta2, float) and beta2 >= 1 else 1 / sqrt(1 - beta2 ** step), group["eps"], group["weight_decay"])


def _adamw(group, step, lr):
    return _adam(group, step, lr, group["weight_decay"])


def _lion(group, step, lr):
    beta1, beta2 = _betas(group)
    return 1 - lr * group["weight_decay"], 1 - beta1, 1 - beta2, lr


def _sgd(group, step, lr):
    """"factor" multiplies the weight: a decoupled decay, for the optimizers that apply their own update by this rule."""
    return group.get("factor", 1.0), lr, number(group["weight_decay"])


def _sgd_momentum(group, step, lr):
    rest = 1 - group["dampening"]
    return *_sgd(group, step, lr), group["momentum"], rest, rest if group["nesterov"] else 0.0


def _adagrad(group, step, lr):
    return lr / (1 + (step - 1) * group["lr_decay"]), group["weight_decay"], group["eps"]


def _adabelief(group, step, lr):
    beta1, beta2 = _betas(group)
    bc1, bc2, eps, decay = 1 - beta1 ** step, 1 - beta2 ** step, group["eps"], group["weight_decay"]
    decoupled = group["weight_decouple"]
    head = 1 - lr * decay if decoupled else 1.0, 1 - beta1, beta2, 1 - beta2
    tail = eps, 0.0 if decoupled else decay
    if not group["rectify"]:
        return *head, lr / bc1, 1 / sqrt(bc2), eps, *tail
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2 ** step / bc2
    known = isinstance(step, (int, float))
    if known and length < 5:  # too few steps for a variance: SGD with momentum, or nothing
        return *head, lr / bc1 if group["degenerated_to_sgd"] else 0.0, 0.0, 1.0, *tail
    rectified = sqrt(bc2 * (length - 4) / (longest - 4) * (length - 2) / length * longest / (longest - 2))
    if known:
        return *head, lr * rectified / bc1, 1.0, eps, *tail
    enough = length >= 5
    return (*head, torch.where(enough, lr * rectified / bc1, lr / bc1 if group["degenerated_to_sgd"] else 0.0), enough.to(torch.float64),
            torch.where(enough, eps, 1.0), *tail)


def _moments(group, step, lr):
    beta1, beta2 = _betas(group)
    return 1 - beta1, beta2, 1 - beta2, lr * sqrt(1 - beta2 ** step) / (1 - beta1 ** step), group["eps"]


def _diffgrad(group, step, lr):
    return group["weight_decay"], *_moments(group, step, lr)


def _grams(group, step, lr):
    return 1 - lr * group["weight_decay"], *_moments(group, step, lr)


def _sophia(group, step, lr):
    return 1 - lr * group["weight_decay"], 1 - _betas(group)[0], group["rho"], group["eps"], lr


def _sophia_hessian(group, step, lr):
    """"samples": how many the squared gradient is the mean of; None for an estimate of the diagonal itself."""
    rest, samples = 1 - _betas(group)[1], group.get("samples")
    return 1 - rest, rest if samples is None else 0.0, 0.0 if samples is None else rest * samples


def _classp(group, step, lr):
    return lr, group["threshold"], group["eps"], group["power"], 1 / group["power"]


def _lamb(group, step, lr):
    beta1, beta2 = _betas(group)
    return group["weight_decay"], 1 - beta1, beta2, 1 - beta2, 1 / (1 - beta1 ** step), 1 / sqrt(1 - beta2 ** step), group["eps"]


def _lars(group, step, lr):
    return group["weight_decay"], group["momentum"], lr


def _stable_spam(group, step, lr):
    """Adam's own step count, and what this tensor's gradient is clipped to, by and scaled with."""
    return *_adamw(group, group["adam_step"], lr), group["limit"], group["share"], group["scale"]


_ADAM = ("exp_avg", "exp_avg_sq"), ("moment8", "square8")
_AMSGRAD = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), ("moment8", "square8", "square8")
RULES = {
    "adamw": Rule(*_ADAM, _adamw),
    "adamw_amsgrad": Rule(*_AMSGRAD, _adamw),
    "lion": Rule(("exp_avg",), ("moment8",), _lion),
    "adam": Rule(*_ADAM, _adam),
    "adam_amsgrad": Rule(*_AMSGRAD, _adam),
    "sgd": Rule((), (), _sgd),
    "sgd_momentum": Rule(("momentum_buffer",), ("moment8",), _sgd_momentum),
    "adagrad": Rule(("sum",), ("square8",), _adagrad),
    "adabelief": Rule(("exp_avg", "exp_avg_var"), ("moment8", "square8"), _adabelief),
    "diffgrad": Rule(("exp_avg", "exp_avg_sq", "previous_grad"), ("moment8", "square8", "moment8"), _diffgrad),
    "grams": Rule(*_ADAM, _grams),
    # Signed (Hutchinson's estimates are), and moves by 1 % at a time: bf16, because a signed 8-bit code to nearest would freeze.
    "sophia": Rule(("exp_avg", "hessian"), ("moment8", "bf16"), _sophia),
    "sophia_hessian": Rule(("hessian",), ("bf16",), _sophia_hessian),
    "classp": Rule(("sum",), ("square8",), _classp),
    "lamb": Rule(*_ADAM, _lamb),
    "lars": Rule(("momentum_buffer",), ("moment8",), _lars),
    "stable_spam": Rule(*_ADAM, _stable_spam),
}
