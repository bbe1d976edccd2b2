"""How the page of `app.py` looks: its style, some lines of JavaScript, and pieces of HTML. All text is escaped here."""

import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from .files import Item, thumbnail
from .queue import Job

CSS = """
.gradio-container, .gradio-container main { width: 100% !important; }
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
#restore .icon-wrap, #add-file .icon-wrap, #pictures .icon-wrap { display: none; }
footer { display: none !important; }
.html-container { padding: 0 !important; }
.top { display: flex; align-items: baseline; gap: 10px; flex-wrap: wrap; padding: 4px 2px;
  color: var(--body-text-color-subdued); }
.top b { font-size: 1.4rem; letter-spacing: -.02em; color: var(--body-text-color); }
.top .chip { margin-left: auto; border-radius: 99px; padding: 3px 13px; font-size: .84rem; white-space: nowrap;
  background: var(--block-background-fill); border: 1px solid var(--border-color-primary); }
.top .chip i { display: inline-block; width: 8px; height: 8px; border-radius: 9px; margin-right: 8px;
  background: #3fb26f; }
.top .chip.busy i { background: var(--primary-500); animation: beat 1.2s infinite; }
@keyframes beat { 50% { opacity: .3; } }
.said { padding: 6px 2px; color: var(--body-text-color-subdued); font-size: .92rem; overflow-wrap: anywhere; }
.said.bad { color: #b3261e; background: #b3261e12; border: 1px solid #b3261e40; border-radius: 10px;
  padding: 10px 14px; }
.dark .said.bad { color: #ff9a90; }
.said ul { margin: 6px 0 0 18px; list-style: disc; }
.bar { height: 8px; border-radius: 9px; background: var(--border-color-primary); overflow: hidden; }
.bar div { height: 100%; background: var(--primary-500); border-radius: 9px; transition: width .2s; }
.sheet { display: flex; align-items: flex-end; gap: 14px; overflow-x: auto; padding: 4px 2px 10px; }
.sheet .strip { flex: 1 1 0; min-width: 150px; max-width: 420px; }
.sheet h4 { font-weight: 600; font-size: .95rem; margin: 0 0 8px; overflow-wrap: anywhere;
  color: var(--body-text-color); }
.sheet h4 small { font-weight: 400; color: var(--body-text-color-subdued); }
.sheet figure { margin: 0 0 12px; position: relative; }
.sheet img { width: 100%; border-radius: 12px; display: block; cursor: zoom-in; background: var(--border-color-primary);
  box-shadow: 0 1px 3px #0002, 0 6px 18px #0001; }
.sheet figcaption { display: flex; justify-content: space-between; padding: 5px 3px 0; font-size: .8rem;
  color: var(--body-text-color-subdued); }
.sheet figcaption a { color: var(--primary-600); text-decoration: none; }
.sheet.whole .strip { max-width: none; }
.sheet.whole figure { width: fit-content; }
.sheet.whole img { width: auto; max-width: 100%; border-radius: 8px; }
.empty { border: 1.5px dashed var(--border-color-primary); border-radius: 16px; padding: 46px 20px; text-align: center;
  color: var(--body-text-color-subdued); }
.lightbox { position: fixed; inset: 0; z-index: 9999; background: #0b0b10f0; display: flex; flex-direction: column;
  align-items: center; justify-content: center; gap: 14px; color: #eee; font: 15px system-ui, sans-serif; }
.lightbox img { height: min(84vh, 94vw); max-width: 94vw; object-fit: contain; border-radius: 8px; }
.lightbox .row { display: flex; gap: 10px; align-items: center; max-width: 94vw; flex-wrap: wrap;
  justify-content: center; }
.lightbox button, .lightbox a { background: #ffffff1c; border: 0; color: #fff; padding: 8px 16px; border-radius: 99px;
  cursor: pointer; text-decoration: none; font: inherit; }
.card { position: relative; border: 1px solid var(--border-color-primary) !important; border-radius: 14px !important;
  background: var(--block-background-fill); gap: 0 !important; overflow: visible !important; }
.card .away { position: absolute; right: 8px; top: 6px; width: auto; min-width: 28px !important;
  padding: 2px 6px !important; font-size: .78rem; font-weight: 400;
  background: none; border: 0; box-shadow: none; color: var(--body-text-color-subdued); z-index: 2; }
#add-column { border-radius: 14px; align-self: stretch; white-space: normal; font-weight: 400; }
.dice { align-self: stretch; background: var(--block-background-fill); font-weight: 400; }
.shelf { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(270px, 100%), 1fr)); gap: 14px;
  padding: 6px 2px; }
.book { border: 1px solid var(--border-color-primary); border-radius: 14px; overflow: hidden;
  background: var(--background-fill-primary); font-size: .88rem; }
.book img { width: 100%; height: 150px; object-fit: cover; object-position: 100% 9%; display: block; }
.book .blank { height: 150px; background: linear-gradient(135deg, var(--primary-100), var(--primary-300)); }
.dark .book .blank { background: linear-gradient(135deg, var(--primary-900), var(--primary-700)); }
.book.no .blank, .book.no img { filter: grayscale(1); opacity: .5; }
.book div.text { padding: 10px 13px 13px; overflow-wrap: anywhere; }
.book b { font-size: 1rem; } .book p { margin: 3px 0 0; color: var(--body-text-color-subdued); }
.book .tag { float: right; border-radius: 99px; padding: 1px 10px; font-size: .78rem; color: var(--primary-700);
  background: var(--primary-100); }
.book.no .tag { background: #b3261e18; color: #b3261e; }
.thumb { flex: 0 0 76px !important; min-width: 76px !important; }
.thumb img, .thumb .broken { width: 72px; height: 72px; object-fit: cover; border-radius: 10px; display: block; }
.thumb .broken { background: #b3261e18; color: #b3261e; font-size: .75rem; padding: 22px 8px; text-align: center; }
.pairs { max-height: 460px; overflow-y: auto !important; }
.curve { width: 100%; height: auto; display: block; }
.curve text { fill: var(--body-text-color-subdued); font: 11px system-ui, sans-serif; }
@media (max-width: 640px) {
  .gradio-container, .gradio-container main { padding: 6px !important; }
  button[role=tab] { padding: 0 9px !important; }
  .sheet { gap: 8px; } .sheet .strip { min-width: 118px; } .sheet figcaption a span { display: none; }
  .top .chip { margin-left: 0; }
}
"""

