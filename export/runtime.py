"""Run an exported directory: numpy in, numpy out, no PyTorch.

    from pdae_fast.export.runtime import Session

    session = Session("exported")                  # or provider="cuda"; or a directory of TensorRT engines
    z = session.encode(x0)                         # x0: float32 [N, C, H, W] in [-1, 1] -> z [N, D]
    x_T = session.invert(x0, z)                    # inferred x_T
    x = session.decode(z, x_T)                     # near exact; session.decode(z, seed=1) draws x_T

Needs numpy and what the directory was made for: onnxruntime, OpenVINO on request, or TensorRT.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..arguments import as_images, as_indices, as_int, as_seed, check_range
from ..errors import UserError
from ..limits import MAX_TIMESTEPS
from . import manifest as manifests
from .backends.backend import Backend


def load_backend(
    directory: str | Path,
    manifest: dict[str, Any],
    name: str | None = None,
    provider: str = "auto",
    threads: int | None = None,
    allow_fallback: bool = False,
) -> Backend:
    """The backend called ``name`` (None: the one the directory was made for); UserError when it cannot run here."""
    made_for = manifest["backend"]
    name = made_for if name is None else name
    if name == made_for == "onnxruntime":
        from .backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(directory, manifest, provider, threads, allow_fallback)
    if name == "openvino" and made_for == "onnxruntime":
        from .backends.openvino import OpenVINOBackend

        return OpenVINOBackend(directory, manifest, provider, threads)
    if name == made_for:
        if provider not in ("auto", "cuda"):
            raise UserError(f"{directory}: TensorRT engines run on a GPU only, not on provider {provider!r}")
        from .backends.tensorrt import TensorRTBackend

        return TensorRTBackend(directory, manifest)
    expected = "onnxruntime or openvino" if made_for == "onnxruntime" else made_for
    raise UserError(f"{directory}: made for {made_for}, so backend {name!r} cannot run it; expected {expected}")


def noise(seed: int, indices: range, shape: tuple[int, ...], kind: str = "normal") -> np.ndarray:
    """Random float32 [len(indices), C, H, W]; image number ``indices[k]`` of ``seed`` always gets the same.

    Standard normal, or where ``kind`` is "standardised" with mean 0 and standard deviation 1 in every channel. Drawn by
    numpy, so that it differs from what the PyTorch pipeline draws for the same seed. UserError for a seed outside
    0 ... 2^63 - 1.
    """
    seed, indices = as_seed(seed), as_indices("indices", indices)
    draws = [np.random.default_rng((seed, i)).standard_normal(shape, np.float32) for i in indices]
    x = np.stack(draws) if draws else np.empty((0, *shape), np.float32)
    if kind == "standardised":
        x = (x - x.mean((2, 3), keepdims=True)) / x.std((2, 3), keepdims=True)
    return x


class Session:
    """An exported directory, ready to run: ``encode``, ``features``, ``invert``, ``decode``, ``reconstruct``.

    Args:
        directory: written by ``python -m pdae_fast.export onnx`` or ``... tensorrt``.
        backend: None (what the directory was made for) or "openvino" for ONNX files.
        provider: for ONNX Runtime "auto" (CUDA where it works, else the CPU), "cpu", "cuda", "tensorrt" ... or the full
            name of an execution provider. What is asked for is verified after loading: a silent fall-back to the CPU
            is a UserError unless ``allow_fallback``.
        threads: of one network evaluation on the CPU (default: the backend's own choice).
        batch_size: images per evaluation (default and upper limit: the ``max_batch`` of the export). Results do not
            depend on it beyond rounding.
        check_files: compare every file with the hash in the manifest before it is used.

    Images are floating point [N, C, H, W] in [-1, 1]. Raises UserError for anything a user can get wrong. Several
    threads may use one session; a copied or pickled one is opened anew.
    """

    def __init__(
        self,
        directory: str | Path,
        backend: str | None = None,
        provider: str = "auto",
        *,
        threads: int | None = None,
        allow_fallback: bool = False,
        batch_size: int | None = None,
        check_files: bool = True,
    ) -> None:
        if not isinstance(directory, (str, os.PathLike)):
            raise UserError(f"the exported directory must be a path, not {type(directory).__name__}")
        self.directory = Path(directory).expanduser()
        self.manifest = manifests.read(self.directory)
        if threads is not None:
            threads = as_int("threads", threads, 1)
        limit = self.manifest["max_batch"]
        if batch_size is not None:
            batch_size = as_int("batch size", batch_size)
            if not 1 <= batch_size <= limit:
                raise UserError(f"batch size {batch_size}: this export takes 1 to {limit} images at a time")
        self.batch_size = batch_size or limit
        options = {"threads": threads, "allow_fallback": allow_fallback, "batch_size": batch_size}
        self._opened = functools.partial(
            type(self), self.directory.absolute(), backend, provider, **options, check_files=check_files
        )
        manifests.check_signatures(self.directory, self.manifest)
        if check_files:
            manifests.check_files(self.directory, self.manifest)
        self.backend = load_backend(self.directory, self.manifest, backend, provider, threads, allow_fallback)

    def __reduce__(self) -> tuple:
        return self._opened, ()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.manifest["image_shape"]
        return channels, height, width

    @property
    def provider(self) -> str:
        """What the graphs really run on."""
        return self.backend.provider

    # -- checks and batching ---------------------------------------------------------------------------------------

    def _images(self, x: Any, what: str, picture: bool = True) -> np.ndarray:
        """x [N, C, H, W] checked, as float32; ``picture``: whether its values have to be in [-1, 1]."""
        x = as_images(x, self.image_shape, what, "N", take_8_bit=False)
        if picture and len(x):
            check_range(float(x.min()), float(x.max()), what)
        return x

    def _codes(self, z: Any, count: int | None = None) -> np.ndarray | None:
        """z checked; None for a prior, which takes none."""
        if self.manifest["kind"] == "prior":
            if z is not None:
                raise UserError("this export holds a prior alone, which takes no z")
            return None
        D = self.manifest["latent_dim"]
        if not isinstance(z, np.ndarray) or z.ndim != 2 or z.shape[1] != D or (count is not None and len(z) != count):
            found = list(z.shape) if isinstance(z, np.ndarray) else type(z).__name__
            raise UserError(f"z has shape {found}; expected an array [{'N' if count is None else count}, {D}]")
        if z.dtype.kind != "f" or not np.isfinite(z).all():
            raise UserError("z must hold finite floating point values")
        return np.ascontiguousarray(z, np.float32)

    def _parts(self, count: int) -> Iterator[slice]:
        for start in range(0, count, self.batch_size):
            yield slice(start, min(start + self.batch_size, count))

    def _loop(self, graph: str, x: np.ndarray, z: np.ndarray | None, steps: int) -> np.ndarray:
        out = np.empty_like(x)
        for part in self._parts(len(x)):
            conditioning = None if z is None else self._run("conditioning", {"z": z[part]}, "conditioning")
            out[part] = self._expected(graph, self.backend.loop(graph, x[part], conditioning, steps), x[part].shape)
        return out

    def _run(self, graph: str, inputs: dict[str, np.ndarray], output: str) -> np.ndarray:
        """One output of one evaluation."""
        count = len(next(iter(inputs.values())))
        entry = next(entry for entry in self.manifest["graphs"][graph]["outputs"] if entry["name"] == output)
        return self._expected(graph, self.backend.run(graph, inputs).get(output), (count, *entry["shape"][1:]))

    def _expected(self, graph: str, found: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
        if found is None or found.shape != shape:
            what = "no such output" if found is None else f"{list(found.shape)}"
            raise UserError(f"{self.directory}: {graph} gives {what}; its manifest says {list(shape)}")
        return found

    # -- what users call -------------------------------------------------------------------------------------------

    def encode(self, x0: np.ndarray) -> np.ndarray:
        """x0 [N, C, H, W] -> z [N, D] float32."""
        if self.manifest["kind"] == "prior":
            raise UserError("encode needs a PDAE; this export holds a prior alone")
        x0 = self._images(x0, "x0")
        z = np.empty((len(x0), self.manifest["latent_dim"]), np.float32)
        for part in self._parts(len(x0)):
            z[part] = self._run("encoder", {"x0": x0[part]}, "z")
        return z

    def features(
        self, images: np.ndarray, t: int | Sequence[int] = 0, z: np.ndarray | None = None
    ) -> tuple[np.ndarray, ...]:
        """The maps [N, C, h, w] of the middle block and of the output blocks that were exported, the network told time
        ``t``, one or [N]. ``images`` [N, C, H, W]; of a Diff-AE: for ``z`` (None: of these images)."""
        x, kind = self._images(images, "images"), self.manifest["kind"]
        if not self.manifest.get(manifests.FEATURES):
            raise UserError(f"{self.directory}: an export without features; export once more with --features")
        most = (self.manifest.get("schedule") or {}).get("timesteps", MAX_TIMESTEPS) - 1
        times = [t] if isinstance(t, (int, np.integer)) else as_indices("t", t)
        times = np.array([as_int("t", value, 0, most) for value in times], np.int64)
        if len(times) not in (1, len(x)):
            raise UserError(f"t has {len(times)} values; expected one, or one for each of {len(x)} images")
        times = np.ascontiguousarray(np.broadcast_to(times, len(x)))
        if z is not None and kind != "diffae":
            raise UserError("z: only the features of a Diff-AE are of a z")
        if kind == "diffae":
            z = self.encode(x) if z is None else self._codes(z, len(x))
        names = [entry["name"] for entry in self.manifest["graphs"][manifests.FEATURES]["outputs"]]
        shapes = self.manifest[manifests.FEATURES]
        maps = tuple(np.empty((len(x), *shape), np.float32) for shape in shapes)
        for part in self._parts(len(x)):
            inputs = {"x": x[part], "t": times[part]}
            if kind == "diffae":
                inputs["conditioning"] = self._run("conditioning", {"z": z[part]}, "conditioning")
            found = self.backend.run(manifests.FEATURES, inputs)
            for name, whole, shape in zip(names, maps, shapes, strict=True):
                whole[part] = self._expected(manifests.FEATURES, found.get(name), (len(x[part]), *shape))
        return maps

    def invert(self, x0: np.ndarray, z: np.ndarray | None = None) -> np.ndarray:
        """Inferred x_T [N, C, H, W] of x0 [N, C, H, W] given its z [N, D] (a prior takes none)."""
        x0 = self._images(x0, "x0")
        return self._loop("invert_step", x0, self._codes(z, len(x0)), self.manifest["encode_steps"])

    def decode(
        self,
        z: np.ndarray | None = None,
        x_T: np.ndarray | None = None,
        seed: int = 0,
        *,
        first: int = 0,
        count: int | None = None,
    ) -> np.ndarray:
        """Images [N, C, H, W], not clamped, from z [N, D] and x_T [N, C, H, W].

        Without x_T it is drawn (see :func:`noise`): image k of the call is image ``first + k`` of ``seed``. A prior
        takes no z; then x_T or ``count`` says how many images.
        """
        z, first = self._codes(z), as_int("first", first, 0)
        x_T = None if x_T is None else self._images(x_T, "x_T", picture=False)
        known = {len(v) for v in (z, x_T) if v is not None}
        if count is not None:
            known.add(as_int("count", count, 0))
        if len(known) != 1:
            raise UserError(f"z, x_T and count disagree on the number of images: {sorted(known) or 'none given'}")
        (count,) = known
        if x_T is None:
            x = noise(seed, range(first, first + count), self.image_shape, self.manifest.get("noise", "normal"))
        else:
            x = x_T
        return self._loop("decode_step", x, z, self.manifest["steps"])

    def reconstruct(self, x0: np.ndarray) -> np.ndarray:
        """x0 -> z and inferred x_T -> x0 again [N, C, H, W], by the separate graphs."""
        z = self.encode(x0) if self.manifest["kind"] != "prior" else None
        return self.decode(z, self.invert(x0, z))
