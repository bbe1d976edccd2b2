"""The building blocks of draw.py: colours, shapes, hair and face. The parts return pieces of SVG text.

A character is drawn in its own coordinates: (0, 0) lies between the eyes, the chin is near y = 97, the top of the
hair near y = -156 and the shoulders near y = 140. Light falls from the upper left.
"""

import math

import numpy as np

INK = "#3a2340"
SKIN, SKIN_SHADE, SKIN_LINE = "#ffe6d8", "#f4b9a8", "#a8584f"
HAIR = {  # base, shade, shine
    "blue": ("#5b9df0", "#3b6acb", "#c9e9ff"),
    "pink": ("#ff9fc0", "#e2679b", "#ffe3ee"),
    "black": ("#4a4668", "#2e2a48", "#9f9ccb"),
    "blonde": ("#ffd978", "#e8a546", "#fff6d0"),
    "red": ("#e9584f", "#b52f45", "#ffb79f"),
    "silver": ("#dfe3f2", "#a9b0d3", "#ffffff"),
    "green": ("#67c79a", "#36936f", "#d2f7d8"),
    "purple": ("#a77be0", "#7450b8", "#e5d0ff"),
    "brown": ("#a8714f", "#7b4a38", "#e6b98c"),
}
EYES = {
    "blue": "#2f86e8", "green": "#2fae6c", "brown": "#a5652d",
    "red": "#dc3b4a", "purple": "#8b4fd8", "golden": "#eda41f",
}  # fmt: skip


# --- colours, paths and strokes ---------------------------------------------------------------------------------------


def mix(a, b, t):
    """The colour a share t of the way from a to b."""
    return "#" + "".join(f"{round(int(a[i : i + 2], 16) * (1 - t) + int(b[i : i + 2], 16) * t):02x}" for i in (1, 3, 5))


def line_of(colour):
    """The outline colour that goes with a fill."""
    return mix(colour, "#2a1338", 0.62)


def path(d, fill="none", line=None, width=3.0, extra=""):
    stroke = f' stroke="{line}" stroke-width="{width}" stroke-linejoin="round" stroke-linecap="round"' if line else ""
    return f'<path d="{d}" fill="{fill}"{stroke} {extra}/>'


def cloth(d, colour, width=3.0):
    return path(d, colour, line_of(colour), width)


def ellipse(x, y, rx, ry, fill, extra=""):
    return f'<ellipse cx="{x:.1f}" cy="{y:.1f}" rx="{rx:.1f}" ry="{ry:.1f}" fill="{fill}" {extra}/>'


def group(content, transform="", extra=""):
    return f'<g transform="{transform}" {extra}>{content}</g>' if transform else f"<g {extra}>{content}</g>"


def mirror(content):
    """The content together with its mirror image about x = 0."""
    return content + group(content, "scale(-1 1)")


def gradient(name, *colours, x2=0, y2=1):
    stops = "".join(f'<stop offset="{i / (len(colours) - 1):.2f}" stop-color="{c}"/>' for i, c in enumerate(colours))
    return f'<linearGradient id="{name}" x1="0" y1="0" x2="{x2}" y2="{y2}">{stops}</linearGradient>'


def clip(name, d):
    return f'<clipPath id="{name}"><path d="{d}"/></clipPath>'


def polygon(points):
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + "Z"


def spline(points, steps=8):
    """A smooth (Catmull-Rom) curve through the points."""
    p = np.array(points, float)
    p = np.vstack([2 * p[0] - p[1], p, 2 * p[-1] - p[-2]])
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]
    parts = [
        0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
        for a, b, c, d in zip(p, p[1:], p[2:], p[3:], strict=False)
    ]
    return np.vstack([*parts, p[-2:-1]])


def ribbon(points):
    """The centre line and the two edges of a band through (x, y, width) points; the left edge comes first."""
    s = spline(points)
    way = np.gradient(s[:, :2], axis=0)
    normal = np.stack([-way[:, 1], way[:, 0]], 1) / (np.linalg.norm(way, axis=1, keepdims=True) + 1e-6)
    half = normal * np.maximum(s[:, 2:], 0) / 2
    one, two = s[:, :2] - half, s[:, :2] + half
    if one[:, 0].mean() > two[:, 0].mean():
        one, two = two, one
    return s[:, :2], one, two


