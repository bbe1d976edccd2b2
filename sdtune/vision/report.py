"""What a command leaves: table.md, accuracy.png, and for each method a picture of its mistakes."""

import math
import statistics
from collections import defaultdict
from pathlib import Path

import torch

from ..adapters import tuner_file
from ..evaluation.intervals import Estimate, Statistic, estimate, mean
from ..inference import grids
from .data import Data
from .methods import PAPER_PARAMETERS, parse_method


def _statistics(results: dict, data: str, method: str) -> dict[int, Statistic]:
    """Seed -> the share of test pictures that the run got right."""
    found = {}
    for key, run in results["runs"].items():
        if key.startswith(f"{data}/{method}/seed-") and "correct" in run:
            found[int(key.rpartition("-")[2])] = mean(torch.tensor([c == "1" for c in run["correct"]]))
    return found


def _combine(estimates: list[Estimate]) -> Estimate:
    """The mean over data sets, whose test pictures have nothing in common."""
    value = statistics.mean(e.value for e in estimates)
    half = math.sqrt(sum(((e.high - e.low) / 2) ** 2 for e in estimates)) / len(estimates)
    return Estimate(value, value - half, value + half)


def accuracies(results: dict, methods: list[str], data: list[str]) -> dict[tuple[str, str], Estimate]:
    """(data set, method) -> mean accuracy with its 95 % interval over test pictures and seeds."""
    found = {(d, m): list(_statistics(results, d, m).values()) for d in data for m in methods}
    return {pair: estimate(s) for pair, s in found.items() if s}


def differences(results: dict, reference: str, methods: list[str], data: list[str]) -> dict[str, Estimate]:
    """Method -> its mean accuracy minus the reference's over all data sets, on the same test pictures and seeds."""
    found = {}
    for method in methods:
        each = []
        for name in data:
            theirs, ours = _statistics(results, name, method), _statistics(results, name, reference)
            seeds = sorted(theirs.keys() & ours.keys())
            if seeds:
                each.append(estimate([theirs[s] - ours[s] for s in seeds]))
        if method != reference and len(each) == len(data):
            found[method] = _combine(each)
    return found


def markdown(results: dict, methods: list[str], data: list[str]) -> str:
    """The content of table.md."""
    s, known = results["settings"], accuracies(results, methods, data)
    seeds = {d: max((len(_statistics(results, d, m)) for m in methods), default=0) for d in data}
    size = f"{s['image_size']} px, " if s["image_size"] else ""
    layers = f"first {s['layers']} blocks, " if s["layers"] else ""
    base = s["base"] if s["base"].count("/") == 1 else Path(s["base"]).name
    lines = [
        f"Base {base}, {layers}{size}{s['epochs']} epochs of batch {s['batch_size']}, mixed precision "
        f"{s['mixed_precision']}, augmentation {s['augment']}; accuracy in percent, in brackets the 95 % bootstrap "
        "interval over test pictures and seeds.", "",
        "; ".join(_describe(d, results["data"][d], seeds[d]) for d in data) + ".", "",
        "Parameters in thousands, without and with the head (mean over the data sets). Memory is what training needs "
        "beyond the weights of the base: what autograd saves, gradients, AdamW. The paper's column is its Param. on "
        "ViT-B/16 as printed, in millions; it is no result of ours.", "",
    ]  # fmt: skip
    titles = ["method", *data, *(["mean"] if len(data) > 1 else []), "parameters (k)", "with head (k)", "memory (MB)",
              "seconds", "rate", "paper: Param. (M)"]  # fmt: skip
    lines += [f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}"]
    for method in methods:
        runs = [r for k, r in results["runs"].items() if k.split("/")[-2] == method and k.rsplit("/", 2)[0] in data and
                "correct" in r]  # fmt: skip
        if not runs:
            continue
        cells = [_percent(known.get((d, method))) for d in data]
        if len(data) > 1:
            complete = all((d, method) in known for d in data)
            cells.append(_percent(_combine([known[d, method] for d in data])) if complete else "–")
        average = lambda key: statistics.mean(r[key] for r in runs)  # noqa: B023, E731
        cells += [
            f"{average('parameters') / 1e3:,.1f}", f"{(average('parameters') + average('head_parameters')) / 1e3:,.1f}",
            f"{average('memory') / 1e6:,.1f}", f"{average('seconds'):.1f}",
            ", ".join(f"{r:g}" for r in sorted({r["rate"] for r in runs})),
            f"{PAPER_PARAMETERS[method]:.2f}" if method in PAPER_PARAMETERS else "–",
        ]  # fmt: skip
        lines.append(f"| {method} | {' | '.join(cells)} |")
    failed = [k for k, r in results["runs"].items() if "failed" in r]
    if failed:
        lines += ["", f"The loss was not finite in: {', '.join(failed)}; these runs are left out."]
    return "\n".join([*lines, "", *verdict(results, methods, data)]) + "\n"


