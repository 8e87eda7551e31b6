"""What an avatar can look like, drawn from a seed: choices, what of them shows, labels, pose, landmarks.

Nothing here needs the drawing packages: an avatar is decided before it is drawn. Every choice is a hash of
(seed, stream, index, name), so it depends neither on the order of drawing nor on how many avatars there are,
nor on the version of a random generator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from hashlib import blake2b
from typing import NamedTuple

# The style's own variants; lists, not sets, because a draw is an index.
HATS = ("hat", "hijab", "turban", "winterHat02", "winterHat03", "winterHat04", "winterHat1")
_HAIR = (
    "bigHair", "bob", "bun", "curly", "curvy", "dreads", "dreads01", "dreads02", "frida", "frizzle", "fro", "froBand",
    "longButNotTooLong", "miaWallace", "shaggy", "shaggyMullet", "shavedSides", "shortCurly", "shortFlat",
    "shortRound", "shortWaved", "sides", "straight01", "straight02", "straightAndStrand", "theCaesar",
    "theCaesarAndSidePart",
)  # fmt: skip
_LONG_HAIR = (
    "bigHair", "bob", "curly", "curvy", "dreads", "longButNotTooLong", "miaWallace", "shavedSides", "straight01",
    "straight02", "straightAndStrand",
)  # fmt: skip
_DARK_GLASSES = ("kurt", "sunglasses", "wayfarers")
_BEARDS = ("beardLight", "beardMajestic", "beardMedium")
_MOUSTACHES = ("moustacheFancy", "moustacheMagnum")
# "none" as often as all the others together.
_FACIAL_HAIR = ("none",) * 5 + _BEARDS + _MOUSTACHES
_ACCESSORIES = ("none",) * 7 + ("eyepatch", "prescription01", "prescription02", "round", *_DARK_GLASSES)

SKIN = {
    "pale": "#ffdbb4", "light": "#edb98a", "tanned": "#fd9841", "yellow": "#f8d25c", "brown": "#d08b5b",
    "dark_brown": "#ae5d29", "deep": "#614335",
}  # fmt: skip
HAIR = {
    "black": "#2c1b18", "dark_brown": "#4a312c", "brown": "#724133", "auburn": "#a55728", "blonde": "#b58143",
    "golden": "#d6b370", "platinum": "#ecdcbf", "red": "#c93305", "pink": "#f59797", "silver": "#e8e1e1",
}  # fmt: skip
CLOTH = {
    "black": "#262e33", "white": "#ffffff", "light_gray": "#e6e6e6", "gray": "#929598", "heather": "#3c4f5c",
    "sky": "#65c9ff", "blue": "#5199e4", "navy": "#25557c", "pastel_blue": "#b1e2ff", "pastel_green": "#a7ffc4",
    "pastel_red": "#ffafb9", "pastel_yellow": "#ffffb1", "pink": "#ff488e", "red": "#ff5c5c",
}  # fmt: skip
# None is a colour of the style: it would drop a part's colour that equals the background.
BACKGROUND = {
    "cream": "#f3ead7", "mist": "#cfd8dc", "mint": "#c8e6c9", "lilac": "#d1c4e9", "sand": "#d7c49a",
    "teal": "#4f9a94", "slate": "#5b6775", "plum": "#6d4c7d",
}  # fmt: skip

# Attribute -> its values. The order of attributes and values is part of the format: see AVATARS_VERSION.
CHOICES: dict[str, tuple[str, ...]] = {
    "top": _HAIR + HATS,
    "hair_color": tuple(HAIR),
    "hat_color": tuple(CLOTH),
    "skin_color": tuple(SKIN),
    "eyes": (
        "closed", "cry", "default", "eyeRoll", "happy", "hearts", "side", "squint", "surprised", "wink", "winkWacky",
        "xDizzy",
    ),
    "eyebrows": (
        "angry", "angryNatural", "default", "defaultNatural", "flatNatural", "frownNatural", "raisedExcited",
        "raisedExcitedNatural", "sadConcerned", "sadConcernedNatural", "unibrowNatural", "upDown", "upDownNatural",
    ),
    "mouth": (
        "concerned", "default", "disbelief", "eating", "grimace", "sad", "screamOpen", "serious", "smile", "tongue",
        "twinkle", "vomit",
    ),
    "facial_hair": _FACIAL_HAIR,
    "facial_hair_color": tuple(HAIR),
    "accessories": _ACCESSORIES,
    "accessories_color": tuple(CLOTH),
    "clothes": (
        "blazerAndShirt", "blazerAndSweater", "collarAndSweater", "graphicShirt", "hoodie", "overall",
        "shirtCrewNeck", "shirtScoopNeck", "shirtVNeck",
    ),
    "clothes_color": tuple(CLOTH),
    "graphic": (
        "bat", "bear", "cumbia", "deer", "diamond", "hola", "pizza", "resist", "skull", "skullOutline",
    ),
    "background": tuple(BACKGROUND),
}  # fmt: skip

# Raised whenever the same seed would give another avatar.
AVATARS_VERSION = 1

CANVAS = 280.0  # the drawing's own units, both ways

# In canvas units, before the pose; left is the image's left. Fixed points of the style: its parts are drawn
# around them whatever the variant.
LANDMARKS: dict[str, tuple[float, float]] = {
    "left_eyebrow": (110.5, 94.0),
    "right_eyebrow": (169.5, 94.0),
    "left_eye": (114.0, 112.0),
    "right_eye": (166.0, 112.0),
    "nose": (140.0, 134.0),
    "mouth": (140.0, 155.0),
    "chin": (140.0, 186.0),
    "left_ear": (76.0, 117.0),
    "right_ear": (204.0, 117.0),
}


class Pose(NamedTuple):
    """The drawing scaled about the canvas's centre, rotated about it (degrees, clockwise), then shifted.

    shift_x, shift_y: percent of the canvas, right and down.
    """

    scale: float
    rotate: float
    shift_x: float
    shift_y: float

    def apply(self, x: float, y: float) -> tuple[float, float]:
        """Where the point of the unposed drawing lands; both in canvas units."""
        c, s = math.cos(math.radians(self.rotate)), math.sin(math.radians(self.rotate))
        half = CANVAS / 2
        x, y = self.scale * (x - half), self.scale * (y - half)
        return (
            c * x - s * y + half + self.shift_x * CANVAS / 100,
            s * x + c * y + half + self.shift_y * CANVAS / 100,
        )


class Avatar(NamedTuple):
    """One avatar before it is drawn. choices: a value for every attribute of CHOICES, shown or not."""

    choices: dict[str, str]
    pose: Pose


def draw(seed: int, index: int, stream: str = "avatar") -> Avatar:
    """The avatar number `index` of `seed`; another `stream` gives independent ones."""
    key = f"{seed}/{stream}/{index}"
    choices = {name: _pick(f"{key}/{name}", values) for name, values in CHOICES.items()}
    return Avatar(choices, _draw_pose(key))


def draw_pair(seed: int, index: int) -> tuple[Avatar, Avatar, str]:
    """Two avatars of one pose that differ in a single choice, and its attribute.

    The attribute is one that shows in the first. Adding or removing a part adds or removes its colour too.
    """
    first = draw(seed, index, "pair")
    key = f"{seed}/pair/{index}/change"
    name = _pick(key, tuple(name for name in CHOICES if _is_shown(name, first.choices)))
    others = tuple(dict.fromkeys(value for value in CHOICES[name] if value != first.choices[name]))
    changed = {**first.choices, name: _pick(f"{key}/value", others)}
    return first, Avatar(changed, first.pose), name


def shown(choices: Mapping[str, str]) -> dict[str, str]:
    """The choices as they can be seen: "none" for the colour of a part that is absent, for eyes behind
    opaque glasses ("kurt"; the others let them through) and for clothes under a hijab."""
    return {name: value if _is_shown(name, choices) else "none" for name, value in choices.items()}


def labels(choices: Mapping[str, str]) -> dict[str, int]:
    """Attributes with two values, 0 or 1, of what can be seen."""
    c = shown(choices)
    answers = {
        "eyeglasses": c["accessories"] not in ("none", "eyepatch"),
        "sunglasses": c["accessories"] in _DARK_GLASSES,
        "eyepatch": c["accessories"] == "eyepatch",
        "beard": c["facial_hair"] in _BEARDS,
        "moustache": c["facial_hair"] in _MOUSTACHES,
        "hat": c["top"] in HATS,
        "long_hair": c["top"] in _LONG_HAIR,
        "bald": c["top"] == "sides",
        "black_hair": c["hair_color"] == "black",
        "brown_hair": c["hair_color"] in ("brown", "dark_brown"),
        "blond_hair": c["hair_color"] in ("blonde", "golden", "platinum"),
        "gray_hair": c["hair_color"] == "silver",
        "pale_skin": c["skin_color"] in ("pale", "light"),
        "dark_skin": c["skin_color"] in ("deep", "dark_brown"),
        "smiling": c["mouth"] in ("default", "smile", "tongue", "twinkle"),
        "mouth_open": c["mouth"] in ("concerned", "default", "disbelief", "screamOpen", "smile", "tongue", "vomit"),
        "eyes_closed": c["eyes"] in ("closed", "happy"),
        "jacket": c["clothes"] in ("blazerAndShirt", "blazerAndSweater"),
        "graphic_shirt": c["clothes"] == "graphicShirt",
        "dark_background": c["background"] in ("teal", "slate", "plum"),
    }
    return {name: int(answer) for name, answer in answers.items()}


def landmarks(pose: Pose, size: int) -> dict[str, tuple[float, float]]:
    """Where LANDMARKS lie in the image, in pixels from the outer corner of its first pixel, x right, y down.

    Points hidden by hair, hats or glasses are given all the same; none leaves the image.
    """
    points = {name: pose.apply(*point) for name, point in LANDMARKS.items()}
    return {name: (x * size / CANVAS, y * size / CANVAS) for name, (x, y) in points.items()}


def _is_shown(name: str, choices: Mapping[str, str]) -> bool:
    if name == "hair_color":
        return choices["top"] not in HATS
    if name == "hat_color":
        return choices["top"] in HATS
    if name == "facial_hair_color":
        return choices["facial_hair"] != "none"
    if name == "accessories_color":
        return choices["accessories"] != "none"
    if name == "graphic":
        return choices["clothes"] == "graphicShirt" and choices["top"] != "hijab"
    if name == "clothes":  # a hijab covers all by which they are told apart
        return choices["top"] != "hijab"
    if name == "eyes":
        return choices["accessories"] != "kurt"
    return True


def _draw_pose(key: str) -> Pose:
    # Rounded as the drawing package rounds, so that landmarks and drawing use the same numbers.
    scale = round(_between(f"{key}/scale", 0.95, 1.12), 4)
    rotate = round(_between(f"{key}/rotate", -8.0, 8.0), 4)
    shift_x = round(_between(f"{key}/shift_x", -6.0, 6.0), 4)
    # The body ends in a straight cut, 100 units to either side of the middle: keep its corners below the edge.
    flat = Pose(scale, rotate, 0.0, 0.0)
    highest = min(flat.apply(40.0, CANVAS)[1], flat.apply(240.0, CANVAS)[1])
    lowest_shift = max(0.0, (CANVAS - highest) / CANVAS * 100)
    shift_y = round(lowest_shift + _between(f"{key}/shift_y", 0.0, 5.0) + 1e-4, 4)
    return Pose(scale, rotate, shift_x, shift_y)


def _uniform(key: str) -> float:
    """In [0, 1), the same on every machine."""
    return (int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big") >> 11) * 2.0**-53


def _between(key: str, low: float, high: float) -> float:
    return low + (high - low) * _uniform(key)


def _pick(key: str, values: tuple[str, ...]) -> str:
    return values[int(_uniform(key) * len(values))]
