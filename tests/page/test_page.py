"""What stands behind the page: settings in pictures, the device's queue, the library, the studio."""

import json
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from folders import a_misfit
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

import sdtune
from sdtune.adapters import tuner_file
from sdtune.page import png_settings, studio, style
from sdtune.page import queue as page_queue
from sdtune.training import config, errors, trainer


def test_settings_travel_in_the_picture(tmp_path):
    columns = [{}, {"a": 1.0}, {"a": 0.5, "ü": -0.25}]
    settings = png_settings.Settings("a girl, 猫", "blurry", 7, 12, 4.5, 128, 2, "DDIM", columns)
    path = png_settings.write_png(tmp_path / "x.png", Image.new("RGB", (128, 128)), settings, 2, 1, "tiny-sd")
    assert png_settings.read_png(path) == settings
    text = Image.open(path).text["parameters"]
    assert text.startswith("a girl, 猫\nNegative prompt: blurry\nSteps: 12, Sampler: DDIM, CFG scale: 4.5, Seed: 8, ")
    assert "Size: 128x128" in text and '"a: 0.5, ü: -0.25"' in text


def picture_with(path: Path, **texts) -> Path:
    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def test_settings_of_other_tools_are_read_and_hostile_ones_do_no_harm(tmp_path):
    other = "a cat\nNegative prompt: dog\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 512x512"
    found = png_settings.read_png(picture_with(tmp_path / "a.png", parameters=other))
    assert (found.prompt, found.negative_prompt, found.steps, found.seed) == ("a cat", "dog", 20, 5)
    assert (found.sampler, found.guidance, found.size) == ("Euler a", 7.0, 512)
    columns = [{"a": float("nan"), "b": 99}, 5]
    bad = {"prompt": 3, "steps": 1e99, "seed": -1, "size": 77, "columns": columns, "images": "x"}
    assert png_settings.read_png(picture_with(tmp_path / "b.png", sdtune=json.dumps(bad))) == png_settings.Settings()
    for name, text in (("deep", "[" * 100_000), ("list", "[1]"), ("none", "")):
        with pytest.raises(ValueError, match="holds no settings"):
            png_settings.read_png(picture_with(tmp_path / f"{name}.png", sdtune=text))
    (tmp_path / "no.png").write_bytes(b"GIF89a nothing")
    with pytest.raises(ValueError, match="no whole PNG"):
        png_settings.read_png(tmp_path / "no.png")


def test_settings_out_of_range_are_all_told():
    wrong = png_settings.Settings("x" * 10_001, "", -1, 0, 99.0, 77, 99, "", [{"a": 9.0}] * 13)
    with pytest.raises(ValueError) as caught:
        wrong.check()
    for part in ("10,001 characters", "seed is -1", "steps is 0", "guidance is 99", "images is 99", "size is 77",
                 "13 columns", "beyond 5"):  # fmt: skip
        assert part in str(caught.value)


def finished(job: page_queue.Job, seconds: float = 20) -> page_queue.Job:
    end = time.monotonic() + seconds
    while not job.over:
        assert time.monotonic() < end
        time.sleep(0.01)
    return job


def test_the_device_does_one_thing_at_a_time_and_survives_everything():
    queue, order, go = page_queue.Queue(), [], threading.Event()

    def work(name, error=None):
        def run(job):
            go.wait(20)
            order.append(name)
            if error:
                raise error
            return name

        return run

    first = queue.submit(page_queue.Job("a", "drawing", "columns", work("first", KeyError("boom"))))
    second = queue.submit(page_queue.Job("b", "drawing", "columns", work("second", ValueError("a <b>wrong</b> value"))))
    third = queue.submit(page_queue.Job("c", "drawing", "columns", work("third")))
    old = queue.submit(page_queue.Job("d", "drawing", "live", work("old")))
    new = queue.submit(page_queue.Job("d", "drawing", "live", work("new")))
    assert old.state == "stopped" and queue.ahead(new) == 3 and queue.ahead(third) == 2
    go.set()
    assert finished(new).result == "new" and order == ["first", "second", "third", "new"]
    assert first.state == second.state == "failed" and "KeyError" in first.error
    assert second.error == "a <b>wrong</b> value" and "<b>" not in style.drawing(second, 0)
    queue.close()