def verdict(results: dict, methods: list[str], data: list[str]) -> list[str]:
    """In words, where the first Res-Attn of the methods stands, by intervals of differences on the same pictures."""
    reference = next((m for m in methods if parse_method(m).config.kind == "res_attn"), None)
    found = differences(results, reference, methods, data) if reference else {}
    if not found:
        return []
    groups = defaultdict(list)
    for method, e in found.items():
        group = "better than" if e.low > 0 else "worse than" if e.high < 0 else "not told from"
        groups[group].append(f"{method} ({100 * e.value:+.1f}, {100 * e.low:+.1f} to {100 * e.high:+.1f})")
    return [
        f"Mean accuracy over {_plural(len(data), 'data set')}, in points, minus that of {reference}, on the same "
        "pictures and seeds, with 95 % intervals:", "",
        *(f"- {group} {reference}: {', '.join(of)}" for group, of in groups.items()),
    ]  # fmt: skip


def _describe(name: str, own: dict, seeds: int) -> str:
    return (
        f"{name}: {own['train'] + own['val']} training pictures, {own['test']} test, {len(own['classes'])} classes, "
        f"{_plural(seeds, 'seed')}"
    )


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def _percent(e: Estimate | None) -> str:
    return "–" if e is None else f"{100 * e.value:.1f} ({100 * e.low:.1f} to {100 * e.high:.1f})"


def plot(results: dict, methods: list[str], data: list[str], path: Path) -> None:
    """Writes accuracy against trained parameters, a panel per data set, and the mean last."""
    from matplotlib.figure import Figure  # no pyplot: no global state

    known = accuracies(results, methods, data)
    panels = {d: {m: known[d, m] for m in methods if (d, m) in known} for d in data}
    if len(data) > 1:
        panels["mean"] = {
            m: _combine([panels[d][m] for d in data]) for m in methods if all(m in panels[d] for d in data)
        }
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 4 * rows), dpi=90, layout="constrained")
    for axes, (name, own) in zip(figure.subplots(rows, columns, squeeze=False).flat, panels.items()):
        points = {}
        for method, e in own.items():
            runs = [r for k, r in results["runs"].items() if k.split("/")[-2] == method and "correct" in r
                    and (name == "mean" or k.startswith(f"{name}/"))]  # fmt: skip
            x = statistics.mean(r["parameters"] + r["head_parameters"] for r in runs)
            colour = "#c8442c" if method.startswith("res_attn") else "#2f6db3"
            axes.plot([x, x], [100 * e.low, 100 * e.high], color=colour, alpha=0.5)
            axes.plot([x], [100 * e.value], "o", color=colour, markersize=4)
            points[method] = x, 100 * e.value, colour
        axes.set(xscale="log", title=name, xlabel="trained parameters, with the head", ylabel="accuracy (%)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        _label_points(axes, points)
    for axes in figure.axes[len(panels) :]:
        axes.set_visible(False)
    with tuner_file.disk.new_file(path) as part:
        figure.savefig(part, format="png")


def _label_points(axes, points: dict[str, tuple[float, float, str]], gap: float = 0.055) -> None:
    """Writes the names of points (x, y, colour) to the right of the axes, apart from each other, with a line to each.

    Args:
        gap: least distance of two names, as a share of the height.
    """
    if not points:  # no run was finite
        return
    low, high = axes.get_ylim()
    names = sorted(points, key=lambda name: points[name][1])
    heights = [(points[name][1] - low) / (high - low) for name in names]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    heights[-1] = min(heights[-1], 1.0)
    for i in reversed(range(len(heights) - 1)):
        heights[i] = min(heights[i], heights[i + 1] - gap)
    for name, height in zip(names, heights):
        x, y, colour = points[name]
        axes.annotate(
            name, (x, y), xytext=(1.03, height), textcoords="axes fraction", fontsize=8, color=colour, va="center",
            annotation_clip=False, arrowprops=dict(arrowstyle="-", color=colour, alpha=0.25, linewidth=0.7),
        )  # fmt: skip


def draw_mistakes(path: Path, data: Data, predictions: list[int], columns: int = 6) -> None:
    """Writes the test pictures that were taken for another class, a row per class; the classes with most mistakes."""
    wrong = defaultdict(list)
    for i, (found, true) in enumerate(zip(predictions, data.test.labels)):
        if found != true:
            wrong[true].append((i, data.classes[found]))
    if not wrong:
        return
    worst = sorted(wrong, key=lambda c: -len(wrong[c]))[:8]
    columns = min(columns, max(len(wrong[c]) for c in worst))
    rows, labels = [], []
    for c in worst:
        shown = wrong[c][:columns]
        pictures = [data.test.open(i) for i, _ in shown]
        rows.append(pictures)
        labels.append(f"{data.classes[c]}, {len(wrong[c])} wrong, taken for {', '.join(name for _, name in shown)}")
    grids.write_png(grids.make_grid(rows, [str(i + 1) for i in range(columns)], labels, cell=96), path)


def write(output: Path, results: dict, methods: list[str], data: list[str]) -> None:
    """Writes table.md and accuracy.png into the output folder, and prints the table."""
    text = markdown(results, methods, data)
    tuner_file.write_text(output / "table.md", text)
    plot(results, methods, data, output / "accuracy.png")
    print(f"\n{text}\nwritten: {output / 'table.md'}, {output / 'accuracy.png'}, {output / 'results.json'}")