def band(points):
    """The closed outline of a ribbon."""
    _, one, two = ribbon(points)
    return polygon([*one, *two[::-1]])


def star(x, y, r, fill, points=4, inner=0.28, extra=""):
    turn = [(-math.pi / 2 + math.pi * i / points, r if i % 2 == 0 else r * inner) for i in range(2 * points)]
    return path(polygon([(x + q * math.cos(a), y + q * math.sin(a)) for a, q in turn]), fill, extra=extra)


# --- hair -------------------------------------------------------------------------------------------------------------


def locks(strands, colours, shine=True, cap=""):
    """Draws pointed strands of hair, (x, y, width) lists, with one outline around all and cel shading on each."""
    base, shade, light = colours
    outer, inner = line_of(shade), mix(shade, line_of(shade), 0.45)
    shapes = [ribbon(s) for s in strands]
    outlines = [polygon([*one, *two[::-1]]) for _, one, two in shapes]
    name = "hair" + base[1:] + shade[1:]
    out = (
        f'<linearGradient id="{name}" gradientUnits="userSpaceOnUse" x1="0" y1="-150" x2="0" y2="130">'
        f'<stop stop-color="{mix(base, shade, 0.3)}"/><stop offset="0.3" stop-color="{base}"/>'
        f'<stop offset="1" stop-color="{mix(base, light, 0.3)}"/></linearGradient>'
    )
    out += path(cap + "".join(outlines), outer, outer, 6.5)
    if cap:
        out += path(cap, f"url(#{name})")
    for (mid, one, two), d in zip(shapes, outlines, strict=True):
        out += path(d, f"url(#{name})", inner, 1.6)
        t = np.linspace(0, 1, len(mid))[:, None]
        out += path(polygon([*two, *(two + (one - two) * 0.5 * np.clip(t * 1.6 - 0.35, 0, 1))[::-1]]), shade)
        ring = -98 + (mid[:, 0] / 110) ** 2 * 40
        near = np.flatnonzero(np.abs(mid[:, 1] - ring) < 19)
        if shine and len(near) > 2:
            k = np.sin(np.linspace(0, math.pi, len(near)))[:, None] * 0.36
            m, w = mid[near], (one - two)[near]
            out += path(polygon([*(m + w * k), *(m - w * k * 0.7)[::-1]]), light)
    return out


def flip(strands):
    return [[(-x, y, w) for x, y, w in s] for s in strands]


def both(strands):
    return strands + flip(strands)


CAP = "M-114 12C-126 -95 -74 -157 0 -157C74 -157 126 -95 114 12L101 -12C98 -58 60 -88 0 -88C-60 -88 -98 -58 -101 -12Z"
# fringes: (tip x, tip y, width, sideways bend); drawn in order, so that the last lie on top
FRINGES = {
    "classic": [(-92, 8, 40, -4), (92, 8, 40, 4), (-66, -14, 44, 4), (66, -14, 44, -4), (-36, -24, 42, 8),
                (38, -24, 42, -8), (2, 6, 44, 6)],
    "blunt": [(-90, -6, 42, 0), (90, -6, 42, 0), (-64, -28, 36, 0), (64, -28, 36, 0), (-38, -31, 34, 0),
              (38, -31, 34, 0), (-13, -30, 34, 0), (13, -31, 34, 0)],
    "swept": [(-96, 4, 40, -6), (-76, -22, 36, -10), (96, 14, 44, 2), (72, -2, 48, 14), (-48, -36, 38, -14),
              (42, -14, 52, 22), (6, -22, 50, 24)],
    "parted": [(-98, 18, 42, -4), (98, 18, 42, 4), (-80, -6, 48, -12), (80, -6, 48, 12), (-48, -32, 46, -26),
               (48, -32, 46, 26)],
    "spiky": [(-98, 6, 38, 4), (98, 6, 38, -4), (-72, -10, 42, 10), (76, -14, 42, 6), (-46, -26, 40, 14),
              (46, -20, 40, 12), (-16, -8, 40, 14), (16, -28, 36, 10)],
}  # fmt: skip


