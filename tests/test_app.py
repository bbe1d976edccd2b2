"""The page as people use it: a real server, a real browser, the real base with few steps."""

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
from folders import HOSTILE, a_misfit
from PIL import Image

from sdtune.inference.grids import mean_difference
from sdtune.page import png_settings

ROOT = Path(__file__).parent.parent
SOON = 240_000  # milliseconds; a busy machine is slow


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
    assert mean_difference(*(Image.open(tmp_path / f"{n}.png") for n in "ab")) > 1

    page.locator("#sheet img.shot").nth(1).click()
    source = page.locator("#sheet img.shot").nth(1).evaluate("i => i.src")
    assert page.locator(".lightbox img").get_attribute("src") == source
    page.keyboard.press("ArrowRight")
    with page.expect_download() as download:
        page.locator(".lightbox a").click()
    page.keyboard.press("Escape")
    assert page.locator(".lightbox").count() == 0
    download.value.save_as(tmp_path / "c.png")
    assert png_settings.read_png(tmp_path / "c.png").seed == 11

    page.click("#dice")
    page.locator("#prompt textarea").fill("something else")
    page.locator(".away").first.click()
    page.wait_for_function("document.querySelectorAll('.card').length == 2")
    page.set_input_files("#restore input[type=file]", tmp_path / "c.png")
    says(page, "generate-status", "Restored.")
    page.wait_for_function("document.querySelectorAll('.card').length >= 3")
    assert page.locator("#seed input").input_value() == "11"
    assert "blue hair" in page.locator("#prompt textarea").input_value()
    far = png_settings.Settings("a far prompt", steps=140, guidance=29, images=16, columns=[{}], sampler="none such")
    png_settings.write_png(tmp_path / "far.png", Image.open(tmp_path / "a.png"), far, 0, 0, "tiny-sd")
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
    page.locator("#live img.shot").nth(1).wait_for()
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
