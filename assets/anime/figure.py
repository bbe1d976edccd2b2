"""Clothes, hands and accessories for draw.py, and the whole character put together from all the parts."""

from parts import (
    CAP,
    HAIR,
    INK,
    SKIN,
    SKIN_LINE,
    SKIN_SHADE,
    anger_mark,
    back_hair,
    band,
    braids,
    brows,
    clip,
    cloth,
    ellipse,
    face_outline,
    features,
    fringe_strands,
    group,
    line_of,
    locks,
    mirror,
    mix,
    path,
    polygon,
    ribbon,
    side_strands,
    spikes,
    star,
)

# --- clothes ----------------------------------------------------------------------------------------------------------

TORSO = (
    "M-36 104C-40 128 -76 132 -102 144C-132 158 -146 200 -152 300L152 300C146 200 132 158 102 144C76 132 40 128 36 104Z"
)
GOLD, GOLD_SHADE = "#f6c453", "#c98a2e"


def torso(colour, shade, d=TORSO):
    """A body of one cloth with the shade of the head and of the arms on it."""
    folds = (
        "M-70 122C-40 168 40 172 78 124L60 100H-60ZM96 310C92 260 92 230 82 196C98 220 108 250 112 310Z"
        "M-84 196C-94 226 -96 262 -98 310L-114 310C-108 262 -100 226 -84 196ZM160 310L128 310C130 240 122 190 96 144"
        "L130 150ZM30 310C44 270 62 240 84 226C72 256 66 280 66 310Z"
    )
    out = clip("torso", d) + path(d, colour) + path(folds, shade, extra='clip-path="url(#torso)"')
    arms = path("M-97 300C-98 250 -94 224 -85 198M97 300C98 250 94 224 85 198", line=line_of(colour), width=2.6)
    return out + path(d, line=line_of(colour)) + arms


def bow(x, y, size, colour, tails=True):
    shade = mix(colour, "#5a1240", 0.35)
    loop = cloth("M0 0C-10 -22 -44 -34 -56 -24C-64 -8 -62 16 -54 26C-40 32 -12 16 0 0Z", colour)
    loop += path("M-6 2C-22 6 -42 8 -56 2C-58 14 -57 22 -52 24C-40 28 -14 14 -6 2Z", shade)
    end = cloth("M-4 4C-14 24 -26 44 -34 58L-18 56L-8 66C-4 44 0 24 4 6Z", mix(colour, shade, 0.5)) if tails else ""
    knot = cloth("M-11 -12C-4 -16 4 -16 11 -12C14 -4 14 6 11 13C4 17 -4 17 -11 13C-14 6 -14 -4 -11 -12Z", colour)
    return group(mirror(end) + mirror(loop) + knot, f"translate({x} {y}) scale({size})")


def neck():
    out = path("M-26 60L-25 108C-27 128 -56 134 -70 140L0 196L70 140C56 134 27 128 25 108L26 60Z", SKIN, SKIN_LINE)
    return out + path("M-26 66L-25 100C-8 118 14 120 30 108L26 66Z", SKIN_SHADE)


def bare_shoulders():
    """A body of skin, joined to the neck without a line."""
    out = torso(
        SKIN,
        SKIN_SHADE,
        TORSO.replace("M-36 104C-40 128", "M-25 104C-27 130").replace("40 128 36 104", "27 130 25 104"),
    )
    return out + path("M-23.6 92V118H23.6V92Z", SKIN) + path("M-23.6 92L-23 101C-8 118 12 120 23.6 111V92Z", SKIN_SHADE)


def school_uniform(boy, main, shade):
    if boy:
        out = torso(main, shade) + path("M0 128V300", line="#23284d", width=3)
        for y in (152, 190, 228):
            out += ellipse(10, y, 6, 6, GOLD, f'stroke="{GOLD_SHADE}" stroke-width="2"')
        stand = cloth("M-38 96C-30 112 -12 120 0 132L0 152C-22 146 -40 134 -46 118Z", "#5a639a")
        return out + path("M-32 98C-20 116 -8 122 0 132C8 122 20 116 32 98", line="#ffffff", width=5) + mirror(stand)
    collar = "M-34 102C-56 120 -86 130 -102 144C-92 172 -50 190 -3 206L0 184C-16 160 -28 130 -34 102Z"
    stripe = path("M-91 147C-80 168 -46 182 -3 195", line="#ffffff", width=3.4)
    return (
        torso(main, shade)
        + path("M-32 104L0 196L32 104Z", SKIN)
        + path("M-30 104C-16 128 16 128 30 104L26 90H-26Z", SKIN_SHADE)
        + mirror(cloth(collar, "#3f5596") + stripe)
        + bow(0, 200, 0.82, "#e8485c")
    )


