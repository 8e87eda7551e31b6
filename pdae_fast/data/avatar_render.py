"""Drawing avatars and their part masks with DiceBear's style "avataaars" (Pablo Stanley)."""

from __future__ import annotations

import json
from importlib import metadata, resources
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from pdae_fast.data.avatar_style import BACKGROUND, CANVAS, CLOTH, HAIR, HATS, SKIN, Avatar
from pdae_fast.errors import UserError

INSTALL = 'pip install "pdae_fast[data]"'
PACKAGES = ("dicebear-core", "dicebear-styles", "resvg-py")

# The value in a mask is the place in this list.
PARTS = (
    "background", "skin", "clothes", "mouth", "nose", "eyes", "eyebrows", "hair", "hat", "facial_hair", "accessories",
)  # fmt: skip
_PART_OF = {
    "clothes": "clothes", "clothesGraphic": "clothes", "mouth": "mouth", "nose": "nose", "eyes": "eyes",
    "eyebrows": "eyebrows", "facialHair": "facial_hair", "accessories": "accessories",
}  # fmt: skip
_COLOURS = (
    (0, 0, 0), (237, 185, 138), (81, 153, 228), (201, 51, 5), (253, 152, 65), (255, 255, 255), (114, 65, 51),
    (44, 27, 24), (167, 255, 196), (165, 87, 40), (255, 72, 142),
)  # fmt: skip
# Fainter than this is a shadow or a blush: what shows is the part below. The drawings have nothing
# between 0.3 and 0.5.
_FAINT = 0.4


class Renderer:
    """Draws avatars; one for a process will do: making it is slow, because the style is checked.

    Raises UserError with the line to install where a package is missing or lacks a drawing that is needed.
    """

    def __init__(self) -> None:
        try:
            import resvg_py
            from dicebear import Avatar as Drawing
            from dicebear import Style

            definition = json.loads(resources.files("dicebear_styles").joinpath("avataaars.json").read_text("utf-8"))
        except (ImportError, OSError) as error:
            raise UserError(f"drawing avatars needs packages that are not installed ({error}): {INSTALL}") from error
        self._drawing = Drawing
        self._to_png = resvg_py.svg_to_bytes
        self._style = Style(definition)
        self._mask_style = Style(_labelled(definition))

    def image(self, avatar: Avatar, size: int) -> Image.Image:
        """The avatar as RGB, size x size."""
        options = {**_options(avatar), "backgroundColor": BACKGROUND[avatar.choices["background"]]}
        return self._render(self._style, options, size).convert("RGB")

    def mask(self, avatar: Avatar, size: int) -> Image.Image:
        """Which part each pixel shows: mode "P", values are places in PARTS.

        Sampled at pixel centres without anti-aliasing. Faint shadows count as what is below them.
        """
        pixels = np.asarray(self._render(self._mask_style, _options(avatar), size).convert("RGBA"))
        part, alpha = pixels[..., 0], pixels[..., 3]
        if not np.isin(alpha, (0, 255)).all() or part.max() >= len(PARTS):
            raise RuntimeError("the renderer blended the colours of a mask")
        mask = Image.fromarray(np.where(alpha == 255, part, 0).astype(np.uint8), "P")
        mask.putpalette([level for colour in _COLOURS for level in colour])
        return mask

    def _render(self, style: Any, options: dict[str, Any], size: int) -> Image.Image:
        svg = self._drawing(style, options).to_string()
        # The style has no text; looking for fonts is most of the time of a small picture.
        png = self._to_png(svg_string=svg, width=size, height=size, skip_system_fonts=True)
        return Image.open(BytesIO(bytes(png)))


def versions() -> dict[str, str]:
    """Installed versions of PACKAGES; UserError with the line to install where one is missing."""
    try:
        return {name: metadata.version(name) for name in PACKAGES}
    except metadata.PackageNotFoundError as error:
        raise UserError(f"drawing avatars needs {error.name}, which is not installed: {INSTALL}") from error


def _options(avatar: Avatar) -> dict[str, Any]:
    """Every choice spelled out, so that the style's own generator decides nothing."""
    c, pose = avatar.choices, avatar.pose
    options: dict[str, Any] = {
        "seed": "pdae_fast",
        "scale": pose.scale,
        "rotate": pose.rotate,
        "translateX": pose.shift_x,
        "translateY": pose.shift_y,
        "skinColor": SKIN[c["skin_color"]],
        "hairColor": HAIR[c["hair_color"]],
        "hatColor": CLOTH[c["hat_color"]],
        "facialHairColor": HAIR[c["facial_hair_color"]],
        "accessoriesColor": CLOTH[c["accessories_color"]],
        "clothesColor": CLOTH[c["clothes_color"]],
        "topVariant": c["top"],
        "topProbability": 100,
        "eyesVariant": c["eyes"],
        "eyebrowsVariant": c["eyebrows"],
        "mouthVariant": c["mouth"],
        "noseVariant": "default",
        "clothesVariant": c["clothes"],
        "clothesGraphicVariant": c["graphic"],
    }
    for part, name in (("facialHair", "facial_hair"), ("accessories", "accessories")):
        options[f"{part}Probability"] = 0 if c[name] == "none" else 100
        if c[name] != "none":
            options[f"{part}Variant"] = c[name]
    return options


def _labelled(definition: dict[str, Any]) -> dict[str, Any]:
    """The style with every part in one flat colour, whose red is the part's place in PARTS."""
    canvas = definition["canvas"]
    if (canvas["width"], canvas["height"]) != (CANVAS, CANVAS):
        raise UserError(f"the installed dicebear-styles draws on another canvas than {CANVAS:g}: {INSTALL}")
    components = {}
    for name, component in definition["components"].items():
        variants = {}
        for variant, content in component["variants"].items():
            part = ("hat" if variant in HATS else "hair") if name == "top" else _PART_OF[name]
            variants[variant] = {**content, "elements": _flat(content["elements"], part)}
        components[name] = {**component, "variants": variants}
    return {
        **definition,
        "attributes": {**definition["attributes"], "shape-rendering": "crispEdges"},
        "canvas": {**canvas, "elements": _flat(canvas["elements"], "skin")},
        "components": components,
    }


def _flat(elements: list[dict[str, Any]], part: str) -> list[dict[str, Any]]:
    flat = []
    for element in elements:
        attributes = dict(element.get("attributes") or {})
        opacity = min(float(attributes.pop("fill-opacity", 1)), float(attributes.pop("opacity", 1)))
        if opacity < _FAINT and part != "nose":  # the nose is nothing but a shadow
            continue
        if attributes.get("fill", "none") != "none":
            attributes["fill"] = f"#{PARTS.index(part):02x}0000"
        attributes.pop("style", None)  # blend modes
        new = {**element, "attributes": attributes}
        if "children" in element:
            new["children"] = _flat(element["children"], part)
        flat.append(new)
    return flat
