"""The step chooser: every checkpoint of a run, scored on held-out prompts, with a recommendation."""

import torch
from PIL import Image
from training_runs import short_run

import sdtune
from sdtune.evaluation import checkpoint_scores, choose_step
from sdtune.evaluation.intervals import mean


def scored(step, similarity, rank, novelty=1.2):
    """A step with these values for each of 8 prompts, up to small differences that are the same for all steps."""
    noise = 1e-3 * torch.randn(8, generator=torch.Generator().manual_seed(step))
    scores = {"similarity": mean(similarity + noise), "rank": mean(rank + noise), "novelty": mean(novelty + noise)}
    return checkpoint_scores.Scored(step, [], scores)


def test_the_earliest_step_that_is_not_worse_beyond_doubt_is_recommended_with_the_reason():
    steps = [scored(0, 0.2, 0.5), scored(100, 0.4, 0.9), scored(200, 0.4, 0.9)]
    step, reason = checkpoint_scores.recommend(steps)
    assert step == 100
    assert "step 100 is the earliest that cannot be told from the best one in local similarity" in reason
    step, reason = checkpoint_scores.recommend([steps[0], scored(100, 0.3, 0.9), scored(200, 0.4, 0.9)])
    assert step == 200


def test_steps_that_copy_training_pictures_are_left_out():
    steps = [scored(0, 0.2, 0.5), scored(100, 0.3, 0.8), scored(200, 0.4, 0.9, 0.8), scored(300, 0.5, 1.0, 0.5)]
    step, reason = checkpoint_scores.recommend(steps)
    assert step == 100
    assert "left out for copying training pictures (novelty below 1 beyond doubt): step 200, 300" in reason


def test_a_base_that_nothing_improves_is_said():
    step, reason = checkpoint_scores.recommend([scored(0, 0.4, 0.9), scored(100, 0.4, 0.9)])
    assert step == 0 and "the tuner has not helped beyond doubt" in reason


def test_the_command_writes_a_sheet_and_a_table_of_a_run(pairs, tmp_path, capsys):
    sdtune.fit(short_run(pairs, tmp_path, checkpoint_every=2, clip_skip=2, resolution=128))
    folder = tmp_path / "run"
    assert choose_step.main([str(folder), "--drawing_steps", "1"]) == 0
    out = capsys.readouterr().out
    table = (folder / "steps.md").read_text()
    assert table.startswith("Recommended: step ") and table in out
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:7]] == ["step", "---", "0, the base", "2", "4"]
    sheet = Image.open(folder / "steps.png")
    assert sheet.width == 220 + 8 + 4 * 168 and sheet.height > 2 * 160


def test_what_cannot_be_scored_is_refused_with_a_sentence(pairs, tmp_path, capsys):
    assert choose_step.main([str(tmp_path)]) == 1
    assert "config.json cannot be read" in capsys.readouterr().err
    sdtune.fit(short_run(pairs / "train", tmp_path, steps=1, resolution=128))
    assert choose_step.main([str(tmp_path / "run")]) == 1
    assert "has 0 held-out pictures, and choosing a step needs 2 or more" in capsys.readouterr().err
