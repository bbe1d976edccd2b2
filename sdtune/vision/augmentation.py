"""What training does to its pictures and labels: nothing, crops and flips, or what SSF's code does for CIFAR-100.

"ssf" is timm's usual augmentation, with its numbers: crops of 8 to 100 % of the area and flips; RandAugment
("rand-m9-mstd0.5-inc1": two operations, each done with probability 0.5, of magnitude 9 with deviation 0.5); mixup (0.8)
or CutMix (1.0) of each batch with its reverse; label smoothing 0.1; a rectangle of noise in a quarter of the pictures.
The operations give what Pillow's give (tests/vision/test_augmentation.py), for a batch on its device. All draws are
PyTorch's: the same seed, the same batches.

Pictures here are floats (B, 3, side, side) with whole numbers from 0 to 255, where nothing else is said.
"""

import math

import torch
import torch.nn.functional as F

from .model import Classifier

AUGMENTATIONS = ("none", "crop_flip", "ssf")


@torch.no_grad()
def augment(
    pixels: torch.Tensor, labels: torch.Tensor, classifier: Classifier, how: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch for training.

    Args:
        pixels: bytes (B, 3, side, side).
        labels: classes (B,).
        how: one of `AUGMENTATIONS`.

    Returns:
        What the model receives, and targets for `cross_entropy`: the classes, or of "ssf" probabilities (B, classes).

    Raises:
        ValueError: if `how` is none of them.
    """
    if how not in AUGMENTATIONS:
        raise ValueError(f"the augmentation is {how!r}; expected one of {', '.join(AUGMENTATIONS)}")
    if how == "none":
        return classifier.normalise(pixels), labels
    if how == "crop_flip":
        return crop_flip(classifier.normalise(pixels)), labels
    x = crop_flip(pixels.to(classifier.device).float()).round()
    fill = (255 * torch.tensor(classifier.setup.mean, device=x.device)).round()[:, None, None]
    x, targets = mix(rand_augment(x, fill), labels, len(classifier.setup.labels))
    return erase(classifier.normalise(x)), targets


def crop_flip(x: torch.Tensor) -> torch.Tensor:
    """(B, 3, side, side) -> the same, with a random crop of 8 to 100 % of the area and a flip of every second one."""
    batch = len(x)
    area, ratio = (
        torch.empty(batch).uniform_(0.08, 1),
        torch.empty(batch).uniform_(math.log(3 / 4), math.log(4 / 3)).exp(),
    )
    size = torch.stack([(area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)], 1)
    centre = (2 * torch.rand(batch, 2) - 1) * (1 - size)
    flip = torch.where(torch.rand(batch) < 0.5, -1.0, 1.0)
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = size[:, 0] * flip, size[:, 1]
    theta[:, :, 2] = centre
    grid = F.affine_grid(theta.to(x), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def rand_augment(x: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """Two operations out of `OPERATIONS` on each picture, each with probability 0.5.

    Args:
        fill: (3, 1, 1), the colour of what a rotation, shear or shift uncovers.
    """
    x, count = x.clone(), len(x)
    for _ in range(2):
        which = torch.randint(len(OPERATIONS), (count,))
        done, sign = torch.rand(count) < 0.5, torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
        strength = sign * (9 + 0.5 * torch.randn(count)).clamp(0, 10) / 10
        for i, operation in enumerate(OPERATIONS.values()):
            (own,) = torch.where(done & (which == i))
            if len(own):
                here = own.to(x.device)
                x[here] = operation(x[here], strength[own].to(x.device)[:, None, None, None], fill)
    return x


# The operations: pictures (B, 3, side, side), strength (B, 1, 1, 1) from -1 to 1, fill (3, 1, 1) -> pictures. What has
# no direction takes the strength without its sign.


def _warp(x: torch.Tensor, rows: list[list], fill: torch.Tensor) -> torch.Tensor:
    """Moves pixels, bilinear; `fill` where a place is outside.

    Args:
        rows: 2 x 3, from a place in the result to that in `x`, in half sides from the centre; numbers or (B, 1, 1, 1).
    """
    zeros = torch.zeros(len(x), device=x.device)
    matrix = torch.stack(
        [torch.stack([zeros + torch.as_tensor(v, device=x.device).flatten() for v in row], 1) for row in rows], 1
    )
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    found = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    found = (found + 1e-3).floor()  # Pillow cuts fractions off; 128.9999 is a whole number that floats miss
    return torch.where((grid.abs() > 1).any(3)[:, None], fill, found)


def _rotate(x, s, fill):
    angle = math.radians(30) * s
    return _warp(x, [[angle.cos(), -angle.sin(), 0], [angle.sin(), angle.cos(), 0]], fill)


def _blend(other: torch.Tensor, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Between `other` and `x`, or beyond `x`, by a factor of 0.1 to 1.9; 1 is `x`. Pillow cuts fractions off."""
    return (other + (1 + 0.9 * s).clamp(min=0.1) * (x - other)).clamp(0, 255).floor()


def _grey(x: torch.Tensor) -> torch.Tensor:
    """(B, 1, side, side), with Pillow's weights, which are whole 65,536ths."""
    red, green, blue = x.split(1, 1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536).floor()


def _sharpness(x, s, fill):
    smooth = x.clone()  # Pillow leaves the border as it is
    kernel = torch.tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]], device=x.device).expand(3, 1, 3, 3)
    smooth[:, :, 1:-1, 1:-1] = (F.conv2d(x, kernel, groups=3) / 13).round()
    return _blend(smooth, x, s)


