"""Masks: which part of a picture the loss counts. White counts, black does not, or as much as `mask_weight` says.

A mask is a file next to its picture, `name-mask.png` or `name.mask.png`, or with OneTrainer's name,
`name-masklabel.png`; or, as kohya's scripts are used, a file of the picture's name in a folder `FOLDER_mask` next to
the pictures' folder. The transparent parts of a picture are masked too.

What is masked does not count by default, because it would be learnt as a white ground: after 200 steps on 12 of the
bundled pictures, cut out as ellipses, 66 % of the corners of drawn pictures were white (above 245 of 255) with a weight
of 1, 2 % with 0.1, where they were still brighter than the base's, and 0.3 % with 0 (2.8 % with the base alone).
"""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageOps

from .captions import name_stem
from .images import crop_to_shape, explain_image_error, open_file

SUFFIXES = ("-masklabel", "-mask", ".mask")
FOLDER_SUFFIX = "_mask"
_OPAQUE = 250  # levels of alpha from here on are rounding errors of an opaque picture


class MaskError(ValueError):
    """A mask cannot be used; the message says why, without the name of its picture."""


def find_mask_files(folder: Path, images: list[str], problems: list[str]) -> dict[str, list[Path]]:
    """The mask files of each image that has one, by the image's name; more than one are a problem.

    Args:
        folder: of the images.
        images: the names of all image files in the folder, those of masks among them.
        problems: a line is appended for each image with two masks.
    """
    by_stem: dict[str, list[str]] = {}  # a.jpg and a.png have one mask
    for name in images:
        by_stem.setdefault(name_stem(name), []).append(name)
    found: dict[str, list[Path]] = {}
    for name in images:
        stem = name_stem(name)
        suffix = next((s for s in SUFFIXES if stem.endswith(s)), None)
        for image in by_stem.get(stem.removesuffix(suffix), []) if suffix else []:
            found.setdefault(image, []).append(folder / name)
    beside = folder.with_name(folder.name + FOLDER_SUFFIX)
    if folder.name and beside.is_dir():
        for path in sorted(p for p in beside.rglob("*") if p.is_file() and not p.name.startswith(".")):
            for image in by_stem.get(name_stem(path.relative_to(beside).as_posix()), []):
                found.setdefault(image, []).append(path)
    for image, paths in found.items():
        if len(paths) > 1:
            problems.append(f"{image}: has {len(paths)} masks, {' and '.join(p.name for p in paths)}; keep one")
    return found


def open_mask(content: bytes | None, image_content: bytes) -> Image.Image | None:
    """The mask of an image in its size, in grey levels: its mask file, darkened by the image's own transparency.

    Args:
        content: of the mask file, or None if there is none.

    Returns:
        None if the image is opaque and has no mask file.

    Raises:
        MaskError: if the mask file is damaged or of another shape than the image, or the mask is black everywhere.
    """
    with open_file(io.BytesIO(image_content)) as image:
        mask = alpha = _alpha(image)
        size = ImageOps.exif_transpose(image).size if content is not None else None
    if content is not None:
        try:
            with open_file(io.BytesIO(content)) as file:
                grey = ImageOps.exif_transpose(file).convert("LA")
        except Exception as error:  # decoders raise many kinds of exceptions on damaged files
            raise MaskError(f"its mask is {explain_image_error(error)}") from error
        mask = ImageChops.multiply(grey.getchannel("L"), grey.getchannel("A"))
        if abs(mask.width / mask.height * size[1] / size[0] - 1) > 0.02:
            raise MaskError(
                f"it is {size[0]} x {size[1]} and its mask {mask.width} x {mask.height}; give them one shape"
            )
        mask = mask.resize(size, Image.Resampling.BILINEAR)
        mask = ImageChops.multiply(mask, alpha) if alpha else mask
    if mask is not None and not mask.getextrema()[1]:
        what = "is transparent" if content is None else "has a mask that is black"
        raise MaskError(f"{what} everywhere, so nothing of it would count; make white what the loss should count")
    return mask


def _alpha(image: Image.Image) -> Image.Image | None:
    """The upright alpha channel of an image, or None if it is opaque; then the image is not decoded."""
    shade = image.info.get("transparency")
    if (image.mode.startswith("I") or image.mode == "F") and shade is not None:
        levels = np.where(np.asarray(ImageOps.exif_transpose(image)) == shade, 0, 255)
        alpha = Image.fromarray(levels.astype(np.uint8))
    elif image.has_transparency_data:
        alpha = ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")
    else:
        return None
    return alpha if alpha.getextrema()[0] < _OPAQUE else None


def loss_weight(mask: Image.Image, shape: tuple[int, int], latent: tuple[int, int], outside: float) -> torch.Tensor:
    """How much each place of a latent counts in the loss, (1, h, w), on average 1.

    So a picture counts as much as others however little of it the mask leaves.

    Args:
        shape: width and height in pixels to which the picture is cropped.
        latent: height and width of the latent.
        outside: the weight of what is masked, from 0 to 1, before the average is made 1.
    """
    levels = torch.from_numpy(np.asarray(crop_to_shape(mask, shape), dtype=np.float32).copy())[None] / 255
    inside = torch.nn.functional.adaptive_avg_pool2d(levels, latent)
    weight = inside + (1 - inside) * outside
    return weight / weight.mean()