# A click on a picture opens it large, with the arrow keys for its neighbours; the listener outlives new contents.
LIGHTBOX = """
element.addEventListener('click', (event) => {
  const clicked = event.target.closest('img.shot');
  if (!clicked) return;
  const all = [...element.querySelectorAll('img.shot')];
  let at = all.indexOf(clicked);
  const box = document.createElement('div');
  box.className = 'lightbox';
  box.setAttribute('role', 'dialog');
  const make = (tag, text) => Object.assign(document.createElement(tag), {textContent: text});
  const image = document.createElement('img'), row = document.createElement('div'), title = make('span', '');
  const back = make('button', '←'), next = make('button', '→');
  const save = make('a', 'Download'), close = make('button', 'Close');
  row.className = 'row';
  row.append(...(all.length > 1 ? [back, title, next] : [title]), save, close);
  box.append(image, row);
  const show = (step) => {
    at = (at + step + all.length) % all.length;
    image.src = save.href = all[at].src;
    image.alt = title.textContent = all[at].alt;
    save.download = all[at].dataset.name;
  };
  const moves = {ArrowLeft: () => show(-1), ArrowRight: () => show(1), Escape: () => end()};
  const keys = (e) => moves[e.key] && moves[e.key]();
  const end = () => { box.remove(); document.removeEventListener('keydown', keys); };
  back.onclick = () => show(-1); next.onclick = () => show(1); close.onclick = end;
  box.onclick = (e) => { if (e.target === box) end(); };
  document.addEventListener('keydown', keys);
  document.body.append(box);
  show(0); close.focus();
});
"""


def top(base: str, side: int, doing: str, busy: bool) -> str:
    """The head of the page: what is loaded, and what the device does."""
    chip = f"<span class='chip{' busy' if busy else ''}' role='status'><i></i>{escape(doing)}</span>"
    return f"<div class='top'><b>sdtune</b><span>on {escape(base)}, {side} px</span>{chip}</div>"


def said(text: str, bad: bool = False, points: Sequence[str] = ()) -> str:
    """A line below the controls; `bad` for what went wrong, `points` as a list below it."""
    if not text:
        return ""
    listed = "".join(f"<li>{escape(p)}</li>" for p in points)
    listed = f"<ul>{listed}</ul>" if listed else ""
    attributes = "class='said bad' role='alert'" if bad else "class='said' role='status'"
    return f"<div {attributes}>{escape(text)}{listed}</div>"


def bar(text: str, done: int, total: int) -> str:
    share = 100 * done / max(1, total)
    return f"<div class='said'>{escape(text)}</div><div class='bar'><div style='width:{share:.1f}%'></div></div>"


def drawing(job: Job, ahead: int) -> str:
    """How far a drawing is, or how it ended."""
    if job.state == "waiting":
        return bar(f"waiting, {ahead} ahead of you" if ahead else "you are next", 0, 1)
    if job.state == "running":
        return bar(f"step {job.done} of {job.total}" if job.total else "getting ready", job.done, job.total)
    if job.state == "failed":
        return said(job.error, bad=True)
    if job.state == "stopped":
        return said(f"Stopped at step {job.done} of {job.total}." if job.total else "Stopped.")
    return said(f"Drawn in {job.seconds:.1f} seconds. {job.note}")


