"""Drop-in modules."""
from gradmill.nn.biper import BinaryConv2d, BinaryLinear, BiPerConv2d, BiPerLinear
from gradmill.nn.bit_delta import BitDeltaLinear
from gradmill.nn.conv import Conv2d
from gradmill.nn.grouped import GroupedLinear
from gradmill.nn.linear import Linear

__all__ = ["BinaryConv2d", "BinaryLinear", "BiPerConv2d", "BiPerLinear", "BitDeltaLinear", "Conv2d", "GroupedLinear", "Linear"]