def test_a_drawing_passes_a_training_and_leaves_its_random_numbers_alone():
    queue, draws, numbers = page_queue.Queue(), [], []

    def train(job):
        torch.manual_seed(0)
        while len(numbers) < 3:
            queue.let_pass()
            numbers.append(torch.rand(1).item())
            time.sleep(0.05)
            if not draws:
                numbers.clear()
                torch.manual_seed(0)

    training = queue.submit(page_queue.Job("a", "training", "training", trainer))
    drawing = queue.submit(page_queue.Job("b", "drawing", "columns", lambda job: draws.append(torch.rand(5))))
    assert queue.ahead(drawing) == 0
    with pytest.raises(page_queue.PageError, match="under way"):
        queue.submit(page_queue.Job("a", "training", "training", trainer))
    assert finished(drawing).state == "done" and finished(training).state == "done"
    assert numbers == torch.rand(3, generator=torch.Generator().manual_seed(0)).tolist()
    queue.close()


def test_a_closed_window_ends_its_drawing_and_not_its_training():
    queue, seen = page_queue.Queue(), threading.Event()

    def work(job):
        for i in range(2000):
            job.step(i, 2000)
            seen.set()
            time.sleep(0.005)

    job = queue.submit(page_queue.Job("a", "drawing", "columns", work))
    training = queue.submit(page_queue.Job("a", "training", "training", lambda job: "kept"))
    assert seen.wait(20)
    queue.forget("a")
    assert finished(job).state == "stopped" and 0 < job.done < 2000
    assert finished(training).result == "kept" and training.owner is None
    queue.close()


def test_the_library_says_what_fits(base, files, tmp_path):
    run = tmp_path / "mine" / "checkpoints" / "step-000012"
    run.mkdir(parents=True)
    shutil.copy(files / "one.safetensors", run / "tuner.safetensors")
    shutil.copy(files / "two.safetensors", tmp_path / "two.safetensors")
    shutil.copy(files / "lora" / "pytorch_lora_weights.safetensors", tmp_path / "lora.safetensors")
    a_misfit(tmp_path / "sd15.safetensors")
    wide = {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": torch.zeros(4, 768)}
    save_file(wide, tmp_path / "wide.safetensors")
    save_file({"lora_te_text_model.lora_down.weight": torch.zeros(4, 8)}, tmp_path / "text.safetensors")
    odd = {"name": [1], "shape": 7}
    tuner_file.save(
        tmp_path / "odd.safetensors", tuner_file.TunerFile(sdtune.TunerConfig(), {"a": torch.zeros(1)}, odd)
    )
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (tmp_path / "other.bin").write_bytes(b"")
    shelf = files.FileList([tmp_path], base.unet)
    assert set(shelf.items) == {"mine @ step 12", "two", "lora", "sd15", "wide", "text", "torn", "odd"}
    assert set(shelf.offered()) == {"mine @ step 12", "two", "lora"}  # the run has ended there
    assert shelf.runs() == {"mine": ["mine @ step 12"]}
    assert "cross_attention_dim is 768, here 192" in shelf.items["sd15"].why
    assert "768 wide, this base's is 192" in shelf.items["wide"].why
    assert shelf.items["lora"].kind == "LoRA" and shelf.items["two"].kind == "Res-Attn"
    for label in ("sd15", "odd", "/etc/passwd", "../two", None, ["two"]):
        with pytest.raises(page_queue.PageError):
            shelf.find(label)
    page = style.shelf(list(shelf.items.values()))
    assert "<script" not in page and "<img src=x" not in page
    version = shelf.version
    (tmp_path / "two.safetensors").unlink()
    assert shelf.scan() == version + 1 and "two" not in shelf.items and shelf.scan() == version + 1


def test_axes_are_parsed_or_refused_in_words():
    assert studio.Axis.parse("weight", "0, 0.5;1 -1", []).values == [0, 0.5, 1, -1]
    assert studio.Axis.parse("prompt", " a cat \n\na dog", []).titles() == ["a cat", "a dog"]
    assert studio.Axis.parse("tuner", "", ["base", "x"]).values == ["", "x"]
    bad = (("seed", "1.5"), ("seed", "-1"), ("weight", "nan"), ("guidance", "x"), ("prompt", " "), ("y", "1"))
    for name, text in bad:
        with pytest.raises(page_queue.PageError):
            studio.Axis.parse(name, text, [])


def test_the_command_line_trains_the_same_as_the_form():
    from transformers.hf_argparser import HfArgumentParser

    run = studio.Run(
        config.TrainConfig(
            data="a b/$(x)", steps=7, flip=True, learning_rate=1e-3, preview_prompts=["it's", '"two"'], resolution=64
        ),
        sdtune.TunerConfig(kind="lora", rank=8, ops=["attn1"]),
    )
    line = studio.command(run)
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True).stdout.split("\0")
    assert words[:3] == ["accelerate", "launch", "train_anime.py"]
    parser = HfArgumentParser((sdtune.TunerConfig, config.TrainConfig))
    tuner, settings = parser.parse_args_into_dataclasses(words[3:-1])
    assert (settings, tuner) == (run.config, run.tuner)