def kimono(boy, main, shade):
    trim = "#dfe8ff" if boy else "#fff1f4"
    out = torso(main, shade)
    for x, y, s in ((-112, 188, 1.0), (-70, 236, 0.8), (98, 186, 0.85), (116, 240, 1.0), (52, 178, 0.6)):
        out += blossom(x, y, 17 * s, trim, GOLD)
    out += path("M-32 104L0 190L32 104Z", SKIN) + path("M-30 100C-14 128 14 128 30 100L26 84H-26Z", SKIN_SHADE)
    out += path(band([(30, 104, 3), (22, 132, 15), (-24, 196, 16)]), "#ffffff", line_of(trim), 2.4)
    out += path(band([(33, 96, 3), (40, 134, 25), (-20, 214, 26)]), trim, line_of(main), 2.8)
    out += path(band([(-30, 104, 3), (-23, 130, 15), (26, 200, 16)]), "#ffffff", line_of(trim), 2.4)
    out += path(band([(-33, 96, 3), (-40, 136, 25), (36, 236, 28)]), trim, line_of(main), 2.8)
    sash = "M-100 222C-40 232 40 232 100 222V310H-100Z"
    return out + cloth(sash, "#8b5fc4") + path("M-99 246C-40 256 40 256 99 246", line=GOLD, width=6)


def hoodie(boy, main, shade):
    hood = "M-92 158C-108 112 -66 84 -34 92C-30 128 -14 148 0 154C14 148 30 128 34 92C66 84 108 112 92 158"
    out = torso(main, shade) + cloth(hood + "C64 184 22 178 0 172C-22 178 -64 184 -92 158Z", main)
    out += path("M-78 150C-84 118 -60 100 -36 100C-30 128 -16 148 0 156C16 148 30 128 36 100C60 100 84 118 78 150"
                "C54 166 22 164 0 160C-22 164 -54 166 -78 150Z", shade)  # fmt: skip
    out += path("M-26 112C-20 136 -10 148 0 154C10 148 20 136 26 112", "#ffffff", line_of(main), 2.4)
    out += path("M-22 168C-26 190 -22 204 -25 222M22 168C26 188 21 198 24 214", line="#ffffff", width=5)
    return out + path("M0 174V300", line=line_of(main), width=2.4)


def knight_armour(boy, main, shade):
    line = "#4c5480"
    cape = "#d8434f" if not boy else "#3f66c8"
    out = cloth("M-70 126C-150 140 -196 200 -206 310H206C196 200 150 140 70 126Z", mix(cape, INK, 0.18))
    out += torso(main, shade) + path("M0 160V300", line=line, width=2.6)
    out += path("M-60 176C-40 210 -20 220 0 224C20 220 40 210 60 176", line=GOLD, width=6)
    plate = cloth("M-72 136C-112 118 -158 144 -164 204C-140 222 -104 218 -82 200C-74 180 -70 156 -72 136Z", main)
    plate += path("M-84 196C-104 214 -140 218 -162 202L-163 188C-138 200 -104 196 -84 178Z", shade)
    plate += path("M-72 138C-110 122 -152 146 -162 190", line="#ffffff", width=4)
    plate += path("M-84 200C-106 216 -140 220 -163 204", line=GOLD, width=6)
    ring = cloth(
        "M-46 112C-58 122 -68 136 -66 150C-30 172 30 172 66 150C68 136 58 122 46 112C34 138 -34 138 -46 112Z", main
    )
    ring += path("M12 131C32 128 42 120 46 112C58 122 68 136 66 150C52 159 34 163 18 165Z", shade)
    ring += path("M-66 150C-30 172 30 172 66 150", line=GOLD, width=6)
    gem = path("M0 152L13 166L0 184L-13 166Z", cape, line, 2.6)
    return out + mirror(plate) + ring + gem


