"""The Markdown tables of an evaluation's report."""

from . import intervals
from .costs import ROUNDS
from .intervals import Estimate
from .metrics import COLUMNS, Column
from .results import Results, Row
from .runs import BASE, SHUFFLED


def markdown_report(results: Results, machine: str) -> str:
    """The content of table.md: what was run, all tasks in one table, costs, and the tables of each task."""
    s, evaluation, reference = results.settings, results.evaluation, results.reference
    lines = [
        f"Base {s.base}; {s.steps} steps of batch {s.batch_size}, {s.seeds} seeds, one picture per seed and "
        f"prompt, {s.drawing_steps} drawing steps, guidance {evaluation.model.guidance:g}. {machine}.",
        "In brackets: 95 % bootstrap interval over prompts and seeds.", "",
        *(f"- **{c.title}**: {c.meaning}{('', '; more is better', '; less is better')[c.better]}" for c in COLUMNS),
        f"- **{SHUFFLED}**: {reference} trained with every picture's caption exchanged for another's; a floor",
        "- **true pictures**: the ceiling; KID and colours compare the training pictures with the held-out ones",
        "- True pictures are always the VAE's reconstructions of them: a model's pictures are decoded by the VAE, and "
        "its blur would otherwise outweigh all other differences",
        "- **lowest validation error**, **memorises** (`stopping.first_memorising_step`): on a quarter of the training "
        "pairs, in the run at the chosen rate that left these out",
    ]  # fmt: skip
    lines += ["", *_summary(results), "", *_cost_table(results)]
    for task, rows in results.rows.items():
        own = next(t for t in evaluation.tasks if t.name == task)
        first = results.first_row(rows)
        chance = f"{1 / len(own.test):.1%}"
        head = f"{len(own.train)} pairs, {len(own.test)} held-out prompts (nearest by chance: {chance})"
        lines += ["", f"## {task}: {head}", "", *_training_table(results, rows), ""]
        lines += _table(
            ["method", *(c.title for c in COLUMNS)],
            [[r.label, *(_shown(r.estimate(c.key), c.form) for c in COLUMNS)] for r in rows],
        )
        others = results.compared_rows(rows)
        if others:
            lines += ["", f"Difference to {reference}, same prompts and seeds:", ""]
            lines += _table(
                ["method", *(c.title for c in COLUMNS)],
                [[r.label, *(_verdict(r.against(first, c.key), c) for c in COLUMNS)] for r in others],
            )
            lines += ["", *_sentences(others, first)]
        failed = [f"{r.label} ({r.cost['failed']} seeds)" for r in rows if r.cost.get("failed")]
        failed += [f"{r.label} (at every rate)" for r in rows if r.cost.get("rate", 0) is None]
        if failed:
            lines += ["", f"The loss was not finite in runs of: {', '.join(failed)}; they are left out."]
    return "\n".join(lines) + "\n"


def _summary(results: Results) -> list[str]:
    """All tasks in one table: means, marked where they differ from the reference method's beyond doubt."""
    columns = [c for c in COLUMNS if c.key in ("error", "similarity", "rank")]
    marks = {"loses to": " ▲", "wins against": " ▼", "cannot be told from": ""}
    titles = ["method", "parameters", *(f"{task}: {c.title}" for task in results.rows for c in columns)]
    cells: dict[str, list[str]] = {}
    for rows in results.rows.values():
        first, others = results.first_row(rows), results.compared_rows(rows)
        for row in rows:
            own = cells.setdefault(row.label, [row.label, _number(row.cost.get("parameters"), "{:,}")])
            for column in columns:
                found = row.estimate(column.key)
                difference = row.against(first, column.key) if row in others else None
                mark = marks[intervals.outcome(difference, column.better)] if difference else ""
                own.append("–" if found is None else column.form.format(found.value) + mark)
    return [
        f"All tasks, means alone. ▲ better, ▼ worse than {results.reference} beyond doubt: the 95 % interval of the "
        "difference on the same prompts and seeds excludes 0. Of 20 equal methods one is marked by chance.", "",
        *_table(titles, list(cells.values())),
    ]  # fmt: skip


def _cost_table(results: Results) -> list[str]:
    batch, rows, cells = results.settings.batch_size, next(iter(results.rows.values())), []
    for row in (r for r in rows if r.label == BASE or results.is_method(r)):
        c = row.cost
        cells.append([
            row.label, _number(c.get("parameters"), "{:,}"), _number(c.get("file_bytes"), "{:,.0f}", 1e3),
            _number(c["peak_memory"], "{:,.0f}", 1e6), _number(c["step_seconds"], "{:.3f}"),
            _number(c["drawing_seconds"], "{:.3f}"),
        ])  # fmt: skip
    return [
        f"What each costs, alone in a process of its own with all of the machine, medians of {ROUNDS} "
        f"rounds: memory in training beyond what the imports take, the base included; a step of batch {batch}; a "
        f"picture, drawn in batches of {batch}.", "",
        *_table(["method", "trainable parameters", "file (KB)", "peak training memory (MB)", "step (s)",
                 "drawing (s)"], cells),
    ]  # fmt: skip


def _training_table(results: Results, rows: list[Row]) -> list[str]:
    cells = []
    for row in (r for r in rows if results.is_method(r)):
        c = row.cost
        rate = f"{c['rate']:g}" + (" (edge of the grid)" if c["rate_at_edge"] else "") if c.get("rate") else "–"
        cells.append([row.label, rate, _number(c["best_step"], "{}"), _number(c["memorises_after"], "{}")])
    return _table(["method", "learning rate", "lowest validation error at step", "memorises after step"], cells)


def _sentences(others: list[Row], first: Row) -> list[str]:
    """In words, where the reference method wins and where it loses, by intervals that exclude 0."""
    lines = []
    for column in (c for c in COLUMNS if c.better):
        verdicts = {"wins against": [], "loses to": [], "cannot be told from": []}
        for row in others:
            difference = row.against(first, column.key)
            if difference:
                verdicts[intervals.outcome(difference, column.better)].append(row.label)
        outcomes = "; ".join(f"{how} {', '.join(labels)}" for how, labels in verdicts.items() if labels)
        lines += [f"- {column.title}: {first.label} {outcomes}"] if outcomes else []
    return lines


def _verdict(difference: Estimate | None, column: Column) -> str:
    if difference is None:
        return "–"
    sign = column.form.replace(":", ":+")
    words = {"loses to": " better", "wins against": " worse", "cannot be told from": ""}
    word = words[intervals.outcome(difference, column.better)] if column.better else ""
    return f"{sign.format(difference.value)} ({sign.format(difference.low)} to {sign.format(difference.high)}){word}"


def _shown(found: Estimate | None, form: str) -> str:
    if found is None:
        return "–"
    return f"{form.format(found.value)} ({form.format(found.low)} to {form.format(found.high)})"


def _number(value, form: str, unit: float | None = None) -> str:
    return "–" if value is None else form.format(value / unit if unit else value)


def _table(titles: list[str], cells: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *cells)]