def fringe_strands(style, turn):
    """The strands of the fringe; they all leave the crown and follow the skull down."""
    crown = {"swept": -34, "spiky": -8}.get(style, 0) + 14 * turn
    tip = 22 if style == "blunt" else 0
    strands = []
    for x, y, w, bend in FRINGES[style]:
        end, x = x + bend + 12 * turn, x + 9 * turn
        strands.append([
            (crown + (x - crown) * 0.2, -146, w * 0.16), (crown * 0.35 + x * 0.64, -121, w * 0.8),
            (x * 0.93, -82, w), (x + bend * 0.2, -82 + (y + 82) * 0.55, w * 0.85), (end, y, tip if abs(x) < 80 else 0),
        ])  # fmt: skip
    return strands


def side_strands(style, boy):
    """The strands that frame the cheeks."""
    if boy:
        return both([[(82, -108, 4), (106, -44, 34), (109, 8, 26), (100, 46, 0)]])
    if style == "bob":
        return both([[(80, -112, 4), (108, -34, 42), (114, 40, 42), (96, 84, 26), (70, 104, 0)]])
    end = {"long": 205, "wavy": 96}.get(style, 118)
    return both([
        [(82, -110, 4), (108, -34, 34), (110, 30, 30), (106, (30 + end) / 2, 22), (98, end, 0)],
        [(80, -100, 4), (100, -40, 24), (98, 10, 18), (92, 62, 0)],
    ])  # fmt: skip


def back_hair(style, colours):
    """Hair behind the body."""
    base, shade, light = colours
    deep = (mix(base, shade, 0.75), mix(shade, INK, 0.25), light)
    full = [[(0, -134, 70), (0, -40, 232), (0, 60, 226), (0, 150, 220), (0, 240, 190)]]
    if style == "long":
        tails = [[(40, -130, 10), (102, -50, 60), (124, 50, 70), (134, 160, 62), (148, 262, 0)],
                 [(60, -60, 60), (92, 60, 66), (100, 170, 60), (92, 270, 0)]]  # fmt: skip
        return locks(full, deep, False) + locks(both(tails), (mix(base, shade, 0.3), shade, light), False)
    if style == "wavy":
        tails = [[(40, -130, 10), (108, -60, 58), (126, 10, 70), (160, 70, 66), (140, 130, 66), (168, 190, 56),
                  (146, 262, 0)],
                 [(60, -60, 60), (108, 20, 66), (116, 90, 60), (104, 150, 62), (120, 205, 50),
                  (96, 268, 0)]]  # fmt: skip
        return locks(full, deep, False) + locks(both(tails), (mix(base, shade, 0.2), shade, light), False)
    if style == "bob":
        ends = [[(40, -130, 10), (106, -50, 58), (122, 30, 64), (112, 84, 42), (80, 118, 0)]]
        return locks([[(0, -134, 70), (0, 0, 236), (0, 70, 224), (0, 100, 190)]], deep, False) + locks(
            both(ends), (mix(base, shade, 0.3), shade, light), False
        )
    if style == "twin tails":
        tail = [
            [(104, -104, 26), (146, -96, 62), (180, -20, 74), (186, 70, 62), (168, 150, 40), (176, 205, 0)],
            [(104, -100, 20), (138, -70, 44), (158, 10, 46), (150, 90, 38), (132, 158, 0)],
        ]
        return locks(both(tail), (base, shade, light), False) + locks(
            [[(0, -134, 70), (0, -20, 226), (0, 40, 200), (0, 80, 120)]], deep, False
        )
    if style == "ponytail":
        tail = [
            [(40, -140, 30), (104, -172, 62), (168, -120, 78), (186, -20, 74), (170, 80, 56), (186, 160, 0)],
            [(50, -136, 24), (108, -138, 46), (146, -70, 52), (150, 20, 44), (136, 104, 0)],
        ]
        return locks(tail, (base, shade, light), False) + locks(
            [[(0, -134, 70), (0, -20, 226), (0, 40, 190), (0, 80, 110)]], deep, False
        )
    if style == "braids":
        return locks([[(0, -134, 70), (0, -20, 230), (0, 50, 206), (0, 84, 160), (0, 106, 40)]], deep, False)
    nape = [(0, -134, 70), (0, -20, 220), (0, 40, 186), (0, 76, 120), (0, 90, 30)]
    return locks([nape], deep, False) + locks(spikes(style, 100, 180), deep, False)