def witch_dress(boy, main, shade):
    out = torso(main, shade)
    cape = "M-36 104C-60 122 -110 132 -140 180C-134 196 -120 204 -112 214C-92 206 -80 212 -66 224C-50 212 -30 214 0 226"
    cape += "C30 214 50 212 66 224C80 212 92 206 112 214C120 204 134 196 140 180"
    cape += "C110 132 60 122 36 104C20 130 -20 130 -36 104Z"
    out += cloth(cape, "#4a387f") + path(
        "M-140 180C-134 196 -120 204 -112 214C-92 206 -80 212 -66 224C-50 212 -30 214 0 226C30 214 50 212 66 224"
        "C80 212 92 206 112 214C120 204 134 196 140 180", line=GOLD, width=4.5)  # fmt: skip
    out += path("M60 134C84 150 92 190 92 206C80 210 72 216 66 222C60 190 52 156 30 132Z", shade)
    if boy:
        frill = cloth("M-40 98C-50 116 -62 128 -70 136L0 168L-2 140C-20 130 -32 116 -40 98Z", "#7d63c4")
    else:
        frill = cloth("M-38 100C-52 116 -66 124 -74 134C-64 142 -58 152 -46 154C-34 152 -22 164 0 152L0 140"
                      "C-18 132 -30 116 -38 100Z", "#fbf6ff")  # fmt: skip
    return (
        out
        + mirror(frill)
        + bow(0, 160, 0.5, "#e85a8c")
        + ellipse(0, 160, 9, 10, "#66e0d0", f'stroke="{INK}" stroke-width="2.4"')
    )


def t_shirt(boy, main, shade):
    out = bare_shoulders()
    shirt = (
        "M-46 118C-70 130 -92 138 -104 146C-130 158 -148 196 -154 244C-134 256 -112 256 -96 250V310H96V250"
        "C112 256 134 256 154 244C148 196 130 158 104 146C92 138 70 130 46 118C30 156 -30 156 -46 118Z"
    )
    out += torso(main, shade, shirt)
    out += path("M-46 120C-30 158 30 158 46 120", line=line_of(main), width=9)
    out += path("M-46 120C-30 158 30 158 46 120", line="#ffffff", width=5)
    return out + star(
        0, 208, 34, "#fff3c4", 5, 0.5, f'stroke="{line_of(main)}" stroke-width="3" stroke-linejoin="round"'
    )


def sundress(boy, main, shade):
    out = bare_shoulders()
    out += path("M-58 148C-40 152 -24 150 -12 158M58 148C40 152 24 150 12 158", line="#d98674", width=3)
    dress = "M-92 196C-70 176 -30 178 0 194C30 178 70 176 92 196C96 230 98 270 98 310H-98C-98 270 -96 230 -92 196Z"
    strap = path(band([(-58, 136, 12), (-66, 160, 13), (-66, 190, 14)]), "#ffffff", line_of("#cdd6f0"), 2.6)
    out += mirror(strap) + cloth(dress, main)
    out += path("M40 300C44 250 60 220 90 204L96 310ZM-30 310C-30 270 -26 240 -8 214C-12 250 -12 280 -10 310Z", shade)
    return (
        out
        + path("M-92 197C-70 178 -30 180 0 196C30 180 70 178 92 197", line="#7fc4f2", width=6)
        + bow(0, 204, 0.42, "#7fc4f2")
    )


def sweater(boy, main, shade):
    out = torso(main, shade)
    for x in (-46, 0, 46):
        zig = "".join(f"L{x + (9 if i % 2 else -9)} {164 + 16 * i}" for i in range(9))
        out += path(f"M{x} 158{zig}", line=mix(shade, line_of(shade), 0.15), width=3.4)
    roll = "M-40 100C-52 106 -54 126 -46 138C-20 156 20 156 46 138C54 126 52 106 40 100C24 118 -24 118 -40 100Z"
    out += cloth(roll, main) + path("M14 114C28 111 36 104 40 100C52 106 53 126 46 138C38 144 28 147 18 149Z", shade)
    return out + path("M-28 118V140M-10 122V146M10 122V146M28 116V140", line=shade, width=3)


