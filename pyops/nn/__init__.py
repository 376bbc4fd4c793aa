"""Drop-in modules."""
from gradmill.nn.biper import BinaryConv2d, BinaryLinear, BiPerConv2d, BiPerLinear
from gradmill.nn.bit_delta import BitDeltaLinear
from gradmill.nn.codebook import CodebookLinear
from gradmill.nn.conv import Conv2d
from gradmill.nn.grouped import GroupedLinear
from gradmill.nn.linear import Linear
from gradmill.nn.ondevice import Int8Conv2d, Int8Linear

__all__ = ["BinaryConv2d", "BinaryLinear", "BiPerConv2d", "BiPerLinear", "BitDeltaLinear", "CodebookLinear", "Conv2d", "GroupedLinear", "Int8Conv2d", "Int8Linear",
           "Linear"]
