"""Low-rank adapters, W = W0 + s B A: gradients as full fine-tuning would have them (LoRA-Pro), and a start from its first update (LoRA-SB).

Both work on the modules of the peft library as they are, known by their attributes: ``lora_A`` and ``lora_B``, dicts by adapter
name of layers with a ``weight``, ``scaling`` and ``base_layer``. peft itself is not needed.
"""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from gradmill.ops._registry import describe
from gradmill.ops.projection import subspace_basis

__all__ = ["Latent", "LoRAPro", "Pair", "init_lora_sb", "pairs"]


class Pair(NamedTuple):
    """One adapter of one layer."""

    name: str      #: of the layer that it adapts
    adapter: str   #: "" where the layer holds A and B itself
    a: torch.nn.Parameter  #: (rank, inputs), or a convolution's (rank, ...), which counts as flatten(1)
    b: torch.nn.Parameter  #: (outputs, rank), or (outputs, rank, 1, 1)
    module: torch.nn.Module

    @property
    def scaling(self) -> float:
        """s, as it is now."""
        scaling = self.module.scaling
        return float(scaling[self.adapter] if isinstance(scaling, Mapping) else scaling)


def pairs(model: torch.nn.Module) -> Iterator[Pair]:
    """Every adapter whose A and B are trained. A layer may hold them as peft does, as two layers, or as two parameters (loralib)."""
    for name, module in model.named_modules():
        downs, ups = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
        if downs is None or ups is None or not hasattr(module, "scaling"):
            continue
        many = isinstance(downs, (Mapping, torch.nn.ModuleDict, torch.nn.ParameterDict))
        for adapter in downs.keys() if many else ("",):
            a, b = (side[adapter] if many else side for side in (downs, ups))
            a, b = (getattr(x, "weight", None) if isinstance(x, torch.nn.Module) else x for x in (a, b))
            if all(isinstance(x, torch.nn.Parameter) and x.requires_grad and x.dim() >= 2 for x in (a, b)):
                yield Pair(name, adapter, a, b, module)


def _require_plain(pair: Pair):
    """ValueError where the layer's weight is not W0 + s B A."""
    dora, variant = getattr(pair.module, "use_dora", False), type(getattr(pair.module, "lora_variant", {}).get(pair.adapter)).__name__
    kind = None
    if dora.get(pair.adapter, False) if isinstance(dora, Mapping) else dora:
        kind = "a DoRA adapter"
    elif not variant.startswith(("NoneType", "ALora", "Velora")):  # those two differ in where they apply, or in how A's gradient is found
        kind = f"an adapter of peft's {variant}"
    elif getattr(pair.module, "num_experts", 1) != 1:
        kind = f"an adapter of {pair.module.num_experts} experts"
    if kind:
        raise ValueError(f"{pair.name} is {kind}, whose weight is not W0 + s B A")


class LoRAPro:
    """Adjusts the gradients of adapters so that their step is the closest to full fine-tuning's that adapters can make.

    A step along (hA, hB) moves W along s B hA + s hB A. Of all (hA, hB) for which that is nearest to the whole gradient, which is
    never formed, the one nearest to (gA, gB) is taken::

        hA = s^-2 (B^T B)^-1 gA + X A        hB = s^-2 (I - B (B^T B)^-1 B^T) gB (A A^T)^-1 - B X
        B^T B X + X A A^T = -s^-2 (B^T B)^-1 gA A^T

    Source: Wang et al., "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", section 2; s is each adapter's own. X
    comes from the eigenvectors of the two Gram matrices, which also invert them. Adapters of one shape are solved together, in
    float64: Gram matrices square a condition number. Where B = 0 (the first step), hA = gA and hB = s^-2 gB (A A^T)^-1.

    Call it after backward and before the step of any optimizer, once a step, and clip after it::

        adjust = LoRAPro(model)
        loss.backward(); adjust(); optimizer.step()

    or ``LoRAPro(model).attach(optimizer)`` once, which does it before each ``optimizer.step()`` (without a closure). A gradient
    scaler's factor may still be on the gradients: the adjustment is linear. (The official Adam keeps moments of the whole weight's
    size; here the optimizer's moments are those of hA and hB.)

    Args:
        model: holds adapters as peft or loralib makes them, linear or convolutions without groups.
        ridge: added to both Gram matrices.

    Raises:
        ValueError: where there is no adapter to train, one of another kind (DoRA, KaSA, experts, a grouped convolution), or ridge is not positive.
    """

    def __init__(self, model: torch.nn.Module, ridge: float = 1e-8):
        if not ridge > 0:
            raise ValueError(f"ridge is {ridge!r}; it must be positive")
        self.ridge, self.pairs = ridge, list(pairs(model))
        if not self.pairs:
            raise ValueError("the model has no adapter to train: no module with lora_A, lora_B and scaling whose weights require gradients")
        for pair in self.pairs:
            _require_plain(pair)
            if pair.b[0].numel() != len(pair.a):
                raise ValueError(f"{pair.name} has lora_B {describe(pair.b)} for lora_A {describe(pair.a)}; it must hold (outputs, {len(pair.a)})")
            base = getattr(pair.module, "base_layer", pair.module)
            if getattr(base, "groups", 1) != 1:
                raise ValueError(f"{pair.name} adapts a convolution of {base.groups} groups, whose weight is not W0 + s B A")

    def attach(self, optimizer: torch.optim.Optimizer):
        """Adjusts before each ``optimizer.step()``. Returns torch's handle, whose ``remove()`` undoes it."""
        return optimizer.register_step_pre_hook(lambda *_: self())

    @torch.no_grad()
    def __call__(self):
        """Replaces the gradients of A and B, in place. An adapter without both gradients, or with s = 0, stays as it is."""
        alike = defaultdict(list)
        for pair in self.pairs:
            if pair.a.grad is not None and pair.b.grad is not None and pair.scaling:
                alike[pair.a.shape, pair.b.shape, pair.a.device].append(pair)
        for group in alike.values():
            a, b, ga, gb = (torch.stack([t.flatten(1).to(torch.float64) for t in tensors])
                            for tensors in zip(*((p.a, p.b, p.a.grad, p.b.grad) for p in group)))
            scaling = torch.tensor([p.scaling for p in group], dtype=torch.float64, device=a.device)[:, None, None]
            for pair, new_a, new_b in zip(group, *adjusted(a, b, ga, gb, scaling, self.ridge)):
                pair.a.grad.copy_(new_a.view(pair.a.shape))
                pair.b.grad.copy_(new_b.view(pair.b.shape))