def _auto_contrast(x, s, fill):
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, ((x - low) * 255 / (high - low).clamp(min=1)).floor(), x)


def _equalize(x, s, fill):
    values = x.flatten(2).long()
    counts = torch.zeros(*values.shape[:2], 256, device=x.device, dtype=torch.long)
    counts.scatter_add_(2, values, torch.ones_like(values))
    step = (values.shape[2] - counts.gather(2, values.amax(2, keepdim=True))) // 255
    table = ((step // 2 + counts.cumsum(2) - counts) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, table.gather(2, values), values).view(x.shape).float()


def _posterize(x, s, fill):
    unit = 2 ** (4 + (4 * s.abs()).floor())  # 4 bits to none are left
    return (x / unit).floor() * unit


def _solarize(x, s, fill):
    return torch.where(x < 256 - (256 * s.abs()).floor(), x, 255 - x)


def _solarize_add(x, s, fill):
    return torch.where(x < 128, (x + (110 * s.abs()).floor()).clamp(max=255), x)


OPERATIONS = {
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": lambda x, s, fill: 255 - x,
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": lambda x, s, fill: _blend(_grey(x), x, s),
    "contrast": lambda x, s, fill: _blend((_grey(x).mean((1, 2, 3), keepdim=True) + 0.5).floor(), x, s),
    "brightness": lambda x, s, fill: _blend(torch.zeros_like(x), x, s),
    "sharpness": _sharpness,
    "shear_x": lambda x, s, fill: _warp(x, [[1, 0.3 * s, 0.3 * s], [0, 1, 0]], fill),
    "shear_y": lambda x, s, fill: _warp(x, [[1, 0, 0], [0.3 * s, 1, 0.3 * s]], fill),
    "translate_x": lambda x, s, fill: _warp(x, [[1, 0, 0.9 * s], [0, 1, 0]], fill),
    "translate_y": lambda x, s, fill: _warp(x, [[1, 0, 0], [0, 1, 0.9 * s]], fill),
}


def mix(x: torch.Tensor, labels: torch.Tensor, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixup or CutMix of a batch with its reverse, and smoothed targets (B, classes), both by one share."""
    cut = torch.rand(()).item() < 0.5
    alpha = 1.0 if cut else 0.8
    own = torch.distributions.Beta(alpha, alpha).sample().item()
    if cut:
        height, width = x.shape[2:]
        rows, columns = (_interval(n, int(n * math.sqrt(1 - own))) for n in (height, width))
        mixed = x.clone()
        mixed[:, :, rows, columns] = x.flip(0)[:, :, rows, columns]
        own = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
    else:
        mixed = (own * x + (1 - own) * x.flip(0)).round()
    targets = 0.9 * F.one_hot(labels, classes).float() + 0.1 / classes
    return mixed, own * targets + (1 - own) * targets.flip(0)


def _interval(size: int, length: int) -> slice:
    """So many of `size` places around a random one of them, without those outside."""
    middle, half = torch.randint(size, ()).item(), length // 2
    return slice(max(0, middle - half), min(size, middle + half))


def erase(x: torch.Tensor) -> torch.Tensor:
    """Normalised pictures (B, 3, side, side) -> a quarter of them with normal noise in 2 to 33 % of the area."""
    x, (height, width) = x.clone(), x.shape[2:]
    for i in torch.where(torch.rand(len(x)) < 0.25)[0].tolist():
        for area, shape in torch.rand(10, 2).tolist():  # the first of ten draws that fits
            area = (0.02 + (1 / 3 - 0.02) * area) * height * width
            ratio = 0.3 ** (2 * shape - 1)
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if h < height and w < width:
                top, left = torch.randint(height - h + 1, ()).item(), torch.randint(width - w + 1, ()).item()
                x[i, :, top : top + h, left : left + w] = torch.randn(3, h, w, device=x.device)
                break
    return x
