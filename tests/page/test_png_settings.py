"""The settings of a drawing survive in its PNG, and a PNG from anywhere does no harm."""

import json
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdtune.page.png_settings import Settings, read_png, write_png


def test_a_png_keeps_the_settings_that_it_was_drawn_with(tmp_path):
    columns = [{}, {"a": 1.0}, {"a": 0.5, "ü": -0.25}]
    settings = Settings("a girl, 猫", "blurry", 7, 12, 4.5, 128, 192, 2, "DDIM", columns, 2)
    path = write_png(tmp_path / "x.png", Image.new("RGB", (128, 192)), settings, 2, 1, "tiny-sd")
    assert read_png(path) == settings
    text = Image.open(path).text["parameters"]
    assert text.startswith("a girl, 猫\nNegative prompt: blurry\nSteps: 12, Sampler: DDIM, CFG scale: 4.5, Seed: 8, ")
    assert "Size: 128x192" in text and "Clip skip: 2" in text and '"a: 0.5, ü: -0.25"' in text


def png_with(path: Path, **texts) -> Path:
    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def test_settings_of_automatic1111_are_read(tmp_path):
    text = (
        "a cat\nNegative prompt: dog\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 512x768, Clip skip: 2"
    )
    found = read_png(png_with(tmp_path / "a.png", parameters=text))
    assert (found.prompt, found.negative_prompt, found.steps, found.seed) == ("a cat", "dog", 20, 5)
    assert (found.sampler, found.guidance, found.width, found.height, found.clip_skip) == ("Euler a", 7.0, 512, 768, 2)


def test_files_from_before_there_were_width_and_height_are_read(tmp_path):
    found = read_png(png_with(tmp_path / "a.png", sdtune=json.dumps({"prompt": "a cat", "size": 256})))
    assert (found.width, found.height) == (256, 256)


def test_unusable_settings_become_defaults(tmp_path):
    columns = [{"a": float("nan"), "b": 99}, 5]
    bad = {"prompt": 3, "steps": 1e99, "seed": -1, "size": 77, "columns": columns, "images": "x"}
    assert read_png(png_with(tmp_path / "b.png", sdtune=json.dumps(bad))) == Settings()


def test_a_file_without_settings_is_refused(tmp_path):
    for name, text in (("deep", "[" * 100_000), ("list", "[1]"), ("none", "")):
        with pytest.raises(ValueError, match="has no settings"):
            read_png(png_with(tmp_path / f"{name}.png", sdtune=text))
    (tmp_path / "gif.png").write_bytes(b"GIF89a nothing")
    with pytest.raises(ValueError, match="not a complete PNG"):
        read_png(tmp_path / "gif.png")


def test_all_settings_out_of_range_are_listed():
    wrong = Settings("x" * 10_001, "", -1, 0, 99.0, 77, 4096, 99, "", [{"a": 9.0}] * 13)
    with pytest.raises(ValueError) as caught:
        wrong.check()
    for part in ("10,001 characters", "seed is -1", "steps is 0", "guidance is 99", "images is 99", "width is 77",
                 "height is 4096", "13 columns", "between -5 and 5"):  # fmt: skip
        assert part in str(caught.value)
