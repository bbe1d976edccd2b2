"""Image files of all formats, as `dataset.read_pairs` checks them and `Pair.open` opens them."""

from pathlib import Path

import numpy as np
import pytest
from image_folders import BUCKETS, RED, SIDE, assert_only_problem, read_image, read_notes, write_caption, write_image
from PIL import Image, ImageCms

from sdtune.training import dataset, images


def test_all_exif_orientations_give_the_same_upright_picture(tmp_path):
    upright = np.zeros((24, 16, 3), np.uint8)
    upright[:12, :8], upright[:12, 8:], upright[12:, :8] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    image = Image.fromarray(upright)
    turn = Image.Transpose  # what turns the upright picture into the stored one
    stored = [None, turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM, turn.TRANSPOSE,
              turn.ROTATE_90, turn.TRANSVERSE, turn.ROTATE_270]  # fmt: skip
    for orientation, how in enumerate(stored, 1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for suffix in (".png", ".jpg", ".webp", ".tiff"):
            name = f"{orientation}{suffix}"
            (image if how is None else image.transpose(how)).save(tmp_path / name, exif=exif, quality=100)
        write_caption(tmp_path / f"{orientation}.txt")
    found = dataset.read_pairs(tmp_path, BUCKETS, log=lambda _: None)
    assert len(found) == 32
    for pair in found:
        picture = np.asarray(pair.open()).astype(int)
        assert picture.shape == upright.shape
        for y, x in ((6, 4), (6, 12), (18, 4), (18, 12)):
            assert np.abs(picture[y, x] - upright[y, x]).max() < 30, pair.name


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.pgm"])
def test_16_bit_grey_stays_grey(tmp_path, name):
    grey = np.linspace(0, 65535, SIDE * SIDE).astype(np.uint16).reshape(SIDE, SIDE)
    Image.fromarray(grey).save(tmp_path / name)
    picture = read_image(tmp_path, name).astype(float)
    assert np.abs(picture - grey[..., None] / 257).max() <= 1


def test_16_bit_grey_with_a_transparent_shade(tmp_path):
    grey = np.full((SIDE, SIDE), 0x8000, np.uint16)
    grey[0] = 0x0100
    Image.fromarray(grey).save(tmp_path / "a.png", transparency=0x0100)
    picture = read_image(tmp_path, "a.png")
    assert (picture[0] == 255).all() and (picture[1:] == 128).all()


@pytest.mark.parametrize("most", [1.0, 255.0, 65535.0, 1e6])
def test_float_grey_is_scaled_to_8_bits(tmp_path, most):
    grey = np.full((SIDE, SIDE), most / 2, np.float32)
    grey[0], grey[1], grey[2] = most, np.nan, -most
    Image.fromarray(grey).save(tmp_path / "a.tiff")
    picture = read_image(tmp_path, "a.tiff").astype(int)
    assert (picture[0] == 255).all() and (picture[1:3] == 0).all() and np.abs(picture[3:] - 128).max() <= 1


@pytest.mark.parametrize("mode, name, color, wanted", [
    ("RGB", "a.png", RED, RED), ("RGB", "a.jpg", RED, RED), ("RGB", "a.webp", RED, RED), ("RGB", "a.bmp", RED, RED),
    ("RGB", "a.tiff", RED, RED), ("RGB", "a.avif", RED, RED), ("RGB", "a.jp2", RED, RED), ("RGB", "a.tga", RED, RED),
    ("RGB", "a.PNG", RED, RED), ("RGB", "a.JPEG", RED, RED), ("RGB", "a.jfif", RED, RED), ("RGB", "a.ppm", RED, RED),
    ("RGB", "a.gif", RED, RED), ("RGB", "a.ico", RED, RED),
    ("L", "a.png", 100, (100,) * 3), ("L", "a.jpg", 100, (100,) * 3), ("1", "a.png", 1, (255,) * 3),
    ("CMYK", "a.jpg", (0, 255, 255, 0), (255, 0, 0)), ("CMYK", "a.tiff", (0, 255, 255, 0), (255, 0, 0)),
    ("YCbCr", "a.jpg", (128, 128, 128), (128,) * 3), ("LAB", "a.tiff", (255, 128, 128), (255,) * 3),
    ("RGBA", "a.png", (0, 0, 0, 1), (255,) * 3), ("RGBA", "a.png", (0, 0, 0, 255), (0,) * 3),
    ("RGBA", "a.png", (255, 0, 0, 128), (255, 127, 127)), ("RGBA", "a.webp", (0, 0, 0, 1), (255,) * 3),
    ("RGBA", "a.tiff", (0, 0, 0, 1), (255,) * 3), ("LA", "a.png", (0, 1), (255,) * 3),
    ("LA", "a.png", (100, 255), (100,) * 3), ("P", "a.png", 0, (0,) * 3),
])  # fmt: skip
def test_all_modes_and_formats_become_rgb(tmp_path, mode, name, color, wanted):
    Image.init()
    if Image.registered_extensions()[Path(name).suffix.lower()] not in Image.SAVE:
        pytest.skip("this Pillow cannot write it")
    write_image(tmp_path / name, (SIDE * 2, SIDE * 2), mode, color)
    picture = read_image(tmp_path, name).astype(int)
    assert np.abs(picture - np.array(wanted)).max() <= 6


@pytest.mark.parametrize("suffix", [".png", ".gif"])
@pytest.mark.parametrize("alpha", [0, b"\0\xff"])
def test_transparent_palettes_become_white(tmp_path, suffix, alpha):
    image = Image.new("P", (SIDE, SIDE))
    image.putpalette([10, 20, 30, *RED] + [0] * 762)
    image.paste(1, (0, 0, 8, SIDE))
    image.save(tmp_path / f"a{suffix}", transparency=0 if suffix == ".gif" else alpha)
    picture = read_image(tmp_path, f"a{suffix}")
    assert (picture[:, :8] == RED).all() and (picture[:, 8:] == 255).all()


@pytest.mark.parametrize("mode, color", [("L", 7), ("RGB", (7, 8, 9))])
def test_a_transparent_colour_becomes_white(tmp_path, mode, color):
    image = Image.new(mode, (SIDE, SIDE), color)
    image.putpixel((0, 0), 255 if mode == "L" else (255, 255, 255))
    image.save(tmp_path / "a.png", transparency=color)
    assert (read_image(tmp_path, "a.png") == 255).all()


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tiff", ".jpg"])
def test_the_first_frame_of_an_animation_is_used_and_a_note_says_so(tmp_path, suffix):
    frames = [Image.new("RGB", (SIDE, SIDE), c) for c in (RED, (0, 0, 255))]
    how = {"format": "MPO"} if suffix == ".jpg" else {}  # as cameras write pictures with depth
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:], **how)
    assert np.abs(read_image(tmp_path, f"a{suffix}").astype(int) - RED).max() <= 6
    assert read_notes(tmp_path) == [
        f"1 images are animated or of several pages; the first picture of each is used: a{suffix}"
    ]