# tufts: (degrees from the top, length, sideways bend in degrees)
TUFTS = {
    "spiky": [(-150, 140, -8), (150, 140, 8), (-128, 160, -6), (128, 160, 6), (-106, 176, -5), (106, 176, 5),
              (-83, 172, -8), (83, 176, 8), (-60, 186, 4), (62, 182, -2), (-38, 168, -8), (40, 174, 6), (20, 158, 8),
              (-16, 178, 6)],
    "tousled": [(-144, 130, 10), (144, 130, -10), (-118, 140, -12), (118, 140, 12), (-92, 146, -14), (92, 148, 14),
                (-66, 146, -14), (66, 150, 14), (-40, 144, -16), (42, 148, 16), (-14, 142, -20), (16, 150, 22)],
}  # fmt: skip


def spikes(style, low, high):
    """The tufts whose angle from the top lies between low and high degrees, as strands that leave the crown."""
    strands = []
    for angle, length, bend in TUFTS.get(style, []):
        if low <= abs(angle) < high:
            at = [(math.radians(angle + bend * k), r, w) for k, r, w in
                  ((-0.6, 46, 12), (-0.5, 92, 64), (0, 92 + (length - 92) * 0.5, 42), (1, length, 0))]  # fmt: skip
            strands.append([(r * math.sin(a), -42 - r * math.cos(a), w) for a, r, w in at])
    return strands


def braids(colours):
    """Two plaits that hang in front of the shoulders."""
    base, shade, _ = colours
    out = ""
    for i in range(6):
        x, y = 116 + 3 * math.sin(i), 66 + 27 * i
        w = 27 - 1.2 * i
        for s, fill in ((1, shade), (-1, base)):
            d = f"M{x} {y + 34}C{x + s * w} {y + 28} {x + s * w * 1.2} {y - 4} {x + s * 6} {y - 12}"
            out = path(d + f"C{x - s * 8} {y - 4} {x - s * 4} {y + 20} {x} {y + 34}Z", fill, line_of(shade), 2.6) + out
    tie = f"M{x - 14} {y + 22}L{x + 14} {y + 22}L{x + 12} {y + 36}L{x - 12} {y + 36}Z"
    return mirror(out + path(tie, "#f2567a", line_of("#f2567a"), 2.6))


# --- the head ---------------------------------------------------------------------------------------------------------


def face_outline(turn, boy):
    c, j = 9 * turn, 5 if boy else 0
    return (
        f"M-97 -40C-98 6 -{94 - 3 * turn:.1f} 34 {-74 + c * 0.4:.1f} {60 + j}C{-52 + c:.1f} {83 + j} {-15 + c:.1f} "
        f"{98 + j} {c:.1f} {98 + j}C{15 + c:.1f} {98 + j} {52 + c:.1f} {83 + j} {74 + c * 0.4:.1f} {60 + j}"
        f"C{94 + 3 * turn:.1f} 34 98 6 97 -40C90 -110 -90 -110 -97 -40Z"
    )


MOODS = {  # openness of the eyes, gaze, size of the iris, brow heights (inner, outer), blush, slant of the eyes
    "smiling": (1.0, (0, 0), 1.0, (0, 0), 0.45, 0),
    "laughing": (None, (0, 0), 1.0, (-6, -2), 0.6, 0),
    "surprised": (1.14, (0, 0), 0.78, (-12, -12), 0.3, 0),
    "sleepy": (0.36, (0, 3), 1.0, (-4, 5), 0.35, 5),
    "pouting": (0.84, (0, 0), 1.0, (13, -5), 0.55, -9),
    "shy": (0.9, (7, 3), 1.0, (-9, 5), 1.0, 3),
    "winking": (1.0, (0, 0), 1.0, (-3, -3), 0.5, 0),
    "crying": (0.92, (0, 2), 1.06, (-13, 6), 0.5, 8),
}


