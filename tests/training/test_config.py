"""The ranges of the training settings."""

import pytest

import sdtune


def test_wrong_settings_are_listed_at_once():
    with pytest.raises(ValueError) as error:
        sdtune.TrainConfig(steps=0, learning_rate=-1, caption_dropout=2, resolution=100, lr_scheduler="zigzag")
    assert all(
        word in str(error.value) for word in ("steps", "learning_rate", "caption_dropout", "resolution", "zigzag")
    )