def test_small_images_and_what_is_cropped_of_images_are_noted(tmp_path):
    for i in range(7):
        write_image(tmp_path / f"{i}.png", (SIDE // 2, SIDE // 2 + 1))
        write_caption(tmp_path / f"{i}.txt")
    small, cropped, shapes, copies = read_notes(tmp_path)
    assert "7 images are too small for 16 px" in small and "4.png and 2 more" in small
    assert cropped.startswith("7 images are cropped by more than 10 %: 0.png (11% of it)")
    assert shapes == "shapes in px: 7 of 16 x 16; at worst 11.1% of a picture is cropped (0.png)"
    assert copies.startswith("6 images are copies of others, or nearly: 1.png = 0.png")
    write_image(tmp_path / "0.png", (SIDE // 2 - 1, SIDE // 2))
    assert_only_problem(tmp_path, "0.png", "7 x 8 is too small", "8 x 8")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".bmp", ".tiff", ".avif", ".jp2", ".tga"])
@pytest.mark.parametrize("part", [0, 0.02, 0.5, 0.9])
def test_truncated_files_are_problems(tmp_path, suffix, part):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    path = tmp_path / f"a{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    write_caption(tmp_path / "a.txt")
    assert_only_problem(tmp_path, f"a{suffix}: ", "empty" if part == 0 else "amaged")


@pytest.mark.parametrize("suffix", ".heic .HEIF .jxl .svg .psd .eps .dng .cr2".split())
def test_formats_that_are_not_read(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    write_caption(tmp_path / "a.txt")
    assert_only_problem(tmp_path, f"a{suffix}: ", "save it as PNG or JPEG")


def test_a_wrong_suffix_does_not_matter(tmp_path):
    write_image(tmp_path / "a.png").rename(tmp_path / "a.heic")
    assert (read_image(tmp_path, "a.heic") == RED).all()


def test_images_of_too_many_pixels_are_problems(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png", (40, 40))
    write_caption(tmp_path / "a.txt")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    assert_only_problem(tmp_path, "a.png: ", "more than 1,000")


def test_an_image_is_read_again_at_each_open(tmp_path):
    path = write_image(tmp_path / "a.png")
    write_caption(tmp_path / "a.txt")
    (pair,) = dataset.read_pairs(tmp_path, BUCKETS)
    write_image(path, color=(1, 2, 3))
    assert pair.open().getpixel((0, 0)) == pair.open().getpixel((1, 1)) == (1, 2, 3)


def test_open_image_takes_paths_and_images(tmp_path):
    path = write_image(tmp_path / "a.png")
    assert images.open_image(path).getpixel((0, 0)) == images.open_image(Image.open(path)).getpixel((0, 0)) == RED


def test_crop_to_shape_takes_the_middle():
    image = Image.new("RGB", (48, 16))
    image.paste(RED, (16, 0, 32, 16))
    assert (np.asarray(images.crop_to_shape(image, (16, 16))) == RED).all()
    assert images.crop_to_shape(image, (5, 9)).size == (5, 9)


def test_colours_are_converted_from_the_embedded_profile_and_an_unusable_one_is_named(tmp_path):
    green = (0, 255, 0)
    write_image(tmp_path / "wide.png", color=green, icc_profile=wide_profile())
    write_image(tmp_path / "damaged.png", color=green, icc_profile=b"no profile")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    write_image(tmp_path / "srgb.png", color=(7, 200, 90), icc_profile=srgb)
    for name in ("wide", "damaged", "srgb"):
        write_caption(tmp_path / f"{name}.txt")
    assert read_image(tmp_path, "srgb.png")[0, 0].tolist() == [7, 200, 90]
    assert read_image(tmp_path, "damaged.png")[0, 0].tolist() == [0, 255, 0]
    assert read_image(tmp_path, "wide.png")[0, 0].tolist() == [255, 0, 0]  # the profile calls green what sRGB calls red
    (note,) = (line for line in read_notes(tmp_path) if "profile" in line)
    assert note.startswith("1 images are in a colour profile that cannot be used") and "damaged.png" in note
    with images.open_image(tmp_path / "wide.png") as image:
        image.putalpha(128)
    assert images.open_image(image).getpixel((0, 0)) == (255, 127, 127)


def wide_profile() -> bytes:
    """The profile of a space whose red and green are sRGB's green and red."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for i in range(int.from_bytes(content[128:132], "big")):
        at = 132 + 12 * i
        name = bytes(content[at : at + 4])
        if name in (b"rXYZ", b"gXYZ"):
            content[at : at + 1] = b"g" if name == b"rXYZ" else b"r"
        if name == b"desc":
            start = int.from_bytes(content[at + 4 : at + 8], "big")
            size = int.from_bytes(content[at + 8 : at + 12], "big")
            text = content[start : start + size]
            for encoding in ("ascii", "utf-16-be"):
                text = text.replace("sRGB".encode(encoding), "wide".encode(encoding))
            content[start : start + size] = text
    return bytes(content)
