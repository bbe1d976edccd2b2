"""The settings of a drawing, and how they travel in the PNG: written into it, and read back from it.

Two text chunks: `parameters`, in the words that AUTOMATIC1111's page made common, so that other tools show them,
and `sdtune`, a JSON object with everything. Reading trusts nothing: values that are not usable are left out.
"""

import json
import math
import re
import unicodedata
from dataclasses import asdict, dataclass, field
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

MOST_CHARACTERS, MOST_COLUMNS = 10_000, 12


@dataclass(frozen=True)
class Settings:
    """What a drawing depends on besides the base. Each column maps labels of the library to weights; {} is the base."""

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 25
    guidance: float = 7.5
    size: int | None = None
    images: int = 1
    sampler: str = ""
    columns: list[dict[str, float]] = field(default_factory=lambda: [{}])

    def check(self) -> None:
        """Raises ValueError, listing everything that is out of range."""
        wrong = []
        for name in ("prompt", "negative_prompt"):
            if len(getattr(self, name)) > MOST_CHARACTERS:
                what, found = name.replace("_", " "), len(getattr(self, name))
                wrong.append(f"the {what} has {found:,} characters; at most {MOST_CHARACTERS:,} can be given")
        for name, low, high in (("seed", 0, 2**32 - 1), ("steps", 1, 150), ("guidance", 0, 30), ("images", 1, 16)):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not low <= value <= high:
                wrong.append(f"{name} is {value}; it must be from {low} to {high}")
        if self.size is not None and (not 64 <= self.size <= 2048 or self.size % 8):
            wrong.append(f"size is {self.size}; it must be from 64 to 2048 and a multiple of 8")
        if not 1 <= len(self.columns) <= MOST_COLUMNS:
            wrong.append(f"there are {len(self.columns)} columns; from 1 to {MOST_COLUMNS} can be drawn")
        if len(self.columns) * self.images > 64:
            wrong.append(f"{len(self.columns)} columns of {self.images} pictures are more than 64; take fewer")
        if any(not math.isfinite(w) or abs(w) > 5 for column in self.columns for w in column.values()):
            wrong.append("a weight is beyond 5")
        if wrong:
            raise ValueError("; ".join(wrong))


def write_png(
    path: Path, picture: Image.Image, settings: Settings, column: int, image: int, base: str, axes: dict | None = None
) -> Path:
    """Saves a picture with its settings; `column` and `image` say which of the drawing's pictures it is."""
    adapters = settings.columns[column]
    facts = {
        "Steps": settings.steps, "Sampler": settings.sampler, "CFG scale": f"{settings.guidance:g}",
        "Seed": settings.seed + image, "Size": f"{picture.width}x{picture.height}", "Model": base,
    }  # fmt: skip
    if adapters:
        facts["Tuners"] = json.dumps(", ".join(f"{n}: {w:g}" for n, w in adapters.items()), ensure_ascii=False)
    text = settings.prompt
    if settings.negative_prompt:
        text += f"\nNegative prompt: {settings.negative_prompt}"
    info = PngInfo()
    info.add_text("parameters", f"{text}\n{', '.join(f'{k}: {v}' for k, v in facts.items())}")
    chunk = {"version": 1, **asdict(settings), "column": column, "image": image, "base": base}
    info.add_text("sdtune", json.dumps(chunk | ({"axes": axes} if axes else {})))
    picture.save(path, pnginfo=info)
    return path


def read_png(path: str | Path) -> Settings:
    """The settings in a picture, of ours or of AUTOMATIC1111's kind; what is not usable has its default.

    Raises:
        ValueError: if this is no PNG with settings.
    """
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            picture.load()
            text = getattr(picture, "text", {})
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise ValueError("this is no whole PNG picture; drop one that was downloaded from this page") from error
    try:
        found = json.loads(text["sdtune"])
        found = found if isinstance(found, dict) else {}
    except (KeyError, ValueError, RecursionError):
        found = _read_parameters(text.get("parameters", ""))
    if not found:
        raise ValueError("this picture holds no settings; editors and messengers often remove them")
    return _usable(found)


def _read_parameters(text: str) -> dict:
    """AUTOMATIC1111's text: the prompt, a negative prompt, and a last line of facts."""
    lines = text[: 4 * MOST_CHARACTERS].strip().split("\n")
    if not re.match(r"Steps: \d", lines[-1]):
        return {}
    facts = dict(re.findall(r"([\w ]+): ([^,]+)(?:, |$)", lines.pop()))
    prompt, _, negative = "\n".join(lines).partition("Negative prompt: ")
    found = {"prompt": prompt.strip(), "negative_prompt": negative.strip(), "sampler": facts.get("Sampler", "")}
    for name, key in (("seed", "Seed"), ("steps", "Steps"), ("guidance", "CFG scale"), ("size", "Size")):
        try:
            found[name] = float(facts[key].partition("x")[0])
        except (KeyError, ValueError):
            pass
    return found


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15


def _usable(found: dict) -> Settings:
    default, values = Settings(), {}
    for name in ("prompt", "negative_prompt", "sampler"):
        if isinstance(found.get(name), str):
            values[name] = found[name][:MOST_CHARACTERS]
    for name in ("seed", "steps", "images", "size", "guidance"):
        value = found.get(name)
        if _is_number(value):
            values[name] = float(value) if name == "guidance" else int(value)
    columns = found.get("columns")
    if isinstance(columns, list):
        values["columns"] = [
            {str(n)[:200]: float(w) for n, w in c.items() if _is_number(w)}
            for c in columns[:MOST_COLUMNS]
            if isinstance(c, dict)
        ] or [{}]
    for name in list(values):  # each alone, so that one bad value does not take the others along
        try:
            Settings(**{name: values[name]}).check()
        except ValueError:
            values[name] = getattr(default, name)
    return Settings(**values)


def slug(text: str) -> str:
    """A text as a file name: ASCII letters, digits and dashes, at most 40."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9_]+", "-", plain)[:40].strip("-")