def space_suit(boy, main, shade):
    orange = "#ff8a3c"
    wide = "M-36 104C-40 128 -76 132 -102 144C-148 152 -164 200 -172 300L172 300C164 200 148 152 102 144"
    out = torso(main, shade, wide + "C76 132 40 128 36 104Z")
    out += mirror(path(band([(-154, 214, 20), (-126, 222, 20), (-98, 216, 20)]), orange, line_of(orange), 2.6))
    out += (
        cloth("M-50 196H50V262H-50Z", "#dfe4f2")
        + ellipse(-28, 216, 8, 8, "#ff5d6c")
        + ellipse(-4, 216, 8, 8, "#56d39a")
    )
    out += path("M16 208H40V224H16Z", "#4fa8f0") + path("M-36 240H36", line=shade, width=5)
    out += ellipse(0, 136, 92, 36, shade, f'stroke="{line_of(shade)}" stroke-width="3"')
    out += ellipse(0, 130, 92, 34, main, f'stroke="{line_of(main)}" stroke-width="3"')
    out += ellipse(0, 128, 72, 24, "#4b5788", f'stroke="{line_of(shade)}" stroke-width="3"')
    inside = clip("ring", "M-72 40H72V128A72 24 0 0 1 -72 128Z") + group(neck(), extra='clip-path="url(#ring)"')
    return out + inside + path("M-84 128C-72 156 -40 158 -20 160", line=orange, width=5)


OUTFITS = {  # drawing, the colours of the girls' and of the boys' cloth and its shade
    "school uniform": (school_uniform, ("#fbfaff", "#cdd0ec"), ("#4a5285", "#353b66")),
    "kimono": (kimono, ("#ef7f9b", "#c9567c"), ("#4f6fb5", "#39508f")),
    "hoodie": (hoodie, ("#63c3b4", "#3f9a92"), ("#63c3b4", "#3f9a92")),
    "knight armour": (knight_armour, ("#d8deee", "#9aa5c8"), ("#d8deee", "#9aa5c8")),
    "witch dress": (witch_dress, ("#5b4794", "#41306f"), ("#5b4794", "#41306f")),
    "t-shirt": (t_shirt, ("#ff9a5c", "#e06c40"), ("#ff9a5c", "#e06c40")),
    "sundress": (sundress, ("#fdfdff", "#cfdcf5"), ("#fdfdff", "#cfdcf5")),
    "sweater": (sweater, ("#8c6fb8", "#6a4f96"), ("#8c6fb8", "#6a4f96")),
    "space suit": (space_suit, ("#f4f5fb", "#bcc4de"), ("#f4f5fb", "#bcc4de")),
}


# --- arms and hands ---------------------------------------------------------------------------------------------------


def hand(fingers, thumb, curled=""):
    """A hand that points up from its wrist at (0, 0); fingers and thumb are strokes."""
    palm = "M-17 2C-22 -14 -22 -30 -18 -42C-6 -48 8 -48 18 -40C22 -26 20 -10 15 2Z"
    skin = "".join(path(f, line=SKIN, width=12.5) for f in fingers)
    out = "".join(path(f, line=SKIN_LINE, width=18) for f in fingers) + path(palm, SKIN, SKIN_LINE, 5.5)
    out += skin + path(palm, SKIN) + path("M10 -30C16 -20 14 -6 10 2H15C20 -10 22 -26 18 -40Z", SKIN_SHADE) + curled
    return out + path(thumb, line=SKIN_LINE, width=18) + path(thumb, line=SKIN, width=12.5)


HANDS = {
    "wave": hand(["M-13 -38L-29 -72", "M-6 -42L-11 -86", "M6 -42L10 -85", "M13 -36L30 -68"], "M-12 -12L-39 -34"),
    "peace": hand(["M-9 -40L-19 -80", "M3 -40L12 -80"], "M-17 -18Q-4 -26 8 -26",
                  path("M2 -40V-24M11 -36V-22", line=SKIN_LINE, width=2.6)),
}  # fmt: skip


