"""What `portraits.py` draws on: an SVG under construction, with one line treatment and one kind of shading.

Coordinates are those of the group that is open: 0..256 px of the picture, or units of the head's half width inside
`group(...)`. Colours are "#rrggbb" strings.
"""

import colorsys
import math
import random


def mix(colour: str, other: str, part: float) -> str:
    """`part` (0..1) of the way from `colour` to `other`."""
    pairs = zip(bytes.fromhex(colour[1:]), bytes.fromhex(other[1:]))
    return "#" + bytes(round(a + (b - a) * part) for a, b in pairs).hex()


def vary(rng: random.Random, colour: str, by: float = 1.0) -> str:
    """The colour with small random changes of hue, saturation and value."""
    h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in bytes.fromhex(colour[1:])))
    s = min(1, s * rng.uniform(1 - 0.25 * by, 1 + 0.2 * by))
    v = min(1, v * rng.uniform(1 - 0.15 * by, 1 + 0.1 * by))
    rgb = colorsys.hsv_to_rgb((h + rng.uniform(-0.02, 0.02) * by) % 1, s, v)
    return "#" + bytes(round(255 * c) for c in rgb).hex()


def smooth(points: list[tuple[float, float]], closed: bool = True) -> str:
    """A path through the points (Catmull-Rom, as cubic Bezier curves)."""
    n = len(points)

    def at(i):
        return points[i % n] if closed else points[min(max(i, 0), n - 1)]

    d = [f"M{points[0][0]:.3f},{points[0][1]:.3f}"]
    for i in range(n if closed else n - 1):
        (ax, ay), (bx, by), (cx, cy), (ex, ey) = (at(i + k) for k in (-1, 0, 1, 2))
        d.append(
            f"C{bx + (cx - ax) / 6:.3f},{by + (cy - ay) / 6:.3f} {cx - (ex - bx) / 6:.3f},{cy - (ey - by) / 6:.3f} "
            f"{cx:.3f},{cy:.3f}"
        )
    return "".join(d) + ("Z" if closed else "")


def polygon(points) -> str:
    """A closed path of straight lines."""
    return "M" + "L".join(f"{x:.3f},{y:.3f}" for x, y in points) + "Z"


def oval(x: float, y: float, rx: float, ry: float | None = None) -> str:
    """The path of an ellipse."""
    ry = rx if ry is None else ry
    return f"M{x - rx:.3f},{y:.3f}a{rx:.3f},{ry:.3f} 0 1,0 {2 * rx:.3f},0a{rx:.3f},{ry:.3f} 0 1,0 {-2 * rx:.3f},0Z"


def lock(x0: float, y0: float, x1: float, y1: float, width: float, bend: float) -> str:
    """A strand of hair: `width` wide at its root (x0, y0), pointed at (x1, y1), curved sideways by `bend`."""
    length = math.hypot(x1 - x0, y1 - y0) or 1e-6
    nx, ny = (y0 - y1) / length, (x1 - x0) / length
    mx, my = (x0 + x1) / 2 + nx * bend, (y0 + y1) / 2 + ny * bend
    a, b = (x0 - nx * width / 2, y0 - ny * width / 2), (x0 + nx * width / 2, y0 + ny * width / 2)
    c, e = (mx - nx * width / 2, my - ny * width / 2), (mx + nx * width / 2, my + ny * width / 2)
    return (
        f"M{a[0]:.3f},{a[1]:.3f}Q{c[0]:.3f},{c[1]:.3f} {x1:.3f},{y1:.3f}Q{e[0]:.3f},{e[1]:.3f} {b[0]:.3f},{b[1]:.3f}Z"
    )


