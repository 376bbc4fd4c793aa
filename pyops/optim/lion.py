"""Lion."""
from __future__ import annotations

from gradmill.optim._base import FusedOptimizer
from gradmill.optim.adamw import check_betas, check_lr_and_decay


class Lion(FusedOptimizer):
    """Lion: the sign of an interpolated momentum, one state per weight.

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", Algorithm 2; defaults are the paper's. The
    decay is decoupled; sign(0) = 0. Lion wants a 3 to 10 times smaller lr and a larger weight_decay than AdamW.

    An 8-bit momentum is rounded to nearest, so that changes of less than half a code (1/64 to 1/32 of it) are lost: at beta2 =
    .99 it lags behind falling gradients (150 steps of a linear regression end at .18 of the first loss, with fp32 and bf16
    states at .085; at beta2 = .9 there is no difference). Prefer states="bf16", or a smaller beta2.

    Args:
        params, lr, betas, weight_decay: as in the paper (lr 1e-4, betas (0.9, 0.99), weight_decay 0).
        maximize, foreach, fused, capturable, differentiable, states, min_quantized_numel, seed: see
            :class:`gradmill.optim.FusedOptimizer`.

    Raises:
        ValueError: for hyperparameters out of range. TypeError: for parameters of another dtype than float32,
            float64, bfloat16 or float16. RuntimeError at step for sparse gradients.
    """

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, **options):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay), **options)

    def check_group(self, group):
        check_lr_and_decay(group)
        check_betas(group)

    def rule(self, group):
        return "lion"
