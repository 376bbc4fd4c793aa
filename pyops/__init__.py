"""gradmill: custom kernels that make PyTorch training cheaper."""
import torch  # first: it brings the OpenMP runtime that gradmill's native module uses

try:  # a broken build still imports: `gradmill info` says what is wrong, and the reference runs
    from gradmill import _C
except ImportError:
    _C = None

from gradmill import bct, biper, bitdelta, codebook, formats, functional, lora, nn, ondevice, ops, optim, qat, recipes
from gradmill.convert import convert, state_in_parts
from gradmill.ops import BackendError, use_backend
from gradmill.optim import CheckpointError
from gradmill.profile import profile
from gradmill.weight import QuantizedWeight, nbytes

__version__ = "0.1.0"


__all__ = ["BackendError", "CheckpointError", "QuantizedWeight", "bct", "biper", "bitdelta", "codebook", "convert", "formats", "functional", "lora", "nbytes", "nn",
           "ondevice", "ops", "optim", "profile", "qat", "recipes", "state_in_parts", "use_backend", "__version__"]
