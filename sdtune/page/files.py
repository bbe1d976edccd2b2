"""The adapter files that the page offers: tuners and LoRAs, what their metadata says, and whether they fit the base."""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError, safe_open

from ..adapters import api, foreign_lora, tuner_file
from ..bases import load
from ..tuners.config import fields_of
from .errors import PageError

RESCAN_SECONDS = 3.0
LAYER_NAMES = {"attn1": "self-attention", "attn2": "cross-attention", "ff": "feed-forward", "conv": "convolutions"}
_CHECKPOINT = " @ step "  # stands between run and step in the label of a checkpoint


@dataclass(frozen=True)
class AdapterFile:
    """A tuner or LoRA file. `problem` says why it cannot be used with the loaded base; it is empty if it can."""

    label: str
    path: Path
    kind: str
    problem: str = ""
    base: str = ""
    trigger_words: str = ""
    megabytes: float = 0.0
    modified: float = 0.0  # seconds since 1970
    details: str = ""
    preview: Path | None = None
    run: str = ""  # of a checkpoint: the label of the training run that wrote it

    @property
    def fits(self) -> bool:
        return not self.problem


class AdapterFiles:
    """The adapter files below some folders, by label. `version` increases whenever the list has changed.

    `unet` is one of the shape of the base's, without weights.
    """

    def __init__(self, folders: Sequence[Path], unet, text_encoder=None):
        self.folders, self.version = list(folders), 1
        self.by_label: dict[str, AdapterFile] = {}
        with torch.device("meta"):  # a UNet of the same shape, without weights, that no other thread changes
            self.unet = UNet2DConditionModel.from_config(unet.config)
            self._text_encoder = text_encoder and type(text_encoder)(text_encoder.config)
        # (label, path, time of change, size, preview) -> what was read
        self._known: dict[tuple, AdapterFile] = {}
        self._lock = threading.Lock()
        self.scan()

    def scan(self) -> int:
        """Reads new and changed files, drops the removed ones, and returns the version."""
        with self._lock:
            self._scanned = time.monotonic()
            by_label, known = {}, {}
            for folder in self.folders:
                for path in sorted(p for p in _find_files(folder) if _is_listed(folder, p)):
                    try:
                        stat = path.stat()
                    except OSError:  # the file was removed a moment ago
                        continue
                    label = _make_label(folder, path, by_label)
                    preview = _find_preview(path)  # a training draws it after it has written the file
                    key = (label, path, stat.st_mtime_ns, stat.st_size, preview)
                    known[key] = by_label[label] = self._known.get(key) or self._read(label, path, stat, preview)
            if known.keys() != self._known.keys():
                self._known, self.by_label = known, by_label
                self.version += 1
            return self.version

    def scan_if_old(self) -> int:
        """As `scan`, but does nothing if the last scan is less than RESCAN_SECONDS ago."""
        if time.monotonic() - self._scanned > RESCAN_SECONDS:
            self.scan()
        return self.version

    def labels(self, checkpoints: bool = False) -> list[str]:
        """The labels of all files that fit the base; intermediate checkpoints only if they are wanted."""
        fitting = [file for file in self.by_label.values() if file.fits]
        return [f.label for f in fitting if checkpoints or not f.run or self._is_result_of_stopped_run(f)]

    def checkpoint_labels(self) -> list[str]:
        """The labels of all checkpoints that fit the base, run by run, in the order of their steps."""
        by_run: dict[str, list[str]] = {}
        for file in self.by_label.values():
            if file.run and file.fits:
                by_run.setdefault(file.run, []).append(file.label)
        return [label for labels in by_run.values() for label in labels]

    def label_of(self, path: Path) -> str | None:
        """The label of a file that fits the base, or None."""
        return next((file.label for file in self.by_label.values() if file.path == path and file.fits), None)

    def get(self, label: str) -> AdapterFile:
        """The file with this label.

        Raises:
            PageError: if there is none, or it does not fit the base.
        """
        file = self.by_label.get(label) if isinstance(label, str) else None
        if file is None:
            raise PageError(f"There is no adapter file {str(label)[:80]!r} (any more). Choose another one.")
        if file.problem:
            raise PageError(f"{file.label} does not fit this base: {file.problem}")
        return file

    def _is_result_of_stopped_run(self, file: AdapterFile) -> bool:
        """Whether this is the last checkpoint of a run that has written no finished tuner."""
        last = [f for f in self.by_label.values() if f.run == file.run][-1]
        return file.run not in self.by_label and file.label == last.label

    def _read(self, label: str, path: Path, stat, preview: Path | None) -> AdapterFile:
        try:
            return self._read_tuner_or_lora(label, path, stat, preview)
        except Exception as error:  # metadata can hold anything
            problem = f"its metadata cannot be read ({type(error).__name__})"
            return AdapterFile(label, path, "unusable", problem)

    def _read_tuner_or_lora(self, label: str, path: Path, stat, preview: Path | None) -> AdapterFile:
        facts = {
            "megabytes": stat.st_size / 1e6,
            "modified": stat.st_mtime,
            "run": label.partition(_CHECKPOINT)[0] if _CHECKPOINT in label else "",
            "preview": preview,
        }
        try:
            if tuner_file.is_plain_lora(path):
                return self._read_lora(label, path, facts)
            file = tuner_file.load(path)
        except (ValueError, OSError, SafetensorError) as error:
            return AdapterFile(label, path, "unusable", " ".join(str(error).split()), **facts)
        problem = ""
        try:
            tuner_file.check_fits(file, api.expected_shapes(self.unet, file.config), path.name)
        except ValueError as error:
            problem = self._describe_shape_difference(file.base.get("shape") or {}) or str(error)
        config, training, fields = file.config, file.training, fields_of(file.config.kind)
        layers = ", ".join(LAYER_NAMES.get(op, op) for op in config.ops) if "ops" in fields else "every layer"
        details = f"rank {config.rank}, on {layers}" if "rank" in fields else f"on {layers}"
        if steps := training.get("steps_done"):
            details += f"; {steps} steps on {training.get('images', '?')} images"
        return AdapterFile(
            label, path, " + ".join(kind_name(k) for k in (config.kind, config.ffn_kind) if k), problem,
            str(file.base.get("name", "")), str(file.trigger_words), details=details, **facts,
        )  # fmt: skip

    def _describe_shape_difference(self, shape: dict) -> str:
        """Where the shape of the base that a file was trained on differs from the loaded base; empty if nowhere."""
        own = {k: list(v) if isinstance(v, tuple) else v for k, v in self.unet.config.items() if k in shape}
        differences = [f"{k} is {shape[k]}, here {v}" for k, v in own.items() if v != shape[k]]
        return f"it was trained on a base of another shape ({'; '.join(differences)})" if differences else ""

    def _read_lora(self, label: str, path: Path, facts: dict) -> AdapterFile:
        """Reads a LoRA of any tool. Whether it fits is decided as `sdtune.load_tuner` does."""
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        kind, problem, details = "LoRA", "", ""
        try:
            found = foreign_lora.inspect(path, self.unet, self._text_encoder)
            kind, details = found.kind, "; ".join(filter(None, (f"rank {found.rank}", found.left_out())))
        except tuner_file.TunerFileError as error:
            problem = str(error).replace(str(path), path.name)
        base = metadata.get("ss_base_model_version") or metadata.get("modelspec.architecture") or ""
        trigger_words = metadata.get("modelspec.trigger_phrase", "")
        return AdapterFile(label, path, kind, problem, base[:200], trigger_words[:500], details=details, **facts)


