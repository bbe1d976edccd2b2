"""What training does to its pictures: operations are Pillow's, targets say what is shown, a seed repeats it."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from transformers import ViTConfig, ViTForImageClassification

from sdtune.vision.augmentation import AUGMENTATIONS, OPERATIONS, augment, crop_flip, erase, mix, rand_augment
from sdtune.vision.model import Classifier, Setup

FILL = torch.tensor([124.0, 116, 104])[:, None, None]
SIDE = 64


def affine(a, b, c, d, e, f):
    fill = tuple(FILL.flatten().int().tolist())
    return lambda image: image.transform(
        image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR, fillcolor=fill
    )


# Of strength 0.9 (magnitude 9): what timm asks Pillow for.
PILLOW = {
    "auto_contrast": ImageOps.autocontrast,
    "equalize": ImageOps.equalize,
    "invert": ImageOps.invert,
    "rotate": lambda image: image.rotate(27, Image.Resampling.BILINEAR, fillcolor=tuple(FILL.flatten().int().tolist())),
    "posterize": lambda image: ImageOps.posterize(image, 1),
    "solarize": lambda image: ImageOps.solarize(image, 26),
    "solarize_add": lambda image: image.point([i + 99 if i < 128 else i for i in range(256)] * 3),
    "color": lambda image: ImageEnhance.Color(image).enhance(1.81),
    "contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.81),
    "brightness": lambda image: ImageEnhance.Brightness(image).enhance(1.81),
    "sharpness": lambda image: ImageEnhance.Sharpness(image).enhance(1.81),
    "shear_x": affine(1, 0.27, 0, 0, 1, 0),
    "shear_y": affine(1, 0, 0, 0.27, 1, 0),
    "translate_x": affine(1, 0, 0.405 * SIDE, 0, 1, 0),
    "translate_y": affine(1, 0, 0, 0, 1, 0.405 * SIDE),
}


@pytest.fixture(scope="module")
def pictures():
    """Two pictures of many colours and some grain, (2, 3, SIDE, SIDE) whole numbers; no channel reaches 0 or 255."""
    torch.manual_seed(0)
    coarse = 30 + 200 * torch.rand(2, 3, 7, 7)
    smooth = torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear").round()
    return smooth + torch.randint(-12, 13, smooth.shape)


def strengths(*values):
    return torch.tensor(values)[:, None, None, None]


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_gives_what_pillow_gives(pictures, name):
    found = OPERATIONS[name](pictures, strengths(0.9, 0.9), FILL)
    images = [Image.fromarray(x.permute(1, 2, 0).byte().numpy()) for x in pictures]
    expected = torch.from_numpy(np.stack([np.array(PILLOW[name](i)) for i in images])).permute(0, 3, 1, 2).float()
    assert (found - pictures).abs().mean() > 1
    different = (found - expected).abs()
    assert different.max() <= 1 and different.mean() < 0.1


def test_magnitude_0_changes_nothing_but_by_the_operations_that_have_no_magnitude(pictures):
    changed = {n for n, f in OPERATIONS.items() if not torch.equal(f(pictures, strengths(0.0, 0.0), FILL), pictures)}
    assert changed == {"auto_contrast", "equalize", "invert", "posterize"}  # posterize: to 4 bits at least


def test_every_operation_keeps_whole_numbers_from_0_to_255_in_both_directions(pictures):
    noise = torch.randint(256, (2, 3, SIDE, SIDE)).float()
    flat = torch.full_like(noise, 77)
    for operation in OPERATIONS.values():
        for x in (noise, flat, pictures):
            found = operation(x, strengths(1.0, -1.0), FILL)
            assert found.shape == x.shape and found.dtype == x.dtype
            assert found.min() >= 0 and found.max() <= 255 and torch.equal(found, found.round())


def test_two_operations_are_done_each_on_half_of_the_pictures(pictures):
    torch.manual_seed(0)
    many = pictures[:1].expand(600, -1, -1, -1)[:, :, :16, :16]
    same = (rand_augment(many, FILL) == many).flatten(1).all(1).double().mean().item()
    assert 0.2 < same < 0.32  # a quarter, and those that an operation happens not to change


def test_targets_are_the_share_of_each_class_in_the_picture_smoothed():
    torch.manual_seed(0)
    labels, x = torch.tensor([0, 1, 2, 3]), torch.tensor([0.0, 0, 255, 255])[:, None, None, None].expand(4, 3, 32, 32)
    found = [mix(x, labels, 10) for _ in range(200)]
    cut = 0
    for mixed, targets in found:
        assert targets.sum(1) == pytest.approx([1.0] * 4)
        share = (targets[0, 3].item() - 0.01) / 0.9  # of the last picture, which is white, in the first, which is black
        assert targets[0].tolist() == pytest.approx(
            [0.91 - 0.9 * share, 0.01, 0.01, 0.01 + 0.9 * share] + [0.01] * 6, abs=1e-6
        )
        assert targets[3].tolist() == pytest.approx(
            [0.01 + 0.9 * share, 0.01, 0.01, 0.91 - 0.9 * share] + [0.01] * 6, abs=1e-6
        )
        is_cut = len(mixed[0].unique()) == 2  # of mixup every pixel is alike, and rounded
        assert mixed[0].mean().item() / 255 == pytest.approx(share, abs=1e-5 if is_cut else 0.5 / 255 + 1e-5)
        cut += is_cut
    assert 75 < cut < 130


def test_a_quarter_of_the_pictures_loses_a_rectangle():
    torch.manual_seed(0)
    erased = erase(torch.full((800, 3, 32, 32), 9.0)) != 9
    assert torch.equal(erased[:, 0], erased[:, 1])
    shares = erased[:, 0].double().mean((1, 2))
    shares = shares[shares > 0]
    assert 160 < len(shares) < 240
    assert shares.min() > 0.015 and shares.max() < 0.35 and 0.14 < shares.mean() < 0.21
    one = erased[erased[:, 0].flatten(1).any(1)][0, 0]
    assert one.sum() == one.any(0).sum() * one.any(1).sum()


def test_crops_show_a_part_of_the_picture_and_half_of_them_are_flipped():
    torch.manual_seed(0)
    ramp = torch.linspace(0, 1, 32).expand(400, 3, 32, 32)  # brighter to the right
    found = crop_flip(ramp)
    slopes = (found[:, 0, 16, 31] - found[:, 0, 16, 0]).tolist()
    assert found.shape == ramp.shape and found.min() >= 0 and found.max() <= 1
    assert 150 < sum(s < 0 for s in slopes) < 250
    shown = [abs(s) for s in slopes]  # the share of the width
    assert min(shown) > 0.2 and max(shown) <= 1 and max(shown) - min(shown) > 0.5


def test_the_same_seed_gives_the_same_batch():
    vit = ViTForImageClassification(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                                              intermediate_size=8, image_size=32, patch_size=16))  # fmt: skip
    classifier = Classifier(vit, Setup("", list("abcd"), 32, 1))
    pixels, labels = torch.randint(256, (7, 3, 32, 32)).byte(), torch.tensor([0, 1, 2, 3, 0, 1, 2])
    before = pixels.clone()

    def batch(seed, how="ssf"):
        torch.manual_seed(seed)
        return augment(pixels, labels, classifier, how)

    (x, targets), (same, same_targets), (other, _) = batch(1), batch(1), batch(2)
    assert x.shape == pixels.shape and targets.shape == (7, 4) and torch.equal(pixels, before)
    assert torch.equal(x, same) and torch.equal(targets, same_targets) and not torch.equal(x, other)
    x, targets = batch(1, "none")
    assert torch.equal(x, classifier.normalise(pixels)) and torch.equal(targets, labels)
    assert torch.equal(batch(1, "crop_flip")[1], labels)
    with pytest.raises(ValueError, match=f"the augmentation is 'all'; expected one of {', '.join(AUGMENTATIONS)}"):
        batch(1, "all")
