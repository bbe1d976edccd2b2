"""The pieces of HTML for which Gradio has no component. All texts are escaped here."""

import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from ..check import sheet
from ..training import images
from .files import AdapterFile
from .queue import Job


def header(base: str, side: int, activity: str, busy: bool) -> str:
    """The head of the page: the loaded base, the side of its images in pixels, and what the queue does."""
    chip = f"<span class='activity{' busy' if busy else ''}' role='status'><i></i>{escape(activity)}</span>"
    return f"<div class='page-header'><b>sdtune</b><span>base: {escape(base)}, {side} px</span>{chip}</div>"


def message(text: str, error: bool = False, points: Sequence[str] = ()) -> str:
    """A message below the controls, with `points` as a list below it."""
    if not text:
        return ""
    items = "".join(f"<li>{escape(point)}</li>" for point in points)
    items = f"<ul>{items}</ul>" if items else ""
    attributes = "class='status-message error' role='alert'" if error else "class='status-message' role='status'"
    return f"<div {attributes}>{escape(text)}{items}</div>"


def progress_bar(text: str, done: int, total: int) -> str:
    """A text and a bar that is filled to done / total."""
    percent = 100 * done / max(1, total)
    bar = f"<div class='status-bar'><div style='width:{percent:.1f}%'></div></div>"
    return f"<div class='status-message'>{escape(text)}</div>{bar}"


def drawing_status(job: Job, before: int = 0) -> str:
    """The progress of a drawing, or how it ended; `before` is the number of jobs that run before it."""
    if job.state == "waiting":
        return progress_bar(_waiting_text("Waiting", before), 0, 1)
    if job.state == "running":
        return progress_bar(f"Step {job.done} of {job.total}" if job.total else "Loading", job.done, job.total)
    if job.state == "failed":
        return message(job.error, error=True)
    if job.state == "stopped":
        return message(f"Stopped at step {job.done} of {job.total}." if job.total else "Stopped.")
    return message(f"Drawn in {job.seconds:.1f} seconds. {job.note}")


def training_status(job: Job, name: str, before: int = 0) -> str:
    """The progress of a training, or how it ended; `before` is the number of jobs that run before it."""
    if job.state == "waiting":
        return progress_bar(_waiting_text(f"“{name}” is waiting", before), 0, 1)
    if job.state == "failed":
        return message(job.error, error=True)
    if job.state in ("done", "stopped") and job.resumable:  # "stopped" if it was so before the page was started
        return message(f"“{name}” was stopped at step {job.done} of {job.total}. Its last checkpoint is in Files.")
    if job.state == "stopped":
        return message("Stopped before the first step, so there is no tuner.")
    if job.state == "done":
        return message(f"“{name}” is trained, after {job.seconds:.0f} seconds. The tuner is in Files.")
    if job.stop_requested:
        return progress_bar(f"“{name}”: stopping after this step", job.done, job.total)
    if not job.done:
        return progress_bar(f"“{name}”: reading the images and loading the base", 0, 1)
    loss = sum(job.losses[-20:]) / len(job.losses[-20:])
    rest = ": saving and checking the file" if job.done == job.total else f", loss {loss:.4f}"
    return progress_bar(f"“{name}”: step {job.done} of {job.total}{rest}", job.done, job.total)


def _waiting_text(text: str, before: int) -> str:
    return f"{text}; {before} job{'s' if before > 1 else ''} before yours" if before else f"{text}; yours is next"


def file_url(path: Path) -> str:
    """The URL of a file in the image folder. It is relative, so it also works behind a proxy with a prefix."""
    return "gradio_api/file=" + quote(str(path.resolve()))


def image_columns(columns: Sequence[tuple[str, Sequence[Path]]], seed: int | None = None) -> str:
    """Columns of images with their titles; with a seed, image i of a column is labelled "seed {seed + i}".

    Without a seed, the images are shown without titles, as for a grid, which has its own.
    """
    parts = []
    for title, files in columns:
        figures = []
        for i, file in enumerate(files):
            name = escape(file.name, quote=True)
            caption = "" if seed is None else f"seed {seed + i}"
            alt = escape(f"{title}, {caption}" if caption else title, quote=True)
            figures.append(
                f"<figure><img class='drawn' src='{file_url(file)}' alt='{alt}' data-name='{name}'><figcaption>"
                f"<span>{caption}</span><a href='{file_url(file)}' download='{name}' title='Download this PNG with its "
                f"settings'>↓ <span>PNG</span></a></figcaption></figure>"
            )
        heading = "" if seed is None else f"<h4>{_breakable(title)}</h4>"
        parts.append(f"<div class='image-column'>{heading}{''.join(figures)}</div>")
    return f"<div class='image-columns{' one-grid' if seed is None else ''}'>{''.join(parts)}</div>"


def empty_result(text: str) -> str:
    """A frame in the place of a result that is not there yet."""
    return f"<div class='empty-result'>{escape(text)}</div>"


