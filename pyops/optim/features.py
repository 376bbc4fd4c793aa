"""What goes around an optimizer: groups from name patterns, and stepping as gradients arrive."""
from __future__ import annotations

from fnmatch import fnmatchcase

import torch

from gradmill.optim._base import FusedOptimizer


def param_groups(model: torch.nn.Module, options: dict[str, dict]) -> list[dict]:
    """Parameter groups from name patterns: ``{"*norm*": {"weight_decay": 0}, "embed*": {"states": "fp32"}}``.

    Args:
        model: its parameters that require gradients are taken, shared ones once, under their first name.
        options: pattern (shell style, the whole name must match, case counts) -> group options. The first that matches decides.

    Returns:
        A group for each pattern, in order, and one without options for what no pattern matched (left out if empty).

    Raises:
        TypeError: for options that are no dict. ValueError: for a pattern that no parameter is left for.
    """
    groups = []
    for pattern, group in options.items():
        if not isinstance(group, dict):
            raise TypeError(f"the options of {pattern!r} are {group!r}; they must be a dict")
        groups.append({**group, "params": []})
    rest: dict = {"params": []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            found = next((g for pattern, g in zip(options, groups) if fnmatchcase(name, pattern)), rest)
            found["params"].append(p)
    for pattern, group in zip(options, groups):
        if not group["params"]:
            raise ValueError(f"no parameter is left for the pattern {pattern!r}; parameters are called "
                             f"{', '.join([n for n, _ in model.named_parameters()][:5])}, ...")
    return groups + ([rest] if rest["params"] else [])


class ReleasedGradients:
    """What release_gradients returns: ``remove()`` undoes it; as a context manager it does at the end."""

    def __init__(self, optimizer, hooks):
        self._optimizer, self._hooks = optimizer, hooks

    def remove(self):
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if getattr(self._optimizer, "_released", None) is self:
            self._optimizer._released = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.remove()


def release_gradients(model: torch.nn.Module, optimizer: FusedOptimizer) -> ReleasedGradients:
    """Steps each parameter as soon as its gradient is complete, within backward, and frees the gradient.

    All gradients never exist together: a model's memory falls by up to their size. The loop stays as it was:
    ``optimizer.step()`` after every backward steps what has no released gradient and tells that the next backward is another
    step's. The weights that result have the same bits.

    Args:
        model: its parameters that are the optimizer's are released. optimizer: a gradmill optimizer.

    Returns:
        A handle; ``handle.remove()`` undoes it.

    Raises:
        TypeError: for another optimizer. ValueError: with max_grad_norm or on_nonfinite (both need all gradients before the
            first step), a DistributedDataParallel model (its gradients arrive before they are averaged), or twice.
        RuntimeError: in backward, where gradients of one parameter arrive twice between two ``step()`` (accumulation); at
            step with a GradScaler (its scale and its check for inf come after backward).
    """
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; release_gradients needs a gradmill optimizer")
    if optimizer.max_grad_norm is not None or optimizer.on_nonfinite != "propagate":
        raise ValueError("release_gradients steps before all gradients are there: set max_grad_norm to None and on_nonfinite to 'propagate'")
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise ValueError("release_gradients would step before DistributedDataParallel has averaged the gradients")
    if getattr(optimizer, "_released", None) is not None:
        raise ValueError("this optimizer's gradients are released already; call remove() on that handle first")
    owners = {p: group for group in optimizer.param_groups for p in group["params"]}
    done: set = set()

    def arrived(p):
        if p in done:
            raise RuntimeError(f"a second gradient of a parameter of shape {tuple(p.shape)} arrived before optimizer.step(): released gradients "
                               "cannot be accumulated; call optimizer.step() after every backward")
        with torch.no_grad():
            optimizer._check_gradient(p)
            optimizer._step_work([(owners[p], [p])], 1.0)
        done.add(p)
        p.grad = None

    hooks = [p.register_post_accumulate_grad_hook(arrived) for p in dict.fromkeys(model.parameters()) if p in owners and p.requires_grad]
    hooks.append(optimizer.register_step_post_hook(lambda *_: done.clear()))
    optimizer._released = ReleasedGradients(optimizer, hooks)
    return optimizer._released