def open_eye(side, name, colour, lash, mood, boy):
    """One open eye; +x points outwards, only the highlights keep the side of the light."""
    openness, (gx, gy), size, *_ = MOODS[mood]
    if boy:
        openness *= 0.86

    def u(y):  # an upper-lid height, lowered as the eye closes
        return 6 + (y - 6) * openness

    white = (
        f"M-25 6C-23 {u(-20):.1f} -7 {u(-31):.1f} 8 {u(-30):.1f}C22 {u(-29):.1f} 29 {u(-14):.1f} 27 2"
        "C26 20 16 32 0 32C-14 32 -22 20 -25 6Z"
    )
    lid = (
        f"M-30 10C-27 {u(-19):.1f} -9 {u(-36) - 2:.1f} 9 {u(-36) - 2:.1f}C24 {u(-35) - 2:.1f} 31 {u(-24) - 2:.1f} "
        f"{36 if boy else 41} {u(-15):.1f}C35 {u(-9):.1f} 32 {u(-4):.1f} 29 4C27 {u(-14):.1f} 20 {u(-26) + 2:.1f} "
        f"7 {u(-25) + 2:.1f}C-8 {u(-25) + 2:.1f} -20 {u(-10):.1f} -30 10Z"
    )
    dark, light = mix(colour, "#1a0b33", 0.68), mix(colour, "#ffffff", 0.55)
    rx, ry, x, y = 20 * size, 28 * size, side * gx - 1, 3 + gy
    inside = (
        path(white, "#ffffff")
        + ellipse(x, y, rx, ry, dark)
        + ellipse(x, y + 1.5, rx - 2.5, ry - 3, f"url(#{name}iris)")
        + ellipse(x, y + ry * 0.55, rx * 0.66, ry * 0.34, light, 'opacity="0.85"')
        + ellipse(x, y - 1, rx * 0.42, ry * 0.42, dark)
        + path(white, "#8a86c8", extra='opacity="0.28" transform="translate(0 -40)"')
        + path(f"M-40 -50H50V{u(-20):.1f}C20 {u(-24):.1f} -10 {u(-22):.1f} -40 {u(-2):.1f}Z", "#4b3c86",
               extra='opacity="0.30"')
    )  # fmt: skip
    out = gradient(name + "iris", dark, mix(colour, dark, 0.25), colour, light) + clip(name + "lid", white)
    out += group(inside, extra=f'clip-path="url(#{name}lid)"')
    out += path("M24 14C20 27 11 33 -1 33", line=mix(lash, SKIN_LINE, 0.4), width=2.6)
    out += path(lid, lash, lash, 1.2)
    if not boy:
        out += path(f"M30 {u(-6):.1f}L45 {u(-5):.1f}L29 {u(8):.1f}Z", lash)
    if openness > 0.5:
        out += path(f"M-16 {u(-36) - 7:.1f}Q8 {u(-48) - 5:.1f} 27 {u(-34) - 7:.1f}", line=SKIN_LINE, width=2.2)
    top = max(u(-13), -13) + gy
    glint = ellipse(x * side - 8 * size, top, 7.5 * size, 9 * size * min(openness, 1), "#ffffff")
    glint += ellipse(x * side + 8, 16 + gy, 4.6, 5.4, "#ffffff", 'opacity="0.92"')
    return out, glint


def closed_eye(lash, happy):
    """A closed eye: an arch when laughing, a bowl when winking."""
    if happy:
        arch = [(-29, 14, 2), (-17, -3, 7), (1, -10, 9), (20, -3, 8), (32, 14, 2)]
        return path(band(arch), lash, lash, 2) + path("M25 2L40 -2M29 9L42 9", line=lash, width=3.4)
    bowl = [(-28, 2, 2), (-14, 12, 7), (2, 15, 9), (18, 10, 8), (33, -4, 2)]
    return path(band(bowl), lash, lash, 2) + path("M24 10L36 16M17 14L25 23", line=lash, width=3.4)


