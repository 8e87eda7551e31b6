"""Work that is left out between the evaluations of one trajectory: named approximations, all off unless asked for.

A spec is a comma-separated list of

    gradient:K       G is evaluated on every K-th step and kept in between
    trunk:K          the trunk is evaluated on every K-th step; in between both decoders run on the kept maps with the
                     time embedding of the moment ("Faster Diffusion", arXiv 2312.09608)
    deep:K           on the steps in between only the outer part of trunk and decoders is evaluated, on top of the deep
    deep:K:M         map kept from the key step; M skips count as outer ("DeepCache", arXiv 2312.00858)
    window:LOW-HIGH  G is left out at times t outside LOW <= t < HIGH, up and down alike
    gradient:off     G is left out altogether: x_T alone carries the image, z nothing

The first step of every trajectory is a key step; so is one that needs what no earlier step has left. What leaves G out
is a function of t alone, which x_T can be inferred for; all others make a step depend on the steps before it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..arguments import as_int
from ..errors import UserError

EXPECTED = (
    "expected a comma-separated list of gradient:K, trunk:K, deep:K or deep:K:M, window:LOW-HIGH and gradient:off"
)
NEVER = (0, 0)


@dataclass(frozen=True)
class Reuse:
    """What a plan leaves out; the module says what the fields mean. The default leaves out nothing.

    ``outer`` 0 stands for the skips of the outermost level. Raises UserError for values without a meaning.
    """

    gradient: int = 1
    trunk: int = 1
    deep: int = 1
    outer: int = 0
    window: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("gradient", "trunk", "deep", "outer"):
            object.__setattr__(self, name, as_int(f"reuse {name}", getattr(self, name)))
        for name in ("gradient", "trunk", "deep"):
            if getattr(self, name) < 1:
                raise UserError(f"reuse {name}:{getattr(self, name)}: the period must be at least 1")
        if self.trunk > 1 and self.deep > 1:
            raise UserError("reuse trunk and deep exclude each other: a kept trunk holds the deep map already")
        if self.outer < 0:
            raise UserError(f"reuse needs at least 1 outer skip, not {self.outer}")
        if self.window not in (None, NEVER) and not 0 <= self.window[0] < self.window[1]:
            raise UserError(f"reuse window:{self.window[0]}-{self.window[1]} is empty; expected 0 <= LOW < HIGH")

    @classmethod
    def parse(cls, spec: str | Reuse | None) -> Reuse:
        """The approximations that ``spec`` names; None, "" and "none" are none. UserError for anything else."""
        if isinstance(spec, Reuse):
            return spec
        if spec is None or (isinstance(spec, str) and spec in ("", "none")):
            return cls()
        if not isinstance(spec, str):
            raise UserError(f"reuse {spec!r} is not understood; {EXPECTED}")
        values: dict[str, object] = {}
        for term in spec.split(","):
            name, *arguments = term.strip().split(":")
            found = _term(name, arguments, spec)
            if values.keys() & found.keys():
                raise UserError(f"reuse {spec!r} says {' and '.join(values.keys() & found.keys())} twice")
            values.update(found)
        return cls(**values)

    def __str__(self) -> str:
        terms = [f"{name}:{getattr(self, name)}" for name in ("gradient", "trunk") if getattr(self, name) > 1]
        if self.deep > 1:
            terms.append(f"deep:{self.deep}" + (f":{self.outer}" if self.outer else ""))
        if self.window == NEVER:
            terms.append("gradient:off")
        elif self.window is not None:
            terms.append(f"window:{self.window[0]}-{self.window[1]}")
        return ",".join(terms) or "none"

    @property
    def keeps(self) -> bool:
        """Whether anything is kept from one step for others, so that a step depends on those before it."""
        return max(self.gradient, self.trunk, self.deep) > 1

    def wants_gradient(self, t: int) -> bool:
        """Whether G is used at time ``t`` at all."""
        return self.window is None or self.window[0] <= t < self.window[1]


NOTHING = Reuse()


def _term(name: str, arguments: list[str], spec: str) -> dict[str, object]:
    try:
        if (name, *arguments) == ("gradient", "off"):
            return {"window": NEVER}
        if name in ("gradient", "trunk"):
            (period,) = arguments
            return {name: int(period)}
        if name == "deep":
            period, outer = arguments if len(arguments) == 2 else (*arguments, None)
            return {"deep": int(period)} | ({} if outer is None else {"outer": int(outer)})
        if name == "window":
            (ends,) = arguments
            low, high = ends.split("-")
            return {"window": (int(low), int(high))}
    except ValueError:
        pass
    raise UserError(f"reuse {spec!r} is not understood at {':'.join([name, *arguments])!r}; {EXPECTED}")
