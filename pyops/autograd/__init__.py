"""Autograd functions: they only call ops."""
from gradmill.autograd.fake_quantize import FakeQuantize
from gradmill.autograd.linear import QuantizedLinear

__all__ = ["FakeQuantize", "QuantizedLinear"]
