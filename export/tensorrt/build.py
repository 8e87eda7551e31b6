"""One ONNX graph to one TensorRT engine: parse, check against the manifest, build, say what is inside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import UserError
from .. import manifest as manifests
from ..backends.tensorrt_flavor import Flavor, configure, dtype_name, make_log, network_flags, targets

# bfloat16 arithmetic came with compute capability 8.0.
BFLOAT16_FROM = 8.0


@dataclass(frozen=True)
class Profile:
    """Images per evaluation: the fewest, those the engine is tuned for, the most."""

    minimum: int
    optimum: int
    maximum: int

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.optimum <= self.maximum:
            raise UserError(f"profile {self}: expected 1 <= MIN <= OPT <= MAX")

    def __str__(self) -> str:
        return f"{self.minimum},{self.optimum},{self.maximum}"

    @classmethod
    def parse(cls, text: str) -> Profile:
        """ "1,4,16" -> Profile(1, 4, 16)."""
        try:
            minimum, optimum, maximum = (int(part) for part in text.split(","))
        except ValueError:
            raise UserError(f"profile {text!r}; expected three whole numbers MIN,OPT,MAX such as 1,4,16") from None
        return cls(minimum, optimum, maximum)

    def shapes(self, shape: Iterable[int | str]) -> tuple[tuple[int, ...], ...]:
        """MIN, OPT and MAX of a shape of the manifest, whose dynamic dimension is given by name."""
        shape = tuple(shape)
        return tuple(
            tuple(v if isinstance(v, int) else n for v in shape) for n in (self.minimum, self.optimum, self.maximum)
        )


@dataclass
class Built:
    """A serialized engine and what is inside it."""

    plan: Any  # bytes, or a buffer of them
    #: how many layers of each type give each dtype: {"convolution": {"float16": 71}, ...}
    layers: dict[str, dict[str, int]] = field(default_factory=dict)


class EngineBuilder:
    """Builds the engines of one export with the same settings.

    ``timing_cache``: measurements of an earlier build (classic TensorRT), b"" to begin a new one, None for none. After
    :meth:`build` it holds what has been measured since; graphs with the same layers share measurements.
    """

    def __init__(self, flavor: Flavor, profile: Profile, tf32: bool = False, timing_cache: bytes | None = None) -> None:
        self.flavor, self.profile, self.tf32, self.timing_cache = flavor, profile, tf32, timing_cache
        self.trt = flavor.load()

    def check_capability(self, capability: str, dtype: str, present: str | None) -> None:
        """UserError unless engines of ``dtype`` can be built for ``capability`` here.

        ``present``: the capability of this machine's GPU, None without one.
        """
        title, version = self.flavor.title, self.trt.__version__
        known = targets(self.trt) if self.flavor.builds_without_gpu else {}
        if self.flavor.builds_without_gpu:
            if capability not in known:
                raise UserError(f"{title} {version} builds for compute capability {', '.join(known)}, not {capability}")
        elif capability != present:
            raise UserError(
                f"{title} builds engines on the GPU they are for, and this machine has "
                f"{'no usable GPU' if present is None else f'compute capability {present}'}, not {capability}; build "
                "there, or use --flavor tensorrt-rtx"
            )
        if dtype == "bfloat16" and float(capability) < BFLOAT16_FROM:
            raise UserError(f"compute capability {capability} has no bfloat16; export the ONNX graphs in float16")

    def build(self, path: Path, entry: dict[str, Any], dtype: str, capability: str) -> Built:
        """The engine of the graph at ``path``.

        ``entry``: its entry in the manifest, whose inputs and outputs it must have; ``dtype``: what its convolutions
        compute in. Raises UserError when it does not, when TensorRT does not read it or cannot build it.
        """
        trt = self.trt
        log = make_log(trt)
        builder = trt.Builder(log)
        network = builder.create_network(network_flags(trt))
        parser = trt.OnnxParser(network, log)
        if not parser.parse_from_file(str(path)):
            raise UserError(f"{path}: {self.flavor.title} does not read it: {_parse_errors(parser) or log.said()}")
        _check_io(path, network, entry)
        layers = _layers(trt, network)
        _check_precision(path, layers, dtype)

        config = builder.create_builder_config()
        configure(trt, config, self.tf32)
        profile = builder.create_optimization_profile()
        for tensor in entry["inputs"]:
            if any(isinstance(v, str) for v in tensor["shape"]):
                profile.set_shape(tensor["name"], *self.profile.shapes(tensor["shape"]))
        if config.add_optimization_profile(profile) < 0:
            raise UserError(f"{path}: {self.flavor.title} refuses the profile {self.profile}: {log.said()}")
        if self.flavor.builds_without_gpu:
            config.num_compute_capabilities = 1
            if not config.set_compute_capability(targets(trt)[capability], 0):
                raise UserError(f"{self.flavor.title} does not build for {capability}: {log.said()}")
        self._begin_timing(config, log)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise UserError(f"{path}: {self.flavor.title} cannot build it for {capability}: {log.said()}")
        if self.timing_cache is not None:
            self.timing_cache = bytes(config.get_timing_cache().serialize())
        return Built(plan, layers)

    def _begin_timing(self, config: Any, log: Any) -> None:
        if self.timing_cache is None:
            return
        cache = config.create_timing_cache(self.timing_cache)
        if cache is None or not config.set_timing_cache(cache, False):
            raise UserError(f"the timing cache is of another GPU or TensorRT, or damaged ({log.said()}); remove it")


def network_io(network: Any) -> dict[str, list[dict[str, Any]]]:
    """Inputs and outputs of a parsed network as the manifest writes them, dynamic dimensions as -1."""

    def entry(tensor: Any) -> dict[str, Any]:
        return {"name": tensor.name, "dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape)}

    return {
        "inputs": [entry(network.get_input(i)) for i in range(network.num_inputs)],
        "outputs": [entry(network.get_output(i)) for i in range(network.num_outputs)],
    }


def _check_io(path: Path, network: Any, entry: dict[str, Any]) -> None:
    found = network_io(network)
    for side in ("inputs", "outputs"):
        expected = {t["name"]: (t["dtype"], manifests.dims(t["shape"])) for t in entry[side]}
        actual = {t["name"]: (t["dtype"], t["shape"]) for t in found[side]}
        if sorted(actual) != sorted(expected):
            raise UserError(
                f"{path}: {side} are {', '.join(actual)}, but the manifest says {', '.join(expected)}; export once more"
            )
        for name, (dtype, shape) in expected.items():
            if actual[name] != (dtype, shape):
                raise UserError(
                    f"{path}: {name} is {actual[name][0]} {actual[name][1]}, but the manifest says {dtype} {shape}; "
                    "export once more"
                )


def _layers(trt: Any, network: Any) -> dict[str, dict[str, int]]:
    """Layers that compute in floating point, by type and by the dtype of their first output.

    In a strongly typed network the builder may fuse layers but not change these dtypes, so they are those of the
    engine. (The engine itself can be opened, and so inspected, only where a driver is.)
    """
    if not network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED):
        raise RuntimeError("the network is not strongly typed, so its dtypes would not be those of the engine")
    found: dict[str, Counter[str]] = {}
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        dtype = dtype_name(layer.get_output(0).dtype) if layer.num_outputs else ""
        if "float" in dtype:  # the others compute shapes
            found.setdefault(layer.type.name.lower(), Counter())[dtype] += 1
    return {kind: dict(sorted(counts.items())) for kind, counts in sorted(found.items())}


def _check_precision(path: Path, layers: dict[str, dict[str, int]], dtype: str) -> None:
    convolutions = layers.get("convolution", {})
    if convolutions and dtype not in convolutions:
        counts = ", ".join(f"{n} in {name}" for name, n in convolutions.items())
        raise UserError(f"{path}: its convolutions compute {counts}, but the manifest says {dtype}; export once more")


def _parse_errors(parser: Any) -> str:
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    return "; ".join(
        f"{e.node_operator()} (node {e.node_name() or e.node()}): {e.code().name.lower()}, {e.desc()}"
        for e in errors[:3]
    )
