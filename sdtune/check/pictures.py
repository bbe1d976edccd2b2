"""What can be seen of a picture alone: how blurred it is, and whether it looks almost like another."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFilter

from ..training.dataset import Pair

# The bundled anime pictures at 256 px have a `blur` of 0.21 to 0.28; blurred with a sigma of 1 px 0.38 to 0.46, of
# 1.5 px 0.52 to 0.60; enlarged 4 times 0.56 to 0.63.
BLURRED = 0.5
# Correlation of thumbnails: of two of these pictures at most 0.70, of one with itself 10 % brighter 0.99, with a white
# box in a corner 0.92 to 0.99; cut by 5 % at each side only 0.81 to 0.87, which is not told from others of one style.
ALIKE = 0.96
_BOX_RADIUS = 4  # of 9 pixels in a row, as in the paper


def blur(image: Image.Image) -> float:
    """How blurred an image is, from 0 (sharp) to 1: how little its edges change when it is blurred once more.

    Crete, Dolmiere, Ladret, Nicolas, "The blur effect: perception and estimation with a new no-reference perceptual
    blur metric", SPIE 2007. Only edges count, so large areas of one colour, as in drawings, do not.
    """
    grey, found = image.convert("L"), []
    sharp = np.asarray(grey, np.float32)
    for axis, radius in ((0, (0, _BOX_RADIUS)), (1, (_BOX_RADIUS, 0))):
        blurred = np.asarray(grey.filter(ImageFilter.BoxBlur(radius)), np.float32)
        change, change_of_blurred = (np.abs(np.diff(x, axis=axis)) for x in (sharp, blurred))
        lost = np.maximum(0, change - change_of_blurred).sum()
        found.append(1 - lost / max(change.sum(), 1e-6))
    return float(max(found))


def find_alike(pairs: Sequence[Pair], others: Sequence[Pair]) -> dict[str, tuple[str, str]]:
    """The pairs whose image looks almost like another's: also if it is brighter, marked in a corner, or mirrored.

    Args:
        others: may be `pairs`; then each image is compared with those before it.

    Returns:
        The name of the pair -> the name of the other one, and "the same as", "almost the same as" or "the mirror image
        of".
    """
    found, is_same_list = {}, pairs is others
    own, known = _normalized(pairs), _normalized(others)
    mirrored = _normalized(pairs, mirror=True)
    for i, pair in enumerate(pairs):
        candidates = known[:i] if is_same_list else known
        if not len(candidates):
            continue
        for thumbnail, what in ((own[i], "almost the same as"), (mirrored[i], "the mirror image of")):
            likeness = candidates @ thumbnail
            j = int(likeness.argmax())
            if likeness[j] >= ALIKE:
                same = what.startswith("almost") and pair.digest == others[j].digest
                found[pair.name] = others[j].name, "the same as" if same else what
                break
    return found


def _normalized(pairs: Sequence[Pair], mirror: bool = False) -> np.ndarray:
    """The thumbnails of the images, (n, 768), without their mean and of length 1; of one colour, zeros."""
    thumbnails = np.array([p.thumbnail for p in pairs], np.float32).reshape(len(pairs), 16, 16, 3)
    flat = (thumbnails[:, :, ::-1] if mirror else thumbnails).reshape(len(pairs), 768)
    flat = flat - flat.mean(1, keepdims=True)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    return np.divide(flat, length, out=np.zeros_like(flat), where=length > 1)
