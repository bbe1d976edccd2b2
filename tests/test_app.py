"""The page as people use it: a real server, a real browser, the real base with few steps; and what stands behind it."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

import sdtune
from sdtune import config, store
from sdtune.page import device, library, look, notes, studio
from sdtune.pictures import distance

ROOT = Path(__file__).parent.parent
HOSTILE = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>"
SOON = 240_000  # milliseconds; a busy machine is slow


def a_misfit(path: Path) -> None:
    """A tuner for a base of another shape, with metadata that wants to be HTML."""
    base = {"name": HOSTILE, "shape": {"cross_attention_dim": 768}}
    store.save(path, store.TunerFile(sdtune.TunerConfig(), {"a.b": torch.zeros(2)}, base, HOSTILE))


# ------------------------------------------------------------------------------------- without a browser


def test_settings_travel_in_the_picture(tmp_path):
    columns = [{}, {"a": 1.0}, {"a": 0.5, "ü": -0.25}]
    settings = notes.Settings("a girl, 猫", "blurry", 7, 12, 4.5, 128, 2, "DDIM", columns)
    path = notes.write_png(tmp_path / "x.png", Image.new("RGB", (128, 128)), settings, 2, 1, "tiny-sd")
    assert notes.read_png(path) == settings
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
    found = notes.read_png(picture_with(tmp_path / "a.png", parameters=other))
    assert (found.prompt, found.negative_prompt, found.steps, found.seed) == ("a cat", "dog", 20, 5)
    assert (found.sampler, found.guidance, found.size) == ("Euler a", 7.0, 512)
    columns = [{"a": float("nan"), "b": 99}, 5]
    bad = {"prompt": 3, "steps": 1e99, "seed": -1, "size": 77, "columns": columns, "images": "x"}
    assert notes.read_png(picture_with(tmp_path / "b.png", sdtune=json.dumps(bad))) == notes.Settings()
    for name, text in (("deep", "[" * 100_000), ("list", "[1]"), ("none", "")):
        with pytest.raises(ValueError, match="holds no settings"):
            notes.read_png(picture_with(tmp_path / f"{name}.png", sdtune=text))
    (tmp_path / "no.png").write_bytes(b"GIF89a nothing")
    with pytest.raises(ValueError, match="no whole PNG"):
        notes.read_png(tmp_path / "no.png")


def test_settings_out_of_range_are_all_told():
    wrong = notes.Settings("x" * 10_001, "", -1, 0, 99.0, 77, 99, "", [{"a": 9.0}] * 13)
    with pytest.raises(ValueError) as caught:
        wrong.check()
    for part in ("10,001 characters", "seed is -1", "steps is 0", "guidance is 99", "images is 99", "size is 77",
                 "13 columns", "beyond 5"):  # fmt: skip
        assert part in str(caught.value)


def finished(job: device.Job, seconds: float = 20) -> device.Job:
    end = time.monotonic() + seconds
    while not job.over:
        assert time.monotonic() < end
        time.sleep(0.01)
    return job


def test_the_device_does_one_thing_at_a_time_and_survives_everything():
    queue, order, go = device.Device(), [], threading.Event()

    def work(name, error=None):
        def run(job):
            go.wait(20)
            order.append(name)
            if error:
                raise error
            return name

        return run

    first = queue.submit(device.Job("a", "drawing", "columns", work("first", KeyError("boom"))))
    second = queue.submit(device.Job("b", "drawing", "columns", work("second", ValueError("a <b>wrong</b> value"))))
    third = queue.submit(device.Job("c", "drawing", "columns", work("third")))
    old = queue.submit(device.Job("d", "drawing", "live", work("old")))
    new = queue.submit(device.Job("d", "drawing", "live", work("new")))
    assert old.state == "stopped" and queue.ahead(new) == 3 and queue.ahead(third) == 2
    go.set()
    assert finished(new).result == "new" and order == ["first", "second", "third", "new"]
    assert first.state == second.state == "failed" and "KeyError" in first.error
    assert second.error == "a <b>wrong</b> value" and "<b>" not in look.drawing(second, 0)
    queue.close()


def test_a_drawing_passes_a_training_and_leaves_its_random_numbers_alone():
    queue, draws, numbers = device.Device(), [], []

    def train(job):
        torch.manual_seed(0)
        while len(numbers) < 3:
            queue.let_pass()
            numbers.append(torch.rand(1).item())
            time.sleep(0.05)
            if not draws:
                numbers.clear()
                torch.manual_seed(0)

    training = queue.submit(device.Job("a", "training", "training", train))
    drawing = queue.submit(device.Job("b", "drawing", "columns", lambda job: draws.append(torch.rand(5))))
    assert queue.ahead(drawing) == 0
    with pytest.raises(device.StudioError, match="under way"):
        queue.submit(device.Job("a", "training", "training", train))
    assert finished(drawing).state == "done" and finished(training).state == "done"
    assert numbers == torch.rand(3, generator=torch.Generator().manual_seed(0)).tolist()
    queue.close()


def test_a_closed_window_ends_its_drawing_and_not_its_training():
    queue, seen = device.Device(), threading.Event()

    def work(job):
        for i in range(2000):
            job.step(i, 2000)
            seen.set()
            time.sleep(0.005)

    job = queue.submit(device.Job("a", "drawing", "columns", work))
    training = queue.submit(device.Job("a", "training", "training", lambda job: "kept"))
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
    store.save(tmp_path / "odd.safetensors", store.TunerFile(sdtune.TunerConfig(), {"a": torch.zeros(1)}, odd))
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (tmp_path / "other.bin").write_bytes(b"")
    shelf = library.Library([tmp_path], base.unet)
    assert set(shelf.items) == {"mine @ step 12", "two", "lora", "sd15", "wide", "text", "torn", "odd"}
    assert set(shelf.offered()) == {"mine @ step 12", "two", "lora"}  # the run has ended there
    assert shelf.runs() == {"mine": ["mine @ step 12"]}
    assert "cross_attention_dim is 768, here 192" in shelf.items["sd15"].why
    assert "768 wide, this base's is 192" in shelf.items["wide"].why
    assert shelf.items["lora"].kind == "LoRA" and shelf.items["two"].kind == "Res-Attn"
    for label in ("sd15", "odd", "/etc/passwd", "../two", None, ["two"]):
        with pytest.raises(device.StudioError):
            shelf.find(label)
    page = look.shelf(list(shelf.items.values()))
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
        with pytest.raises(device.StudioError):
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
        with pytest.raises(device.StudioError):
            studio.base_choice(text, "tiny-sd")


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A studio whose trainings are only waited for: it, a way to let them end, and one to stop them at step 2."""
    from sdtune import train

    free, begun = threading.Event(), threading.Event()

    def fit(settings, tuner, on_step):
        folder = Path(settings.output)
        for done in (1, 2):
            stop = on_step(done, 0.1 * done)
            begun.set()
        free.wait(20)
        if stop or on_step(3, 0.3):
            (folder / "checkpoints" / "step-000003").mkdir(parents=True, exist_ok=True)
            (folder / "checkpoints" / "step-000003" / store.FILE_NAME).touch()
            raise train.Stopped("stopped", signal.SIGTERM)
        return train.Result(True, folder / store.FILE_NAME, *[folder] * 3, [], {}, 3)

    monkeypatch.setattr(train, "fit", fit)
    made = studio.Studio("tiny-sd", tmp_path / "output")
    made.free, made.begun = free, begun
    yield made
    free.set()
    made.device.close()


