"""Drop-in modules."""
from gradmill.nn.linear import Linear

__all__ = ["Linear"]