class Canvas:
    """An SVG of 256 x 256 px.

    `line`: width of the outlines in px, 0 for none; `ink`: their colour, or None for a darker tone of each fill;
    `shading`: "flat", "two-tone" or "gradient"; `light`: the side that the light comes from, -1 or 1.
    """

    def __init__(self, line: float, ink: str | None, shading: str, light: int):
        self.line, self.ink, self.shading, self.light = line, ink, shading, light
        self.defs, self.body, self.unit, self.count = [], [], 1.0, 0

    def _name(self) -> str:
        self.count += 1
        return f"i{self.count}"

    def group(self, x: float, y: float, unit: float, turn: float = 0.0) -> None:
        """Opens a group with its origin at (x, y) px, `unit` px a unit, turned by `turn` degrees."""
        self.body.append(f'<g transform="translate({x:.2f} {y:.2f}) rotate({turn:.2f}) scale({unit:.3f})">')
        self.unit = unit

    def end(self) -> None:
        self.body.append("</g>")
        self.unit = 1.0

    def tone(self, colour: str, amount: float = 1.0) -> str:
        """The shadow's tone of a colour: darker, and a little towards violet."""
        return mix(colour, "#2a1a4a", 0.24 * amount)

    def warm(self, skin: str, amount: float = 1.0) -> str:
        """The shadow's tone of skin: redder rather than violet."""
        return mix(skin, "#a03040", min(1, 0.17 * amount))

    def clip(self, path: str) -> str:
        """The name of a clipping path, for `draw(..., clip=name)`."""
        name = self._name()
        self.defs.append(f'<clipPath id="{name}"><path d="{path}"/></clipPath>')
        return name

    def ramp(self, first: str, last: str, across: bool = False) -> str:
        """A linear gradient from top to bottom (or left to right), as a fill."""
        name = self._name()
        end = 'x2="1" y2="0"' if across else 'x2="0" y2="1"'
        self.defs.append(
            f'<linearGradient id="{name}" x1="0" y1="0" {end}><stop offset="0" stop-color="{first}"/>'
            f'<stop offset="1" stop-color="{last}"/></linearGradient>'
        )
        return f"url(#{name})"

    def draw(self, path: str, fill: str, opacity: float = 1.0, clip: str | None = None) -> None:
        """A plain fill without outline."""
        more = (f' fill-opacity="{opacity:.2f}"' if opacity < 1 else "") + (
            f' clip-path="url(#{clip})"' if clip else ""
        )
        self.body.append(f'<path d="{path}" fill="{fill}"{more}/>')

    def stroke(self, path: str, colour: str, width: float, clip: str | None = None, opacity: float = 1.0) -> None:
        """A line; `width` in px whatever the group's unit is."""
        more = (f' stroke-opacity="{opacity:.2f}"' if opacity < 1 else "") + (
            f' clip-path="url(#{clip})"' if clip else ""
        )
        self.body.append(
            f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width / self.unit:.4f}" '
            f'stroke-linecap="round" stroke-linejoin="round"{more}/>'
        )

    def outline(self, path: str, colour: str, width: float = 1.0, clip: str | None = None) -> None:
        """The outline of a part filled with `colour`; `width` relative to this picture's outlines."""
        if self.line:
            self.stroke(path, self.ink or mix(colour, "#20102a", 0.6), self.line * width, clip)

    def part(self, path: str, colour: str, shadow: str | None = None, width: float = 1.0) -> None:
        """A filled, shaded, outlined part; `shadow` is the path of its shaded area (clipped to the part)."""
        fill = colour
        if self.shading == "gradient":
            fill = self.ramp(mix(colour, "#ffffff", 0.12), self.tone(colour, 0.9))
        self.draw(path, fill)
        if shadow and self.shading == "two-tone":
            self.draw(shadow, self.tone(colour), clip=self.clip(path))
        if width:
            self.outline(path, colour, width)

    def skin(self, path: str, colour: str, shadow: str | None = None) -> None:
        """A part of bare skin: as `part`, with shadows of a warmer tone."""
        self.draw(path, self.ramp(colour, self.warm(colour, 0.8)) if self.shading == "gradient" else colour)
        if shadow and self.shading == "two-tone":
            self.draw(shadow, self.warm(colour), clip=self.clip(path))
        self.outline(path, colour)

    def svg(self) -> str:
        head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 256 256">'
        return f"{head}<defs>{''.join(self.defs)}</defs>{''.join(self.body)}</svg>"
