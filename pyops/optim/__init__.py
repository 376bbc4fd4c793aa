"""Fused optimizers: torch.optim.Optimizer subclasses whose step is one native call per parameter group."""
from gradmill.optim._base import CheckpointError, FusedOptimizer, state_nbytes
from gradmill.optim.adamw import AdamW
from gradmill.optim.lion import Lion
from gradmill.optim.qgalore import QGaLoreAdamW

__all__ = ["AdamW", "CheckpointError", "FusedOptimizer", "Lion", "QGaLoreAdamW", "state_nbytes"]