def _find_files(folder: Path) -> Iterator[Path]:
    """The .safetensors files below a folder, without hidden folders; others may come and go meanwhile."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if name.endswith(".safetensors"))


def _is_listed(folder: Path, path: Path) -> bool:
    """Whether a file is offered: not if it is hidden, part of the small base, another file of a checkpoint, or PEFT's
    copy of the tuner beside it."""
    parts = path.relative_to(folder).parts
    if any(part.startswith(".") for part in parts) or path.is_relative_to(load.TINY_SD):
        return False
    if path.name == tuner_file.PEFT_FILE_NAME and any(path.with_name(n).exists() for n in tuner_file.FILE_NAMES):
        return False
    return "checkpoints" not in parts or path.name == tuner_file.FILE_NAME


def _find_preview(path: Path) -> Path | None:
    """The image next to an adapter file: of the same name, or preview.png next to the tuner of a training."""
    is_result = path.name == tuner_file.FILE_NAME
    previews = (path.with_suffix(".png"), path.with_name("preview.png"))[: 1 + is_result]
    return next((preview for preview in previews if preview.is_file()), None)


def _make_label(folder: Path, path: Path, taken) -> str:
    """A short unique name for a file, such as "anime", "hub/anime" or "anime @ step 200"."""
    parts = path.relative_to(folder).with_suffix("").parts
    parts = parts[:-1] if path.name == tuner_file.FILE_NAME and len(parts) > 1 else parts
    if len(parts) > 2 and parts[-2] == "checkpoints":
        step = parts[-1].removeprefix("step-").lstrip("0")
        parts = (*parts[:-3], f"{parts[-3]}{_CHECKPOINT}{step}")
    label, number = "/".join(parts[-2:])[:120], 2
    while label in taken:
        label, number = f"{'/'.join(parts[-2:])[:110]} ({number})", number + 1
    return label


def kind_name(kind: str) -> str:
    """A kind of tuner as people write it: "res_attn" becomes "Res-Attn"."""
    special = {"lora": "LoRA", "dora": "DoRA", "full": "Full fine-tuning",
               "res_attn_conv": "Res-Attn with conv", "res_attn_layer": "Res-Attn on layers"}  # fmt: skip
    return special.get(kind) or "-".join(part.capitalize() for part in str(kind).split("_"))
