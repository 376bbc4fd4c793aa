"""AdaBelief, DiffGrad and Grams: Adam with another denominator, numerator or sign."""
from __future__ import annotations

from gradmill.optim._base import FusedOptimizer
from gradmill.optim.adamw import AdamW


class AdaBelief(AdamW):
    """AdaBelief: Adam whose second moment is that of the gradient's distance from its own average.

    Source: Zhuang et al., "AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed Gradients"; arguments and
    defaults are those of the authors' package, adabelief-pytorch. m first; s = beta2 s + (1-beta2)(g-m)^2 + eps, where eps
    stays in s; theta <- theta - step m / (sqrt(s / bc2) + eps). (Popular re-implementations leave out the correction of m, or
    one eps.) An eps of 1e-16 is for fp32; it sets the floor of sqrt(s) at 1e-8.

    Args:
        params, lr, betas, eps, weight_decay: (1e-3, (.9, .999), 1e-16, 0).
        weight_decouple: AdamW's decay (the default); False adds it to the gradient.
        rectify: RAdam's factor on the step size, on by default. degenerated_to_sgd: while the factor is undefined, at first,
            step by the corrected momentum alone; False does not step.
        The other options and what is raised: as in :class:`gradmill.optim.AdamW`.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-16, weight_decay=0, *, weight_decouple=True, rectify=True,
                 degenerated_to_sgd=True, **options):
        FusedOptimizer.__init__(self, params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, weight_decouple=weight_decouple,
                                                   rectify=rectify, degenerated_to_sgd=degenerated_to_sgd), **options)

    def rule(self, group):
        return "adabelief"


class DiffGrad(AdamW):
    """diffGrad: Adam with a friction of 1/(1 + exp(-abs(g_before - g))), between 1/2 where the gradient is steady and 1.

    Source: Dubey et al., "diffGrad: An Optimization Method for Convolutional Neural Networks"; arguments and defaults are
    the paper's, the decay (part of the gradient) the authors' code's. theta <- theta - lr sqrt(bc2)/bc1 friction m / (sqrt(v)
    + eps): eps is added to the uncorrected root. The last gradient is a third state. (The official first version keeps an alias
    of the gradient instead of a copy, so that its friction is always 1/2.)

    Args:
        params, lr, betas, eps, weight_decay: (1e-3, (.9, .999), 1e-8, 0).
        The other options and what is raised: as in :class:`gradmill.optim.AdamW`.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, **options):
        FusedOptimizer.__init__(self, params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay), **options)

    def rule(self, group):
        return "diffgrad"


class Grams(AdamW):
    """Grams: Adam's magnitudes with the gradient's signs.

    Source: Cao et al., "Grams: Gradient Descent with Adaptive Momentum Scaling", Algorithm 1; defaults are the authors'
    code's. theta <- theta (1 - lr wd) - lr sqrt(bc2)/bc1 sign(g) abs(m) / (sqrt(v) + eps). The decay comes before the step, as
    in the paper (the code, after HF's AdamW, decays after it); sign(0) = 0.

    Args:
        params, lr, betas, eps, weight_decay: (1e-3, (.9, .999), 1e-6, 0).
        The other options and what is raised: as in :class:`gradmill.optim.AdamW`.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0, **options):
        FusedOptimizer.__init__(self, params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay), **options)

    def rule(self, group):
        return "grams"
