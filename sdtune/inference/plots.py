"""The plot of the training and held-out losses."""

from pathlib import Path

from ..adapters import disk


def plot_losses(path: Path, losses: list[float], heldout: dict[int, float], title: str) -> None:
    """The loss of every step with its running mean, and the held-out loss where there is one."""
    from matplotlib.figure import Figure  # no pyplot: no global state, safe in threads

    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    axes = figure.subplots()
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="#c9d7ea", linewidth=1, label="each step")
    span, mean = max(1, min(30, len(losses) // 5)), []
    for i in range(len(losses)):
        window = losses[max(0, i - span + 1) : i + 1]
        mean.append(sum(window) / len(window))
    axes.plot(steps, mean, color="#2f6db3", linewidth=2, label=f"mean of {span} steps")
    if heldout:
        axes.plot(list(heldout), list(heldout.values()), "o-", color="#d9722b", label="held-out pictures")
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)  # never over the curves
    with disk.new_file(path) as part:
        figure.savefig(part, format="png")
