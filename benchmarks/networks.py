"""The five networks of "Compression of Deep Convolutional Neural Networks" for 32 x 32 pictures, 10 classes, in torch.

Written from the papers, with the usual changes for small pictures: a 3 x 3 stem of stride 1 and no pooling before the
first stage. Weights are random: the normal distribution of He et al. 2015 keeps the size of activations through any
depth; everything starts from one seed, so that a network is the same each time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10


def alexnet() -> nn.Module:
    """Krizhevsky et al. 2012: convolutions of 96, 256, 384, 384 and 256 channels, one tower, three dense layers."""
    pool = nn.MaxPool2d(2)
    features = [
        *_plain(3, 96, 5), pool, *_plain(96, 256, 5), pool, *_plain(256, 384, 3), *_plain(384, 384, 3),
        *_plain(384, 256, 3), pool,
    ]  # fmt: skip
    dense = [nn.Linear(256 * 16, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, CLASSES)]
    return _started(nn.Sequential(*features, nn.Flatten(), *dense))


def vgg16() -> nn.Module:
    """Simonyan and Zisserman 2015, configuration D: thirteen 3 x 3 convolutions, five poolings, three dense layers."""
    layers: list[nn.Module] = []
    channels = 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers += _plain(channels, width, 3)
            channels = width
        layers.append(nn.MaxPool2d(2))
    dense = [nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, CLASSES)]
    return _started(nn.Sequential(*layers, nn.Flatten(), *dense))


def resnet18() -> nn.Module:
    """He et al. 2016: four stages of two basic blocks, 64 to 512 channels."""
    blocks: list[nn.Module] = []
    channels = 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        blocks += [_BasicBlock(channels, width, stride), _BasicBlock(width, width, 1)]
        channels = width
    return _started(nn.Sequential(*_normed(3, 64, 3), *blocks, *_head(512)))


def shufflenet_v2() -> nn.Module:
    """Ma et al. 2018, 1x: stages of 116, 232 and 464 channels with 4, 8 and 4 units, then 1 x 1 to 1,024."""
    units: list[nn.Module] = []
    channels = 24
    for width, depth in ((116, 4), (232, 8), (464, 4)):
        units += [_ShuffleDown(channels, width), *(_ShuffleUnit(width) for _ in range(depth - 1))]
        channels = width
    return _started(nn.Sequential(*_normed(3, 24, 3), *units, *_normed(channels, 1024, 1), *_head(1024)))


def densenet161() -> nn.Module:
    """Huang et al. 2017, growth 48: blocks of 6, 12, 36 and 24 layers, each halved by a transition."""
    growth, channels = 48, 96
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
    for depth in (6, 12, 36, 24):
        for _ in range(depth):
            layers.append(_DenseLayer(channels, growth))
            channels += growth
        if depth != 24:
            halved = nn.Conv2d(channels, channels // 2, 1, bias=False)
            layers += [nn.BatchNorm2d(channels), nn.ReLU(), halved, nn.AvgPool2d(2)]
            channels //= 2
    return _started(nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU(), *_head(channels)))


def _plain(channels: int, width: int, kernel: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, width, kernel, padding=kernel // 2), nn.ReLU()]


def _normed(channels: int, width: int, kernel: int, stride: int = 1, *, groups: int = 1) -> list[nn.Module]:
    """Return convolution, batch normalization and, but for depthwise ones (Ma et al. 2018), the nonlinearity."""
    conv = nn.Conv2d(channels, width, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(width)] + ([nn.ReLU()] if groups == 1 else [])


def _head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)]


class _BasicBlock(nn.Module):
    """Two 3 x 3 convolutions around which the input is added, by a 1 x 1 convolution where its shape changes."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(*_normed(channels, width, 3, stride), *_normed(width, width, 3)[:2])
        same = stride == 1 and channels == width
        self.shortcut = nn.Sequential(*([] if same else _normed(channels, width, 1, stride)[:2]))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, channels, h, w)`` to ``(n, width, h / stride, w / stride)``."""
        return functional.relu(self.residual(x) + self.shortcut(x))


def _shuffle(x: Tensor) -> Tensor:
    """Interleave the two halves of the channels."""
    return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def _branch(channels: int, width: int, stride: int) -> nn.Sequential:
    """1 x 1, depthwise 3 x 3, 1 x 1."""
    middle = _normed(width, width, 3, stride, groups=width)
    return nn.Sequential(*_normed(channels, width, 1), *middle, *_normed(width, width, 1))


class _ShuffleUnit(nn.Module):
    """One half of the channels is transformed, the other passes by; then both are interleaved."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = _branch(width // 2, width // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape."""
        kept, changed = x.chunk(2, dim=1)
        return _shuffle(torch.cat((kept, self.branch(changed)), dim=1))


class _ShuffleDown(nn.Module):
    """Two branches of stride 2, each giving half of the channels."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        half = width // 2
        self.short = nn.Sequential(*_normed(channels, channels, 3, 2, groups=channels), *_normed(channels, half, 1))
        self.long = _branch(channels, half, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, channels, h, w)`` to ``(n, width, h / 2, w / 2)``."""
        return _shuffle(torch.cat((self.short(x), self.long(x)), dim=1))


class _DenseLayer(nn.Module):
    """1 x 1 to four times the growth, 3 x 3 to the growth; the result is appended to the input."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        mixed = [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 4 * growth, 1, bias=False)]
        kernel = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
        self.step = nn.Sequential(*mixed, nn.BatchNorm2d(4 * growth), nn.ReLU(), kernel)

    def forward(self, x: Tensor) -> Tensor:
        """Add ``growth`` channels."""
        return torch.cat((x, self.step(x)), dim=1)


def _started(module: nn.Module) -> nn.Module:
    """Draw all weights from one seed."""
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu", generator=generator)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    return module.eval()
