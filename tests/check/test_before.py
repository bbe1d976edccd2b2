"""What `python -m sdtune.check` says about a set of pictures before a training."""

import re

import numpy as np
import pytest
from conftest import ANIME
from image_folders import write_caption
from PIL import Image, ImageFilter, ImageOps

from sdtune.check import command, pictures
from sdtune.training import dataset
from sdtune.training.buckets import AspectBuckets


@pytest.fixture(scope="module")
def drawn():
    """Eight of the bundled pictures, at 128 px."""
    found = dataset.read_pairs(ANIME, AspectBuckets(128), log=lambda _: None)[:8]
    return [pair.open().resize((128, 128), Image.Resampling.LANCZOS) for pair in found]


def save(folder, **images) -> None:
    """Saves images with captions of their own; __ in a name is a slash."""
    for name, image in images.items():
        path = folder / f"{name.replace('__', '/')}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        write_caption(path.with_suffix(".txt"), f"picture {name}")


def check(folder, tmp_path, capsys, *flags) -> tuple[str, str]:
    """What the command prints, and the text of its page."""
    page = tmp_path / "page.html"
    assert command.main([str(folder), "--resolution", "128", "--output", str(page), *flags]) == 0
    return capsys.readouterr().out, page.read_text(encoding="utf-8")


def sentences(page: str) -> dict[str, str]:
    """Name -> sentence, of the cards of a page."""
    return dict(re.findall(r"<b>(.*?)</b><p>(.*?)</p>", page))


def test_each_picture_gets_a_thumbnail_and_a_sentence_and_those_worth_a_look_are_printed(drawn, tmp_path, capsys):
    folder = tmp_path / "set"
    brighter = Image.eval(drawn[0], lambda level: min(255, int(level * 1.1)))
    save(
        folder, train__a=drawn[0], train__b=brighter, train__c=ImageOps.mirror(drawn[1]), train__d=drawn[1],
        train__e=drawn[2].filter(ImageFilter.GaussianBlur(2)), train__f=drawn[3].resize((80, 80)),
        train__g=drawn[4].crop((0, 0, 120, 20)).resize((720, 120)), train__h=drawn[5], test__i=drawn[5],
        test__j=drawn[6],
    )  # fmt: skip
    write_caption(folder / "train/h.txt", "Girl, smiling")
    write_caption(folder / "train/g.txt", "smiling, girl")
    printed, page = check(folder, tmp_path, capsys)
    found = sentences(page)
    wanted = {
        "b.png": "It is almost the same as a.png.", "d.png": "It is the mirror image of c.png.",
        "test/i.png": "It is the same as h.png, which is trained on: then the held-out loss says little.",
        "h.png": "Its caption says the same as that of g.png.",
    }  # fmt: skip
    assert {name: found[name] for name in wanted} == wanted
    assert found["e.png"].startswith("It is blurred (0.")
    assert "it is small, 80 x 80, and enlarged 1.6 times" in found["f.png"].lower()
    assert "33% of it is cut off, at left and right" in found["g.png"]
    for name in ("a.png", "c.png", "test/j.png"):
        assert found[name] == "Nothing to remark."
    assert len(found) == page.count("data:image/jpeg;base64,") == 10 and "http" not in page
    assert page.index("Nothing to remark") > max(page.index(found[name]) for name in wanted)  # those noted come first
    for name, text in wanted.items():
        assert f"  {name}: {text}" in printed
    assert "Nothing to remark" not in printed
    assert "8 pictures and 2 held-out ones" in printed and "7 pictures are worth a look" in printed
    assert "shapes in px: 7 of 128 x 128" in printed


def test_a_set_in_order_is_said_to_be_so_and_what_is_usual_is_said(drawn, tmp_path, capsys):
    save(tmp_path / "set", a=drawn[0], b=drawn[1])
    printed, _ = check(tmp_path / "set", tmp_path, capsys)
    assert "no picture is out of line" in printed and "2 pictures are few" in printed and "held out" in printed


def test_names_and_captions_do_no_harm_to_the_page(drawn, tmp_path, capsys):
    save(tmp_path / "set", **{"<img src=x>": drawn[0], "a&b": drawn[1]})
    _, page = check(tmp_path / "set", tmp_path, capsys)
    assert "<img src=x" not in page and "&lt;img src=x&gt;.png" in page and "a&amp;b.png" in page


def test_a_set_that_cannot_be_trained_on_has_its_problems_listed(drawn, tmp_path, capsys):
    save(tmp_path / "set", a=drawn[0], b=drawn[1])
    (tmp_path / "set/a.txt").unlink()
    (tmp_path / "set/b.png").write_bytes(b"no picture")
    assert command.main([str(tmp_path / "set"), "--output", str(tmp_path / "page.html")]) == 1
    error = capsys.readouterr().err
    assert "a.png: no caption" in error and "b.png: damaged" in error and not (tmp_path / "page.html").exists()
    with pytest.raises(SystemExit):
        command.main([str(tmp_path / "set"), "--resolution", "13"])
    assert "resolution is 13; it must be from 64 to 8192" in capsys.readouterr().err


def test_a_mask_that_leaves_little_is_noted(drawn, tmp_path, capsys):
    picture = drawn[0].convert("RGBA")
    picture.putalpha(0)
    picture.paste(drawn[0].crop((0, 0, 128, 10)), (0, 0))
    save(tmp_path / "set", a=drawn[0], b=picture)
    _, page = check(tmp_path / "set", tmp_path, capsys)
    assert "its mask leaves 8% of it" in sentences(page)["b.png"].lower()


def test_trigger_words_are_looked_up_in_the_vocabulary_and_measured_with_the_base(drawn, tmp_path, capsys):
    save(tmp_path / "set", **{f"p{i}": image for i, image in enumerate(drawn[:3])})
    printed, _ = check(tmp_path / "set", tmp_path, capsys, "--trigger_words", "anime zwxq")
    assert "anime is a word of the vocabulary, number 6469 of 49408" in printed
    assert "zwxq is no word of the vocabulary; it is read as " in printed
    measured = "with 'anime zwxq' before the captions, the base's error on these pictures changes by "
    assert re.search(re.escape(measured) + r"[+-]\d+\.\d\d% \(standard error \d+\.\d\d%\): ", printed)


def test_blur_rises_with_blurring_and_not_with_flat_colours(drawn):
    found = [pictures.blur(drawn[0].filter(ImageFilter.GaussianBlur(sigma))) for sigma in (0, 1, 2, 4)]
    assert found == sorted(found) and found[0] < pictures.BLURRED < found[2]
    flat = Image.new("RGB", (256, 256), "white")
    flat.paste(drawn[0].crop((32, 32, 96, 96)), (96, 96))
    assert abs(pictures.blur(flat) - pictures.blur(drawn[0].crop((32, 32, 96, 96)))) < 0.1
    assert 0 <= pictures.blur(Image.new("RGB", (64, 64), "red")) <= 1
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    assert pictures.blur(Image.fromarray(noise)) < 0.2
