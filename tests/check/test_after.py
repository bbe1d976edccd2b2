"""What `python -m sdtune.check` says about the pictures of a run after it."""

import json
import re
import shutil

import pytest
from training_runs import short_run

import sdtune
from sdtune.check import after, command


@pytest.fixture(scope="module")
def curves() -> after.PictureLosses:
    """Losses of six training pictures and two held-out ones at steps 0, 100 and 200."""
    train = {0: [0.2] * 6, 100: [0.196, 0.195, 0.194, 0.2, 0.150, 0.195], 200: [0.180, 0.182, 0.178, 0.199, 0.1, 0.181]}
    return after.PictureLosses(train, {0: [0.2, 0.2], 100: [0.18, 0.19], 200: [0.189, 0.18]})


def test_pictures_that_were_never_learnt_or_first_by_heart_are_told_from_the_others(curves):
    texts = after.describe_training(curves)
    assert [noted for _, noted in texts] == [False, False, False, True, True, False]
    assert texts[3][0] == "Never learnt: its loss fell by 0.5%, the median fell by 9.8%."
    assert texts[4][0] == "By heart first: its loss fell by 50.0%, the median fell by 9.8%; it was there at step 100."
    assert texts[0][0] == "Its loss fell by 10.0%, the median fell by 9.8%."


def test_held_out_pictures_say_since_when_their_loss_rises(curves):
    assert after.describe_heldout(curves) == [
        "Held out: its loss was lowest at step 100 and has risen by 5.0% since.",
        "Held out: its loss was lowest at step 200.",
    ]


def test_where_nothing_was_learnt_no_picture_is_blamed():
    losses = after.PictureLosses({0: [0.2, 0.2, 0.2], 9: [0.199, 0.2, 0.19]}, {})
    assert not any(noted for _, noted in after.describe_training(losses))


def test_the_pictures_of_a_run_are_measured_at_its_checkpoints_as_the_run_measured_them(pairs, tmp_path, capsys):
    config = short_run(pairs, tmp_path, resolution=64, checkpoint_every=2, trigger_words="tok")
    result = sdtune.fit(config)
    capsys.readouterr()
    page = tmp_path / "page.html"
    assert command.main([str(tmp_path / "run"), "--output", str(page)]) == 0
    printed, text = capsys.readouterr().out, page.read_text(encoding="utf-8")
    assert "measured at steps 0, 2, 4" in printed and "the median loss of the 5 pictures fell by " in printed
    titles = re.findall(r"<b>(.*?)</b>", text)
    assert sorted(titles) == ["0.png", "1.png", "2.png", "3.png", "4.png", "test/0.png", "test/1.png"]
    assert text.count("<polyline") == 7 and text.count("Held out: its loss was lowest at step") == 2
    shutil.rmtree(tmp_path / "run/checkpoints")
    losses = after.measure_run(tmp_path / "run", lambda _: None)  # the finished tuner alone
    assert {step: sum(values) / 2 for step, values in losses.test.items()} == pytest.approx(result.heldout, rel=1e-3)
    assert losses.train.keys() == {0, 4}


def test_a_run_whose_settings_or_pictures_are_gone_says_so(pairs, tmp_path, capsys):
    sdtune.fit(short_run(pairs, tmp_path, steps=1, resolution=64))
    settings = json.loads((tmp_path / "run/config.json").read_text())
    shutil.rmtree(pairs)
    assert command.main([str(tmp_path / "run")]) == 1
    assert f"{pairs}: 1 problem" in capsys.readouterr().err
    settings["train"]["resolution"] = "wide"
    (tmp_path / "run/config.json").write_text(json.dumps(settings))
    assert command.main([str(tmp_path / "run")]) == 1
    assert "config.json cannot be read" in capsys.readouterr().err
