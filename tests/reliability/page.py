"""Bad input of the page, through its functions for files, pictures with settings, data sets and trainings."""

import io
import json
import math
import pickle
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save

from sdtune.page import add_files, grid_axes, png_settings
from sdtune.page.datasets import Datasets
from sdtune.page.output_folder import OutputFolder
from sdtune.page.queue import Queue
from sdtune.page.training_jobs import Trainings

from . import commands
from .adapter_files import make_lora, page_files
from .cases import BYTE_MUTATIONS, Case, Failure, judge
from .pictures import HTML, Harmful, make_picture

ASSETS = Path(commands.train_anime.__file__).parent / "assets"


def make_page(folder: Path) -> SimpleNamespace:
    """What of the page's backend receives files, on the base that is loaded once."""
    base = commands.loaded_base()
    output = OutputFolder(folder / "output")
    files = page_files()
    files.folders = [output.path]
    files.scan()
    datasets = Datasets(output, base.tokenizer, 64)
    queue = Queue()
    trainings = Trainings("tiny-sd", queue, files, datasets, output)
    queue.close()
    return SimpleNamespace(output=output, files=files, datasets=datasets, trainings=trainings)


def upload_case(title: str, name: str, content: bytes, is_refused: bool = False) -> Case:
    def run(folder: Path) -> str:
        page, source = make_page(folder), folder / "upload" / name
        source.parent.mkdir()
        source.write_bytes(content)

        def find_fault(label) -> str:
            file = page.files.by_label.get(label)
            if file is None:
                return f"Added {label}, and there is no such file in the list"
            if file.path.read_bytes() != content:
                return "the added file has another content"
            outside = [p for p in folder.rglob("*") if p.is_file() and p != source and p != file.path]
            return f"other files were written: {outside}" if outside else ""

        return judge(lambda: add_files.add_upload(source, page.files, page.output), source, find_fault=None
                     if is_refused else find_fault, names=[name[:20], Path(name).suffix])  # fmt: skip

    return Case(f"upload: {title}", run)


def png_case(title: str, content: bytes) -> Case:
    """A picture from which the page restores settings: usable settings, or a message."""

    def run(folder: Path) -> str:
        path = folder / "picture.png"
        path.write_bytes(content)

        def find_fault(settings) -> str:
            settings.check()
            return ""

        return judge(lambda: png_settings.read_png(path), path, find_fault=find_fault)

    return Case(f"picture with settings: {title}", run)


def with_text(**chunks: str) -> bytes:
    info, stream = PngInfo(), io.BytesIO()
    for key, text in chunks.items():
        info.add_text(key, text)
    Image.new("RGB", (8, 8)).save(stream, "PNG", pnginfo=info)
    return stream.getvalue()


def dataset_case(title: str, files: dict[str, bytes]) -> Case:
    """Files that a window drops to train on: pairs that a training could use, or lines that name the files."""

    def run(folder: Path) -> str:
        page, source = make_page(folder), folder / "upload"
        for i, (name, content) in enumerate(files.items()):
            (source / str(i)).mkdir(parents=True)
            (source / str(i) / name).write_bytes(content)
        dropped = sorted(p for p in source.rglob("*") if p.is_file())

        def receive():
            uploaded = page.datasets.receive(dropped)
            captions = [caption or "a caption" for _, caption in uploaded.pairs]
            return uploaded, *page.datasets.check(uploaded, captions)

        def find_fault(found) -> str:
            uploaded, problems, notes = found
            text = "\n".join([*problems, *notes, *(name for name, _ in uploaded.pairs)])
            lost = [n for n in files if n.strip(".") not in text and Path(n).stem not in text]
            return f"nothing is said of {lost}" if lost else ""

        return judge(receive, source, find_fault=find_fault)

    return Case(f"dropped files: {title}", run)


def plan_case(title: str, **changes) -> Case:
    """A form with odd values: a plan below the output folder with usable settings, or a message."""

    def run(folder: Path) -> str:
        page = make_page(folder)
        form = {"name": "mine", "kind": "res_attn", "steps": 10, "source": "bundled"} | changes
        more = form.pop("more", {})

        def plan():
            return page.trainings.plan(None, [], form["source"], form["name"], form["kind"], form["steps"], more)

        def find_fault(planned) -> str:
            output = Path(planned.config.output).resolve()
            if output.parent != page.output.path.resolve() or output.name.startswith("."):
                return f"the training would write to {output}"
            numbers = [v for v in (*vars(planned.config).values(), *vars(planned.tuner).values()) if type(v) is float]
            return "" if all(map(math.isfinite, numbers)) else "a number is not finite"

        return judge(plan, [], find_fault=find_fault)

    return Case(f"training form: {title}", run)


