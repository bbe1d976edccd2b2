"""The ranges of the training settings."""

import pytest

import sdtune


def test_wrong_settings_are_listed_at_once():
    with pytest.raises(ValueError) as error:
        sdtune.TrainConfig(steps=0, learning_rate=-1, caption_dropout=2, resolution=100, lr_scheduler="zigzag")
    assert all(
        word in str(error.value) for word in ("steps", "learning_rate", "caption_dropout", "resolution", "zigzag")
    )


def test_numbers_that_pytorch_or_the_scheduler_cannot_take_are_refused_before_any_work():
    with pytest.raises(ValueError) as error:
        sdtune.TrainConfig(
            seed=2**32,
            batch_size=10**9,
            preview_steps=2000,
            guidance_scale=float("inf"),
            resolution=10**6,
            weight_decay=float("inf"),
            preserve=float("inf"),
        )
    for words in ("seed is 4294967296; it must be at most 4294967295", "batch_size is 1000000000; it must be at most",
                  "preview_steps is 2000", "guidance_scale is inf", "resolution is 1000000",
                  "weight_decay is inf; it must be finite", "preserve is inf"):  # fmt: skip
        assert words in str(error.value)
