"""Fused optimizers: torch.optim.Optimizer subclasses whose step is one native call per parameter group."""
from gradmill.optim._base import CheckpointError, FusedOptimizer, state_nbytes
from gradmill.optim.adagrad import CLASSP, AdaGradNorm, Adagrad, norm_test
from gradmill.optim.adam_variants import AdaBelief, DiffGrad, Grams
from gradmill.optim.adamw import Adam, AdamW
from gradmill.optim.checkpoints import load_optimizer, save_optimizer
from gradmill.optim.features import param_groups, release_gradients
from gradmill.optim.fedspeed import FedSpeed
from gradmill.optim.large_batch import LAMB, LARS
from gradmill.optim.lion import Lion
from gradmill.optim.muon import AuON, HybridAuON, Muon, newton_schulz
from gradmill.optim.galore import DCTAdamW, FiraAdamW, FrugalAdamW, GaLoreAdamW, QGaLoreAdamW
from gradmill.optim.orthogonal import project_normal, project_out
from gradmill.optim.projection import Projection, param_groups_for_projection
from gradmill.optim.sgd import SGD
from gradmill.optim.sophia import Sophia, gauss_newton_bartlett, hutchinson
from gradmill.optim.stable_spam import StableSPAM
from gradmill.optim.switching import STEPAdam, SWATS
from gradmill.optim.vrgd import VRGD
from gradmill.optim.xgrad import XGrad

__all__ = ["AdaBelief", "AdaGradNorm", "Adagrad", "Adam", "AdamW", "AuON", "CLASSP", "CheckpointError", "DCTAdamW", "DiffGrad",
           "FedSpeed", "FiraAdamW", "FrugalAdamW", "FusedOptimizer", "GaLoreAdamW", "Grams", "HybridAuON", "LAMB", "LARS", "Lion",
           "Muon", "Projection", "QGaLoreAdamW", "SGD", "STEPAdam", "SWATS", "Sophia", "StableSPAM", "VRGD", "XGrad",
           "gauss_newton_bartlett", "hutchinson", "load_optimizer", "newton_schulz", "norm_test", "param_groups",
           "param_groups_for_projection", "project_normal", "project_out", "release_gradients", "save_optimizer",
           "state_nbytes"]
