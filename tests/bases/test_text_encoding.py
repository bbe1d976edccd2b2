"""Texts as the UNet takes them: clip skip, and texts of more than 75 tokens."""

import pytest
import torch

from sdtune.bases.text_encoding import count_chunks, encode_texts


def test_clip_skip_2_is_the_layer_before_the_last_with_the_final_norm(base):
    tokens = base.tokenizer(["a cat"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        layers = base.text_encoder(tokens, output_hidden_states=True).hidden_states
        wanted = base.text_encoder.final_layer_norm(layers[-2])
    assert torch.equal(encode_texts(["a cat"], base.tokenizer, base.text_encoder, clip_skip=2), wanted)


def test_clip_skip_1_is_what_the_pipeline_itself_encodes(base):
    wanted, _ = base.encode_prompt("a cat", "cpu", 1, False)
    assert torch.equal(encode_texts(["a cat"], base.tokenizer, base.text_encoder), wanted)


@pytest.mark.parametrize("clip_skip", [0, 3, 1.5])
def test_a_layer_that_the_text_encoder_lacks_is_refused(base, clip_skip):
    with pytest.raises(ValueError, match=f"clip_skip is {clip_skip}.*has 2 layers.*from 1, the last layer, to 2"):
        encode_texts(["a cat"], base.tokenizer, base.text_encoder, clip_skip)


def test_a_long_text_is_encoded_in_chunks_of_75_tokens_each_between_start_and_end(base):
    text = "cat " * 75 + "dog " * 5
    assert [count_chunks(t, base.tokenizer) for t in ("", "cat", "cat " * 75, text)] == [1, 1, 1, 2]
    states = encode_texts([text, "cat"], base.tokenizer, base.text_encoder, chunks=2)
    first, second, short, empty = (
        encode_texts([t], base.tokenizer, base.text_encoder)[0] for t in ("cat " * 75, "dog " * 5, "cat", "")
    )
    assert states.shape == (2, 154, base.text_encoder.config.hidden_size)
    for found, wanted in zip(states.unflatten(1, (2, 77)).flatten(0, 1), (first, second, short, empty)):
        torch.testing.assert_close(found, wanted)
