"""What goes around an optimizer: groups from name patterns, and stepping as gradients arrive."""
from __future__ import annotations

from fnmatch import fnmatchcase

import torch

from gradmill.optim._base import FusedOptimizer, is_sharded


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

    def __init__(self, optimizer):
        self._optimizer, self._hooks = optimizer, []
        self.counts: dict = {}  # parameter -> gradients that arrived and wait for more
        self.low: dict = {}     # parameter -> the sum of their projections, where they are kept so

    def forget(self):
        """Drops gradients that wait for more; ``zero_grad`` does."""
        self.counts.clear()
        self.low.clear()

    def remove(self):
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.forget()
        if getattr(self._optimizer, "_released", None) is self:
            self._optimizer._released = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.remove()


def release_gradients(model: torch.nn.Module, optimizer: FusedOptimizer, accumulate: int = 1) -> ReleasedGradients:
    """Steps each parameter as soon as its gradient is complete, within backward, and frees the gradient.

    All gradients never exist together: a model's memory falls by up to their size. The loop stays as it was:
    ``optimizer.step()`` after every backward steps what has no released gradient and tells that the next backward is another
    step's. The weights that result have the same bits.

    With ``accumulate``, gradients of so many backward passes are summed before their step. Those of a projected parameter
    (``projection=``) are projected as they arrive: what is summed is R, rank instead of side long, and no gradient outlives
    its backward, but in the steps that refresh the basis, which take the whole sum. All others are summed in ``.grad``, as ever.
    An ``optimizer.step()`` that comes early steps with what has arrived. ::

        with release_gradients(model, optimizer, accumulate=4):
            for batch in batches:
                for part in batch.chunk(4):
                    (loss(part) / 4).backward()
                optimizer.step()

    Args:
        model: its parameters that are the optimizer's are released. optimizer: a gradmill optimizer.
        accumulate: backward passes that make a step.

    Returns:
        A handle; ``handle.remove()`` undoes it.

    Raises:
        TypeError: for another optimizer. ValueError: with max_grad_norm or on_nonfinite (both need all gradients before the
            first step), AdaGradNorm, STEPAdam and FedSpeed (a step of theirs is a whole group's), a DistributedDataParallel model (its
            gradients arrive before they are averaged), twice, or with accumulate where a projection has a residual (which is made of the whole gradient).
        RuntimeError: in backward, where more gradients of one parameter than ``accumulate`` arrive between two ``step()``; at
            step with a GradScaler (its scale and its check for inf come after backward).
    """
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; release_gradients needs a gradmill optimizer")
    if optimizer.max_grad_norm is not None or optimizer.on_nonfinite != "propagate":
        raise ValueError("release_gradients steps before all gradients are there: set max_grad_norm to None and on_nonfinite to 'propagate'")
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise ValueError("release_gradients would step before DistributedDataParallel has averaged the gradients")
    if optimizer.releases_not:
        raise ValueError(f"release_gradients cannot be combined with {type(optimizer).__name__}, {optimizer.releases_not}")
    if getattr(optimizer, "_released", None) is not None:
        raise ValueError("this optimizer's gradients are released already; call remove() on that handle first")
    if not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(f"accumulate is {accumulate!r}; it must be an int of at least 1")
    residuals = {group["projection"].residual for group in optimizer.param_groups if group["projection"] is not None} - {None}
    if accumulate > 1 and residuals:
        raise ValueError(f"accumulate is {accumulate}; it must be 1 with a projection whose residual is {residuals.pop()!r}: that is made of the whole gradient")
    owners = {p: group for group in optimizer.param_groups for p in group["params"]}
    handle, done = ReleasedGradients(optimizer), set()

    def arrived(p):
        if p in done:
            raise RuntimeError(f"gradient {accumulate + 1} of a parameter of shape {tuple(p.shape)} arrived before optimizer.step(): call it after every "
                               + (f"{accumulate} backward passes" if accumulate > 1 else "backward, or release_gradients with accumulate="))
        with torch.no_grad():
            optimizer._check_gradient(p)
            count = handle.counts.pop(p, 0) + 1
            if count < accumulate:
                handle.counts[p] = count
                low = optimizer.projected_gradient(p, owners[p])
                if low is not None:
                    handle.low[p] = handle.low[p].add_(low) if p in handle.low else low
                    p.grad = None
                return
            optimizer._step_work([(owners[p], [p])], 1.0)
        done.add(p)
        p.grad = None

    def early(*_):
        done.clear()  # here too: a step that fails comes to no end
        for p in handle.low:  # the rest of the sum is R's
            p.grad = torch.zeros_like(p) if is_sharded(p) else torch.zeros(p.shape, dtype=p.dtype, device=p.device)

    def stepped(*_):
        for p in handle.counts:
            p.grad = None
        done.clear()
        handle.forget()

    handle._hooks += [p.register_post_accumulate_grad_hook(arrived) for p in dict.fromkeys(model.parameters()) if p in owners and p.requires_grad]
    handle._hooks += [optimizer.register_step_pre_hook(early), optimizer.register_step_post_hook(stepped)]
    optimizer._released = handle
    return handle