def caption_thumbnail(path: Path) -> str:
    """The small image next to its caption; a file that is no image says so."""
    url = thumbnail_url(path, 144)
    return f"<img src='{url}' alt='{escape(path.name, quote=True)}'>" if url else "<div class='broken'>no image</div>"


def thumbnail_url(path: Path | None, side: int) -> str:
    """An image of at most side x side pixels as a JPEG data URL; "" if the file is missing or no image.

    The image is decoded and encoded again, so nothing else in the file reaches the browser.
    """
    try:
        return sheet.image_url(images.open_image(path), side)
    except Exception:  # decoders raise many kinds of errors on damaged files
        return ""


def picture_sheet(lines: Sequence[str], cards: Sequence[sheet.Card]) -> str:
    """Sentences about all pictures, and a card for each, those first that are worth a look."""
    points = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<div class='picture-sheet'><ul>{points}</ul>{sheet.cards_html(cards)}</div>"


def recommended_step(name: str, reason: str, label: str | None) -> str:
    """The recommended step of a training, with the reason.

    Args:
        label: of its tuner in Files, or None for the base or a file that is gone.
    """
    where = f" In Draw and Grid its tuner is “{escape(label)}”." if label else ""
    text = f"<b>Recommended for “{escape(name)}”:</b> {escape(reason)}.{where} All steps are drawn below."
    return f"<div class='status-message recommended' role='status'>{text}</div>"


def steps_sheet(
    sheet: Path, titles: Sequence[str], rows: Sequence[Sequence[str]], meanings: Sequence[tuple[str, str]]
) -> str:
    """The sheet of all steps of a training, and a table of their scores with what each of them means."""
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    points = "".join(f"<li><b>{escape(title)}</b>: {escape(meaning)}</li>" for title, meaning in meanings)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class='steps-sheet'>{image_columns([('all steps', [sheet])])}{table}<ul>{points}</ul></div>"


def file_cards(files: Sequence[AdapterFile]) -> str:
    """A card for each adapter file. The checkpoints of a run are left out if its finished tuner is there."""
    if not files:
        return empty_result("There is no tuner or LoRA file yet. Train one, or add one above.")
    labels = {file.label for file in files}
    return f"<div class='file-cards'>{''.join(_file_card(file) for file in files if file.run not in labels)}</div>"


def _file_card(file: AdapterFile) -> str:
    url = thumbnail_url(file.preview, 640)
    alt = f"preview of {escape(file.label, quote=True)}"
    image = f"<img src='{url}' alt='{alt}'>" if url else "<div class='blank'></div>"
    date = time.strftime("%Y-%m-%d %H:%M", time.localtime(file.modified))
    facts = [
        f"Cannot be used here: {file.problem}" if file.problem else "",
        f"base: {file.base}" if file.base else "",
        f"trigger words: {file.trigger_words}" if file.trigger_words else "",
        file.details,
        f"{file.megabytes:.2f} MB, {date}",
    ]
    lines = "".join(f"<p>{escape(_shorten(fact, 300))}</p>" for fact in facts if fact)
    return (
        f"<div class='file-card{'' if file.fits else ' unusable'}'>{image}<div class='text'>"
        f"<span class='tag'>{escape(file.kind) if file.fits else 'does not fit'}</span>"
        f"<b>{_breakable(file.label)}</b>{lines}</div></div>"
    )


def _breakable(name: str) -> str:
    """A name as HTML in which a line may break after each underscore."""
    return escape(name).replace("_", "_<wbr>")


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def loss_curve(losses: Sequence[float], total: int) -> str:
    """The loss of each step so far and its running mean, as an SVG whose x axis ends at `total` steps."""
    if len(losses) < 2:
        return ""
    width, height, left, bottom = 640, 200, 44, 22
    stride = max(1, len(losses) // 400)
    window, means = max(1, min(30, len(losses) // 5)), []
    for i in range(len(losses)):
        recent = losses[max(0, i - window + 1) : i + 1]
        means.append(sum(recent) / len(recent))
    largest, smallest = max(losses), min(losses)
    span = (largest - smallest) or 1.0

    def line(values: Sequence[float], color: str, stroke: float) -> str:
        xs = [left + (width - left - 8) * (i + 1) / total for i in range(0, len(values), stride)]
        ys = [8 + (height - bottom - 8) * (largest - value) / span for value in values[::stride]]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys))
        return f"<polyline points='{points}' fill='none' style='stroke:{color}' stroke-width='{stroke}'/>"

    return (
        f"<svg class='loss-curve' viewBox='0 0 {width} {height}' role='img' aria-label='loss curve'>"
        f"<text x='0' y='16'>{largest:.3f}</text><text x='0' y='{height - bottom}'>{smallest:.3f}</text>"
        f"<text x='{left}' y='{height - 4}'>step 0</text>"
        f"<text x='{width - 8}' y='{height - 4}' text-anchor='end'>{total}</text>"
        f"{line(losses, 'var(--primary-200)', 1)}{line(means, 'var(--primary-600)', 2.2)}</svg>"
    )