def test_a_base_from_the_page_is_no_path_of_the_server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert studio.base_choice("", "own/base") == "own/base" and studio.base_choice("x/y", "tiny-sd") == "x/y"
    for text in ("/etc", "../x", "a/b", "~/x", "./a", "a"):
        with pytest.raises(page_queue.PageError):
            studio.base_choice(text, "tiny-sd")


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A studio whose trainings are only waited for: it, a way to let them end, and one to stop them at step 2."""
    free, begun = threading.Event(), threading.Event()

    def fit(settings, tuner, on_step):
        folder = Path(settings.output)
        for done in (1, 2):
            stop = on_step(done, 0.1 * done)
            begun.set()
        free.wait(20)
        if stop or on_step(3, 0.3):
            (folder / "checkpoints" / "step-000003").mkdir(parents=True, exist_ok=True)
            (folder / "checkpoints" / "step-000003" / tuner_file.FILE_NAME).touch()
            raise errors.Stopped("stopped", signal.SIGTERM)
        return trainer.Result(True, folder / tuner_file.FILE_NAME, *[folder] * 3, [], {}, 3)

    monkeypatch.setattr(trainer, "fit", fit)
    made = studio.Studio("tiny-sd", tmp_path / "output")
    made.free, made.begun = free, begun
    yield made
    free.set()
    made.device.close()


def a_run(room, name: str = "mine") -> studio.Run:
    return studio.Run(config.TrainConfig(output=str(room.output / name), steps=3), sdtune.TunerConfig())


def test_a_name_is_taken_by_the_first_training_that_asks(room):
    first = room.train("a", a_run(room))
    with pytest.raises(page_queue.PageError, match="has taken the name mine"):
        room.train("b", a_run(room))
    assert room.free_name("mine") == "mine-2"
    with pytest.raises(page_queue.PageError, match="under way"):  # one at a time, and the refused one leaves no folder
        room.train("a", a_run(room, "other"))
    assert not (room.output / "other").exists()
    room.free.set()
    assert finished(first).state == "done"


def test_a_training_goes_on_after_a_stop_and_after_one_while_it_waited(room):
    first = room.train("a", a_run(room))
    assert room.begun.wait(20)
    room.device.stop(first)
    room.free.set()
    assert finished(first).state == "done" and first.unfinished and first.result.name == tuner_file.FILE_NAME
    room.free.clear()
    room.begun.clear()
    other = room.train("b", a_run(room, "other"))
    assert room.begun.wait(20)
    waits = room.go_on("a")
    assert waits.run.config.resume and waits.losses == first.losses
    room.device.stop(waits)
    assert waits.state == "stopped" and waits.unfinished and waits.result == first.result  # as if not asked
    again = room.go_on("a")
    room.free.set()
    assert finished(other).state == finished(again).state == "done" and not again.unfinished
    with pytest.raises(page_queue.PageError, match="no stopped training"):
        room.go_on("a")


def test_a_training_whose_window_was_closed_is_shown_to_whoever_looks_next(room):
    job = room.train("before", a_run(room))
    room.forget("before")  # a reload is a new window
    assert room.training_of("after") is job and room.training_of("third") is job
    room.free.set()
    finished(job)
    assert room.training_of("third") is job and room.training_of("after") is None
    assert room.training_of("third") is job


def test_pictures_that_are_dropped_are_checked_before_a_training(room, tmp_path):
    for name, side in (("good", 128), ("small", 80), ("tiny", 20)):
        Image.new("RGB", (side, side), "red").save(tmp_path / f"{name}.png")
    (tmp_path / "good.txt").write_text("a red square")
    drop = room.take([tmp_path / n for n in ("good.png", "good.txt", "small.png", "tiny.png")])
    assert drop.pairs == [("good.png", "a red square"), ("small.png", ""), ("tiny.png", "")] and not drop.problems
    problems, _ = room.check(drop, ["a red square", "", "a dot"])
    assert len(problems) == 2 and "small.png: no caption yet" in problems[0] and "tiny.png" in problems[1]
    good = studio.Drop(drop.folder, drop.pairs[:2], [], [])
    problems, notes_ = room.check(good, ["a red square " * 50, "another"])
    assert not problems and any("good.png" in n and "cut" in n for n in notes_)
    assert any("small.png" in n and "enlarged" in n for n in notes_)
