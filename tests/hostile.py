"""Values that no honest file holds: what property tests put in place of honest ones."""

import copy
import math

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

HUGE = (0, -1, 1, 2, 2**16 + 1, 2**31, 2**40, 2**63, 10**30, 10**400, 10**4000)
FLOATS = (0.0, -1.0, 0.5, 5e-324, 1e-9, 1e308, math.nan, math.inf, -math.inf)
WORDS = ("", "false", "linear", "stored", "normal", "pdae", "\n\r\x00", "../x", "..", "\ud800", "x" * 5000)

scalars = (
    st.none()
    | st.booleans()
    | st.sampled_from(HUGE)
    | st.sampled_from(FLOATS)
    | st.sampled_from(WORDS)
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


def quick(examples):
    """Settings of a property test: the same examples every time, and no file of them."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


def places(tree, path=()):
    """Paths of all values in a tree of dicts and lists."""
    yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(value, (*path, key))


@st.composite
def mutated(draw, tree):
    """``tree`` with one to three of its values replaced, removed or joined by unknown ones."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from([path for path in places(tree) if path]))
        inner = tree
        for key in way:
            inner = inner[key]
        action = draw(st.sampled_from(("replace", "replace", "replace", "remove", "add")))
        if action == "replace":
            inner[last] = draw(values)
        elif action == "remove":
            del inner[last]
        elif isinstance(inner, dict):
            inner[draw(st.text(max_size=5))] = draw(values)
        if not tree:
            break
    return tree