def mouth(mood):
    lip = "#9c3d46"
    red, tongue = "#a5303f", "#f2848a"
    if mood in ("laughing", "winking"):
        d = "M-25 -7Q0 3 25 -7C26 14 12 27 0 27C-12 27 -26 14 -25 -7Z"
        inside = ellipse(0, 24, 15, 11, tongue) + path("M-25 -9Q0 1 25 -9L22 1Q0 8 -22 1Z", "#ffffff")
        out = clip("mouth", d) + path(d, red) + group(inside, extra='clip-path="url(#mouth)"') + path(d, line=lip)
        return out if mood == "laughing" else group(out, "scale(0.8)")
    if mood == "surprised":
        return ellipse(0, 6, 9, 12, red, f'stroke="{lip}" stroke-width="3"') + ellipse(0, 12, 5.5, 4.5, tongue)
    d = {"smiling": "M-19 -3Q0 14 19 -3", "pouting": "M-13 9Q0 -8 13 9", "shy": "M-15 -1Q-8 7 0 1Q8 7 15 -1",
         "crying": "M-16 9Q-8 -3 0 4Q8 -3 16 9", "sleepy": "M-9 2Q0 6 9 2"}[mood]  # fmt: skip
    under = path("M-6 17Q0 20 6 17", line=SKIN_SHADE, width=3)
    return path(d, line=lip, width=3.6) + under


def features(spec, lash, turn, boy):
    """Eyes, nose, mouth and blush."""
    mood = spec.expression
    openness, _, _, _, blush, slant = MOODS[mood]
    out = ""
    for side in (-1, 1):
        at = f"translate({side * 47 + 11 * turn:.1f} 0)"
        narrow = 0.92 if side * turn > 0.2 else 1.0
        out += ellipse(side * 60 + 9 * turn, 42, 21, 11, "#ff7a86", f'opacity="{0.55 * blush:.2f}" filter="url(#soft)"')
        if mood == "shy":
            for k in (-9, 0, 9):
                x = side * 60 + 9 * turn + k
                out += path(f"M{x - 3:.1f} 50L{x + 3:.1f} 40", line="#f0606e", width=2.6)
        if openness is None or (mood == "winking" and side == 1):
            out += group(closed_eye(lash, openness is None), f"{at} scale({side * narrow} 1)")
            continue
        eye, glint = open_eye(side, "lr"[side > 0], EYES[spec.eyes], lash, mood, boy)
        out += group(eye, f"{at} scale({side * narrow} 1) rotate({slant})") + group(glint, at)
        if mood == "crying":
            pool = path("M-23 20C-12 34 14 36 26 16C22 38 -14 42 -23 20Z", "#d8f2ff", "#6db4e6", 2)
            drop = path("M6 30C18 46 18 62 7 64C-6 62 -5 46 6 30Z", "#c4eaff", "#5aa7dd", 2.4)
            out += group(pool + drop, f"{at} scale({side} 1)") + group(ellipse(side * 7 - 3, 54, 2.6, 5, "#ffffff"), at)
    out += path(f"M{13 * turn - 2:.1f} 42q4 5 0 8", line="#d98674", width=3.2)
    return out + group(mouth(mood), f"translate({12 * turn:.1f} {66 if boy else 64})")


def anger_mark():
    """The mark of popping veins that a cross character has on the hair."""
    veins = "".join(f"M{x * 5} {y * 15}Q{x * 5} {y * 5} {x * 15} {y * 5}" for x in (-1, 1) for y in (-1, 1))
    both_lines = path(veins, line="#ffffff", width=11) + path(veins, line="#e0304a", width=5.5)
    return group(both_lines, "translate(-78 -84) rotate(-12) scale(1.1)")


def brows(spec, colours, turn, boy):
    """Eyebrows, which show through the fringe; on dark hair a light edge sets them off."""
    base, shade, light = colours
    inner, outer = MOODS[spec.expression][3]
    thick = 8.5 if boy else 6
    low = 5 if boy else 0
    out = ""
    for side in (-1, 1):
        p = [
            (24, -50 + inner + low, thick * 0.8),
            (48, -57 + (inner + outer) / 2 + low, thick),
            (76, -49 + outer + low, 1),
        ]
        d = band([(side * x + 11 * turn, y, w) for x, y, w in p])
        out += path(d, line=mix(base, light, 0.4), width=3.6) + path(d, mix(shade, "#1c0f2e", 0.5))
    return out
