"""The page in a real browser: app.py runs as a server, with the small base and few steps."""

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ANIME
from PIL import Image
from training_runs import short_run
from tuner_files import HTML_TEXT, save_tuner_of_another_base

import sdtune
from sdtune.inference.grids import mean_difference
from sdtune.page import png_settings
from sdtune.training.errors import Stopped

ROOT = Path(__file__).parent.parent
TIMEOUT = 240_000  # milliseconds; a busy machine is slow

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
    """Runs app.py and gives its address. Stops it at the end, which must succeed without a traceback."""
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
    try:
        end = time.monotonic() + 180
        while "the page is at" not in log.read_text():
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        lines = log.read_text().splitlines()
        assert lines[0] == "loading the base tiny-sd ..." and len(lines) == 2, lines  # no warnings of libraries
        yield f"http://127.0.0.1:{port}"
        assert process.poll() is None, log.read_text()
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    assert code == 0 and "Traceback" not in log.read_text(), log.read_text()


def leave_unfinished(output: Path, data: Path) -> None:
    """Trains one of two steps on one pair, as a page that is then closed."""
    data.mkdir()
    shutil.copy(ANIME / "train" / "train-01.png", data / "a.png")
    (data / "a.txt").write_text("a girl, in anime style")
    config = short_run(data, output.parent, output=str(output), steps=2, batch_size=1, resolution=64)
    with pytest.raises(Stopped):
        sdtune.fit(config, sdtune.TunerConfig(ops=["attn1"]), lambda *_: True)


@pytest.fixture(scope="module")
def server(files, tmp_path_factory):
    """A running app.py with a few adapter files and two trainings that an earlier one had started and not finished:
    its address and its output folder."""
    output = tmp_path_factory.mktemp("app") / "output"
    for step, name in ((2, "one"), (4, "two")):
        folder = output / "run" / "checkpoints" / f"step-{step:06}"
        folder.mkdir(parents=True)
        shutil.copy(files / f"{name}.safetensors", folder / "tuner.safetensors")
    shutil.copy(files / "one.safetensors", output / "one.safetensors")
    shutil.copy(files / "lora" / "pytorch_lora_weights.safetensors", output / "my_lora.safetensors")
    save_tuner_of_another_base(output / "other-base.safetensors")
    (output.parent / "secret.txt").write_text("secret")
    leave_unfinished(output / "older", output.parent / "pair")
    (shutil.copytree(output / "older", output / "newer") / "checkpoints" / "step-000001").touch()
    with running(output) as address:
        yield address, output


@pytest.fixture
def page(browser, server):
    view = browser.new_page(viewport={"width": 1280, "height": 900})
    foreign = []
    view.on("request", lambda r: foreign.append(r.url) if not r.url.startswith((server[0], "data:", "blob:")) else None)
    view.set_default_timeout(TIMEOUT)
    view.goto(server[0])
    view.wait_for_selector("#cards .card")
    yield view
    assert not foreign, "the page must not load anything from the internet"
    assert view.evaluate("window.hacked") is None
    view.close()


