"""What tests share: the real small base, and a few real pairs."""

from pathlib import Path

import pytest
from PIL import Image

ANIME = Path(__file__).parent.parent / "assets" / "anime"


@pytest.fixture
def pairs(tmp_path_factory) -> Path:
    """Five of the anime pairs and two held-out ones at 128 px with .txt captions, in folders train and test."""
    folder = tmp_path_factory.mktemp("pairs")
    from sdtune import data

    for split, count in (("train", 5), ("test", 2)):
        (folder / split).mkdir()
        for i, pair in enumerate(data.read(ANIME, 128, split)[:count]):
            pair.open().resize((128, 128), Image.Resampling.LANCZOS).save(folder / split / f"{i}.png")
            (folder / split / f"{i}.txt").write_text(pair.caption)
    return folder
