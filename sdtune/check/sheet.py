"""A page of thumbnails with a sentence for each: HTML that needs no other file and nothing from the internet."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from ..adapters import disk

THUMBNAIL_SIDE = 224
STYLE = """
.picture-cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: 14px; }
.picture-card { border: 1px solid #8884; border-radius: 12px; padding: 10px; overflow-wrap: anywhere; }
.picture-card.noted { border-color: #d9722b; box-shadow: inset 3px 0 0 #d9722b; }
.picture-card img { width: 100%; height: 170px; object-fit: contain; display: block; }
.picture-card b { display: block; margin: 8px 0 3px; font-size: .9rem; }
.picture-card p { margin: 0; font-size: .88rem; line-height: 1.4; }
.picture-card svg { width: 100%; height: 34px; display: block; margin-top: 6px; }
"""
_PAGE_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 24px auto; max-width: 1180px; padding: 0 20px;
  background: Canvas; color: CanvasText; color-scheme: light dark; }
h1 { font-size: 1.4rem; } li { margin: 3px 0; }
"""


@dataclass(frozen=True)
class Card:
    """A picture of the page.

    Attributes:
        image: the picture, at least as large as its thumbnail.
        title: its name.
        text: the sentence about it.
        noted: whether the sentence is a reason to look at the picture.
        curve: values that are drawn as a line from left to right; none if there are fewer than two.
    """

    image: Image.Image
    title: str
    text: str
    noted: bool
    curve: Sequence[float] = ()


def image_url(image: Image.Image, side: int) -> str:
    """An image of at most side x side pixels as a JPEG data URL; nothing else of its file is in it."""
    small, jpeg = image.convert("RGB"), io.BytesIO()
    small.thumbnail((side, side))
    small.save(jpeg, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()


def cards_html(cards: Sequence[Card]) -> str:
    """The cards as HTML, for a page that has `STYLE`; those that are noted come first."""
    ordered = sorted(cards, key=lambda card: not card.noted)
    return f"<div class='picture-cards'>{''.join(map(_card_html, ordered))}</div>"


def _card_html(card: Card) -> str:
    title = escape(card.title, quote=True)
    return (
        f"<div class='picture-card{' noted' if card.noted else ''}'>"
        f"<img src='{image_url(card.image, THUMBNAIL_SIDE)}' alt='{title}'>"
        f"<b>{title}</b><p>{escape(card.text)}</p>{_curve_html(card.curve)}</div>"
    )


def _curve_html(values: Sequence[float]) -> str:
    if len(values) < 2:
        return ""
    low, span = min(values), (max(values) - min(values)) or 1.0
    points = " ".join(
        f"{100 * i / (len(values) - 1):.1f},{29 - 26 * (value - low) / span:.1f}" for i, value in enumerate(values)
    )
    return (
        "<svg viewBox='0 0 100 32' preserveAspectRatio='none' role='img' aria-label='loss over the run'>"
        f"<polyline points='{points}' fill='none' stroke='#2f6db3' stroke-width='1.5'/></svg>"
    )


def write_page(path: Path, title: str, lines: Sequence[str], cards: Sequence[Card]) -> None:
    """Writes the page.

    Args:
        lines: sentences about all pictures, above them.
    """
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    page = (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{escape(title)}</title>"
        f"<meta name='viewport' content='width=device-width'><style>{_PAGE_STYLE}{STYLE}</style>"
        f"<h1>{escape(title)}</h1><ul>{items}</ul>{cards_html(cards)}</html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk.new_file(path) as part:
        part.write_text(page, encoding="utf-8")
