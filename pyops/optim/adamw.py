"""AdamW and Adam."""
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
        if isinstance(beta, torch.Tensor) and beta.numel() != 1:
            raise ValueError(f"Tensor betas[{i}] must be 1-element")
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")


def check_as_torch(lr, betas, foreach=None, capturable=False, **_):
    """What torch.optim.Adam refuses of these arguments together, although gradmill, for which ``foreach`` is nothing, could take it."""
    tensors = {"lr": lr, "betas[0]": betas[0], "betas[1]": betas[1]}
    for name, x in tensors.items():
        if isinstance(x, torch.Tensor) and foreach and not capturable:
            raise ValueError(f"{name} as a Tensor is not supported for capturable=False and foreach=True")
    if len({isinstance(beta, torch.Tensor) for beta in betas}) > 1:
        raise ValueError("betas must be either both floats or both Tensors")


def check_eps(group: dict):
    if not 0.0 <= group["eps"]:
        raise ValueError(f"Invalid epsilon value: {group['eps']}")


class AdamW(FusedOptimizer):
    """torch.optim.AdamW with low-precision states and weights, one fused native call per parameter group.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", Algorithm 2; amsgrad: Reddi et al., "On
    the Convergence of Adam and Beyond". Arguments, names and defaults are torch.optim.AdamW's. (The AdamW of GaLore, Fira
    and Grams' code differs: eps inside an uncorrected root, 1e-6, and the decay after the step.)

    Args:
        params, lr, betas, eps, weight_decay, amsgrad: as in torch.optim.AdamW. lr and betas may be tensors.
        maximize, foreach, fused, capturable, differentiable, offload, states, min_quantized_numel, seed: see
            :class:`gradmill.optim.FusedOptimizer`.

    Raises:
        ValueError: for hyperparameters out of range. TypeError: for parameters of another dtype than float32,
            float64, bfloat16 or float16. RuntimeError at step for sparse gradients.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False, **options):
        check_as_torch(lr, betas, **options)
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad), **options)

    def check_group(self, group):
        check_lr_and_decay(group)
        check_eps(group)
        check_betas(group)

    def rule(self, group):
        return "adamw_amsgrad" if group.get("amsgrad") else "adamw"


class Adam(AdamW):
    """torch.optim.Adam: as :class:`gradmill.optim.AdamW`, but the weight decay is part of the gradient.

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization". Arguments, names and defaults are torch.optim.Adam's.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad: as in torch.optim.Adam. lr and betas may be tensors.
        decoupled_weight_decay: True makes it AdamW.
        The other options and what is raised: as in :class:`gradmill.optim.AdamW`.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, amsgrad=False, *, decoupled_weight_decay=False, **options):
        check_as_torch(lr, betas, **options)
        FusedOptimizer.__init__(self, params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad,
                                                   decoupled_weight_decay=decoupled_weight_decay), **options)

    def rule(self, group):
        rule = super().rule(group)  # without decay they are the same
        return rule if group["decoupled_weight_decay"] or not group["weight_decay"] else rule.replace("adamw", "adam")
