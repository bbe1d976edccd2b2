"""The tuner and LoRA files that the page offers: what their metadata says, and whether they fit the loaded base."""

import base64
import io
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError, safe_open

from ..adapters import api, tuner_file
from ..bases import load
from ..training import images
from ..tuners.config import BASELINES, KINDS, fields_of
from .queue import PageError


@dataclass(frozen=True)
class Item:
    """A tuner or LoRA file. `why` says why it does not fit the base, empty if it does."""

    label: str
    path: Path
    kind: str
    why: str = ""
    base: str = ""
    trigger_words: str = ""
    megabytes: float = 0.0
    made: float = 0.0  # seconds since 1970
    details: str = ""
    preview: Path | None = None
    run: str = ""  # for a checkpoint: the label of the run it belongs to

    @property
    def fits(self) -> bool:
        return not self.why


class FileList:
    """The tuner and LoRA files in some folders, by label. `version` grows whenever the listing has changed."""

    def __init__(self, folders: Sequence[Path], unet):
        self.folders, self.version, self.items = list(folders), 1, {}
        with torch.device("meta"):  # a UNet of this shape that no other thread touches
            self._unet = UNet2DConditionModel.from_config(unet.config)
        self._layers = {
            name.replace(".", "_"): (module.in_features if isinstance(module, torch.nn.Linear) else module.in_channels)
            for name, module in self._unet.named_modules()
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
        }
        self._known: dict[tuple, Item] = {}
        self._lock = threading.Lock()
        self.scan()

    def scan(self) -> int:
        """Looks for new, changed and vanished files; gives the version."""
        with self._lock:
            self._scanned = time.monotonic()
            items, known = {}, {}
            for folder in self.folders:
                for path in sorted(p for p in folder.rglob("*.safetensors") if self._listed(folder, p)):
                    try:
                        stat = path.stat()
                    except OSError:  # it vanished meanwhile
                        continue
                    label = self._label(folder, path, items)
                    key = (label, path, stat.st_mtime_ns, stat.st_size)
                    known[key] = items[label] = self._known.get(key) or self._item(label, path, stat)
            if known.keys() != self._known.keys():
                self._known, self.items = known, items
                self.version += 1
            return self.version

    def scan_sometimes(self) -> int:
        """As `scan`, but looks again after some seconds only."""
        if time.monotonic() - self._scanned > 3:
            self.scan()
        return self.version

    def offered(self, checkpoints: bool = False) -> list[str]:
        """The labels of what fits the base: finished files, or also the checkpoints of runs."""
        return [i.label for i in self.items.values() if i.fits and (checkpoints or not i.run or self._last(i))]

    def runs(self) -> dict[str, list[str]]:
        """Run -> the labels of its checkpoints that fit the base, in order."""
        found: dict[str, list[str]] = {}
        for item in self.items.values():
            if item.run and item.fits:
                found.setdefault(item.run, []).append(item.label)
        return found

    def find(self, label: str) -> Item:
        """The file of a label; StudioError if there is none or it does not fit."""
        item = self.items.get(label) if isinstance(label, str) else None
        if item is None:
            raise PageError(f"{str(label)[:80]!r} is not in the library (any more); choose another")
        if item.why:
            raise PageError(f"{item.label} does not fit this base: {item.why}")
        return item

    def _last(self, item: Item) -> bool:
        """Whether a checkpoint stands for its run: the run was stopped, and this is where."""
        own = [i for i in self.items.values() if i.run == item.run]
        return item.run not in self.items and item.label == own[-1].label

    @staticmethod
    def _listed(folder: Path, path: Path) -> bool:
        parts = path.relative_to(folder).parts
        if any(part.startswith(".") for part in parts) or path.is_relative_to(load.TINY_SD):
            return False
        return "checkpoints" not in parts or path.name == tuner_file.FILE_NAME

    @staticmethod
    def _label(folder: Path, path: Path, taken) -> str:
        parts = path.relative_to(folder).with_suffix("").parts
        parts = parts[:-1] if path.name == tuner_file.FILE_NAME and len(parts) > 1 else parts
        if len(parts) > 2 and parts[-2] == "checkpoints":
            step = parts[-1].removeprefix("step-").lstrip("0")
            parts = (*parts[:-3], f"{parts[-3]} @ step {step}")
        label, number = "/".join(parts[-2:])[:120], 2
        while label in taken:
            label, number = f"{'/'.join(parts[-2:])[:110]} ({number})", number + 1
        return label

    def _item(self, label: str, path: Path, stat) -> Item:
        try:
            return self._read(label, path, stat)
        except Exception as error:  # metadata may hold anything
            return Item(label, path, "not usable", why=f"its metadata is not readable ({type(error).__name__})")

    def _read(self, label: str, path: Path, stat) -> Item:
        facts = {"megabytes": stat.st_size / 1e6, "made": stat.st_mtime, "run": label.partition(" @ step ")[0]}
        if " @ step " not in label:
            facts["run"] = ""
        previews = (path.with_suffix(".png"), path.with_name("preview.png"))
        facts["preview"] = next((p for p in previews[: 1 + (path.name == tuner_file.FILE_NAME)] if p.is_file()), None)
        try:
            if tuner_file.is_plain_lora(path):
                return self._read_lora(label, path, facts)
            file = tuner_file.load(path)
        except (ValueError, OSError, SafetensorError) as error:
            return Item(label, path, "not usable", why=" ".join(str(error).split()), **facts)
        why = ""
        try:
            tuner_file.check_fits(file, api.expected_shapes(self._unet, file.config), path.name)
        except ValueError as error:
            shape = file.base.get("shape") or {}
            own = {k: v for k, v in self._unet.config.items() if k in shape}
            differs = [f"{k} is {v}, here {own[k]}" for k, v in shape.items() if k in own and _lists(own[k]) != v]
            why = f"made for a base of another shape ({'; '.join(differs)})" if differs else str(error)
        config, training = file.config, file.training
        where = f"on {' + '.join(config.ops)}" if matters(config.kind, "ops") else "on every layer"
        details = f"rank {config.rank}, {where}" if matters(config.kind, "rank") else where
        if steps := training.get("steps_done"):
            details += f"; {steps} steps on {training.get('images', '?')} pictures"
        return Item(
            label, path, " + ".join(kind_name(k) for k in (config.kind, config.ffn_kind) if k), why,
            str(file.base.get("name", "")), str(file.trigger_words),
            details=details, **facts,
        )  # fmt: skip

    def _read_lora(self, label: str, path: Path, facts: dict) -> Item:
        """A LoRA of another tool: its layers must be layers of this UNet, with inputs as wide."""
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            keys = [k for k in file.keys() if re.search(r"lora(_A|[._]down)\.", k)]  # noqa: SIM118
            downs = {k: file.get_slice(k).get_shape() for k in keys}
        found, wrong, rank = 0, "", 0
        for key, shape in downs.items():
            if key.startswith(("text_encoder", "lora_te")):
                continue
            layer = re.sub(r"\.?(lora_A(\.\w+)?|lora[._]down)\.weight$", "", key)
            layer = re.sub(r"^(unet\.|lora_unet_)", "", layer).replace(".processor", "").replace(".", "_")
            layer = layer.removesuffix("_lora")
            width = self._layers.get(layer, self._layers.get(f"{layer}_0"))
            if width is None:
                continue
            found, rank = found + 1, shape[0]
            if width != shape[1]:
                wrong = wrong or f"its {layer} is {shape[1]} wide, this base's is {width}"
        if not downs or not found:
            wrong = "none of its layers are in this base's UNet"
        base = metadata.get("ss_base_model_version") or metadata.get("modelspec.architecture") or ""
        trigger = metadata.get("modelspec.trigger_phrase", "")
        return Item(label, path, "LoRA", wrong, base[:200], trigger[:500], details=f"rank {rank}", **facts)


def kind_name(kind: str) -> str:
    """ "res_attn" as people write it: Res-Attn."""
    short = {"lora": "LoRA", "dora": "DoRA", "full": "Full fine-tuning"}
    return short.get(kind) or "-".join(part.capitalize() for part in str(kind).split("_"))


def matters(kind: str, name: str) -> bool:
    """Whether a field of `TunerConfig` has an effect for tuners of this kind."""
    return name in fields_of(kind)


def _lists(value):
    return list(value) if isinstance(value, tuple) else value


def thumbnail(path: Path | None, side: int) -> str:
    """A picture as a small JPEG in a data URL, or "" if it is none. Decoded and drawn anew, so nothing hides in it."""
    try:
        image = images.open_image(path)
        image.thumbnail((side, side))
        out = io.BytesIO()
        image.save(out, "JPEG", quality=85)
    except Exception:  # decoders raise many kinds on damaged files
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def kinds() -> list[str]:
    """The kinds of tuner that can be trained, ours first."""
    return [*KINDS, *BASELINES]