def adjusted(a, b, ga, gb, scaling, ridge):
    """(hA, hB) for batches a, ga (layers, rank, inputs), b, gb (layers, outputs, rank) and scaling (layers, 1, 1)."""
    values_a, vectors_a = _eigen(a @ a.mT, ridge)
    values_b, vectors_b = _eigen(b.mT @ b, ridge)
    inverse_a, inverse_b = ((vectors / values[:, None]) @ vectors.mT for values, vectors in ((values_a, vectors_a), (values_b, vectors_b)))
    low_a, low_b = (inverse_b / scaling ** 2) @ ga, gb @ (inverse_a / scaling ** 2)
    inside = inverse_b @ (b.mT @ low_b)
    right = vectors_b.mT @ (low_a @ a.mT) @ vectors_a
    x = -vectors_b @ (right / (values_b[:, :, None] + values_a[:, None])) @ vectors_a.mT
    first = (b == 0).all(2).all(1)[:, None, None]  # then gA = 0, and so is everything but low_b: unless something else was added to gA
    return torch.where(first, ga, low_a + x @ a), torch.where(first, low_b, low_b - b @ (inside + x))


def _eigen(gram, ridge):
    """Eigenvalues, ridge included, and eigenvectors. Where a weight is not finite any will do (eigh would raise): nan follows from it."""
    finite = gram.isfinite().all(2).all(1)[:, None, None]
    values, vectors = torch.linalg.eigh(torch.where(finite, gram, torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)))
    return values.clamp(min=0) + ridge, vectors


# --- LoRA-SB ----------------------------------------------------------------------------------------------
class Latent(torch.nn.Module):
    """What takes lora_B's place: x -> B (R x). R (``latent``, fp32) trains, B (``basis``) is a buffer. ``weight`` is B R, for merging.

    A state_dict holds B R / ``scaling`` too, as lora_B's weight: what peft saves then loads, without gradmill, as the adapter
    W0 + s B A that its configuration tells of, s = ``scaling``. Loading takes R and B.
    """

    bias = None

    def __init__(self, basis: torch.Tensor, latent: torch.Tensor, scaling: float = 1.0):
        super().__init__()
        self.register_buffer("basis", basis)
        self.latent = torch.nn.Parameter(latent)
        self.scaling = scaling
        self.out_features, self.in_features = basis.shape

    @property
    def weight(self) -> torch.Tensor:
        return (self.basis.to(self.latent.dtype) @ self.latent).to(self.basis.dtype)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self.basis.to(self.latent.dtype) @ self.latent / self.scaling
        destination[prefix + "weight"] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        state_dict.pop(prefix + "weight", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, x):
        linear = torch.nn.functional.linear
        return linear(linear(x, self.latent.to(x.dtype)), self.basis.to(x.dtype))


