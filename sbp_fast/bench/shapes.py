"""Shapes of the parameters of ResNet-50, written out so that no model need be built.

Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, table 1.
"""

from __future__ import annotations

Shape = tuple[int, ...]

# (width of the bottleneck, blocks) of the four stages.
_STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
_EXPANSION = 4


def resnet50_shapes() -> list[Shape]:
    """161 shapes in the order of the layers: convolutions, batch norms, classifier; 25.6 M elements."""
    shapes = _convolution(3, 64, 7)
    channels = 64
    for width, blocks in _STAGES:
        for block in range(blocks):
            shapes += _convolution(channels, width, 1)
            shapes += _convolution(width, width, 3)
            shapes += _convolution(width, width * _EXPANSION, 1)
            if block == 0:
                shapes += _convolution(channels, width * _EXPANSION, 1)
            channels = width * _EXPANSION
    return [*shapes, (1000, channels), (1000,)]


def _convolution(channels_in: int, channels_out: int, size: int) -> list[Shape]:
    """A convolution's weight, and weight and bias of its batch norm."""
    return [(channels_out, channels_in, size, size), (channels_out,), (channels_out,)]
