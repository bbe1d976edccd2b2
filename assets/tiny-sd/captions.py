"""The captions of the corpus's pictures. Prompts to the base look like these.

A row comes from `render.picture`; a variant (0, 1 or 2) says which of a concept's pictures is meant.
"""

import random

STYLE_WORDS = {
    "noto": "noto emoji", "twemoji": "twemoji", "fluent": "fluent emoji",
    "openmoji": "openmoji", "fluent3d": "3d emoji",
    "noto-v1": "noto v1 emoji", "emojione": "emojione", "emojione-v1": "emojione v1", "fxemoji": "fx emoji",
}  # fmt: skip


def caption(row: dict, variant: int = 0, rng: random.Random | None = None) -> str:
    """The caption of an emoji; with `rng`, one of its many wordings.

    Without `rng`: the plain prompt, e.g. "noto emoji of cat face".
    """
    text = f"{STYLE_WORDS[row['style']]} of {row['name']}"
    if rng is None:
        return text
    colours, ground = row["colours"][variant], row["ground"][variant]
    if rng.random() < 0.1 and variant == 0:
        text = row["name"]
    if colours and (variant == 1 or rng.random() < 0.25):
        text += " in " + " and ".join(colours[: rng.choice((1, 2))] if variant != 1 else colours)
    if row["tags"] and rng.random() < 0.35:
        text += ", " + ", ".join(rng.sample(row["tags"], min(len(row["tags"]), rng.choice((1, 2)))))
    if ground or rng.random() < 0.1:
        text += f", {ground or 'white'} background"
    return text


def people_caption(row: dict, variant: int, rng: random.Random) -> str:
    """One of the many wordings of the caption of an avatar or a portrait: what is seen, in changing order."""
    hair, face, place = f"with {row['hair']}", row["face"], row["ground"][variant]
    worn = rng.choice(("wearing ", "dressed in ")) + " and ".join(row["worn"]) if row["worn"] else ""
    parts = [p for p in (hair, face, worn) if p]
    if rng.random() < 0.4:
        rng.shuffle(parts)
    if rng.random() < 0.2:
        parts.pop(rng.randrange(len(parts)))
    text = row["who"] + (" " if parts and parts[0].startswith("with") else ", " if parts else "") + ", ".join(parts)
    if place and rng.random() < 0.2:
        text = f"{place}, {text}"
    elif place:
        text += f", {place}"
    if row["style"] == "portrait":
        start = rng.choice(("portrait of ", "portrait of ", "illustration of ", "", ""))
        text += rng.choice((", in anime style", ", in cartoon style", "", ""))
    else:
        start = rng.choice(("avatar of ", "avatar of ", "avatar of ", ""))
    return (start + text).replace(" a orange", " an orange")


def words(row: dict, variant: int, rng: random.Random) -> str:
    """One wording of the caption of any row."""
    return (people_caption if row["style"] in ("avatar", "portrait") else caption)(row, variant, rng)