def open_tab(page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def set_number(page, field: str, value) -> None:
    page.locator(f"#{field} input[type=number]").fill(str(value))
    page.locator(f"#{field} input[type=number]").press("Tab")


def size_of_grid(page) -> list[int]:
    """Width and height of the drawn grid, once the browser has decoded it."""
    size = "async i => { await i.decode(); return [i.naturalWidth, i.naturalHeight]; }"
    return page.locator("#drawn-grid img.drawn").evaluate(size)


def wait_for_text(page, elem_id: str, text: str | re.Pattern) -> str:
    """Waits until an element contains a text, and returns all of its text."""
    page.locator(f"#{elem_id}", has_text=text).wait_for()
    return page.locator(f"#{elem_id}").inner_text()


def set_steps(page, count: int) -> None:
    if not page.locator("#steps").is_visible():
        page.locator("#more-draw").get_by_role("button").first.click()
    set_number(page, "steps", count)


def download_images(page, elem_id: str) -> list[bytes]:
    """The image files in an element, as the server sends them."""
    page.locator(f"#{elem_id} img.drawn").first.wait_for()
    urls = page.locator(f"#{elem_id} img.drawn").evaluate_all("all => all.map(i => i.src)")
    return [page.request.get(url).body() for url in urls]


def test_columns_are_drawn_side_by_side_and_an_image_restores_its_settings(page, tmp_path):
    set_steps(page, 3)
    set_number(page, "seed", 11)
    page.click("#draw")
    wait_for_text(page, "draw-status", "Drawn in")
    images = download_images(page, "drawn-images")
    assert len(images) == page.locator(".card").count() >= 3
    assert page.locator("#drawn-images h4").first.inner_text() == "base"
    (tmp_path / "a.png").write_bytes(images[0])
    (tmp_path / "b.png").write_bytes(images[2])
    assert Image.open(tmp_path / "a.png").size == (256, 256)
    assert mean_difference(*(Image.open(tmp_path / f"{n}.png") for n in "ab")) > 1

    page.locator("#drawn-images img.drawn").nth(1).click()
    source = page.locator("#drawn-images img.drawn").nth(1).evaluate("i => i.src")
    assert page.locator(".lightbox img").get_attribute("src") == source
    page.keyboard.press("ArrowRight")
    with page.expect_download() as download:
        page.locator(".lightbox a").click()
    page.keyboard.press("Escape")
    assert page.locator(".lightbox").count() == 0
    download.value.save_as(tmp_path / "c.png")
    assert png_settings.read_png(tmp_path / "c.png").seed == 11

    page.click("#new-seed")
    page.locator("#prompt textarea").fill("something else")
    page.locator(".remove").first.click()
    page.wait_for_function("document.querySelectorAll('.card').length == 2")
    page.set_input_files("#restore input[type=file]", tmp_path / "c.png")
    wait_for_text(page, "draw-status", "The settings are restored.")
    page.wait_for_function("document.querySelectorAll('.card').length >= 3")
    assert page.locator("#seed input").input_value() == "11"
    assert "blue hair" in page.locator("#prompt textarea").input_value()
    far = png_settings.Settings("a far prompt", steps=140, guidance=29, images=16, columns=[{}], sampler="none such")
    png_settings.write_png(tmp_path / "far.png", Image.open(tmp_path / "a.png"), far, 0, 0, "tiny-sd")
    page.set_input_files("#restore input[type=file]", tmp_path / "far.png")
    assert "images" in wait_for_text(page, "draw-status", "guidance")  # settings out of the sliders' range are reported
    page.wait_for_function("document.querySelector('#images input').value == '8'")
    (tmp_path / "d.png").write_text("no picture")
    page.set_input_files("#restore input[type=file]", tmp_path / "d.png")
    wait_for_text(page, "draw-status", "not a complete PNG")


def test_any_size_is_drawn_with_clip_skip_and_an_image_restores_both(page, tmp_path):
    def size_fields() -> list[str]:
        return [page.locator(f"#draw-{name} input").input_value() for name in ("width", "height")]

    page.get_by_role("button", name="clip skip").click()
    set_number(page, "steps", 1)
    choose(page, "clip-skip", "2")
    assert size_fields() == ["256", "256"]
    page.locator("#draw-sizes input").click()
    page.get_by_role("option", name="Portrait 2:3, 256 × 384").click()
    page.wait_for_function("document.querySelector('#draw-height input').value == '384'")
    set_number(page, "draw-width", 128)
    set_number(page, "draw-height", 72)
    page.click("#draw-swap")
    page.wait_for_function("document.querySelector('#draw-height input').value == '128'")
    page.click("#draw")
    wait_for_text(page, "draw-status", "Drawn in")
    (tmp_path / "a.png").write_bytes(download_images(page, "drawn-images")[0])
    assert Image.open(tmp_path / "a.png").size == (72, 128)
    assert png_settings.read_png(tmp_path / "a.png").clip_skip == 2
    choose(page, "clip-skip", "as the tuners were trained")
    set_number(page, "draw-width", 100)
    page.click("#draw")
    wait_for_text(page, "draw-status", "The width is 100; it must be between 64 and 2048 and a multiple of 8.")
    page.set_input_files("#restore input[type=file]", tmp_path / "a.png")
    wait_for_text(page, "draw-status", "The settings are restored.")
    assert size_fields() == ["72", "128"] and page.locator("#clip-skip input").input_value() == "2"


def test_stop_ends_a_drawing_before_its_last_step(page):
    set_steps(page, 100)
    page.click("#draw")
    wait_for_text(page, "draw-status", re.compile(r"Step ([2-9]|\d\d+) of"))
    page.click("#stop")
    text = wait_for_text(page, "draw-status", "Stopped at step")
    assert 2 <= int(text.split("step ")[1].split(" of")[0]) < 100
    assert page.locator("#drawn-images img.drawn").count() == 0


def test_long_texts_and_html_in_texts_do_no_harm(page):
    set_steps(page, 1)
    page.locator("#prompt textarea").fill(HTML_TEXT + "cat " * 2400)
    page.click("#draw")
    assert "it is read in" in wait_for_text(page, "draw-status", "Drawn in")
    page.locator("#prompt textarea").fill("x" * 10_001)
    page.click("#draw")
    wait_for_text(page, "draw-status", "at most 10,000 are allowed")
    open_tab(page, "Files")
    cards = wait_for_text(page, "file-cards", "other-base")
    assert "does not fit" in cards and "onerror" in cards and "cross_attention_dim is 768, here 192" in cards
    open_tab(page, "Draw")
    page.locator(".card input").first.click()
    offered = page.get_by_role("option").all_inner_texts()
    assert any("one" in o for o in offered) and not any("other-base" in o for o in offered)


def test_a_grid_has_two_axes_and_the_weight_slider_redraws(page):
    open_tab(page, "Grid")
    set_number(page, "grid-steps", 1)
    page.locator("#values-across textarea, #values-across input").fill("0, 1")
    page.locator("#values-down textarea, #values-down input").fill("1, two")
    page.click("#draw-grid")
    wait_for_text(page, "grid-status", "'two' is not a valid seed")
    page.locator("#values-down textarea, #values-down input").fill("1, 2, 3")
    page.click("#draw-grid")
    wait_for_text(page, "grid-status", "Drawn in")
    assert len(download_images(page, "drawn-grid")) == 1
    width, height = size_of_grid(page)
    assert width > 2 * 256 and height > 3 * 256
    open_tab(page, "Weight")
    page.locator("#weight-slider input[type=range]").focus()
    page.keyboard.press("ArrowRight")
    wait_for_text(page, "weight-status", "Weight 1.05")
    page.locator("#weight-images img.drawn").nth(1).wait_for()
    first, second = download_images(page, "weight-images")
    assert first != second


def choose(page, field: str, option: str) -> None:
    """Chooses an option of a dropdown."""
    page.locator(f"#{field} input").click()
    page.locator(f"#{field}").get_by_role("option", name=option, exact=True).click()  # another list may still close


def test_a_grid_compares_adapters_prompts_checkpoints_and_guidance(page):
    open_tab(page, "Grid")
    set_number(page, "grid-steps", 1)
    choose(page, "axis-across", "adapter")
    page.locator("#adapters-across").wait_for()
    page.locator("#grid-adapter").wait_for(state="hidden")  # the axis decides it
    choose(page, "axis-down", "prompt")
    page.locator("#values-down", has_text="Prompts").wait_for()  # then the field has its values
    page.locator("#values-down textarea").fill("a girl\na boy\na cat")
    page.click("#draw-grid")
    wait_for_text(page, "grid-status", "Drawn in")
    width, height = size_of_grid(page)
    assert width > 4 * 256 and height > 3 * 256

    choose(page, "axis-across", "training checkpoint")
    page.locator("#adapters-across", has_text="run @ step 4").wait_for()
    choose(page, "axis-down", "guidance")
    page.locator("#values-down", has_text="Guidance values").wait_for()
    page.locator("#values-down textarea, #values-down input").fill("1, 5")
    old = page.locator("#drawn-grid img.drawn").evaluate("i => i.src")
    page.click("#draw-grid")
    page.wait_for_function("old => document.querySelector('#drawn-grid img.drawn').src != old", arg=old)
    width, height = size_of_grid(page)
    # a label for each row, two checkpoints of "run", and one of each run that an earlier server has not finished
    assert 4 * 256 < width < 5 * 256 + 100 and 2 * 256 < height < 3 * 256
    choose(page, "axis-down", "adapter")
    page.click("#draw-grid")
    wait_for_text(page, "grid-status", "Both axes change the same setting")


def test_a_password_protects_the_page_and_a_tuner_comes_from_the_hub(browser, hub, tmp_path):
    online = {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    with running(tmp_path / "output", "--auth", "ann:a:b", **online) as address:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}/config")
        assert refused.value.code == 401
        page = browser.new_page()
        page.set_default_timeout(TIMEOUT)
        page.goto(address)
        page.get_by_label("username").fill("ann")
        assert page.locator("#cards").count() == 0
        page.get_by_label("password").fill("a:b")
        page.get_by_role("button", name="Login").click()
        page.wait_for_selector("#cards .card")

        open_tab(page, "Files")
        answers = {"ann": "is not a hub id", "ann/nothing": "ann/nothing could not be", "ann/style": "Added ann/style"}
        for name, answer in answers.items():
            page.locator("#hub input, #hub textarea").fill(name)
            page.keyboard.press("Enter")
            wait_for_text(page, "files-status", answer)
        wait_for_text(page, "file-cards", "ann--style")
        page.close()


def test_on_a_narrow_screen_nothing_is_cut_off(browser, server):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.set_default_timeout(TIMEOUT)
    page.goto(server[0])
    page.wait_for_selector("#cards .card")
    set_steps(page, 1)
    page.click("#draw")
    wait_for_text(page, "draw-status", "Drawn in")
    for name in ("Draw", "Grid", "Weight", "Train", "Files"):
        open_tab(page, name)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
    page.close()


def test_five_images_train_a_tuner_to_draw_with_and_training_resumes(page, pairs, server, tmp_path):
    open_tab(page, "Train")
    page.click("#train")
    wait_for_text(page, "problems", "there are no images yet")
    (pairs / "train" / "3.txt").unlink()
    (tmp_path / "broken.png").write_text("no picture")
    files = [*sorted((pairs / "train").iterdir()), tmp_path / "broken.png"]
    page.set_input_files("#train-files input[type=file]", files)
    text = wait_for_text(page, "problems", "3 problems to solve")
    assert "broken.png: damaged" in text and "3.png: has no caption yet" in text
    page.get_by_label("Caption of broken.png").wait_for()
    page.click("#train")
    wait_for_text(page, "problems", "3 problems to solve")

    page.locator("#train-files").get_by_label("Clear").click()
    page.set_input_files("#train-files input[type=file]", files[:-1])
    wait_for_text(page, "problems", "1 problem to solve")
    page.get_by_label("Caption of 3.png").fill("a girl, in anime style")
    page.click("#look-through")
    page.locator("#looked-through .picture-card").nth(4).wait_for()
    assert "enlarged 2.0 times" in page.locator("#looked-through").inner_text()  # they have 128 px
    page.locator("#run-name textarea, #run-name input").fill("../../five <b>")
    set_number(page, "train-steps", 3)
    page.get_by_text("More settings").click()
    page.get_by_label("Preview prompts").fill("a girl")
    page.get_by_label("Resolution").fill("64")
    set_number(page, "heldout", 2)
    page.click("#train")
    wait_for_text(page, "problems", "2 of them are not trained on, to judge the steps")
    text = wait_for_text(page, "train-status", "The tuner is in Files")
    assert "“five-b”" in text and (server[1] / "five-b" / "tuner.safetensors").is_file()
    page.locator("#loss-curve svg").wait_for()
    assert len(download_images(page, "preview")) == 1
    page.click("#measure-images")
    page.locator("#measured-images .picture-card svg").nth(4).wait_for()
    assert "measured at steps 0, 3" in page.locator("#measured-images").inner_text()
    page.click("#choose-step")
    sheet = Image.open(io.BytesIO(download_images(page, "steps-sheet")[0]))
    assert sheet.width == 220 + 8 + 3 * 168 and sheet.height > 2 * 160  # base, step 3, true picture of both held-out
    text = wait_for_text(page, "step-status", "Recommended for “five-b”")
    assert re.search("step [03] is the earliest that cannot be told from the best one", text)
    assert page.locator("#steps-sheet tbody tr").count() == 2
    page.locator("#stop-choosing").wait_for(state="hidden")
    page.get_by_text("Train in a shell instead").click()
    line = page.locator("#train-command textarea").input_value()
    assert line.startswith("accelerate launch train_anime.py") and "--steps 3" in line
    folder = Path(line.split("--data ")[1].split(" --")[0])
    counts = [len((folder / s / "metadata.jsonl").read_text().splitlines()) for s in ("train", "test")]
    assert counts == [3, 2]
    page.click("#draw-with-it")
    page.locator(".card", has_text="five-b").wait_for()
    set_steps(page, 1)
    page.click("#draw")
    wait_for_text(page, "draw-status", "Drawn in")
    assert page.locator("#drawn-images h4").all_inner_texts() == ["base", "five-b"]

    open_tab(page, "Train")
    set_number(page, "train-steps", 5000)
    page.locator("#run-name textarea, #run-name input").fill("stopped early")
    page.click("#train")
    wait_for_text(page, "train-status", re.compile(r"step [1-9]\d* of 5000"))
    page.click("#stop-train")
    first = wait_for_text(page, "train-status", "Its last checkpoint is in Files")
    page.click("#resume")
    wait_for_text(page, "train-status", re.compile(r": step [1-9]\d* of 5000"))
    page.click("#stop-train")
    second = wait_for_text(page, "train-status", "Its last checkpoint is in Files")
    before, after = (int(text.split("at step ")[1].split(" of")[0]) for text in (first, second))
    assert after > before
    open_tab(page, "Files")
    wait_for_text(page, "file-cards", "stopped-early @ step")


def test_trainings_that_an_earlier_server_has_not_finished_can_be_chosen_and_resumed(page, server):
    open_tab(page, "Train")
    text = wait_for_text(page, "train-status", "was stopped at step")
    shown = text.split("“")[1].split("”")[0]  # the last that another window has shown
    other = "newer" if shown == "older" else "older"
    choose(page, "other-trainings", other)
    text = wait_for_text(page, "train-status", f"“{other}” was stopped at step 1 of 2")
    assert "Its last checkpoint is in Files" in text
    page.click("#resume")
    wait_for_text(page, "train-status", f"“{other}” is trained")
    assert (server[1] / other / "tuner.safetensors").is_file()
    page.locator("#other-trainings input").click()
    offered = page.locator("#other-trainings").get_by_role("option").all_inner_texts()
    assert shown in offered and other not in offered


def test_two_windows_share_the_queue_and_nothing_else(page, browser, server):
    other = browser.new_page()
    other.set_default_timeout(TIMEOUT)
    other.goto(server[0])
    other.wait_for_selector("#cards .card")
    set_steps(page, 100)
    set_steps(other, 1)
    page.click("#draw")
    wait_for_text(page, "draw-status", re.compile(r"Step [1-9]\d* of"))
    other.click("#draw")
    wait_for_text(other, "draw-status", "1 job before yours")
    other.locator(".activity", has_text="another window's drawing").wait_for()
    page.click("#stop")
    wait_for_text(other, "draw-status", "Drawn in")
    assert page.locator("#drawn-images img.drawn").count() == 0 and other.locator("#drawn-images img.drawn").count() > 0
    other.close()

    address, output = server
    for path in (output.parent / "secret.txt", output / "one.safetensors", ROOT / "app.py", Path("/etc/passwd")):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}/gradio_api/file={path}")
        assert refused.value.code in (403, 404)