def raised_arm(kind, main, shade, bare):
    """The arm on the right of the picture, raised beside the head; a bare arm ends in the hand, a sleeve in a cuff."""
    if bare:
        main, shade = SKIN, SKIN_SHADE
    arm = [(138, 320, 76), (172, 236, 64), (168, 150, 32 if bare else 46)]
    _, one, two = ribbon(arm)
    limb = path(band(arm), main, SKIN_LINE if bare else line_of(main))
    limb += path(polygon([*two, *(two + (one - two) * 0.3)[::-1]]), shade)
    palm = group(HANDS[kind], "translate(168 154) rotate(-7)")
    if bare:
        return limb + palm
    cuff = band([(142, 154, 18), (168, 158, 20), (194, 152, 18)])
    return palm + limb + path(cuff, mix(main, "#ffffff", 0.3), line_of(main))


def sleeves(main, shade):
    """Both hands before the chest, the fingers just out of long sleeves."""
    arm = [(150, 310, 74), (104, 226, 64), (46, 160, 54)]
    _, one, two = ribbon(arm)
    tip = f'stroke="{SKIN_LINE}" stroke-width="2.6" transform="rotate(-40 '
    tips = "".join(
        ellipse(x, y, 8, 11, SKIN, f'{tip}{x} {y})"') for x, y in ((53, 131), (41, 137), (30, 147), (21, 159))
    )
    out = tips + path(band(arm), main, line_of(main))
    out += path(polygon([*two, *(two + (one - two) * 0.3)[::-1]]), shade)
    cuff = path(band([(66, 136, 14), (46, 156, 18), (26, 178, 14)]), mix(main, "#ffffff", 0.3), line_of(main))
    return mirror(out + cuff)


def gesture(spec, main, shade):
    kind, _, side = spec.gesture.partition(" ")
    if kind == "sleeves":
        return sleeves(main, shade)
    if kind in HANDS:
        arm = raised_arm(kind, main, shade, spec.outfit in ("t-shirt", "sundress"))
        return group(arm, "scale(-1 1)" if side == "left" else "")
    return ""


# --- accessories ------------------------------------------------------------------------------------------------------


def blossom(x, y, r, colour, heart):
    petal = path("M0 0C-9 -4 -9 -14 -4 -18L0 -15L4 -18C9 -14 9 -4 0 0Z", colour)
    ring = "".join(group(petal, f"rotate({a})") for a in range(0, 360, 72))
    return group(ring + ellipse(0, 0, 3.4, 3.4, heart), f"translate({x:.1f} {y:.1f}) scale({r / 18:.2f})")


def cat_ears(colours):
    """Drawn before the front hair, which covers their base."""
    base, shade, _ = colours
    ear = cloth("M-112 -84C-128 -140 -126 -196 -110 -212C-80 -200 -44 -168 -26 -132Z", base, 3.4)
    ear += path("M-100 -100C-110 -140 -110 -172 -103 -188C-84 -178 -62 -156 -50 -136Z", mix("#ff9fb4", shade, 0.15))
    return mirror(ear + path("M-108 -96C-96 -112 -92 -128 -90 -144C-80 -132 -74 -124 -72 -112Z", base))


def glasses(turn):
    frame = "#b23a5e"
    out = ""
    for side in (-1, 1):
        d = "M-36 -16C-36 -32 36 -32 36 -16C38 14 26 38 0 38C-26 38 -38 14 -36 -16Z"
        rim = path(d, "#ffffff", extra='opacity="0.16"') + path(d, line=frame, width=5)
        rim += path("M-24 20L-8 -18M-14 26L-4 4", line="#ffffff", width=4, extra='opacity="0.6"')
        out += group(rim, f"translate({47 * side + 11 * turn:.1f} 4)")
    x = 11 * turn
    out += path(f"M{x - 12:.1f} -6Q{x:.1f} -14 {x + 12:.1f} -6", line=frame, width=5)
    return out + path(f"M{x - 83:.1f} -8L-98 -14M{x + 83:.1f} -8L98 -14", line=frame, width=5)


