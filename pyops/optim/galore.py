"""AdamW on projected gradients under its papers' names: each is AdamW with a Projection and the paper's defaults."""
from __future__ import annotations

import warnings

from gradmill.optim.adamw import AdamW
from gradmill.optim.projection import FIELDS, Projection


class GaLoreAdamW(AdamW):
    """AdamW in the leading singular subspace of each gradient.

    Source: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", Algorithms 1 and 2. Parameter
    groups with ``rank`` set are projected: their parameters of two or more dimensions (convolutions count as ``flatten(1)``)
    whose sides are larger than ``rank``. All others take a plain AdamW step. Weight decay multiplies the weight after
    the step, as in the official code (whose AdamW also puts eps, 1e-6, into an uncorrected root: this one is torch's).

    Args:
        params: parameters or groups; a group may set ``rank`` and any other option of Projection.
        lr, betas, eps, weight_decay, amsgrad: as in :class:`gradmill.optim.AdamW`.
        rank: None takes plain steps (set it per group).
        options: those of :class:`gradmill.optim.Projection` (basis, bits, refresh_every, scale ...) and of
            :class:`gradmill.optim.FusedOptimizer` (states, seed ...).
    """

    BETAS, STATES = (0.9, 0.999), "fp32"
    PROJECTION = dict(basis="svd", bits=32, refresh_every=200, scale=0.25, stagger=False)

    def __init__(self, params, lr=1e-3, betas=None, eps=1e-8, weight_decay=0.0, amsgrad=False, *, rank=None, states=None, **options):
        self._projection_options = {"rank": rank, **self.PROJECTION, **{k: options.pop(k) for k in FIELDS if k in options}}
        Projection(**{**self._projection_options, "rank": 1 if rank is None else rank})  # what is wrong is said now, not when a group sets its rank
        super().__init__(params, lr, self.BETAS if betas is None else betas, eps, weight_decay, amsgrad, states=states or self.STATES, **options)

    def __getstate__(self):
        return {**super().__getstate__(), "_projection_options": self._projection_options}

    def add_param_group(self, param_group):
        super().add_param_group({"rank": self._projection_options["rank"], **param_group} if "projection" not in param_group else param_group)
        projection = self.param_groups[-1]["projection"]
        small = [tuple(p.shape) for p in self.param_groups[-1]["params"] if projection and p.dim() >= 2 and not projection.rank_of(p.shape)]
        if small:
            warnings.warn(f"rank {projection.rank} is not below the smaller side of {len(small)} parameters (the first of shape {small[0]}): "
                          "they take plain AdamW steps, with full-size states and without scale", stacklevel=3)


class QGaLoreAdamW(GaLoreAdamW):
    """GaLore with packed bases, 8-bit states and lazy refreshes.

    Source: Zhang et al., "Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients". Defaults: INT4
    basis in groups of 256, block power iteration with QR from the last basis instead of the paper's SVD, ``adaptive``
    intervals, betas (0.9, 0.95), states "int8". For INT8 weights see recipe int8_weights. Everything else as in
    :class:`GaLoreAdamW`.
    """

    BETAS, STATES = (0.9, 0.95), "int8"
    PROJECTION = dict(basis="subspace", bits=4, group_size=256, refresh_every=200, adaptive=True, scale=0.25)


class FiraAdamW(GaLoreAdamW):
    """GaLore whose residual steps too, scaled as AdamW scaled its low-rank part, under a norm-growth limiter of 1.01. Without a ``rank``
    (``param_groups_for_projection`` makes groups with one) steps are plain AdamW's.

    Source: Chen et al., "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?", Algorithm 1. (The
    official code takes the residual from alpha P R, and a zero first residual freezes its limiter: here the residual is
    the paper's and the limiter starts at the first that is not zero.) Everything else as in :class:`GaLoreAdamW`.
    """

    PROJECTION = dict(basis="subspace", bits=32, refresh_every=200, scale=0.25, residual="fira")


class FrugalAdamW(GaLoreAdamW):
    """AdamW on a quarter of the coordinates, signSGD on the others.

    Source: Zmushko et al., "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training", Algorithm 1:
    ``rank`` is the density (0.25 of the projected side), rows or columns are drawn anew every 200 steps, moments and step
    count are then reset; ``residual_scale`` is the sign step's rate over lr (1; fine-tuning: 0.1). Other bases work too.
    Weight decay comes first. Everything else as in :class:`GaLoreAdamW`.
    """

    PROJECTION = dict(basis="coordinate", refresh_every=200, scale=1.0, residual="sign", moments="reset", decay_after=False, stagger=False)


class DCTAdamW(GaLoreAdamW):
    """AdamW on the columns of the discrete cosine transform that hold most of each gradient, chosen anew at every step.

    Source: Modoranu et al., "SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models": S = G D by a fast
    transform, the ``rank`` columns of largest l1 norm; only their indices are stored; moments move by index match. (The
    official fast path uses another basis, DCT-II, than its matmul path; here there is one, DCT-III. The optional error
    feedback is not here.) Everything else as in :class:`GaLoreAdamW`.
    """

    PROJECTION = dict(basis="dct", refresh_every=1, scale=1.0, moments="rotate", decay_after=False, stagger=False)
