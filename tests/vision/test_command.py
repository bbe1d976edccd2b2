"""The command on a tiny random ViT and a handful of pictures: every kind, end to end, and what it refuses."""

import json
import math
import random
import shutil
from dataclasses import asdict

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BertConfig, ViTConfig, ViTForImageClassification

from sdtune.adapters import tuner_file
from sdtune.bases.errors import BaseError
from sdtune.tuners.config import ALL_KINDS
from sdtune.vision import experiment, load_classifier, report, training
from sdtune.vision.command import main
from sdtune.vision.data import Pixels, read_data
from sdtune.vision.methods import PAPER_PARAMETERS, parse_method
from sdtune.vision.model import Classifier, load_base

COLOURS = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (50, 60, 200)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a tiny random ViT."""
    folder = tmp_path_factory.mktemp("tiny-vit")
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16,
                       patch_size=8, num_labels=2)  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    return folder


def write_pictures(folder, classes=COLOURS, count=4, seed=0):
    generator = random.Random(seed)
    for name, colour in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            shade = tuple(c + generator.randrange(-30, 30) for c in colour)
            Image.new("RGB", (20, 14 + i), shade).save(folder / name / f"{i}.png")


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets") / "colours"
    write_pictures(folder / "train")
    write_pictures(folder / "test", seed=1)
    return folder


def arguments(base, data, output, *more):
    return ["--base", str(base), "--data", str(data), "--output", str(output), *more]


def test_every_kind_trains_from_end_to_end_and_loads_in_three_lines(base, colours, tmp_path, capsys):
    kinds = [*(k for k in ALL_KINDS if k != "res_attn"), "res_attn-2x4@block", "res_attn@attn1+ff:res_adapter"]
    command = arguments(base, colours, tmp_path, "--kinds", *kinds, "--seeds", "1", "--epochs", "2", "--rates", "0.01")
    assert main(command) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["runs"]) == {f"colours/{k}/seed-0" for k in kinds}
    table = (tmp_path / "table.md").read_text()
    for kind in kinds:
        run, folder = results["runs"][f"colours/{kind}/seed-0"], tmp_path / f"colours/{kind}/seed-0"
        assert math.isfinite(run["loss"]) and run["memory"] > 0 and len(run["correct"]) == 12
        assert run["accuracy"] == run["correct"].count("1") / 12
        assert f"| {kind} |" in table
        assert not (folder / "checkpoint.pt").exists()
        classifier = load_classifier(folder)
        found = [
            classifier.predict(colours / "test" / c / f"{i}.png")[0][0] == c for c in sorted(COLOURS) for i in range(4)
        ]
        assert found == [c == "1" for c in run["correct"]]
    assert (tmp_path / "accuracy.png").stat().st_size > 5000
    assert "load_classifier(" in capsys.readouterr().out
    before = (tmp_path / "results.json").stat().st_mtime_ns
    assert main(command) == 0  # everything is there already
    assert (tmp_path / "results.json").stat().st_mtime_ns == before


def test_a_classifier_learns_its_classes_and_its_file_alone_is_enough(base, colours, tmp_path):
    more = ("--kinds", "res_attn", "--seeds", "1", "--epochs", "30", "--rates", "0.01")
    assert main(arguments(base, colours, tmp_path, *more)) == 0
    folder = tmp_path / "colours/res_attn/seed-0"
    assert json.loads((tmp_path / "results.json").read_text())["runs"]["colours/res_attn/seed-0"]["accuracy"] > 0.9
    file = tuner_file.load(folder / "tuner.safetensors")
    assert file.labels == sorted(COLOURS) and file.training["accuracy"] > 0.9
    (label, probability), *_ = load_classifier(folder / "tuner.safetensors").predict(Image.new("RGB", (9, 9), "blue"))
    assert label == "blue" and probability > 0.5


def test_the_grid_chooses_rate_and_decay_on_the_validation_pictures(base, colours, tmp_path):
    more = ("--kinds", "linear", "--seeds", "2", "--epochs", "8", "--grid", "--rates", "1e-5", "0.05")
    assert main(arguments(base, colours, tmp_path, *more)) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    tried = results["grid"]["colours/linear"]
    best = max(tried, key=tried.get)
    assert len(tried) == 4
    assert {f"rate {r['rate']:g}, decay {r['decay']:g}" for r in results["runs"].values()} == {best}


@pytest.mark.parametrize("kind, augment", [("res_attn", "none"), ("full", "none"), ("res_attn", "ssf")])
def test_a_killed_run_continues_from_its_last_epoch_to_the_same_predictions_and_loss(
    base, colours, tmp_path, monkeypatch, kind, augment
):
    monkeypatch.setattr(training, "_SAVE_EVERY", 0)
    data = read_data(str(colours))
    schedule = training.Schedule(epochs=6, batch_size=4, rate=0.01, augment=augment)
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def run(folder, log):
        classifier = Classifier(*load_base(str(base), data.classes))
        pixels = [Pixels(s, 16) for s in (data.train + data.val, data.test)]
        return training.train(classifier, parse_method(kind), *pixels, schedule, 3, folder, False, log)

    def kill(text):
        if "epoch 4" in text:
            raise KeyboardInterrupt

    lines = []
    first = run(whole, lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        run(killed, kill)
    assert (killed / "checkpoint.pt").is_file()
    second = run(killed, lines.append)
    assert lines[0].startswith("epoch 4 of 6")
    assert first["loss"] == second["loss"] and first["predictions"] == second["predictions"]


def test_the_command_trains_with_the_augmentation_of_ssf(base, colours, tmp_path, monkeypatch):
    loss, targets = training.F.cross_entropy, []
    monkeypatch.setattr(training.F, "cross_entropy", lambda x, y: targets.append(y) or loss(x, y))
    more = ("--kinds", "linear", "ssf", "--seeds", "1", "--epochs", "3", "--augment", "ssf", "--batch_size", "5")
    assert main(arguments(base, colours, tmp_path, *more)) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["augment"] == "ssf"
    assert {y.shape for y in targets} == {(5, 3), (2, 3)}  # probabilities, of 12 pictures
    assert torch.cat(targets).sum(1).tolist() == pytest.approx([1.0] * 12 * 3 * 2)
    assert all(0.29 < run["loss"] < 3 for run in results["runs"].values())  # smoothed labels have an entropy of 0.29
    assert "augmentation ssf" in (tmp_path / "table.md").read_text()
    assert load_classifier(tmp_path / "colours/linear/seed-0").setup.labels == sorted(COLOURS)


def test_linear_on_cached_features_is_what_training_the_head_alone_gives(base, colours):
    data = read_data(str(colours))
    found = []
    for epochs_of in (training._features, None):
        classifier = Classifier(*load_base(str(base), data.classes))
        pixels = [Pixels(s, 16) for s in (data.train + data.val, data.test)]
        with pytest.MonkeyPatch.context() as patch:
            if epochs_of is None:
                patch.setattr(training, "LINEAR", "no kind")
            schedule = training.Schedule(epochs=5, batch_size=4, rate=0.01)
            found.append(training.train(classifier, parse_method("linear"), *pixels, schedule, 0))
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-4)
    assert found[0]["predictions"] == found[1]["predictions"]


def test_all_problems_of_a_command_are_said_at_once(base, tmp_path, capsys):
    data = tmp_path / "bad"
    write_pictures(data / "train", count=2)
    (data / "train/red/1.png").unlink()
    write_pictures(data / "test", {"red": (1, 1, 1), "pink": (9, 9, 9)})
    (data / "test/red/broken.png").write_bytes(b"no picture")
    bert = tmp_path / "bert"
    BertConfig().save_pretrained(bert)
    command = arguments(bert, data, tmp_path / "out", "--kinds", "lora", "loora", "res_attn@attn2", "linear-4")
    assert main(command) == 1
    said = capsys.readouterr().err
    for sentence in (
        "'loora' is no method", "there is no attn2 in a vision model", "linear has no size",
        "is a bert, not a vision transformer for classification", "test has classes that train has not: pink",
        "test lacks classes that train has: blue, green", "test/red/broken.png: damaged",
        "1 classes have a single training picture: red",
    ):  # fmt: skip
        assert sentence in said
    assert not (tmp_path / "out").exists()
    assert main(arguments(base, tmp_path / "none", tmp_path / "out", "--image_size", "20", "--layers", "9")) == 1
    said = capsys.readouterr().err
    for sentence in ("no such folder", "must be a multiple of the base's patches of 8", "--layers is 9; the base"):
        assert sentence in said


def test_an_output_folder_of_other_settings_is_refused_and_kept(base, colours, tmp_path, capsys):
    more = ("--kinds", "linear", "--seeds", "1")
    assert main(arguments(base, colours, tmp_path, *more, "--epochs", "2")) == 0
    before = (tmp_path / "results.json").read_bytes()
    assert main(arguments(base, colours, tmp_path, *more, "--epochs", "3")) == 1
    assert "epochs was 2 and is 3" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_bytes() == before


def test_a_stopped_run_is_not_continued_with_another_base(base, colours, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "_SAVE_EVERY", 0)
    train = experiment.train

    def stop(*args, **more):
        args[-1]("epoch 1")
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "train", stop)
    more = ("--kinds", "linear", "--seeds", "1", "--epochs", "2")
    main(arguments(base, colours, tmp_path / "out", *more))
    monkeypatch.setattr(experiment, "train", train)
    other = shutil.copytree(base, tmp_path / "other")
    assert main(arguments(other, colours, tmp_path / "out", *more)) == 1
    assert "base was" in capsys.readouterr().err
    assert main(arguments(base, colours, tmp_path / "out", *more)) == 0


def test_a_base_that_lacks_weights_is_refused_and_a_new_head_is_none_of_them(base, tmp_path):
    tensors = load_file(base / "model.safetensors")
    key = next(k for k in tensors if k.endswith("weight") and ".layer" in k and tensors[k].dim() == 2)
    for name, changed in (
        ("missing", {k: t for k, t in tensors.items() if k != key}), ("small", {**tensors, key: torch.zeros(3, 3)}),
    ):  # fmt: skip
        folder = shutil.copytree(base, tmp_path / name)
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(BaseError, match=f"{name} lacks 1 weights of its model, .*; fetch or save it again"):
            load_base(str(folder), ["a", "b"])
    assert load_base(str(base), ["a", "b", "c"])[0].classifier.out_features == 3


def test_the_rate_is_chosen_on_the_first_data_set_also_if_its_runs_are_done(base, colours, tmp_path):
    first = arguments(base, colours, tmp_path / "out", "--kinds", "linear", "--seeds", "1", "--epochs", "2", "--rates",
                      "1e-3", "0.01", "--choose_on_first")  # fmt: skip
    assert main(first) == 0
    path = tmp_path / "out/results.json"
    results = json.loads(path.read_text())
    tried = results["grid"].pop("colours/linear")
    path.write_text(json.dumps(results))
    write_pictures(tmp_path / "two/train", dict(list(COLOURS.items())[:2]), seed=5)
    write_pictures(tmp_path / "two/test", dict(list(COLOURS.items())[:2]), seed=6)
    assert main([*first[:3], str(colours), str(tmp_path / "two"), *first[4:]]) == 0
    assert json.loads(path.read_text())["grid"] == {"colours/linear": tried}


def test_the_table_has_the_rows_of_data_sets_of_the_hub_and_the_plot_bears_runs_that_all_failed(tmp_path):
    run = {"correct": "10", "parameters": 1, "head_parameters": 1, "memory": 1, "seconds": 1, "rate": 1e-3}
    results = {
        "settings": asdict(experiment.Settings(data=["owner/name"])),
        "data": {n: {"classes": ["a", "b"], "train": 2, "val": 1, "test": 2} for n in ("owner/name", "other")},
        "runs": {"owner/name/linear/seed-0": run, "other/linear/seed-0": {"failed": "no"}},
    }
    report.write(tmp_path, results, ["linear"], ["owner/name", "other"])
    assert "| linear | 50.0" in (tmp_path / "table.md").read_text() and (tmp_path / "accuracy.png").is_file()


def test_names_of_methods_give_the_settings_they_say():
    assert parse_method("lora").config.rank == 8 and parse_method("lora").config.ops == ["attn1"]
    assert parse_method("adapter").config.length == 96 and parse_method("vpt-50").config.length == 50
    config = parse_method("res_attn-8x2@attn1+ff:res_adapter").config
    assert (config.rank, config.num_heads, config.ops, config.ffn_kind) == (8, 2, ["attn1", "ff"], "res_adapter")
    assert all(parse_method(name) for name in PAPER_PARAMETERS)
