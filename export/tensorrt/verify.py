"""Whether engines compute what their ONNX graphs compute: both run here on the same random inputs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ... import cli
from ...errors import UserError
from .. import manifest as manifests
from ..backends.backend import Backend
from ..runtime import load_backend

# Largest accepted relative error, by dtype. Both compute the same graph in the same dtype; what is left is the order of
# sums, and what the dtype rounds. TF32 keeps as many bits as float16.
TOLERANCE = {"float32": 2e-4, "float16": 2e-2, "bfloat16": 1e-1}
TOLERANCE_TF32 = 2e-2
# A step is judged by how far it moves x, since most of x_next is x itself, which would hide the network's errors; but
# not by less than this fraction of x_next, or rounding would count where a step hardly moves.
SMALLEST_MOVE = 0.01
# Steps of the loop that is compared as a whole: one uncaptured, and enough replays to see a wrong step number.
LOOP = 5


def relative_error(found: np.ndarray, expected: np.ndarray, start: np.ndarray | None = None) -> float:
    """||found - expected|| / ||expected - start||, in float64; infinite when ``found`` is not finite.

    ``start``: the x that a step began with (see `SMALLEST_MOVE`), None for 0.
    """
    if not np.isfinite(found).all():
        return float("inf")
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    scale = np.linalg.norm(expected)
    if start is not None:
        scale = max(np.linalg.norm(expected - start), SMALLEST_MOVE * scale)
    return float(np.linalg.norm(found - expected) / max(scale, np.finfo(np.float64).tiny))


def verify(source: Path, engines: Path, quiet: bool = False) -> None:
    """Compare every engine with ONNX Runtime on the CPU, and print the errors.

    UserError when they cannot run here (the engines stay: they are complete) or when an error is above `TOLERANCE`.
    """
    onnx, built = manifests.read(source, ["onnxruntime"]), manifests.read(engines, ["tensorrt", "tensorrt-rtx"])
    try:
        reference = load_backend(source, onnx, provider="cpu")
        tested = load_backend(engines, built)
    except UserError as error:
        raise UserError(f"the engines are complete, but --verify could not compare them here: {error}") from error
    tolerance = max(TOLERANCE[built["dtype"]], TOLERANCE_TF32 if built.get("tf32") else 0.0)
    rows, failed = [], []
    fewest, _, most = built["profile"]
    for count in dict.fromkeys((fewest, most)):
        for what, error in _errors(reference, tested, built, count):
            rows.append([what, str(count), f"{error:.1e}"])
            if not error <= tolerance:
                failed.append(f"{what} at {count} images: {error:.1e}")
    if not quiet:
        print(cli.table(["compared with ONNX Runtime", "images", "relative error"], rows))
    if failed:
        raise UserError(f"{engines}: too far from ONNX Runtime (at most {tolerance:g}): {'; '.join(failed)}")


def _errors(reference: Backend, tested: Backend, built: dict[str, Any], count: int) -> Iterator[tuple[str, float]]:
    """What was compared and its relative error; all inputs come from the reference, so that errors do not add up."""
    random = np.random.default_rng(count)
    shape = (count, *built["image_shape"])
    conditioning: dict[str, np.ndarray] = {}
    if built["kind"] != "prior":
        given = {"x0": random.uniform(-1, 1, shape).astype(np.float32)}
        for graph in ("encoder", "conditioning"):
            (output, expected), *_ = reference.run(graph, given).items()
            yield graph, relative_error(tested.run(graph, given)[output], expected)
            given = {output: expected}
        conditioning = given
    for graph, total in (("decode_step", built["steps"]), ("invert_step", built["encode_steps"])):
        x = random.standard_normal(shape).astype(np.float32)
        for i in dict.fromkeys((0, total // 2, total - 1)):
            given = {"x": x, **conditioning, "step": np.array([i], np.int64)}
            expected = reference.run(graph, given)["x_next"]
            yield f"{graph} {i}", relative_error(tested.run(graph, given)["x_next"], expected, x)
        steps = min(LOOP, total)
        looped = [backend.loop(graph, x, conditioning.get("conditioning"), steps) for backend in (tested, reference)]
        yield f"{graph} 0..{steps - 1}, replayed", relative_error(*looped, x)
