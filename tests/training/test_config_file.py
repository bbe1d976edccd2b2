"""Settings from a file: YAML, JSON, and the config.json that a run has written."""

import dataclasses
import json

import pytest
from training_runs import have_equal_tensors, last_checkpoint, short_run
from transformers.hf_argparser import HfArgumentParser

import sdtune
from sdtune.training import run_folder
from sdtune.training.config_file import expand_arguments

pytestmark = pytest.mark.usefixtures("without_final_check")


def parse(*words):
    parser = HfArgumentParser((sdtune.TunerConfig, sdtune.TrainConfig))
    return parser.parse_args_into_dataclasses(expand_arguments(list(words)))


def test_a_yaml_file_names_settings_as_the_flags_do_and_flags_win(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 7\nflip: true\nops: [attn1, ff]\nlearning_rate: 2e-3\nstop_when: null\ntrigger_words: a b\n"
                    "preview_prompts: ['one, two', three]\n")  # fmt: skip
    tuner, config = parse("--config", str(path), "--steps", "9")
    assert (config.steps, config.flip, config.learning_rate, config.stop_when) == (9, True, 2e-3, None)
    assert tuner.ops == ["attn1", "ff"] and config.trigger_words == "a b"
    assert config.preview_prompts == ["one, two", "three"]
    assert parse(f"--config={path}")[1].steps == 7


def test_words_that_yaml_would_change_stay_as_they_are_written(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "mixed_precision: no\ntrigger_words: on\nauthor: 007\nflip: yes\nkeep_last: ~\nlicense:\nseed: 0010\n"
    )
    _, config = parse("--config", str(path))
    assert (config.mixed_precision, config.trigger_words, config.author, config.flip) == ("no", "on", "007", True)
    assert (config.keep_last, config.license, config.seed) == (None, "", 10)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("steps: [", "cannot be read"), ("- steps", "holds list; expected names of flags and their values"),
        ("stepz: 3\nsteps: 3\n1: 2", "settings that do not exist: stepz, 1; --help lists them all"),
        ("steps: 3\nseed: 1\nsteps: 5", "cannot be read: steps stands in it twice"),
        ("steps: " + "[" * 5000, "cannot be read: "),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_named_with_the_reason(tmp_path, text, sentence):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"--config {path}.*{sentence}"):
        parse("--config", str(path))
    with pytest.raises(ValueError, match="missing.yaml cannot be read.*No such file"):
        parse("--config", str(tmp_path / "missing.yaml"))


def test_words_that_begin_with_a_dash_are_no_flags(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("trigger_words: -sks\npreview_prompts: [a cat, -blue, --steps]")
    _, config = parse("--config", str(path))
    assert config.trigger_words == "-sks" and config.preview_prompts == ["a cat", "-blue", "--steps"]


def test_a_value_of_a_wrong_kind_is_refused_like_a_flag(tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"steps": "many"}))
    with pytest.raises(SystemExit):
        parse("--config", str(path))
    assert "argument --steps: invalid int value: 'many'" in capsys.readouterr().err


def test_the_config_json_of_a_run_repeats_it_to_the_bit(pairs, tmp_path):
    first = short_run(
        pairs, tmp_path / "first", steps=2, clip_skip=2, flip=True, keep_last=3, resolution=128, lr_warmup_steps=1
    )
    result = sdtune.fit(first, sdtune.TunerConfig(rank=2, attn_drop=0.1))
    tuner, config = parse("--config", str(result.config), "--output", str(tmp_path / "second/run"))
    known = dataclasses.asdict(first) | {"output": config.output, "mixed_precision": config.mixed_precision}
    assert dataclasses.asdict(config) == known and tuner == sdtune.TunerConfig(rank=2, attn_drop=0.1)
    content = json.loads(result.config.read_text())
    assert content["resolved"] == {"learning_rate": 1e-3, "resolution": 128}
    sdtune.fit(config, tuner)
    assert have_equal_tensors(last_checkpoint(tmp_path / "first/run"), last_checkpoint(tmp_path / "second/run"))


def test_init_takes_over_the_tuner_of_the_file_and_flags_change_it(files):
    tuner, config = parse("--init", str(files / "two.safetensors"), "--rank", "8")
    assert tuner == sdtune.TunerConfig(ops=["attn1", "ff"], rank=8) and config.init == str(files / "two.safetensors")


def test_a_run_that_is_repeated_with_another_optimizer_gets_the_rate_that_suits_it(pairs, tmp_path):
    result = sdtune.fit(short_run(pairs, tmp_path, steps=1, learning_rate=None))
    assert json.loads(result.config.read_text())["resolved"]["learning_rate"] == 6e-3
    assert run_folder.read_config(result.config.parent).learning_rate == 6e-3
    _, config = parse("--config", str(result.config), "--optimizer", "prodigy")
    assert config.learning_rate is None and config.resolution == 64
