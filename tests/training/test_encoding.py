"""Images and captions, encoded by a small VAE and a small text encoder."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from image_folders import SIDE
from PIL import Image

from sdtune.training import dataset, encoding
from sdtune.training.buckets import AspectBuckets
from sdtune.training.errors import DataError

SQUARES = AspectBuckets(SIDE)


class Tokenizer:
    """One token for each character, padded to 12."""

    model_max_length = 12

    def __call__(self, texts, padding=None, max_length=None, truncation=False, return_tensors=None, verbose=True):
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


def make_noise_pairs(captions) -> list[dataset.Pair]:
    images = np.random.default_rng(0).integers(0, 255, (len(captions), SIDE, SIDE, 3), np.uint8)
    return [
        dataset.Pair(f"{i}.png", c, lambda x=x: Image.fromarray(x), (SIDE, SIDE))
        for i, (c, x) in enumerate(zip(captions, images))
    ]


def test_encode_gives_scaled_moments_of_the_image_and_its_mirror_image(models):
    vae, tokenizer, encoder = models
    found = make_noise_pairs(["a", "b", "c"])
    encoded = encoding.encode(found, vae, tokenizer, encoder, SQUARES, flip=True)
    (bucket,) = encoded.buckets
    assert encoded.names == ["0.png", "1.png", "2.png"]
    assert bucket.mean.shape == bucket.std.shape == (3, 2, 4, 8, 8)
    assert encoded.text.shape == (3, 12, 8) and encoded.empty.shape == (1, 12, 8)
    assert not any(x.requires_grad for x in (bucket.mean, bucket.std, encoded.text, encoded.empty))
    for i, pair in enumerate(found):
        x = torch.from_numpy(np.array(pair.open())).permute(2, 0, 1)[None] / 127.5 - 1
        for j, one in enumerate((x, x.flip(-1))):
            with torch.no_grad():
                wanted = vae.encode(one).latent_dist
            torch.testing.assert_close(bucket.mean[i, j], wanted.mean[0] * 0.5)
            torch.testing.assert_close(bucket.std[i, j], wanted.std[0] * 0.5)
    once, again = (encoding.encode(found, vae, tokenizer, encoder, SQUARES).buckets[0] for _ in range(2))
    torch.testing.assert_close(once.mean, bucket.mean[:, :1])
    assert torch.equal(once.mean, again.mean)


def test_encode_encodes_each_text_once(models):
    vae, tokenizer, encoder = models
    seen = []

    def watch(module, inputs):
        seen.extend(map(tuple, inputs[0].tolist()))

    hook = encoder.register_forward_pre_hook(watch)
    try:
        encoded = encoding.encode(
            make_noise_pairs(["cat", "dog", "cat"]),
            vae,
            tokenizer,
            encoder,
            SQUARES,
            texts=[["sks cat"], ["sks dog", "sks cat"], ["sks cat"]],
        )
    finally:
        hook.remove()
    ids = tokenizer(["sks cat", "sks dog", ""], "max_length", 12, True, "pt").input_ids
    assert seen == list(map(tuple, ids.tolist()))
    with torch.no_grad():
        wanted = encoder(ids).last_hidden_state
    torch.testing.assert_close(encoded.text, wanted[[0, 1, 0, 0]])
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

    found = make_noise_pairs(["a", "b", "c"])
    found[1] = dataset.Pair("black.png", "b", lambda: Image.new("RGB", (SIDE, SIDE)), (SIDE, SIDE))
    with pytest.raises(DataError, match="black.png") as caught:
        encoding.encode(found, Vae(), tokenizer, encoder, SQUARES, flip=True)
    assert len(caught.value.problems) == 1


def test_encoded_moves_the_text_to_a_dtype_and_keeps_the_moments_in_fp32(models):
    encoded = encoding.encode(make_noise_pairs(["a"]), *models, SQUARES).to("cpu", torch.bfloat16)
    assert encoded.text.dtype == encoded.empty.dtype == torch.bfloat16
    assert encoded.buckets[0].mean.dtype == encoded.buckets[0].std.dtype == torch.float32


def test_images_with_a_text_that_is_too_long_are_named():
    texts = [["x" * 12], ["x", "x" * 13], ["x"]]
    assert encoding.truncated_texts(["a.png", "b.png", "c.png"], texts, Tokenizer()) == ["b.png"]