def headphones():
    main = "#ff6f91"
    out = path("M-122 -10C-134 -134 -76 -172 0 -172C76 -172 134 -134 122 -10", line=line_of(main), width=21)
    out += path("M-122 -10C-134 -134 -76 -172 0 -172C76 -172 134 -134 122 -10", line="#fdfbff", width=15)
    out += path("M-60 -156C-24 -169 24 -169 60 -156", line=main, width=15)
    cup = cloth("M-112 -38C-140 -44 -150 -22 -150 2C-150 28 -140 48 -112 42C-104 20 -104 -16 -112 -38Z", main, 3.4)
    cup += path("M-124 -22C-138 -20 -140 -8 -140 4", line="#ffffff", width=5, extra='opacity="0.8"')
    return out + mirror(cup + cloth("M-112 -40C-98 -38 -98 42 -112 44C-106 20 -106 -16 -112 -40Z", "#fdfbff"))


def flower():
    out = ""
    for a in range(0, 360, 72):
        petal = cloth("M0 0C-24 -8 -24 -36 -8 -42L0 -36L8 -42C24 -36 24 -8 0 0Z", "#ff7d9d", 2.8)
        out += group(petal + path("M0 -8V-24", line="#d8436f", width=3), f"rotate({a})")
    leaf = cloth("M10 8C30 6 48 20 54 38C34 40 14 30 10 8Z", "#6fc283", 2.8)
    return group(leaf + out + ellipse(0, 0, 9, 9, GOLD, f'stroke="{GOLD_SHADE}" stroke-width="2"'), "translate(84 -92)")


def witch_hat():
    main, shade = "#4a3a80", "#332760"
    cone = "M-108 -104C-92 -170 -60 -226 -8 -250C30 -268 84 -252 104 -214"
    cone += "C84 -226 62 -222 60 -206C70 -170 94 -140 108 -104Z"
    out = cloth(cone, main, 3.4)
    out += path(
        "M108 -104C94 -140 70 -170 60 -206C62 -222 84 -226 104 -214C86 -244 56 -254 26 -253C14 -220 30 -160 46 -104Z",
        shade,
    )
    out += path(
        "M-104 -118C-40 -146 40 -146 104 -118L98 -140C40 -170 -40 -170 -96 -140Z", "#e85a8c", line_of("#e85a8c")
    )
    brim = "M-184 -70C-160 -112 -100 -134 0 -134"
    brim += "C100 -134 160 -112 184 -70C120 -104 60 -112 0 -112C-60 -112 -120 -104 -184 -70Z"
    out += cloth(brim, main, 3.4) + path("M-150 -88C-110 -118 -60 -126 -10 -127", line="#7f6bc2", width=4)
    return out + star(-58, -148, 17, GOLD, 5, 0.5, f'stroke="{GOLD_SHADE}" stroke-width="2.4"')


def crown():
    d = "M-62 -138L-76 -192L-40 -170L0 -212L40 -170L76 -192L62 -138C30 -152 -30 -152 -62 -138Z"
    out = cloth(d, GOLD, 3.4) + path(
        "M14 -150C34 -149 50 -144 62 -138L76 -192L40 -170Z", GOLD_SHADE, extra='opacity="0.7"'
    )
    out += path("M-63 -143C-30 -158 30 -158 63 -143", line="#ffe9a8", width=5)
    for x, y, c in ((-76, -194, "#f25a78"), (0, -214, "#5fb4f5"), (76, -194, "#f25a78")):
        out += ellipse(x, y, 8, 8, c, f'stroke="{line_of(c)}" stroke-width="2.6"')
    return out + path("M0 -186L11 -172L0 -157L-11 -172Z", "#f25a78", line_of("#f25a78"), 2.6)


def scarf():
    main, shade = "#e8525a", "#b93350"
    tail = path(band([(-40, 124, 40), (-56, 170, 44), (-48, 220, 46), (-60, 262, 44)]), main, line_of(main), 3)
    tail += path("M-78 190L-30 194M-76 206L-28 210", line="#ffe8d6", width=6)
    wrap = "M-58 97C-86 94 -90 128 -66 140C-30 160 34 160 68 139C90 126 86 94 58 97C30 115 -30 115 -58 97Z"
    out = tail + cloth(wrap, main, 3.4)
    out += path("M20 108C36 106 48 101 58 97C86 94 90 126 68 139C58 145 44 150 30 152Z", shade)
    return out + path("M-79 116C-40 138 34 140 78 116", line=line_of(main), width=2.4)


