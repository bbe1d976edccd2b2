"""What becomes of the pictures and captions of `data.read`: opened, squared, encoded."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from folders import RED, SIDE, notes, only_problem, opened, put, sidecar
from PIL import Image

from sdtune.training import dataset, encoding, images
from sdtune.training.errors import DataError

# -------------------------------------------------------------------------------------------- images


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
        sidecar(tmp_path / f"{orientation}.txt")
    found = dataset.read(tmp_path, SIDE, log=lambda _: None)
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
    picture = opened(tmp_path, name).astype(float)
    assert np.abs(picture - grey[..., None] / 257).max() <= 1


def test_16_bit_grey_with_a_transparent_shade(tmp_path):
    grey = np.full((SIDE, SIDE), 0x8000, np.uint16)
    grey[0] = 0x0100
    Image.fromarray(grey).save(tmp_path / "a.png", transparency=0x0100)
    picture = opened(tmp_path, "a.png")
    assert (picture[0] == 255).all() and (picture[1:] == 128).all()


@pytest.mark.parametrize("most", [1.0, 255.0, 65535.0, 1e6])
def test_float_grey(tmp_path, most):
    grey = np.full((SIDE, SIDE), most / 2, np.float32)
    grey[0], grey[1], grey[2] = most, np.nan, -most
    Image.fromarray(grey).save(tmp_path / "a.tiff")
    picture = opened(tmp_path, "a.tiff").astype(int)
    assert (picture[0] == 255).all() and (picture[1:3] == 0).all() and np.abs(picture[3:] - 128).max() <= 1


@pytest.mark.parametrize("mode, name, color, wanted", [
    ("RGB", "a.png", RED, RED), ("RGB", "a.jpg", RED, RED), ("RGB", "a.webp", RED, RED), ("RGB", "a.bmp", RED, RED),
    ("RGB", "a.tiff", RED, RED), ("RGB", "a.avif", RED, RED), ("RGB", "a.jp2", RED, RED), ("RGB", "a.tga", RED, RED),
    ("RGB", "a.PNG", RED, RED), ("RGB", "a.JPEG", RED, RED), ("RGB", "a.jfif", RED, RED), ("RGB", "a.ppm", RED, RED),
    ("RGB", "a.gif", RED, RED), ("RGB", "a.ico", RED, RED),
    ("L", "a.png", 100, (100,) * 3), ("L", "a.jpg", 100, (100,) * 3), ("1", "a.png", 1, (255,) * 3),
    ("CMYK", "a.jpg", (0, 255, 255, 0), (255, 0, 0)), ("CMYK", "a.tiff", (0, 255, 255, 0), (255, 0, 0)),
    ("YCbCr", "a.jpg", (128, 128, 128), (128,) * 3), ("LAB", "a.tiff", (255, 128, 128), (255,) * 3),
    ("RGBA", "a.png", (0, 0, 0, 0), (255,) * 3), ("RGBA", "a.png", (0, 0, 0, 255), (0,) * 3),
    ("RGBA", "a.png", (255, 0, 0, 128), (255, 127, 127)), ("RGBA", "a.webp", (0, 0, 0, 0), (255,) * 3),
    ("RGBA", "a.tiff", (0, 0, 0, 0), (255,) * 3), ("LA", "a.png", (0, 0), (255,) * 3),
    ("LA", "a.png", (100, 255), (100,) * 3), ("P", "a.png", 0, (0,) * 3),
])  # fmt: skip
def test_modes_and_formats(tmp_path, mode, name, color, wanted):
    Image.init()
    if Image.registered_extensions()[Path(name).suffix.lower()] not in Image.SAVE:
        pytest.skip("this Pillow cannot write it")
    put(tmp_path / name, (SIDE * 2, SIDE * 2), mode, color)
    picture = opened(tmp_path, name).astype(int)
    assert np.abs(picture - np.array(wanted)).max() <= 6


@pytest.mark.parametrize("suffix", [".png", ".gif"])
@pytest.mark.parametrize("alpha", [0, b"\0\xff"])
def test_transparent_palettes_become_white(tmp_path, suffix, alpha):
    image = Image.new("P", (SIDE, SIDE))
    image.putpalette([10, 20, 30, *RED] + [0] * 762)
    image.paste(1, (0, 0, 8, SIDE))
    image.save(tmp_path / f"a{suffix}", transparency=0 if suffix == ".gif" else alpha)
    picture = opened(tmp_path, f"a{suffix}")
    assert (picture[:, :8] == RED).all() and (picture[:, 8:] == 255).all()


@pytest.mark.parametrize("mode, color", [("L", 7), ("RGB", (7, 8, 9))])
def test_a_transparent_colour_becomes_white(tmp_path, mode, color):
    put(tmp_path / "a.png", mode=mode, color=color, transparency=color)
    assert (opened(tmp_path, "a.png") == 255).all()


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tiff", ".jpg"])
def test_the_first_frame_of_an_animation_is_used_and_told(tmp_path, suffix):
    frames = [Image.new("RGB", (SIDE, SIDE), c) for c in (RED, (0, 0, 255))]
    how = {"format": "MPO"} if suffix == ".jpg" else {}  # as cameras write pictures with depth
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:], **how)
    assert np.abs(opened(tmp_path, f"a{suffix}").astype(int) - RED).max() <= 6
    assert notes(tmp_path) == [
        f"1 images are animated or of several pages; the first picture of each is used: a{suffix}"
    ]


def test_small_and_oblong_images_are_told(tmp_path):
    for i in range(7):
        put(tmp_path / f"{i}.png", (SIDE // 2, SIDE // 2 + 1))
        sidecar(tmp_path / f"{i}.txt")
    small, oblong = notes(tmp_path)
    assert "7 images are smaller than 16 px" in small and "4.png and 2 more" in small
    assert "not square" in oblong
    put(tmp_path / "0.png", (SIDE // 2 - 1, 100))
    only_problem(tmp_path, "0.png", "7 x 100 is too small", "8 x 8")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".bmp", ".tiff", ".avif", ".jp2", ".tga"])
@pytest.mark.parametrize("part", [0, 0.02, 0.5, 0.9])
def test_cut_files(tmp_path, suffix, part):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    path = tmp_path / f"a{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    sidecar(tmp_path / "a.txt")
    only_problem(tmp_path, f"a{suffix}: ", "empty" if part == 0 else "amaged")


@pytest.mark.parametrize("suffix", ".heic .HEIF .jxl .svg .psd .eps .dng .cr2".split())
def test_formats_that_are_not_read(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    sidecar(tmp_path / "a.txt")
    only_problem(tmp_path, f"a{suffix}: ", "save it as PNG or JPEG")


def test_a_wrong_suffix_does_not_matter(tmp_path):
    put(tmp_path / "a.png").rename(tmp_path / "a.heic")
    assert (opened(tmp_path, "a.heic") == RED).all()


def test_decompression_bombs(tmp_path, monkeypatch):
    put(tmp_path / "a.png", (40, 40))
    sidecar(tmp_path / "a.txt")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    only_problem(tmp_path, "a.png: ", "more than 1,000")


def test_nothing_but_the_checks_is_kept_in_memory(tmp_path):
    path = put(tmp_path / "a.png")
    sidecar(tmp_path / "a.txt")
    (pair,) = dataset.read(tmp_path, SIDE)
    put(path, color=(1, 2, 3))
    assert pair.open().getpixel((0, 0)) == pair.open().getpixel((1, 1)) == (1, 2, 3)


def test_open_image_takes_paths_and_images(tmp_path):
    path = put(tmp_path / "a.png")
    assert images.open_image(path).getpixel((0, 0)) == images.open_image(Image.open(path)).getpixel((0, 0)) == RED


def test_to_square_takes_the_middle():
    image = Image.new("RGB", (48, 16))
    image.paste(RED, (16, 0, 32, 16))
    assert (np.asarray(images.crop_to_square(image, 16)) == RED).all()
    assert images.crop_to_square(image, 5).size == (5, 5)


# ----------------------------------------------------------------------------------------- encoding


class Tokenizer:
    """One token for each character, padded to 12."""

    model_max_length = 12

    def __call__(self, texts, padding=None, max_length=None, truncation=False, return_tensors=None):
        if isinstance(texts, str):
            return SimpleNamespace(input_ids=[ord(c) % 100 for c in texts])
        assert padding == "max_length" and truncation and return_tensors == "pt"
        ids = [([ord(c) % 100 for c in t] + [0] * max_length)[:max_length] for t in texts]
        return SimpleNamespace(input_ids=torch.tensor(ids))


@pytest.fixture(scope="module")
def models():
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4, norm_num_groups=4, scaling_factor=0.5,
    )  # fmt: skip
    config = CLIPTextConfig(
        vocab_size=100, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return vae.eval(), Tokenizer(), CLIPTextModel(config).eval()


def noise_pairs(captions) -> list[dataset.Pair]:
    images = np.random.default_rng(0).integers(0, 255, (len(captions), SIDE, SIDE, 3), np.uint8)
    return [
        dataset.Pair(f"{i}.png", c, lambda x=x: Image.fromarray(x)) for i, (c, x) in enumerate(zip(captions, images))
    ]


def test_encode_gives_scaled_moments_of_the_image_and_its_mirror_image(models):
    vae, tokenizer, encoder = models
    found = noise_pairs(["a", "b", "c"])
    encoded = encoding.encode(found, vae, tokenizer, encoder, SIDE, flip=True)
    assert encoded.names == ["0.png", "1.png", "2.png"]
    assert encoded.mean.shape == encoded.std.shape == (3, 2, 4, 8, 8)
    assert encoded.text.shape == (3, 12, 8) and encoded.empty.shape == (1, 12, 8)
    assert not any(x.requires_grad for x in (encoded.mean, encoded.std, encoded.text, encoded.empty))
    for i, pair in enumerate(found):
        x = torch.from_numpy(np.array(pair.open())).permute(2, 0, 1)[None] / 127.5 - 1
        for j, one in enumerate((x, x.flip(-1))):
            with torch.no_grad():
                wanted = vae.encode(one).latent_dist
            torch.testing.assert_close(encoded.mean[i, j], wanted.mean[0] * 0.5)
            torch.testing.assert_close(encoded.std[i, j], wanted.std[0] * 0.5)
    once = encoding.encode(found, vae, tokenizer, encoder, SIDE)
    torch.testing.assert_close(once.mean, encoded.mean[:, :1])
    assert torch.equal(once.mean, encoding.encode(found, vae, tokenizer, encoder, SIDE).mean)


def test_encode_puts_trigger_words_before_each_caption_and_encodes_each_once(models):
    vae, tokenizer, encoder = models
    seen = []

    def watch(module, inputs):
        seen.extend(map(tuple, inputs[0].tolist()))

    hook = encoder.register_forward_pre_hook(watch)
    try:
        encoded = encoding.encode(
            noise_pairs(["cat", "dog", "cat"]), vae, tokenizer, encoder, SIDE, trigger_words="sks"
        )
    finally:
        hook.remove()
    ids = tokenizer(["sks cat", "sks dog", ""], "max_length", 12, True, "pt").input_ids
    assert seen == list(map(tuple, ids.tolist()))
    with torch.no_grad():
        wanted = encoder(ids).last_hidden_state
    torch.testing.assert_close(encoded.text, wanted[[0, 1, 0]])
    torch.testing.assert_close(encoded.empty, wanted[2:])


def test_encode_text_of_many_captions(models):
    _, tokenizer, encoder = models
    texts = [f"caption {i % 40}" for i in range(80)]
    states = encoding.encode_text(texts, tokenizer, encoder)
    assert torch.equal(states[:40], states[40:])
    torch.testing.assert_close(states[37:38], encoding.encode_text(["caption 37"], tokenizer, encoder))


def test_encodings_that_are_not_finite_are_named(models):
    _, tokenizer, encoder = models

    class Vae:
        device, dtype, config = torch.device("cpu"), torch.float32, SimpleNamespace(scaling_factor=1.0)

        def encode(self, x):
            dark = torch.where(x.mean((1, 2, 3), keepdim=True) < -0.9, torch.nan, 0.0)
            return SimpleNamespace(latent_dist=SimpleNamespace(mean=x + dark, std=x.abs()))

    found = noise_pairs(["a", "b", "c"])
    found[1] = dataset.Pair("black.png", "b", lambda: Image.new("RGB", (SIDE, SIDE)))
    with pytest.raises(DataError, match="black.png") as caught:
        encoding.encode(found, Vae(), tokenizer, encoder, SIDE, flip=True)
    assert len(caught.value.problems) == 1


def test_encoded_moves_the_text_to_a_dtype_and_keeps_the_moments_in_fp32(models):
    encoded = encoding.encode(noise_pairs(["a"]), *models, SIDE).to("cpu", torch.bfloat16)
    assert encoded.text.dtype == encoded.empty.dtype == torch.bfloat16
    assert encoded.mean.dtype == encoded.std.dtype == torch.float32


def test_truncated_names_captions_that_are_too_long():
    found = noise_pairs(["x" * 12, "x" * 13, "x"])
    assert encoding.truncated_captions(found, Tokenizer()) == ["1.png"]
    assert encoding.truncated_captions(found, Tokenizer(), "sks") == ["0.png", "1.png"]
