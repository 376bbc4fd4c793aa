"""AdamW."""
from __future__ import annotations

import torch

from gradmill.optim._base import FusedOptimizer


# torch.optim's checks, with its messages.
def check_lr_and_decay(group: dict):
    lr = group["lr"]
    if isinstance(lr, torch.Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not 0.0 <= lr:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not 0.0 <= group["weight_decay"]:
        raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")


def check_betas(group: dict):
    for i, beta in enumerate(group["betas"]):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")


def refuse(optimizer: str, **options):
    """torch.optim arguments that gradmill's step does not have: refused by name rather than ignored."""
    for name, value in options.items():
        if value:
            raise ValueError(f"{optimizer}: {name}=True is not supported; gradmill's step is already fused, and runs outside autograd")


class AdamW(FusedOptimizer):
    """torch.optim.AdamW with low-precision states and weights, one fused native call per parameter group.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", Algorithm 2; amsgrad: Reddi et al., "On
    the Convergence of Adam and Beyond". Arguments, names and defaults are torch.optim.AdamW's.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize: as in torch.optim.AdamW. lr may be a tensor.
        foreach, fused: accepted and ignored; the step is always fused. capturable, differentiable: refused if True.
        states, min_quantized_numel, seed: see :class:`gradmill.optim.FusedOptimizer`.

    Raises:
        ValueError: for hyperparameters out of range. TypeError: for parameters of another dtype than float32,
            bfloat16 or float16. RuntimeError at step for sparse gradients.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False, *, maximize=False, foreach=None,
                 capturable=False, differentiable=False, fused=None, states="fp32", min_quantized_numel=4096, seed=None):
        refuse("AdamW", capturable=capturable, differentiable=differentiable)
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad), states=states,
                         min_quantized_numel=min_quantized_numel, maximize=maximize, seed=seed)

    def check_group(self, group):
        check_lr_and_decay(group)
        if not 0.0 <= group["eps"]:
            raise ValueError(f"Invalid epsilon value: {group['eps']}")
        check_betas(group)

    def rule(self, group):
        return "adamw_amsgrad" if group.get("amsgrad") else "adamw"