def axis_case(name, text: str, labels=()) -> Case:
    def run(folder: Path) -> str:
        def find_fault(axis) -> str:
            numbers = [v for v in axis.values if isinstance(v, (int, float))]
            return "" if all(map(math.isfinite, numbers)) and axis.values else "values that cannot be used"

        return judge(lambda: grid_axes.parse_axis(name, text, labels), [], find_fault=find_fault)

    return Case(f"grid axis: {name} {text[:30]!r}", run)


def run_folder_case(title: str, change) -> Case:
    """The page's list of unfinished trainings, started on an output folder that holds a damaged one."""

    def run(folder: Path) -> str:
        from .runs import finished_run

        _, finished, _ = finished_run()
        copy_of_run = folder / "output" / "mine"
        shutil.copytree(finished, copy_of_run)
        (copy_of_run / "tuner.safetensors").unlink()
        change(copy_of_run)
        page = make_page(folder)
        job = page.trainings.shown_in("window")
        if job is not None and not job.resumable:
            raise Failure("it is shown and cannot be resumed")
        return "right" if job else "refused: not offered"

    return Case(f"unfinished training of the page: {title}", run)


def page_cases(seed: int) -> list[Case]:
    rng = random.Random(f"{seed} page")
    lora = save(make_lora("LoRA", "kohya", seed))
    tuner = (ASSETS / "anime_res_attn.safetensors").read_bytes()
    cases = [
        upload_case("a LoRA", "style.safetensors", lora), upload_case("a tuner", "anime.safetensors", tuner),
        upload_case("a name of dots", "....safetensors", lora),
        upload_case("a name of other scripts", "猫.safetensors", lora),
        upload_case("a name of HTML", "<img src=x onerror=alert(1)>.safetensors", lora),
        upload_case("a long name", "x" * 200 + ".safetensors", lora),
        upload_case("a name with a line break", "a\nb.safetensors", lora),
        upload_case("a name that looks like a path", "..%2f..%2fa.safetensors", lora),
        upload_case("a suffix in capitals", "style.SAFETENSORS", lora),
        upload_case("an empty file", "a.safetensors", b"", True),
        upload_case("a web page", "a.safetensors", HTML, True),
        upload_case("a pickle", "a.safetensors", pickle.dumps(Harmful()), True),
        upload_case("a pickle named .pt", "a.pt", pickle.dumps(Harmful()), True),
        upload_case("a pickle after a header", "a.safetensors", b"\2\0\0\0\0\0\0\0{}" + pickle.dumps(Harmful()), True),
        upload_case("a zip", "a.safetensors", b"PK\3\4" + bytes(99), True),
        *(upload_case(m.__name__, "a.safetensors", m(lora, rng)) for m in BYTE_MUTATIONS),
    ]  # fmt: skip
    settings = json.dumps({"version": 1, "prompt": "a", "seed": 5, "steps": 3, "guidance": 2.0, "columns": [{}]})
    cases += [png_case(f"its chunk is {t}", with_text(sdtune=t)) for t in (
        settings, "", "{", "[]", "5", "null", "[" * 100_000, '{"seed": 1e999}', '{"seed": NaN}', '{"seed": "a"}',
        '{"steps": -5}', '{"steps": 1e12}', '{"size": 7}', '{"size": 1e9}', '{"columns": {}}', '{"columns": [5]}',
        '{"columns": [{"a": "b"}]}', '{"columns": [{"a": 1e308}]}', '{"columns": []}', '{"prompt": 5}',
        '{"prompt": "\\ud83d"}', json.dumps({"prompt": "x" * 100_000}), json.dumps({"columns": [{}] * 500}),
        '{"sampler": ["a"]}', '{"guidance": true}', '{"images": 0.5}')]  # fmt: skip
    cases += [png_case(f"of another tool, {t[:30]!r}", with_text(parameters=t)) for t in (
        "a\nSteps: 5, Seed: x", "Steps: 1", "Steps: 999999999999999999999999, Seed: 1",
        "a\nSteps: 5, Size: x", "\n" * 5000,
        "a\nNegative prompt: b\nSteps: 5, CFG scale: inf, Seed: nan")]  # fmt: skip
    picture = with_text(sdtune=settings)
    cases += [png_case(m.__name__, m(picture, rng)) for m in BYTE_MUTATIONS]
    cases += [png_case("a JPEG", make_picture(rng, ".jpg")), png_case("a pickle", pickle.dumps(Harmful()))]

    good = make_picture(random.Random(1), ".png")
    for title, files in (
        ("a good pair", {"a.png": good, "a.txt": b"a girl"}), ("a picture without a caption", {"a.png": good}),
        ("a caption without a picture", {"a.png": good, "b.txt": b"a"}),
        ("hidden names", {".a.png": good, "..b.png": good}),
        ("a table with a path outside", {
            "a.png": good, "metadata.jsonl": b'{"file_name": "../../x.png", "text": "a"}'}),
        ("two tables", {"a.png": good, "metadata.jsonl": b"{}", "metadata.csv": b"file_name,text\n"}),
        ("a table that is noise", {"a.png": good, "metadata.csv": random.Random(2).randbytes(300)}),
        ("a pickle", {"a.png": good, "b.png": pickle.dumps(Harmful())}),
        ("a program", {"a.png": good, "b.sh": b"rm x"}),
        ("a name of HTML", {"<img src=x>.png": good, "a.txt": b"a"}),
        ("a name of folders", {"train": good, "test": b"x"}),
        ("a caption of UTF-16", {"a.png": good, "a.txt": "a girl".encode("utf-16")}),
        ("nothing but text", {"a.txt": b"a"}),
        *((f"a picture, {m.__name__}", {"a.png": good, "b.png": m(good, rng)}) for m in BYTE_MUTATIONS),
    ):  # fmt: skip
        cases.append(dataset_case(title, files))
    for title, change in (
        ("a name with a path", {"name": "../../etc/x"}), ("an absolute name", {"name": "/etc/x"}),
        ("no name", {"name": ""}),
        ("a name of dots", {"name": ".."}), ("a hidden name", {"name": ".page"}), ("a long name", {"name": "x" * 9999}),
        ("a NUL in the name", {"name": "a\0b"}), ("an unknown kind", {"kind": "none"}),
        ("a kind that is a list", {"kind": []}),
        ("no steps", {"steps": None}), ("-1 steps", {"steps": -1}), ("NaN steps", {"steps": float("nan")}),
        ("infinite steps", {"steps": float("inf")}), ("1e30 steps", {"steps": 1e30}), ("steps of text", {"steps": "a"}),
        ("steps of a list", {"steps": [1]}), ("a base that is a path", {"more": {"base": "/etc"}}),
        ("a base that is a number", {"more": {"base": 5}}), ("a batch of 1e9", {"more": {"batch_size": 1e9}}),
        ("a batch of text", {"more": {"batch_size": "a"}}), ("rank 1e12", {"more": {"rank": 1e12}}),
        ("rank NaN", {"more": {"rank": float("nan")}}), ("a rate of text", {"more": {"learning_rate": "a"}}),
        ("a rate of infinity", {"more": {"learning_rate": float("inf")}}),
        ("resolution 1e9", {"more": {"resolution": 1e9}}),
        ("an unknown field", {"more": {"output": "/etc"}}),
        ("prompts that are a list", {"more": {"preview_prompts": ["a"]}}),
        ("a million prompts", {"more": {"preview_prompts": "a\n" * 1_000_000}}),
        ("a source of another name", {"source": "x"}),
        ("a checkpoint at each of a billion steps", {"steps": 10**9, "more": {"checkpoint_every": 1}}),
        ("layers that are none", {"more": {"ops": ["none"]}}), ("layers that are a text", {"more": {"ops": "attn1"}}),
    ):  # fmt: skip
        cases.append(plan_case(title, **change))
    for name, text in (
        ("weight", "nan"), ("weight", "1e999"), ("weight", "a"), ("weight", ",,,"), ("seed", "-1"), ("seed", "1e400"),
        ("seed", "9" * 5000), ("guidance", "inf"), ("guidance", "0x10"), ("prompt", "\n\n"), ("none", "1"),
        ("adapter", ""),
        ("weight", "1, " * 100_000), ([], "1"),
    ):  # fmt: skip
        cases.append(axis_case(name, text))
    for title, change in (
        ("whole", lambda run: None), ("config.json is gone", lambda run: (run / "config.json").unlink()),
        ("config.json is cut", lambda run: (run / "config.json").write_bytes(b"{")),
        ("config.json is noise", lambda run: (run / "config.json").write_bytes(np.random.default_rng(0).bytes(99))),
        ("config.json is a list", lambda run: (run / "config.json").write_bytes(b"[]")),
        ("config.json holds a list", lambda run: (run / "config.json").write_bytes(b'{"train": [], "tuner": []}')),
        ("config.json is deeply nested", lambda run: (run / "config.json").write_bytes(b"[" * 100_000)),
        ("state.json is a list", lambda run: [f.write_bytes(b"[]") for f in run.rglob("state.json")]),
        ("losses are a text", lambda run: [f.write_bytes(b'{"losses": "abc"}') for f in run.rglob("state.json")]),
        ("losses are texts", lambda run: [f.write_bytes(b'{"losses": ["a"]}') for f in run.rglob("state.json")]),
    ):  # fmt: skip
        cases.append(run_folder_case(title, change))
    return cases
