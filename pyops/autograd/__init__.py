"""Autograd functions: they only call ops."""
from gradmill.autograd.bit_delta import BitDelta
from gradmill.autograd.codebook import CodebookProduct
from gradmill.autograd.fake_quantize import FakeQuantize
from gradmill.autograd.linear import QuantizedLinear
from gradmill.autograd.one_bit import OneBit

__all__ = ["BitDelta", "CodebookProduct", "FakeQuantize", "OneBit", "QuantizedLinear"]
