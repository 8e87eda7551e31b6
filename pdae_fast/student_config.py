"""The configuration of a student, a small CNN that learns from a diffusion model's features."""

from __future__ import annotations

from dataclasses import dataclass

from .limits import (
    MAX_ATTRIBUTES,
    MAX_BLOCKS,
    MAX_LEVELS,
    MAX_NAME,
    brief,
    listed,
    one_of,
    positive,
    require,
    weights,
)

HEADS = ("classes", "parts", "points")
GROUPS = 8  # of every norm: width is a multiple of it
MOST_TIMES = 4  # the widest level has so many times the width


@dataclass(frozen=True)
class StudentConfig:
    """A residual CNN with GroupNorm on images of ``image_size`` and ``input_channel`` channels.

    halvings: the stem halves the resolution, and so does every level but the first. Level i (from 0) has
    ``width`` * min(i + 1, 4) channels and ``depth`` residual blocks. head: one of HEADS, or None; labels: the names of
    what it tells apart. crop: which square of an image it was trained on, as in PriorConfig.
    """

    image_size: int = 64
    input_channel: int = 3
    width: int = 24
    depth: int = 1
    halvings: int = 3
    head: str | None = None
    labels: tuple[str, ...] = ()
    crop: str = "centre"

    def __post_init__(self) -> None:
        for name in ("image_size", "input_channel", "width"):
            positive(name, getattr(self, name))
        positive("depth", self.depth, most=MAX_BLOCKS)
        positive("halvings", self.halvings, most=MAX_LEVELS)
        require(self.width % GROUPS == 0, f"width must be a multiple of {GROUPS}, not {brief(self.width)}")
        require(
            self.image_size % 2**self.halvings == 0,
            f"image_size {self.image_size} cannot be halved {self.halvings} times",
        )
        one_of("crop", self.crop, ("centre", "celeba"))
        labels = listed("labels", self.labels, "names")
        object.__setattr__(self, "labels", labels)
        require(
            len(labels) <= MAX_ATTRIBUTES
            and all(isinstance(name, str) and len(name) <= MAX_NAME and name.isprintable() for name in labels),
            f"labels must be at most {MAX_ATTRIBUTES} names of at most {MAX_NAME} characters, not {brief(labels)}",
        )
        if self.head is None:
            require(not labels, "labels go with a head")
        else:
            one_of("head", self.head, HEADS)
            least = 1 if self.head == "points" else 2
            require(len(labels) >= least, f"a head of {self.head} needs at least {least} labels, not {len(labels)}")
        weights("the student", sum(18 * self.depth * w * w for w in self.widths))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the levels, the finest first."""
        return tuple(self.width * min(i + 1, MOST_TIMES) for i in range(self.halvings))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Side lengths of the levels' maps, the finest first."""
        return tuple(self.image_size >> (i + 1) for i in range(self.halvings))
