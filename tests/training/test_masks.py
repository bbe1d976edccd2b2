"""Masks: from files under all their names and from transparency, and what a run does with them."""

import numpy as np
import pytest
import torch
from image_folders import read_notes, write_caption
from PIL import Image
from training_runs import have_equal_tensors, last_checkpoint, short_run

import sdtune
from sdtune.training import dataset, encoding, errors, masks, trainer
from sdtune.training.buckets import AspectBuckets

pytestmark = pytest.mark.usefixtures("without_final_check")

SIZE = (32, 48)
BUCKETS = AspectBuckets(40)


def write_picture(path, transparent=(), size=SIZE) -> None:
    """A picture of noise with a caption; the box `transparent` of it is so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.effect_noise(size, 90).convert("RGBA" if transparent else "RGB")
    if transparent:
        image.paste((0, 0, 0, 0), transparent)
    image.save(path)
    write_caption(path.with_suffix(".txt"))


def write_mask(path, white=(0, 0, 16, 48), mode="L", size=SIZE, **options) -> None:
    """A black mask with a white box."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new(mode, size, (0, 0, 0, 0) if mode == "RGBA" else "black")
    image.paste("white", white)
    image.save(path, **options)


def read_masks(folder) -> dict[str, np.ndarray | None]:
    pairs = dataset.read_pairs(folder, BUCKETS, log=lambda _: None)
    return {p.name: p.open_mask and np.asarray(p.open_mask()) for p in pairs}


LEFT_HALF = np.repeat([255] * 16 + [0] * 16, 48).reshape(32, 48).T


@pytest.mark.parametrize("name", ["a-mask.png", "a.mask.png", "a-masklabel.png", "../data_mask/a.png",
                                  "../data_mask/a.webp"])  # fmt: skip
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_a_mask_file_belongs_to_the_picture_of_its_name(tmp_path, name, mode):
    write_picture(tmp_path / "data/a.png")
    write_picture(tmp_path / "data/b.png")
    write_mask(tmp_path / "data" / name, mode=mode, **({"lossless": True} if name.endswith("webp") else {}))
    found = read_masks(tmp_path / "data")
    assert found["b.png"] is None and (found["a.png"] == LEFT_HALF).all() and len(found) == 2
    assert "1 images are partly masked by a file; what is black there counts as --mask_weight says: a.png" in (
        read_notes(tmp_path / "data", buckets=BUCKETS)
    )


def test_a_mask_belongs_to_all_pictures_of_its_name(tmp_path):
    problems = []
    names = ["a.jpg", "a.png", "a-mask.png", "b.png"]
    found = masks.find_mask_files(tmp_path, names, problems)
    assert found == {name: [tmp_path / "a-mask.png"] for name in ("a.jpg", "a.png")} and not problems


def test_masks_in_a_folder_next_to_train_are_found_in_its_subfolders(tmp_path):
    write_picture(tmp_path / "train/deep/a.png")
    write_mask(tmp_path / "train_mask/deep/a.png")
    assert (read_masks(tmp_path)["deep/a.png"] == LEFT_HALF).all()
    assert not any("not train_mask" in note for note in read_notes(tmp_path, buckets=BUCKETS))


def test_transparent_parts_are_masked_and_multiply_with_a_mask_file(tmp_path):
    write_picture(tmp_path / "a.png", (16, 0, 32, 48))
    write_picture(tmp_path / "b.png", (0, 0, 32, 24))
    write_mask(tmp_path / "b-mask.png")
    Image.new("RGBA", SIZE, (9, 9, 9, 253)).save(tmp_path / "c.png")
    write_caption(tmp_path / "c.txt")
    found = read_masks(tmp_path)
    assert (found["a.png"] == LEFT_HALF).all() and found["c.png"] is None
    assert not found["b.png"][:24].any() and (found["b.png"][24:] == LEFT_HALF[24:]).all()


def test_a_picture_whose_name_only_looks_like_a_mask_is_a_picture(tmp_path):
    write_picture(tmp_path / "gas-mask.png")
    assert read_masks(tmp_path) == {"gas-mask.png": None}


def test_masks_that_cannot_be_used_are_problems_of_their_pictures(tmp_path):
    for name in "abcdef":
        write_picture(tmp_path / f"{name}.png")
    write_mask(tmp_path / "a-mask.png", (0, 0, 0, 0))
    write_mask(tmp_path / "b-mask.png", size=(48, 32))
    (tmp_path / "c-mask.png").write_bytes(b"no picture")
    for name in ("d-mask.png", "d.mask.png", "e-mask.png"):
        write_mask(tmp_path / name)
    write_caption(tmp_path / "e-mask.txt")
    write_picture(tmp_path / "f.png", (0, 0, *SIZE))
    with pytest.raises(errors.DataError) as caught:
        dataset.read_pairs(tmp_path, BUCKETS, log=lambda _: None)
    wanted = {
        "a.png": "has a mask that is black everywhere", "b.png": "it is 32 x 48 and its mask 48 x 32",
        "c.png": "its mask is damaged", "d.png": "has 2 masks, d-mask.png and d.mask.png; keep one",
        "e-mask.png": "its name makes it the mask of e.png", "f.png": "is transparent everywhere",
    }  # fmt: skip
    assert len(caught.value.problems) == len(wanted)
    for name, text in wanted.items():
        assert any(line.startswith(f"{name}: ") and text in line for line in caught.value.problems)


