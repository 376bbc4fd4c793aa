"""The scalars each rule's kernels read, computed here in double precision and rounded to fp32 once.

A rule's formula stands in csrc/common/rules.h, kernels/optim.py and pyops/reference/optim.py; this table is its
fourth and last line: state names, and scalars(group, step, lr) -> h[1:] (h[0] multiplies the gradient).
"""
from __future__ import annotations

from math import sqrt
from typing import Callable, NamedTuple


class Rule(NamedTuple):
    states: tuple[str, ...]     #: state names, torch's where torch has the rule
    state_codes: tuple[str, ...]  #: the 8-bit code of each state under states="int8"
    scalars: Callable[[dict, int, float], tuple[float, ...]]


def _adam(group, step, lr):
    beta1, beta2 = group["betas"]
    return (1 - lr * group["weight_decay"], 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1 ** step),
            1 / sqrt(1 - beta2 ** step), group["eps"])


def _lion(group, step, lr):
    beta1, beta2 = group["betas"]
    return 1 - lr * group["weight_decay"], 1 - beta1, 1 - beta2, lr


RULES = {
    "adamw": Rule(("exp_avg", "exp_avg_sq"), ("moment8", "square8"), _adam),
    "adamw_amsgrad": Rule(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), ("moment8", "square8", "square8"), _adam),
    "lion": Rule(("exp_avg",), ("moment8",), _lion),
}
