"""The benchmark's report: the machine, Markdown tables, and whether the targets are met."""

import os
import platform
from pathlib import Path

import psutil
import torch

from ..adapters import tuner_file
from .candidates import BASE, FLOOR, LORA, REFERENCE, RES_ATTN

JSON_ONLY = ("name", "seconds", "checkpointing")  # columns that the tables leave out


def check_targets(parts: dict[str, list[dict]], cuda: bool) -> list[dict]:
    """Each target of speed and memory as a row: the limit, what was measured, and whether it is met.

    Args:
        parts: the rows of each part that was measured.
        cuda: whether they were measured on a GPU.
    """
    rows = []

    def add(text: str, value: float | None, limit: float, at_least: bool = False) -> None:
        met = value is not None and (value >= limit if at_least else value <= limit)
        row = {"target": text, "wanted": f"{'at least' if at_least else 'at most'} {limit:,}", "found": value}
        rows.append(row | {"answer": "not measured" if value is None else "met" if met else "NOT met"})

    def get(part: str, column: str, **where):
        """The value in the row of a part that `where` describes, or None."""
        matching = (r for r in parts.get(part, []) if all(r.get(k) == v for k, v in where.items()))
        return next(matching, {}).get(column)

    def ratio_to(name: str, part: str, column: str, **where) -> float | None:
        """The value of Res-Attn over that of another candidate."""
        own, other = (get(part, column, name=n, **where) for n in (RES_ATTN, name))
        return own / other if own is not None and other else None

    for batch in dict.fromkeys(r["batch"] for part in ("train", "memory") for r in parts.get(part, [])):
        speed, time_ = (get("train", c, batch=batch, name=RES_ATTN) for c in ("speed x reference", f"x {FLOOR}"))
        add(f"training step, batch {batch}: x reference's speed", speed, 2.0, at_least=True)
        add(f"training step, batch {batch}: x floor's time", time_, 1.1)
        # on a CPU without what has been loaded: a model that is no longer needed stays in the same memory
        kind, where = "peak" if cuda else "working", dict(what="train", batch=batch, checkpointing=False)
        memory = ratio_to(REFERENCE, "memory", kind, **where)
        add(f"training memory ({kind}), batch {batch}: x reference's", memory, 0.6)
    if cuda:
        add("fp16, batch 1, checkpointing: MB", get("memory", "whole", checkpointing=True), 4000)
    add("drawing with Res-Attn: x base's time", get("draw", f"x {BASE}", name=RES_ATTN), 1.05)
    add("drawing with Res-Attn: x time of a LoRA of equal parameters", ratio_to(LORA, "draw", "s/image"), 1.0)
    share = get("memory", "base's share", what="train", name=RES_ATTN)
    add("start-up after the imports: share of reading the base", share, 0.5, at_least=True)
    for command in ("import sdtune", "train_anime.py --help"):
        add(f"{command}: s beyond importing torch", get("imports", "beyond torch", command=command), 1.0)
    return rows


def describe_machine() -> dict:
    """What the numbers depend on; a high load at the start shows that others were using the machine."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = next((line.partition(": ")[2] for line in info.splitlines() if "model name" in line), platform.machine())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    load, threads = round(psutil.getloadavg()[0], 1), torch.get_num_threads()
    return {"device": device, "cores": os.cpu_count(), "threads": threads, "load at start": load,
            "python": platform.python_version(), **tuner_file.library_versions()}  # fmt: skip


def markdown_table(rows: list[dict]) -> str:
    """Rows as a Markdown table, without empty columns and without those that are for the JSON file alone."""
    filled = dict.fromkeys(k for row in rows for k, v in row.items() if v is not None)
    columns = [k for k in filled if k not in JSON_ONLY]
    lines = [columns, ["---"] * len(columns), *([_format(row.get(c)) for c in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _format(value) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)