def training(job: Job, name: str, ahead: int) -> str:
    """How far a training is, or how it ended."""
    if job.state == "waiting":
        return bar(f"“{name}” waits, {ahead} ahead of you", 0, 1)
    if job.state == "failed":
        return said(job.error, bad=True)
    if job.state == "stopped":
        return said("Stopped before the first step; nothing was learned yet.")
    if job.state == "done" and job.unfinished:
        return said(f"“{name}” stopped at step {job.done} of {job.total}. What it learned is in the library.")
    if job.state == "done":
        return said(f"“{name}” is done, after {job.seconds:.0f} seconds. It is in the library.")
    if job.stopping:
        return bar(f"“{name}”: stopping after this step", job.done, job.total)
    if not job.done:
        return bar(f"“{name}”: reading the pictures and the base", 0, 1)
    loss = sum(job.losses[-20:]) / len(job.losses[-20:])
    rest = ": saving, and checking the file" if job.done == job.total else f", loss {loss:.4f}"
    return bar(f"“{name}”: step {job.done} of {job.total}{rest}", job.done, job.total)


def url(path: Path) -> str:
    """Where the page serves a file of the private folder; relative, so that it works behind any prefix."""
    return "gradio_api/file=" + quote(str(path.resolve()))


def sheet(columns: Sequence[tuple[str, Sequence[Path]]], seed: int | None = None) -> str:
    """Columns of pictures with their titles; with a seed, each picture says its own."""
    strips = []
    for title, files in columns:
        shots = []
        for i, file in enumerate(files):
            name = escape(file.name, quote=True)
            caption = "" if seed is None else f"seed {seed + i}"
            alt = escape(f"{title}, {caption}" if caption else title, quote=True)
            shots.append(
                f"<figure><img class='shot' src='{url(file)}' alt='{alt}' data-name='{name}'><figcaption>"
                f"<span>{caption}</span><a href='{url(file)}' download='{name}' title='Download this PNG with its "
                f"settings'>↓ <span>PNG</span></a></figcaption></figure>"
            )
        heading = "" if seed is None else f"<h4>{escape(title)}</h4>"
        strips.append(f"<div class='strip'>{heading}{''.join(shots)}</div>")
    return f"<div class='sheet{' whole' if seed is None else ''}'>{''.join(strips)}</div>"


def empty(text: str) -> str:
    return f"<div class='empty'>{escape(text)}</div>"


def thumb(view: str, name: str) -> str:
    """A small picture beside its caption; what cannot be shown says so."""
    return f"<img src='{view}' alt='{escape(name, quote=True)}'>" if view else "<div class='broken'>no picture</div>"


def shelf(items: Sequence[Item]) -> str:
    """The library as cards, with what each file's metadata says."""
    if not items:
        return empty("No tuner or LoRA file yet. Train one, or add one.")
    labels = {item.label for item in items}  # the checkpoints of a finished run are for Compare
    return f"<div class='shelf'>{''.join(_book(i) for i in items if i.run not in labels)}</div>"


def _book(item: Item) -> str:
    view = thumbnail(item.preview, 640)
    alt = f"preview of {escape(item.label, quote=True)}"
    image = f"<img src='{view}' alt='{alt}'>" if view else "<div class='blank'></div>"
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(item.made))
    facts = [
        f"not offered: {item.why}" if item.why else "",
        f"made on {item.base}" if item.base else "",
        f"trigger words: {item.trigger_words}" if item.trigger_words else "",
        item.details,
        f"{item.megabytes:.2f} MB, {day}",
    ]
    lines = "".join(f"<p>{escape(_cut(f, 300))}</p>" for f in facts if f)
    return (
        f"<div class='book{'' if item.fits else ' no'}'>{image}<div class='text'>"
        f"<span class='tag'>{escape(item.kind) if item.fits else 'does not fit'}</span>"
        f"<b>{escape(item.label)}</b>{lines}</div></div>"
    )


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def curve(losses: Sequence[float], total: int) -> str:
    """The loss of each step so far, and its running mean, as a drawing for the page."""
    if len(losses) < 2:
        return ""
    width, height, left, foot = 640, 200, 44, 22
    step = max(1, len(losses) // 400)
    span, mean = max(1, min(30, len(losses) // 5)), []
    for i in range(len(losses)):
        window = losses[max(0, i - span + 1) : i + 1]
        mean.append(sum(window) / len(window))
    top_loss, low = max(losses), min(losses)
    room = (top_loss - low) or 1.0

    def line(values: Sequence[float], colour: str, thick: float) -> str:
        across = [left + (width - left - 8) * (i + 1) / total for i in range(0, len(values), step)]
        down = [8 + (height - foot - 8) * (top_loss - v) / room for v in values[::step]]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down))
        return f"<polyline points='{points}' fill='none' style='stroke:{colour}' stroke-width='{thick}'/>"

    return (
        f"<svg class='curve' viewBox='0 0 {width} {height}' role='img' aria-label='loss curve'>"
        f"<text x='0' y='16'>{top_loss:.3f}</text><text x='0' y='{height - foot}'>{low:.3f}</text>"
        f"<text x='{left}' y='{height - 4}'>step 0</text>"
        f"<text x='{width - 8}' y='{height - 4}' text-anchor='end'>{total}</text>"
        f"{line(losses, 'var(--primary-200)', 1)}{line(mean, 'var(--primary-600)', 2.2)}</svg>"
    )
