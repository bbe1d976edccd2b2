"""Pictures of any shape: which shape they are trained in, and runs on sets of several shapes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_folders import read_notes, write_caption
from PIL import Image
from training_runs import have_equal_tensors, last_checkpoint, short_run

import sdtune
from sdtune.adapters import tuner_file
from sdtune.training import dataset, errors, images, trainer
from sdtune.training.buckets import AspectBuckets, cropped_share


@settings(deadline=None, max_examples=200)
@given(resolution=st.integers(8, 128).map(lambda n: 8 * n), width=st.integers(1, 4000), aspect=st.floats(1 / 3, 3))
def test_a_shape_has_about_the_area_of_the_square_and_cuts_at_most_a_sliver(resolution, width, aspect):
    size = width, max(1, round(width / aspect))
    shape = AspectBuckets(resolution).shape_for(size)
    assert not shape[0] % 8 and not shape[1] % 8
    assert 0.8 <= shape[0] * shape[1] / resolution**2 <= 1.25
    if 1 / 3 <= size[0] / size[1] <= 3 and resolution % 64 == 0:
        assert cropped_share(size, shape) < 0.06
    assert AspectBuckets(resolution, square=True).shape_for(size) == (resolution, resolution)
    assert AspectBuckets(resolution).shape_for((width, width)) == (resolution, resolution)


@pytest.mark.parametrize("resolution", [128, 256, 512, 768])
@pytest.mark.parametrize("size", [(1024, 1536), (832, 1216), (600, 900), (1000, 1499)])
def test_a_portrait_of_two_to_three_keeps_head_and_feet(resolution, size):
    picture = np.zeros((size[1], size[0], 3), np.uint8)
    edge = size[1] // 50  # hair and feet: the first and the last fiftieth of the height
    picture[:edge], picture[-edge:] = (255, 0, 0), (0, 0, 255)
    shape = AspectBuckets(resolution).shape_for(size)
    seen = np.asarray(images.crop_to_shape(Image.fromarray(picture), shape))
    assert seen.shape[0] > seen.shape[1] and not shape[0] % (8 if resolution < 512 else 64)
    assert seen[0, :, 0].min() > 100 and seen[-1, :, 2].min() > 100
    square = np.asarray(images.crop_to_shape(Image.fromarray(picture), (resolution, resolution)))
    assert not square[..., [0, 2]].any()  # the old way cuts both off


def test_the_notes_say_which_shapes_are_trained_and_what_is_cropped_at_worst(tmp_path):
    noise = np.random.default_rng(0)
    for i, size in enumerate([(512, 512), (400, 600), (600, 400), (410, 600), (2000, 400)]):
        Image.fromarray(noise.integers(0, 255, (size[1], size[0], 3), np.uint8)).save(tmp_path / f"{i}.png")
        write_caption(tmp_path / f"{i}.txt")
    lines = read_notes(tmp_path, buckets=AspectBuckets(512))
    assert lines == [
        "1 images are too small for 512 px and will be enlarged: 3.png",
        "1 images are cropped by more than 10 %: 4.png (20% of it)",
        "shapes in px: 1 of 512 x 512, 1 of 384 x 576, 1 of 576 x 384, 1 of 448 x 640, 1 of 1024 x 256; "
        "at worst 20.0% of a picture is cropped (4.png)",
    ]
    square = read_notes(tmp_path, buckets=AspectBuckets(512, square=True))
    assert square[-1] == "shapes in px: 5 of 512 x 512; at worst 80.0% of a picture is cropped (4.png)"


@pytest.fixture
def shapes(pairs):
    """The pairs, two of them 96 x 144 px, one 160 x 96 px, two square; one held-out pair is 96 x 144 px."""
    sizes = {"train/1": (96, 144), "train/2": (96, 144), "train/3": (160, 96), "test/1": (96, 144)}
    for name, size in sizes.items():
        with Image.open(pairs / f"{name}.png") as image:
            image.resize(size).save(pairs / f"{name}.png")
    return pairs


def shaped_run(data, folder, **changes):
    return short_run(data, folder, **{"steps": 5, "resolution": 128, **changes})


def watch_batches(monkeypatch) -> list[tuple[int, ...]]:
    """Notes the shape of the latents of each training batch from now on."""
    seen, plain = [], trainer.training_loss

    def noted(unet, scheduler, latents, *args):
        seen.append(tuple(latents.shape))
        return plain(unet, scheduler, latents, *args)

    monkeypatch.setattr(trainer, "training_loss", noted)
    return seen


def test_a_run_trains_on_every_shape_in_batches_of_one_and_draws_previews_in_them(
    shapes, tmp_path, monkeypatch, capsys
):
    seen = watch_batches(monkeypatch)
    result = sdtune.fit(shaped_run(shapes, tmp_path, preview_prompts=[]))
    assert sorted(seen) == [(2, 4, 12, 20), *[(2, 4, 16, 16)] * 2, *[(2, 4, 18, 12)] * 2]
    assert all(torch.isfinite(torch.tensor(result.losses))) and set(result.heldout) == {0, 5}
    text = capsys.readouterr().out
    assert "shapes in px: 2 of 128 x 128, 2 of 96 x 144, 1 of 160 x 96; nothing is cropped" in text
    assert "draws the preview with the file (difference 0.00 of 255)" in text
    preview = Image.open(result.preview)  # columns of 192 px: a square row, and one of 2:3
    assert preview.height > 192 + 288 and preview.height < 192 + 288 + 80
    assert tuner_file.load(result.tuner).training["square"] is False


def test_square_pictures_are_trained_as_with_square(pairs, tmp_path):
    shaped = sdtune.fit(shaped_run(pairs, tmp_path / "shaped", steps=2))
    square = sdtune.fit(shaped_run(pairs, tmp_path / "square", steps=2, square=True))
    assert shaped.losses == square.losses and shaped.heldout == square.heldout
    assert have_equal_tensors(last_checkpoint(tmp_path / "shaped/run"), last_checkpoint(tmp_path / "square/run"))


def test_square_crops_every_picture_to_the_square_in_its_middle(shapes, tmp_path, monkeypatch):
    seen = watch_batches(monkeypatch)
    sdtune.fit(shaped_run(shapes, tmp_path, steps=1, square=True))
    assert seen == [(2, 4, 16, 16)]


def test_a_run_on_several_shapes_resumes_to_the_same_bits(shapes, tmp_path):
    changes = dict(steps=6, caption_dropout=0.5, noise_offset=0.1, flip=True)
    straight = sdtune.fit(shaped_run(shapes, tmp_path / "straight", **changes))
    config = shaped_run(shapes, tmp_path / "broken", **changes)
    with pytest.raises(errors.Stopped, match="stopped at step 3"):
        sdtune.fit(config, None, lambda done, loss: done == 3)
    with pytest.raises(errors.TrainError, match="square was False and is True"):
        sdtune.fit(shaped_run(shapes, tmp_path / "broken", **changes, resume=True, square=True))
    resumed = sdtune.fit(shaped_run(shapes, tmp_path / "broken", **changes, resume=True))
    assert resumed.losses == straight.losses and resumed.heldout == straight.heldout
    assert have_equal_tensors(last_checkpoint(tmp_path / "straight/run"), last_checkpoint(tmp_path / "broken/run"))


def test_a_checkpoint_from_before_there_were_shapes_goes_on_with_square(shapes, tmp_path):
    sdtune.fit(shaped_run(shapes, tmp_path, steps=1, square=True))
    state = tmp_path / "run/checkpoints/step-000001/state.json"
    state.write_text(state.read_text().replace('"square": true, ', ""))
    (state.parent / "files.json").unlink()
    with pytest.raises(errors.TrainError, match="square was True and is False"):
        sdtune.fit(shaped_run(shapes, tmp_path, steps=2, resume=True))
    assert len(sdtune.fit(shaped_run(shapes, tmp_path, steps=2, resume=True, square=True)).losses) == 2


def test_gradient_accumulation_changes_memory_not_the_result_on_several_shapes(shapes, tmp_path):
    plain = sdtune.fit(shaped_run(shapes, tmp_path / "plain", batch_size=4, steps=2))
    other = sdtune.fit(shaped_run(shapes, tmp_path / "other", gradient_accumulation_steps=2, steps=2))
    assert other.losses == pytest.approx(plain.losses, rel=1e-4)


def test_pictures_are_too_small_only_where_their_shape_would_enlarge_them_twice(tmp_path):
    for name, size in {"a": (96, 144), "b": (47, 300)}.items():
        Image.effect_noise(size, 50).save(tmp_path / f"{name}.png")
        write_caption(tmp_path / f"{name}.txt")
    with pytest.raises(errors.DataError) as caught:
        dataset.read_pairs(tmp_path, AspectBuckets(256), log=lambda _: None)
    assert caught.value.problems == ["b.png: 47 x 300 is too small; 256 px need 64 x 256 or more"]
