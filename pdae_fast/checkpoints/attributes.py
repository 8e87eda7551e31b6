"""Names for the rows of an attribute classifier; its files hold none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError

# The order of the columns of list_attr_celeba.txt, which a classifier of 40 attributes follows.
# fmt: off
CELEBA = (
    "5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs", "Big_Lips",
    "Big_Nose", "Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby", "Double_Chin",
    "Eyeglasses", "Goatee", "Gray_Hair", "Heavy_Makeup", "High_Cheekbones", "Male", "Mouth_Slightly_Open",
    "Mustache", "Narrow_Eyes", "No_Beard", "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline",
    "Rosy_Cheeks", "Sideburns", "Smiling", "Straight_Hair", "Wavy_Hair", "Wearing_Earrings", "Wearing_Hat",
    "Wearing_Lipstick", "Wearing_Necklace", "Wearing_Necktie", "Young",
)
# fmt: on


def attribute_names(given: str | Path | Sequence[str] | None, count: int, where: str) -> tuple[tuple[str, ...], str]:
    """``count`` names and where they come from.

    ``given`` is a list, a comma-separated string, or a file: one name a line, or CelebA's list_attr_celeba.txt
    (a count, then a line of names). Without it, 40 rows are taken to be CelebA's. UserError when the number differs.
    """
    if given is None:
        if count == len(CELEBA):
            return CELEBA, "the 40 of CelebA, in the order of list_attr_celeba.txt (assumed)"
        return tuple(f"attribute_{i}" for i in range(count)), "numbered (no --attributes given)"
    if isinstance(given, str) and ("," in given or not Path(given).expanduser().exists()):
        names, source = given.split(","), "--attributes"
    elif isinstance(given, str | Path):
        names, source = _read(Path(given).expanduser()), str(given)
    else:
        names, source = list(given), "attributes="
    names = [str(name).strip() for name in names if str(name).strip()]
    if len(names) != count or len(set(names)) != count:
        raise UserError(
            f"{where}: the classifier has {count} rows but {source} names {len(set(names))} attributes; "
            f"expected {count} different names"
        )
    return tuple(names), source


def _read(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a list of attribute names ({type(error).__name__})") from None
    if len(lines) > 1 and lines[0].strip().isdigit():
        return lines[1].split()
    return [line for line in lines if not line.lstrip().startswith("#")]