def a_run(room, name: str = "mine") -> studio.Run:
    return studio.Run(config.TrainConfig(output=str(room.output / name), steps=3), sdtune.TunerConfig())


def test_a_name_is_taken_by_the_first_training_that_asks(room):
    first = room.train("a", a_run(room))
    with pytest.raises(device.StudioError, match="has taken the name mine"):
        room.train("b", a_run(room))
    assert room.free_name("mine") == "mine-2"
    with pytest.raises(device.StudioError, match="under way"):  # one at a time, and the refused one leaves no folder
        room.train("a", a_run(room, "other"))
    assert not (room.output / "other").exists()
    room.free.set()
    assert finished(first).state == "done"


def test_a_training_goes_on_after_a_stop_and_after_one_while_it_waited(room):
    first = room.train("a", a_run(room))
    assert room.begun.wait(20)
    room.device.stop(first)
    room.free.set()
    assert finished(first).state == "done" and first.unfinished and first.result.name == store.FILE_NAME
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
    with pytest.raises(device.StudioError, match="no stopped training"):
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


# ---------------------------------------------------------------------------------------- with a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update"]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("no chromium on the PATH; install Debian's package chromium to test the page")
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    with sync.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@contextmanager
def running(output: Path, *options: str, **environment: str):
    """A running app.py; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = output.parent / "log.txt"
    command = [sys.executable, "app.py", "--port", str(port), "--output", str(output), *options]
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        )  # fmt: skip
    end = time.monotonic() + 180
    while "Running on local URL" not in log.read_text():
        assert process.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.2)
    yield f"http://127.0.0.1:{port}"
    assert process.poll() is None, log.read_text()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0, log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def server(files, tmp_path_factory):
    """A running app.py with a small library: (its address, its output folder)."""
    output = tmp_path_factory.mktemp("app") / "output"
    for step, name in ((2, "one"), (4, "two")):
        folder = output / "run" / "checkpoints" / f"step-{step:06}"
        folder.mkdir(parents=True)
        shutil.copy(files / f"{name}.safetensors", folder / "tuner.safetensors")
    shutil.copy(files / "one.safetensors", output / "one.safetensors")
    shutil.copy(files / "lora" / "pytorch_lora_weights.safetensors", output / "my_lora.safetensors")
    a_misfit(output / "misfit.safetensors")
    (output.parent / "secret.txt").write_text("secret")
    with running(output) as address:
        yield address, output


@pytest.fixture
def page(browser, server):
    view = browser.new_page(viewport={"width": 1280, "height": 900})
    foreign = []
    view.on("request", lambda r: foreign.append(r.url) if not r.url.startswith((server[0], "data:", "blob:")) else None)
    view.set_default_timeout(SOON)
    view.goto(server[0])
    view.wait_for_selector("#cards .card")
    yield view
    assert not foreign, "the page must be whole offline"
    assert view.evaluate("window.hacked") is None
    view.close()


def tab(page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def number(page, field: str, value) -> None:
    page.locator(f"#{field} input[type=number]").fill(str(value))
    page.locator(f"#{field} input[type=number]").press("Tab")


def says(page, where: str, text: str | re.Pattern) -> str:
    """Waits until a place says something; gives all that it says."""
    page.locator(f"#{where}", has_text=text).wait_for()
    return page.locator(f"#{where}").inner_text()


def steps(page, count: int) -> None:
    if not page.locator("#steps").is_visible():
        page.get_by_text("More: negative prompt").click()
    number(page, "steps", count)


def shots(page, where: str) -> list[bytes]:
    """The pictures in a place, as the server gives them."""
    page.locator(f"#{where} img.shot").first.wait_for()
    urls = page.locator(f"#{where} img.shot").evaluate_all("all => all.map(i => i.src)")
    return [page.request.get(url).body() for url in urls]


def test_columns_side_by_side_and_a_picture_that_remembers(page, tmp_path):
    steps(page, 3)
    number(page, "seed", 11)
    page.click("#draw")
    says(page, "generate-status", "Drawn in")
    pictures = shots(page, "sheet")
    assert len(pictures) == page.locator(".card").count() >= 3
    assert page.locator("#sheet h4").first.inner_text() == "base"
    (tmp_path / "a.png").write_bytes(pictures[0])
    (tmp_path / "b.png").write_bytes(pictures[2])
    assert Image.open(tmp_path / "a.png").size == (128, 128)
    assert distance(*(Image.open(tmp_path / f"{n}.png") for n in "ab")) > 1

    page.locator("#sheet img.shot").nth(1).click()
    source = page.locator("#sheet img.shot").nth(1).evaluate("i => i.src")
    assert page.locator(".lightbox img").get_attribute("src") == source
    page.keyboard.press("ArrowRight")
    with page.expect_download() as download:
        page.locator(".lightbox a").click()
    page.keyboard.press("Escape")
    assert page.locator(".lightbox").count() == 0
    download.value.save_as(tmp_path / "c.png")
    assert notes.read_png(tmp_path / "c.png").seed == 11

    page.click("#dice")
    page.locator("#prompt textarea").fill("something else")
    page.locator(".away").first.click()
    page.wait_for_function("document.querySelectorAll('.card').length == 2")
    page.set_input_files("#restore input[type=file]", tmp_path / "c.png")
    says(page, "generate-status", "Restored.")
    page.wait_for_function("document.querySelectorAll('.card').length >= 3")
    assert page.locator("#seed input").input_value() == "11"
    assert "blue hair" in page.locator("#prompt textarea").input_value()
    far = notes.Settings("a far prompt", steps=140, guidance=29, images=16, columns=[{}], sampler="none such")
    notes.write_png(tmp_path / "far.png", Image.open(tmp_path / "a.png"), far, 0, 0, "tiny-sd")
    page.set_input_files("#restore input[type=file]", tmp_path / "far.png")
    assert "pictures" in says(page, "generate-status", "guidance")  # what the page's sliders do not reach is told
    page.wait_for_function("document.querySelector('#images input').value == '8'")
    (tmp_path / "d.png").write_text("no picture")
    page.set_input_files("#restore input[type=file]", tmp_path / "d.png")
    says(page, "generate-status", "no whole PNG")


def test_stop_ends_a_drawing_half_way(page):
    steps(page, 100)
    page.click("#draw")
    says(page, "generate-status", re.compile(r"step ([2-9]|\d\d+) of"))
    page.click("#stop")
    said = says(page, "generate-status", "Stopped at step")
    assert 2 <= int(said.split("step ")[1].split(" of")[0]) < 100
    assert page.locator("#sheet img.shot").count() == 0


def test_long_and_hostile_texts_are_only_texts(page):
    steps(page, 1)
    page.locator("#prompt textarea").fill(HOSTILE + "cat " * 2400)
    page.click("#draw")
    assert "only its first 75 tokens" in says(page, "generate-status", "Drawn in")
    page.locator("#prompt textarea").fill("x" * 10_001)
    page.click("#draw")
    says(page, "generate-status", "at most 10,000 can be given")
    tab(page, "Library")
    shelf = says(page, "shelf", "misfit")
    assert "does not fit" in shelf and "onerror" in shelf and "cross_attention_dim is 768, here 192" in shelf
    tab(page, "Generate")
    page.locator(".card input").first.click()
    offered = page.get_by_role("option").all_inner_texts()
    assert any("one" in o for o in offered) and not any("misfit" in o for o in offered)


def test_a_grid_over_two_axes_and_the_weight_slider(page):
    tab(page, "Compare")
    number(page, "grid-steps", 1)
    page.locator("#values-across textarea, #values-across input").fill("0, 1")
    page.locator("#values-down textarea, #values-down input").fill("1, two")
    page.click("#draw-grid")
    says(page, "grid-status", "'two' is no seed")
    page.locator("#values-down textarea, #values-down input").fill("1, 2, 3")
    page.click("#draw-grid")
    says(page, "grid-status", "Drawn in")
    assert len(shots(page, "grid")) == 1
    width, height = page.locator("#grid img.shot").evaluate("i => [i.naturalWidth, i.naturalHeight]")
    assert width > 2 * 192 and height > 3 * 192
    page.get_by_role("tab", name="Weight slider").click()
    page.locator("#live-weight input[type=range]").focus()
    page.keyboard.press("ArrowRight")
    says(page, "live-status", "weight 1.05")
    first, second = shots(page, "live")
    assert first != second


def choose(page, field: str, option: str) -> None:
    """Picks an option of a dropdown."""
    page.locator(f"#{field} input").click()
    page.locator(f"#{field}").get_by_role("option", name=option, exact=True).click()  # another list may still close


def test_a_grid_over_tuners_prompts_checkpoints_and_guidance(page):
    tab(page, "Compare")
    number(page, "grid-steps", 1)
    choose(page, "axis-across", "tuner or LoRA")
    page.locator("#which-across").wait_for()
    page.locator("#grid-tuner").wait_for(state="hidden")  # an axis decides it
    choose(page, "axis-down", "prompt")
    page.locator("#values-down", has_text="Prompts").wait_for()  # with that its values have been laid out
    page.locator("#values-down textarea").fill("a girl\na boy\na cat")
    page.click("#draw-grid")
    says(page, "grid-status", "Drawn in")
    width, height = page.locator("#grid img.shot").evaluate("i => [i.naturalWidth, i.naturalHeight]")
    assert width > 4 * 192 and height > 3 * 192

    choose(page, "axis-across", "training checkpoint")
    page.locator("#which-across", has_text="run @ step 4").wait_for()
    choose(page, "axis-down", "guidance")
    page.locator("#values-down", has_text="Guidances").wait_for()
    page.locator("#values-down textarea, #values-down input").fill("1, 5")
    old = page.locator("#grid img.shot").evaluate("i => i.src")
    page.click("#draw-grid")
    page.wait_for_function("old => document.querySelector('#grid img.shot').src != old", arg=old)
    width, height = page.locator("#grid img.shot").evaluate("i => [i.naturalWidth, i.naturalHeight]")
    assert 2 * 192 < width < 3 * 192 + 100 and 2 * 192 < height < 3 * 192
    choose(page, "axis-down", "tuner or LoRA")
    page.click("#draw-grid")
    says(page, "grid-status", "both axes change the same thing")


def test_a_name_and_password_are_asked_for_and_the_hub_gives_a_tuner(browser, hub, tmp_path):
    online = {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    with running(tmp_path / "output", "--auth", "ann:a:b", **online) as address:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}/config")
        assert refused.value.code == 401
        page = browser.new_page()
        page.set_default_timeout(SOON)
        page.goto(address)
        page.get_by_label("username").fill("ann")
        assert page.locator("#cards").count() == 0
        page.get_by_label("password").fill("a:b")
        page.get_by_role("button", name="Login").click()
        page.wait_for_selector("#cards .card")

        tab(page, "Library")
        asked = {"ann": "is not a hub id", "ann/nothing": "does not give ann/nothing", "ann/style": "Added ann/style"}
        for name, answer in asked.items():
            page.locator("#hub input, #hub textarea").fill(name)
            page.keyboard.press("Enter")
            says(page, "library-status", answer)
        says(page, "shelf", "ann--style")
        page.close()


def test_on_a_narrow_screen_nothing_is_cut_off(browser, server):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.set_default_timeout(SOON)
    page.goto(server[0])
    page.wait_for_selector("#cards .card")
    steps(page, 1)
    page.click("#draw")
    says(page, "generate-status", "Drawn in")
    for name in ("Generate", "Compare", "Train", "Library"):
        tab(page, name)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
    page.close()


def test_five_pictures_become_a_tuner_that_can_be_drawn_with(page, pairs, server, tmp_path):
    tab(page, "Train")
    page.click("#train")
    says(page, "problems", "no pictures yet")
    (pairs / "train" / "3.txt").unlink()
    (tmp_path / "broken.png").write_text("no picture")
    page.set_input_files("#pictures input[type=file]", [*sorted((pairs / "train").iterdir()), tmp_path / "broken.png"])
    said = says(page, "problems", "3 things to put right")
    assert "broken.png: damaged" in said and "3.png: no caption yet" in said
    page.get_by_label("Caption of broken.png").wait_for()
    page.click("#train")
    says(page, "problems", "3 things to put right")

    page.locator("#pictures").get_by_label("Clear").click()
    page.set_input_files("#pictures input[type=file]", sorted((pairs / "train").iterdir()))
    says(page, "problems", "1 thing to put right")
    page.get_by_label("Caption of 3.png").fill("a girl, in anime style")
    page.locator("#run-name textarea, #run-name input").fill("../../five <b>")
    number(page, "train-steps", 3)
    page.get_by_text("More settings").click()
    page.get_by_label("Preview prompts").fill("a girl")
    page.click("#train")
    said = says(page, "train-status", "It is in the library")
    assert "“five-b”" in said and (server[1] / "five-b" / "tuner.safetensors").is_file()
    page.locator("#curve svg").wait_for()
    assert len(shots(page, "preview")) == 1
    page.get_by_text("The same from a shell").click()
    line = page.locator("#line textarea").input_value()
    assert line.startswith("accelerate launch train_anime.py") and "--steps 3" in line
    folder = Path(line.split("--data ")[1].split(" --")[0])
    assert len((folder / "metadata.jsonl").read_text().splitlines()) == 5
    page.click("#use")
    page.locator(".card", has_text="five-b").wait_for()
    steps(page, 1)
    page.click("#draw")
    says(page, "generate-status", "Drawn in")
    assert page.locator("#sheet h4").all_inner_texts() == ["base", "five-b"]

    tab(page, "Train")
    number(page, "train-steps", 5000)
    page.locator("#run-name textarea, #run-name input").fill("stopped early")
    page.click("#train")
    says(page, "train-status", re.compile(r"step [1-9]\d* of 5000"))
    page.click("#stop-train")
    said = says(page, "train-status", "What it learned is in the library")
    page.click("#go-on")
    says(page, "train-status", re.compile(r": step [1-9]\d* of 5000"))
    page.click("#stop-train")
    again = says(page, "train-status", "What it learned is in the library")
    before, after = (int(text.split("at step ")[1].split(" of")[0]) for text in (said, again))
    assert after > before
    tab(page, "Library")
    says(page, "shelf", "stopped-early @ step")


def test_two_windows_share_the_device_and_nothing_else(page, browser, server):
    other = browser.new_page()
    other.set_default_timeout(SOON)
    other.goto(server[0])
    other.wait_for_selector("#cards .card")
    steps(page, 100)
    steps(other, 1)
    page.click("#draw")
    says(page, "generate-status", re.compile(r"step [1-9]\d* of"))
    other.click("#draw")
    says(other, "generate-status", "1 ahead of you")
    other.locator(".chip", has_text="another window's drawing").wait_for()
    page.click("#stop")
    says(other, "generate-status", "Drawn in")
    assert page.locator("#sheet img.shot").count() == 0 and other.locator("#sheet img.shot").count() > 0
    other.close()

    address, output = server
    for path in (output.parent / "secret.txt", output / "one.safetensors", ROOT / "app.py", Path("/etc/passwd")):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}/gradio_api/file={path}")
        assert refused.value.code in (403, 404)
