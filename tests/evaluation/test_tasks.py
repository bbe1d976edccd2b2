"""The tasks: what is held out, and what the script that prepares them writes."""

import importlib.util
import io
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from PIL import Image

from sdtune.evaluation.tasks import read_task
from sdtune.training import dataset
from sdtune.training.buckets import AspectBuckets

ROOT = Path(__file__).parents[2]


def test_held_out_pairs_have_no_part_in_the_choice_of_the_rate(pairs, tmp_path):
    task = read_task(str(pairs), tmp_path, 128, 100)
    assert {p.name for p in task.train_part} | {p.name for p in task.validation} == {p.name for p in task.train}
    assert not {p.name for p in task.train_part} & {p.name for p in task.validation} and len(task.validation) == 1
    captions = {p.caption for p in task.train}
    assert len(task.test) == 2 and not captions & {p.caption for p in task.test}


def script_of_tasks():
    spec = importlib.util.spec_from_file_location("tasks", ROOT / "assets/tasks.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_anime_task_holds_out_characters_that_recombine_those_of_the_training(tmp_path, monkeypatch):
    png = io.BytesIO()
    Image.new("RGB", (512, 512), "pink").save(png, "PNG")
    renderer = SimpleNamespace(svg_to_bytes=lambda **arguments: png.getvalue())
    monkeypatch.setitem(sys.modules, "resvg_py", renderer)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "draw", None)  # so that the one imported below is forgotten afterwards
    del sys.modules["draw"]
    folder = script_of_tasks().write_anime(tmp_path, more=20)
    train, test = (dataset.read_pairs(folder, AspectBuckets(256), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (30, 32)
    captions = [{p.caption for p in pairs} for pairs in (train, test)]
    assert not captions[0] & captions[1] and len(captions[1]) == 32
    known = set(re.findall("[a-z-]+", " ".join(captions[0])))
    assert all(set(re.findall("[a-z-]+", caption)) <= known for caption in captions[1])


def test_both_prepared_emoji_tasks_hold_out_the_same_concepts(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "assets/tiny-sd")
    script = script_of_tasks()
    Image.new("RGBA", (60, 40), "red").save(tmp_path / "drawing.png")
    styles = script.KNOWN + script.UNSEEN

    def rows_of(folder, style):  # each designer leaves some more out
        row = {"style": style, "tags": [], "file": tmp_path / "drawing.png"}
        return [row | {"hexcode": f"{i:X}", "name": f"thing {i}"} for i in range(styles.index(style), 12)]

    monkeypatch.setattr(script, "rows_of", rows_of)
    folders = script.write(tmp_path, train=3, test=5)
    things = []
    for folder in folders:
        read = [dataset.read_pairs(folder, AspectBuckets(256), split) for split in ("train", "test")]
        assert [len(pairs) for pairs in read] == [3, 5]
        things.append([p.caption.split(" of ")[1] for pairs in read for p in pairs])
    assert things[0] == things[1] and len(set(things[0])) == 8
    assert all(int(thing.split()[1]) >= 4 for thing in things[0])  # drawn by every designer


def test_the_script_says_what_is_missing_before_it_fetches_anything(tmp_path):
    command = [sys.executable, str(ROOT / "assets/tasks.py"), "--cache", str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": str(tmp_path)})
    assert done.returncode != 0 and "npm, which fetches the drawings: apt-get install npm" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "cache").exists()
