"""Autograd functions: they only call ops."""
from gradmill.autograd.linear import QuantizedLinear

__all__ = ["QuantizedLinear"]
