"""The pictures of an evaluation's report: the grid of drawn pictures and the plot of errors."""

import statistics
from pathlib import Path

from PIL import Image

from ..inference import grids
from ..training import images
from .results import Results
from .runs import BASE
from .tasks import Task

COLOUR = "#2f6db3"


def draw_grid(results: Results) -> Image.Image:
    """A grid with a row per prompt and a column per method, the true picture last, as Figure 2 of the paper; seed 0."""
    evaluation, labels, rows = results.evaluation, [], []
    columns = [BASE, *evaluation.methods]
    side = evaluation.model.resolution
    nothing = Image.new("RGB", (side, side), "white")

    def drawn(task: Task, label: str, name: str) -> Image.Image:
        folder = results.seed_folders(task, label).get(0)
        return Image.open(folder / "drawn" / name) if folder else nothing

    for task in evaluation.tasks:
        count = len(task.test)
        for i in dict.fromkeys(count * part // 4 for part in range(4)):
            labels.append(task.test[i].caption)
            true = images.crop_to_shape(task.test[i].open(), (side, side))
            rows.append([*(drawn(task, label, f"{i:03d}.png") for label in columns), true])
        labels.append(f"{evaluation.outside_prompts[1]} (outside the style)")
        rows.append([*(drawn(task, label, "outside-001.png") for label in columns), nothing])
    return grids.make_grid(rows, [*columns, "true picture"], labels, cell=128)


def plot_curves(results: Results, path: Path) -> None:
    """Writes a plot with, per task, the similarity of validation drawings by learning rate, the validation error by
    step at the chosen one, and the difference of each method's local similarity to the reference method's."""
    from matplotlib.figure import Figure  # no pyplot: no global state

    panels = 3 if len(results.settings.rates) > 1 else 1  # a single rate is taken without validation runs
    figure = Figure(figsize=(14 if panels == 3 else 7, 4.2 * len(results.rows)), dpi=100, layout="constrained")
    grid = figure.subplots(len(results.rows), panels, squeeze=False)
    for (task, rows), (*validation, heldout) in zip(results.rows.items(), grid):
        if validation:
            _plot_validation(results, task, *validation)
        first = results.first_row(rows)
        others = [r for r in results.compared_rows(rows) if r.label != BASE and r.against(first, "similarity")]
        for i, e in enumerate(r.against(first, "similarity") for r in others):
            heldout.plot([e.low, e.high], [i, i], color=COLOUR)
            heldout.plot([e.value], [i], "o", color=COLOUR)
        heldout.axvline(0, color="#999999", linewidth=1)
        heldout.set_yticks(range(len(others)), [r.label for r in others])
        heldout.invert_yaxis()
        heldout.locator_params(axis="x", nbins=5)
        heldout.set(xlabel="local similarity, 95 % interval", title=f"{task}: difference to {results.reference}")
        for axes in (*validation, heldout):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.3)
    figure.savefig(path)


def _plot_validation(results: Results, task: str, by_rate, by_step) -> None:
    rates = set()
    for i, (name, done) in enumerate(results.done[task].items()):
        style = {"color": f"C{i % 10}", "label": name, "linestyle": "-" if i < 10 else "--"}
        found = {float(rate): run["similarity"] for rate, run in done["rates"].items() if not run["failed"]}
        rates |= found.keys()
        by_rate.plot(list(found), list(found.values()), "o", **style)
        curve = done["rates"].get(f"{done['rate']:g}", {}).get("validation", {}) if done["rate"] else {}
        by_step.plot([int(s) for s in curve], [statistics.mean(e) for e in curve.values()], **style)
    by_rate.set(xlabel="learning rate", ylabel="local similarity on validation prompts", title=task, xscale="log")
    by_rate.set_xticks(sorted(rates), [f"{rate:g}" for rate in sorted(rates)])  # each rate that was tried, and no other
    by_rate.set_xticks([], minor=True)
    by_step.set(xlabel="step", ylabel="validation error", title="at the chosen rate")
    by_rate.legend(frameon=False, fontsize=8)