def init_lora_sb(model: torch.nn.Module, gradients, *, lr: float = 1e-4, iterations: int = 4, oversample: int = 16, seed: int = 0) -> list[torch.nn.Parameter]:
    """Makes every linear adapter W0 + B R A, starting at the best approximation of its rank to full fine-tuning's first Adam step.

    Source: Ponkshe et al., "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning"
    (LoRA-SB): U = -lr sign(G), U ~ B S A by a truncated SVD; A and B are frozen, R starts at S, so that the model moves here, and
    only R (rank x rank) trains; s = 1. The SVD is randomised: block power iteration, then an exact SVD in the space found. (R stays fp32;
    the official code rounds it to bf16.)

    Args:
        model: with linear adapters of peft; the rank is theirs (the paper's: 96). A's weight is overwritten, lora_B becomes
            a :class:`Latent`, ``scaling`` 1. What ``save_pretrained`` writes loads as an ordinary adapter.
        gradients: {name of the adapted layer, as in ``named_modules``: the gradient of its base weight}; or a function that returns a
            loss; or an iterable that makes losses as it is read, whose gradients are added up (the paper: of about 50 samples).
            Losses are propagated to the base weights here, whose gradients are all there at once; no parameter's ``grad`` is changed.
        lr: the learning rate of that first step.
        iterations, oversample: of the power iteration, and its vectors beyond the rank.
        seed: of its start.

    Returns:
        The trainable R, in order of the layers: what an optimizer should get.

    Raises:
        ValueError: for no adapter, one of another kind (DoRA, KaSA, lora_bias) or merged, a missing gradient or one of another shape, a gradient with
            nan or inf, or a base weight that is not a float. The model is then as it was.
    """
    found = [p for p in pairs(model) if p.adapter and isinstance(p.module.lora_B[p.adapter], torch.nn.Linear)]
    if not found:
        raise ValueError("the model has no linear adapter to train: no module with dicts lora_A and lora_B of linear layers")
    names = [p.name for p in found]
    if len(set(names)) < len(names):
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)} has more than one trainable adapter; it must have one")
    for pair in found:
        _require_plain(pair)
        if pair.module.lora_B[pair.adapter].bias is not None:
            raise ValueError(f"{pair.name} has an adapter with a bias (lora_bias), which R has no place for")
        if pair.adapter in getattr(pair.module, "merged_adapters", ()):
            raise ValueError(f"{pair.name} has its adapter merged into the base weight; unmerge it first")
    if not isinstance(gradients, Mapping):
        gradients = _gradients(found, [gradients] if callable(gradients) else gradients)
    updates = []
    for index, pair in enumerate(found):  # every reason to refuse comes before anything is changed
        turned = getattr(pair.module, "fan_in_fan_out", False)  # around a layer whose weight is (inputs, outputs), as GPT-2's are
        shape, g = (len(pair.b), pair.a.shape[1])[::-1 if turned else 1], gradients.get(pair.name)
        if not isinstance(g, torch.Tensor) or g.shape != shape or not g.isfinite().all():
            raise ValueError(f"the gradient of {pair.name} is {describe(g)}; it must be a finite tensor of shape {shape}")
        if len(pair.a) > min(shape):
            raise ValueError(f"{pair.name} has an adapter of rank {len(pair.a)}; it must be at most {min(shape)}, the smaller side of its weight")
        g = g.detach().t() if turned else g.detach()
        updates.append(_truncated(g.to(pair.a.device, torch.float32).sign().neg(), len(pair.a), iterations, oversample, seed, index))
    trained = []
    for pair, (basis, values, down) in zip(found, updates):
        with torch.no_grad():
            pair.a.copy_(down)
        pair.a.requires_grad_(False)
        pair.a.grad = None
        latent = Latent(basis.to(pair.b.dtype), torch.diag(values * lr), pair.scaling or 1.0)
        pair.module.lora_B[pair.adapter] = latent
        if isinstance(pair.module.scaling, Mapping):
            pair.module.scaling[pair.adapter] = 1.0
        else:
            pair.module.scaling = 1.0
        trained.append(latent.latent)
    return trained


def _gradients(found, losses) -> dict[str, torch.Tensor]:
    """The sum of the losses' gradients at the base weights, which require gradients for that time only."""
    weights = {}
    for pair in found:
        weight = getattr(getattr(pair.module, "base_layer", None), "weight", None)
        if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
            raise ValueError(f"the base weight of {pair.name} is {describe(weight)}; it must be a float tensor: give its gradient by name")
        weights[pair.name] = weight
    before, total = [w.requires_grad for w in weights.values()], None
    try:
        for w in weights.values():
            w.requires_grad_(True)
        with torch.enable_grad():
            for loss in losses:
                grads = torch.autograd.grad(loss() if callable(loss) else loss, list(weights.values()), allow_unused=True)
                grads = [None if g is None else g.to(torch.float32) for g in grads]
                total = grads if total is None else [a if b is None else b if a is None else a.add_(b) for a, b in zip(total, grads)]
    finally:
        for w, required in zip(weights.values(), before):
            w.requires_grad_(required)
    return dict(zip(weights, total or []))


def _truncated(u, rank, iterations, oversample, seed, stream):
    """B (rows, rank), S (rank), A (rank, columns) of the SVD of u, cut to its largest values."""
    left, count = u.shape[0] < u.shape[1], min(rank + oversample, *u.shape)
    key = torch.tensor([seed, 0], dtype=torch.int64, device="cpu")
    space = subspace_basis(u, None, count, iterations, left, key, stream)
    small, values, vectors = torch.linalg.svd(space @ u if left else u @ space.t(), full_matrices=False)
    b, a = (space.t() @ small, vectors) if left else (small, vectors @ space)
    return b[:, :rank].contiguous(), values[:rank], a[:rank].contiguous()