def test_the_weights_of_a_picture_have_the_mean_one_and_follow_the_crop(tmp_path):
    mask = Image.fromarray(LEFT_HALF.astype(np.uint8))
    for outside, left, right in ((0.0, 2.0, 0.0), (0.5, 4 / 3, 2 / 3), (1.0, 1.0, 1.0)):
        weight = masks.loss_weight(mask, (32, 48), (6, 4), outside)
        assert weight.shape == (1, 6, 4) and weight.mean().item() == pytest.approx(1)
        assert weight[..., :2].unique().item() == pytest.approx(left)
        assert weight[..., 2:].unique().item() == pytest.approx(right)


@pytest.fixture
def masked(pairs):
    """The pairs; of one the right half is transparent, of another masked, also of a held-out one."""
    for name in ("train/1", "test/0"):
        image = Image.open(pairs / f"{name}.png").convert("RGBA")
        image.paste((0, 0, 0, 0), (64, 0, 128, 128))
        image.save(pairs / f"{name}.png")
    write_mask(pairs / "train/3-mask.png", (0, 0, 64, 128), size=(128, 128))
    return pairs


def masked_run(data, folder, **changes):
    return short_run(data, folder, **{"resolution": 128, "steps": 3, **changes})


def test_encoded_masks_are_mirrored_with_their_pictures(masked, base):
    found = dataset.read_pairs(masked, AspectBuckets(128), log=lambda _: None)
    models = (base.vae, base.tokenizer, base.text_encoder, AspectBuckets(128))
    (bucket,) = encoding.encode(found, *models, flip=True, mask_weight=0.0).buckets
    assert bucket.weight.shape == (5, 2, 1, 16, 16) and torch.equal(bucket.weight[0], torch.ones(2, 1, 16, 16))
    for i in (1, 3):
        assert (bucket.weight[i, 0, 0, :, :7] > 1.5).all() and not bucket.weight[i, 0, 0, :, 9:].any()
        assert torch.equal(bucket.weight[i, 1], bucket.weight[i, 0].flip(-1))
    assert encoding.encode(found, *models, mask_weight=1.0).buckets[0].weight is None


def test_nothing_is_learnt_from_the_masked_part_of_the_target(masked, tmp_path, monkeypatch):
    seen, plain = [], trainer.training_loss

    def noted(unet, scheduler, latents, noise, timesteps, states, gamma=0.0, weight=None):
        if weight is not None and gamma:
            with torch.no_grad():
                moved = noise + 100 * (weight == 0)  # the target, where it must not count
                same = plain(unet, scheduler, latents, noise, timesteps, states, gamma, weight)
            scheduler.add_noise, add = (lambda latents, _, t: add(latents, noise, t)), scheduler.add_noise
            with torch.no_grad():
                other = plain(unet, scheduler, latents, moved, timesteps, states, gamma, weight)
            scheduler.add_noise = add
            seen.append(torch.equal(same, other))
        return plain(unet, scheduler, latents, noise, timesteps, states, gamma, weight)

    monkeypatch.setattr(trainer, "training_loss", noted)
    sdtune.fit(masked_run(masked, tmp_path))
    assert seen == [True] * 3


def test_mask_weight_1_trains_as_if_there_were_no_masks(masked, tmp_path):
    all_of_it = sdtune.fit(masked_run(masked, tmp_path / "one", mask_weight=1.0))
    weighted = sdtune.fit(masked_run(masked, tmp_path / "half", mask_weight=0.5))
    (masked / "train/3-mask.png").unlink()
    for name in ("train/1", "test/0"):  # on white, as it was read before there were masks
        image = Image.open(masked / f"{name}.png")
        Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB").save(masked / f"{name}.png")
    without = sdtune.fit(masked_run(masked, tmp_path / "without"))
    assert all_of_it.losses == without.losses and all_of_it.heldout == without.heldout
    assert weighted.losses != without.losses and weighted.heldout != without.heldout
    assert have_equal_tensors(last_checkpoint(tmp_path / "one/run"), last_checkpoint(tmp_path / "without/run"))


def test_another_mask_is_another_picture_for_a_resumed_run(masked):
    before = [p.digest for p in dataset.read_pairs(masked, AspectBuckets(128), log=lambda _: None)]
    write_mask(masked / "train/3-mask.png", (0, 0, 32, 128), size=(128, 128))
    after = [p.digest for p in dataset.read_pairs(masked, AspectBuckets(128), log=lambda _: None)]
    assert [a == b for a, b in zip(before, after)] == [True, True, True, False, True]


def test_a_run_with_masks_resumes_to_the_same_bits(masked, tmp_path):
    config = dict(flip=True, mask_weight=0.1)
    straight = sdtune.fit(masked_run(masked, tmp_path / "straight", **config))
    with pytest.raises(errors.Stopped):
        sdtune.fit(masked_run(masked, tmp_path / "broken", **config), None, lambda done, loss: done == 2)
    with pytest.raises(errors.TrainError, match="mask_weight was 0.1 and is 0.2"):
        sdtune.fit(masked_run(masked, tmp_path / "broken", flip=True, mask_weight=0.2, resume=True))
    resumed = sdtune.fit(masked_run(masked, tmp_path / "broken", **config, resume=True))
    assert resumed.losses == straight.losses and resumed.heldout == straight.heldout
    assert have_equal_tensors(last_checkpoint(tmp_path / "straight/run"), last_checkpoint(tmp_path / "broken/run"))


def test_a_weight_out_of_range_and_a_crop_that_leaves_nothing_are_refused(pairs, tmp_path):
    with pytest.raises(ValueError, match="mask_weight is 1.5; it must be from 0 to 1"):
        sdtune.TrainConfig(mask_weight=1.5)
    image = Image.new("RGBA", (64, 640))
    image.paste("red", (0, 0, 64, 16))
    image.save(pairs / "train/4.png")
    with pytest.raises(errors.DataError, match="4.png: all that is left of it after cropping is masked"):
        sdtune.fit(masked_run(pairs, tmp_path))
