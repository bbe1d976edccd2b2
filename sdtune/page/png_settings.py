"""The settings of a drawing, written into its PNG files and read back from them.

A PNG holds them in two text chunks: `parameters`, in the format of AUTOMATIC1111's web UI, which many tools show, and
`sdtune`, a JSON object with all settings. A PNG can come from anywhere, so unusable values are replaced by defaults.
"""

import json
import math
import re
import unicodedata
from dataclasses import asdict, dataclass, field
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..adapters import disk

MAX_CHARACTERS, MAX_COLUMNS, MAX_IMAGES, MAX_WEIGHT = 10_000, 12, 64, 5


@dataclass(frozen=True)
class Settings:
    """The settings of a drawing besides the base. Each column maps labels of adapter files to weights; {} is the base.

    `images` is the number of images per column; image i starts from the noise of `seed` + i. `width` and `height` are
    those of an image in pixels, None for the size of the base. `clip_skip` is as AUTOMATIC1111 counts, None for what
    the tuners were trained with.
    """

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 25
    guidance: float = 7.5
    width: int | None = None
    height: int | None = None
    images: int = 1
    sampler: str = ""
    columns: list[dict[str, float]] = field(default_factory=lambda: [{}])
    clip_skip: int | None = None

    def check(self) -> None:
        """Raises a ValueError that lists all settings that are out of range."""
        problems = []
        for name, text in (("prompt", self.prompt), ("negative prompt", self.negative_prompt)):
            if len(text) > MAX_CHARACTERS:
                problems.append(f"The {name} has {len(text):,} characters; at most {MAX_CHARACTERS:,} are allowed.")
        for name, value, low, high in (
            ("seed", self.seed, 0, 2**32 - 1),
            ("number of steps", self.steps, 1, 150),
            ("guidance", self.guidance, 0, 30),
            ("number of images", self.images, 1, 16),
        ):
            if not isinstance(value, (int, float)) or not low <= value <= high:
                problems.append(f"The {name} is {value}; it must be between {low} and {high}.")
        for name, side in (("width", self.width), ("height", self.height)):
            if side is not None and (not 64 <= side <= 2048 or side % 8):
                problems.append(f"The {name} is {side}; it must be between 64 and 2048 and a multiple of 8.")
        if self.clip_skip is not None and not 1 <= self.clip_skip <= 12:
            problems.append(f"The clip skip is {self.clip_skip}; it must be between 1, the last layer, and 12.")
        if not 1 <= len(self.columns) <= MAX_COLUMNS:
            problems.append(f"There are {len(self.columns)} columns; between 1 and {MAX_COLUMNS} can be drawn.")
        if len(self.columns) * self.images > MAX_IMAGES:
            problems.append(
                f"{len(self.columns)} columns of {self.images} images are more than {MAX_IMAGES} images; draw fewer."
            )
        if any(not math.isfinite(w) or abs(w) > MAX_WEIGHT for column in self.columns for w in column.values()):
            problems.append(f"A weight is not between -{MAX_WEIGHT} and {MAX_WEIGHT}.")
        if problems:
            raise ValueError(" ".join(problems))


def write_png(
    path: Path, picture: Image.Image, settings: Settings, column: int, image: int, base: str, axes: dict | None = None
) -> Path:
    """Saves an image with its settings and returns the path.

    Args:
        column, image: the place of this image in the drawing, both from 0.
        axes: of a grid: the titles along each axis.
    """
    adapters = settings.columns[column]
    facts = {
        "Steps": settings.steps, "Sampler": settings.sampler, "CFG scale": f"{settings.guidance:g}",
        "Seed": settings.seed + image, "Size": f"{picture.width}x{picture.height}", "Model": base,
    }  # fmt: skip
    if settings.clip_skip:
        facts["Clip skip"] = settings.clip_skip
    if adapters:
        facts["Tuners"] = json.dumps(", ".join(f"{n}: {w:g}" for n, w in adapters.items()), ensure_ascii=False)
    text = settings.prompt
    if settings.negative_prompt:
        text += f"\nNegative prompt: {settings.negative_prompt}"
    info = PngInfo()
    info.add_text("parameters", f"{text}\n{', '.join(f'{k}: {v}' for k, v in facts.items())}")
    chunk = {"version": 1, **asdict(settings), "column": column, "image": image, "base": base}
    info.add_text("sdtune", json.dumps(chunk | ({"axes": axes} if axes else {})))
    with disk.new_file(path) as part:
        picture.save(part, format="PNG", pnginfo=info)
    return path


def read_png(path: str | Path) -> Settings:
    """Reads the settings from a PNG of this page or of AUTOMATIC1111's web UI; unusable values get their default.

    Raises:
        ValueError: if this is no PNG, or one without settings.
    """
    try:
        with Image.open(path, formats=["PNG"]) as opened:
            opened.load()
            text = getattr(opened, "text", {})
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise ValueError("This is not a complete PNG file. Drop one that was downloaded from this page.") from error
    try:
        found = json.loads(text["sdtune"])
        found = found if isinstance(found, dict) else {}
    except (KeyError, ValueError, RecursionError):
        found = _read_parameters(text.get("parameters", ""))
    if not found:
        raise ValueError("This image has no settings in it. Image editors and messengers often remove them.")
    return _keep_usable(found)


def _read_parameters(text: str) -> dict:
    """Parses AUTOMATIC1111's text: the prompt, a negative prompt, and a last line such as "Steps: 20, Seed: 5"."""
    lines = text[: 4 * MAX_CHARACTERS].strip().split("\n")
    if not re.match(r"Steps: \d", lines[-1]):
        return {}
    facts = dict(re.findall(r"([\w ]+): ([^,]+)(?:, |$)", lines.pop()))
    prompt, _, negative = "\n".join(lines).partition("Negative prompt: ")
    found = {"prompt": prompt.strip(), "negative_prompt": negative.strip(), "sampler": facts.get("Sampler", "")}
    facts["Width"], _, facts["Height"] = facts.get("Size", "").partition("x")
    numbers = {"seed": "Seed", "steps": "Steps", "guidance": "CFG scale", "width": "Width", "height": "Height",
               "clip_skip": "Clip skip"}  # fmt: skip
    for name, key in numbers.items():
        try:
            found[name] = float(facts[key])
        except (KeyError, ValueError):
            pass
    return found


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15


def _keep_usable(found: dict) -> Settings:
    """Settings from a parsed chunk; each value that has the wrong type or is out of range becomes its default."""
    default, values = Settings(), {}
    for name in ("prompt", "negative_prompt", "sampler"):
        if isinstance(found.get(name), str):
            values[name] = found[name][:MAX_CHARACTERS]
    for name in ("seed", "steps", "images", "width", "height", "clip_skip", "guidance"):
        value = found.get(name, found.get("size") if name in ("width", "height") else None)  # old files: one side
        if _is_number(value):
            values[name] = float(value) if name == "guidance" else int(value)
    columns = found.get("columns")
    if isinstance(columns, list):
        values["columns"] = [
            {str(n)[:200]: float(w) for n, w in c.items() if _is_number(w)}
            for c in columns[:MAX_COLUMNS]
            if isinstance(c, dict)
        ] or [{}]
    for name in list(values):  # each by itself, so that one bad value does not replace the others
        try:
            Settings(**{name: values[name]}).check()
        except ValueError:
            values[name] = getattr(default, name)
    return Settings(**values)


def make_slug(text: str) -> str:
    """Turns a text into a file name of at most 40 ASCII letters, digits, underscores and dashes; may be empty."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9_]+", "-", plain)[:40].strip("-")
