"""Captions that vary: what a run reads from files, encodes once, and takes from step to step."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_folders import assert_only_problem, metadata_row, write_caption, write_image, write_jsonl
from training_runs import have_equal_tensors, last_checkpoint, short_run

import sdtune
from sdtune.adapters import tuner_file
from sdtune.training import caption_variants, dataset, encoding, errors, random_choices, trainer
from sdtune.training.buckets import AspectBuckets

pytestmark = pytest.mark.usefixtures("without_final_check")

TAGS = "1girl, silver hair, red eyes, smile"


def pair(*captions) -> dataset.Pair:
    return dataset.Pair("a.png", captions[0], None, (1, 1), other_captions=captions[1:])


def texts_of(*captions, **options) -> list[str]:
    (texts,) = caption_variants.training_texts([pair(*captions)], sdtune.TrainConfig(**options))
    return texts


def test_without_options_a_caption_is_trained_as_it_is():
    odd = "a  girl,b ,, c\nd {e} |"
    assert texts_of(odd) == [odd]
    assert texts_of("a", "b", "c", trigger_words="sks") == ["sks a", "sks b", "sks c"]


@settings(deadline=None, max_examples=100)
@given(
    tags=st.lists(st.text("abc ", min_size=1).map(str.strip).filter(bool), min_size=1, max_size=8),
    keep=st.integers(0, 9), dropout=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_kept_tags_stay_first_and_others_are_reordered_or_left_out_never_all_of_them(tags, keep, dropout, seed):
    options = dict(shuffle_tags=True, keep_tokens=keep, tag_dropout=dropout, seed=seed, trigger_words="sks")
    texts = texts_of(", ".join(tags), **options)
    assert len(texts) == 20 and texts == texts_of(", ".join(tags), **options)
    for text in texts:
        assert text.startswith("sks ")
        found = text.removeprefix("sks ").split(", ")
        assert found[:keep] == tags[:keep] and not Counter(found) - Counter(tags) and found != [""]
        assert dropout or Counter(found) == Counter(tags)


def test_shuffling_gives_many_orders_and_each_image_its_own():
    (one, other) = caption_variants.training_texts([pair(TAGS), pair(TAGS)], sdtune.TrainConfig(shuffle_tags=True))
    assert len(set(one)) > 10 and one != other


def test_choices_are_made_also_inside_choices_and_each_caption_gets_its_share():
    texts = texts_of("a {red|{light|dark} blue} hat", "a {big|small} dog", caption_variants=40)
    assert len(texts) == 40
    assert set(texts) == {"a red hat", "a light blue hat", "a dark blue hat", "a big dog", "a small dog"}
    assert sum("dog" in text for text in texts) == 20
    assert caption_variants.first_text(pair("a {red|blue} hat", "b"), "sks") == "sks a red hat"


def test_several_captions_are_lines_of_a_file_or_a_list_in_the_table(tmp_path):
    for name in ("lines/a.png", "table/a.png"):
        write_image(tmp_path / name)
    write_caption(tmp_path / "lines/a.txt", "a girl\n\n  smiling \n")
    write_jsonl(tmp_path / "table", metadata_row("a.png", ["a girl", "smiling", " "]))
    for folder in ("lines", "table"):
        (found,) = dataset.read_pairs(tmp_path / folder, AspectBuckets(16), log=lambda _: None)
        assert found.captions == ["a girl", "smiling"]
    write_jsonl(tmp_path / "table", metadata_row("a.png", ["a girl", 3]))
    assert_only_problem(tmp_path / "table", "needs a text, a string or a list of strings")


def test_each_text_and_each_repeat_is_taken_as_often_as_it_should_be():
    latents = torch.zeros(3, 1, 4, 2, 2)
    buckets = [encoding.Bucket(torch.arange(3), latents, latents)]
    counts, repeats = torch.tensor([1, 3, 2]), torch.tensor([10, 20, 10])
    encoded = encoding.Encoded(["a", "b", "c"], buckets, None, None, counts, repeats)
    drawn = [random_choices.draw_random_choices(sdtune.TrainConfig(), step, 8, encoded, 1000) for step in range(300)]
    images = Counter(i for d in drawn for i in d.image.tolist())
    assert images == {0: 600, 1: 1200, 2: 600}
    texts = Counter((i, t) for d in drawn for i, t in zip(d.image.tolist(), d.text.tolist()))
    assert set(texts) == {(0, 0), (1, 1), (1, 2), (1, 3), (2, 4), (2, 5)}
    assert all(abs(texts[i, t] / images[i] * counts[i].item() - 1) < 0.2 for i, t in texts)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(tag_dropout=1.5), "tag_dropout is 1.5; it must be from 0 to 1"),
        (dict(keep_tokens=-1, shuffle_tags=True), "keep_tokens is -1; it must be at least 0"),
        (dict(keep_tokens=2), "keep_tokens is 2; it has an effect only with shuffle_tags or tag_dropout"),
        (dict(caption_variants=0), "caption_variants is 0; it must be at least 1"),
        (dict(clip_skip=0), "clip_skip is 0; it must be a whole number from 1"),
        (dict(max_tokens=100), "max_tokens is 100; possible: 75, 150, 225"),
    ],
)
def test_options_out_of_range_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        sdtune.TrainConfig(**options)


def test_a_run_with_all_of_it_is_killed_and_resumes_to_the_same_bits(pairs, tmp_path, monkeypatch):
    (pairs / "train/0.txt").write_text("1girl, {red|blue} hair, smile\na girl, " + "very long, " * 40)
    changes = dict(shuffle_tags=True, keep_tokens=1, tag_dropout=0.3, caption_variants=4, clip_skip=2, max_tokens=150,
                   trigger_words="sks", resolution=64)  # fmt: skip
    sdtune.fit(short_run(pairs, tmp_path / "straight", **changes))

    step = trainer.Trainer.step

    def step_and_stop(self):
        if self.done == 2:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(trainer.Trainer, "step", step_and_stop)
    with pytest.raises(KeyboardInterrupt):
        sdtune.fit(short_run(pairs, tmp_path / "broken", **changes, checkpoint_every=2))
    monkeypatch.setattr(trainer.Trainer, "step", step)
    with pytest.raises(errors.TrainError, match="tag_dropout was 0.3 and is 0.5"):
        sdtune.fit(short_run(pairs, tmp_path / "broken", **{**changes, "tag_dropout": 0.5}, resume=True))
    result = sdtune.fit(short_run(pairs, tmp_path / "broken", **changes, resume=True))
    assert have_equal_tensors(last_checkpoint(tmp_path / "straight/run"), last_checkpoint(tmp_path / "broken/run"))
    training = tuner_file.load(result.tuner).training
    assert {k: training[k] for k in changes} == changes and len(result.losses) == 4
