"""Features of pictures."""

import torch
from PIL import Image

from sdtune.evaluation import features


def test_similar_pictures_have_similar_features():
    picture = Image.effect_mandelbrot((96, 96), (-2, -1.5, 1, 1.5), 60).convert("RGB")
    darker, other = picture.point(lambda v: int(v * 0.9)), Image.new("RGB", (96, 96), "orange")
    found = features.features([picture, darker, other])
    assert found.shape == (3, 1280) and torch.allclose(found.norm(dim=1), torch.ones(3))
    assert found[0] @ found[1] > 0.9 > found[0] @ found[2]


def test_local_features_see_a_part_that_is_smeared_and_only_there():
    picture = Image.effect_mandelbrot((256, 256), (-2, -1.5, 1, 1.5), 60).convert("RGB")
    smeared = picture.copy()
    smeared.paste(picture.crop((32, 128, 96, 192)).resize((4, 4)).resize((64, 64)), (32, 128))
    clean, found = features.local_features([picture, smeared])
    assert clean.shape == (112, 16, 16)
    changed = (clean - found).norm(dim=0)
    assert changed[8:12, 2:6].mean() > 5 * changed[:, 11:].mean()