# what each accessory draws behind the front hair, on the face, above the hair and around the neck
def accessory(spec, layer, colours, turn):
    drawn = {
        ("cat ears", "behind"): lambda: cat_ears(colours),
        ("glasses", "face"): lambda: glasses(turn),
        ("headphones", "top"): headphones,
        ("ribbon", "top"): lambda: group(bow(0, 0, 1.0, "#f0505f", False), "translate(72 -124) rotate(28)"),
        ("flower", "top"): flower,
        ("witch hat", "top"): witch_hat,
        ("crown", "top"): lambda: group(crown(), f"rotate({6 * turn:.1f})"),
        ("scarf", "neck"): scarf,
    }
    make = drawn.get((spec.accessory, layer))
    return make() if make else ""


# --- the whole character ----------------------------------------------------------------------------------------------

POSES = {  # turn of the face, tilt of the head, scale, shift (x, y)
    "front": (0.0, 0, 1.13, (0, 6)),
    "left": (-0.9, -4, 1.12, (6, 6)),
    "right": (0.9, 5, 1.12, (-6, 6)),
    "tilt left": (-0.45, -9, 1.1, (10, 8)),
    "tilt right": (0.45, 9, 1.1, (-10, 8)),
    "close": (0.3, 4, 1.3, (-4, 14)),
    "near left": (-0.6, -5, 1.26, (8, 14)),
    "aside left": (0.8, 4, 1.06, (-44, 14)),
    "aside right": (-0.8, -5, 1.06, (44, 14)),
    "closer": (-0.2, -6, 1.38, (8, 20)),
    "far": (0.5, 3, 0.98, (-4, 26)),
    "far left": (-0.6, -5, 0.98, (8, 26)),
}


def character(spec):
    """The character of a spec in the 512 x 512 frame."""
    boy, style, colours = spec.who == "boy", spec.hair_style, HAIR[spec.hair_colour]
    turn, tilt, scale, (dx, dy) = POSES[spec.pose]
    lash = mix(colours[1], "#1c0f2e", 0.72)
    face = face_outline(turn, boy)
    fringe = fringe_strands(spec.fringe, turn)
    shadow = "".join(band(s) for s in fringe + side_strands(style, boy))
    ear = path("M-95 -16C-112 -26 -116 0 -108 18C-104 28 -96 30 -92 24Z", SKIN, SKIN_LINE) + path(
        "M-98 -6C-106 -8 -108 6 -102 14", line=SKIN_SHADE, width=3
    )
    head = mirror(ear) + clip("face", face) + path(face, SKIN)
    head += group(
        path(shadow, SKIN_SHADE, SKIN_SHADE, 4, 'transform="translate(5 11)"')
        + path("M20 110C60 92 88 50 94 0L120 40L60 120Z", SKIN_SHADE, extra='opacity="0.7" filter="url(#soft)"'),
        extra='clip-path="url(#face)"',
    )
    head += (
        path(face, line=SKIN_LINE, width=3.2) + features(spec, lash, turn, boy) + accessory(spec, "face", colours, turn)
    )
    head += accessory(spec, "behind", colours, turn)
    tufts = spikes(style, {"witch hat": 70, "cat ears": 76}.get(spec.accessory, 0), 100)
    tufts += spikes(style, 0, 20) if spec.accessory == "cat ears" else []  # leaves room for the ears
    front = locks(tufts + side_strands(style, boy) + fringe, colours, cap=CAP)
    if style == "braids":
        front = braids(colours) + front
    if style == "twin tails":
        front += mirror(cloth("M-118 -112C-108 -122 -92 -116 -90 -104C-90 -92 -104 -86 -114 -92Z", "#f2567a"))
    head += front + brows(spec, colours, turn, boy)
    head += accessory(spec, "top", colours, turn) + (anger_mark() if spec.expression == "pouting" else "")
    swing = f"rotate({tilt} 0 110)"
    outfit, *cloths = OUTFITS[spec.outfit]
    body = neck() + group(outfit(boy, *cloths[boy]), "scale(1.07 1)" if boy else "")
    body = group(body + accessory(spec, "neck", colours, turn), f"rotate({-tilt * 0.35:.1f} 0 200)")
    whole = group(back_hair(style, colours), swing) + body + group(head, swing) + gesture(spec, *cloths[boy])
    return group(whole, f"translate({256 + dx} {252 + dy}) scale({scale})")
