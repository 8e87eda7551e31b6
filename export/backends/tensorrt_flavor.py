"""The two flavours of TensorRT behind one small adapter: what differs between them is here and nowhere else.

"tensorrt" is the classic one: it times kernels while it builds, so it needs the GPU that the engine is for.
"tensorrt-rtx" is TensorRT for RTX: it builds for any compute capability it knows, without a GPU, and compiles the last
part when the engine is first run. Both have nearly the same Python interface.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ...errors import UserError

# numpy's words for the dtypes that the graphs use; the keys are names of trt.DataType.
DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "BOOL": "bool",
    "UINT8": "uint8",
    "INT8": "int8",
}
_CAPABILITY = re.compile(r"[1-9]\d*\.\d")


@dataclass(frozen=True)
class Flavor:
    """One of the two packages; ``name`` is also the backend that the manifest states."""

    name: str
    title: str
    module: str
    install: str
    builds_without_gpu: bool

    def load(self) -> ModuleType:
        """The package; UserError with the install command where it is missing or does not load."""
        try:
            return importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            if error.name != self.module:
                raise UserError(
                    f"{self.title} is installed but does not load ({error}); reinstall it: {self.install}"
                ) from error
            raise UserError(f"{self.title} is not installed; install it: {self.install}") from error
        except (ImportError, OSError) as error:
            raise UserError(
                f"{self.title} is installed but does not load ({error}); reinstall it: {self.install}"
            ) from error


FLAVORS = {
    "tensorrt": Flavor("tensorrt", "TensorRT", "tensorrt", 'pip install "pdae_fast[tensorrt]"', False),
    "tensorrt-rtx": Flavor(
        "tensorrt-rtx", "TensorRT for RTX", "tensorrt_rtx", 'pip install "pdae_fast[tensorrt-rtx]"', True
    ),
}


def parse_capability(text: str) -> str:
    """ "8.9" or "12.0" as it is; UserError for anything else."""
    if not isinstance(text, str) or not _CAPABILITY.fullmatch(text):
        raise UserError(f"compute capability {text!r}; expected a number such as 8.9 or 12.0")
    return text


def file_suffix(capability: str) -> str:
    """ "8.9" -> "sm89"."""
    return "sm" + capability.replace(".", "")


def targets(trt: Any) -> dict[str, Any]:
    """Capabilities that this package builds for without the GPU, {"8.9": trt.ComputeCapability.SM89, ...}."""
    members = getattr(trt, "ComputeCapability", None)
    if members is None:
        return {}
    found = {}
    for name, value in members.__members__.items():
        if match := re.fullmatch(r"SM(\d+)(\d)", name):
            found[f"{match[1]}.{match[2]}"] = value
    return found


def dtype_name(trt_dtype: Any) -> str:
    """numpy's word for a trt.DataType; the word of TensorRT, in lower case, where numpy has none."""
    return DTYPES.get(trt_dtype.name, trt_dtype.name.lower())


def make_log(trt: Any) -> Any:
    """A logger that keeps errors (``.errors``) instead of printing: they become part of one line."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.Severity.ERROR):
                self.errors.append(str(message))

        def said(self, otherwise: str = "it gave no reason") -> str:
            """The first error, which is the cause of the later ones."""
            return self.errors[0] if self.errors else otherwise

    return Log()


def network_flags(trt: Any) -> int:
    """Flags of a strongly typed network (TensorRT 10 needs the flag; 11 and RTX know no other kind)."""
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def configure(trt: Any, config: Any, tf32: bool) -> None:
    """Set the builder's options that do not depend on the model.

    TF32 is on by default in TensorRT: it rounds float32 operands to 10 bits, so it is an option here. An engine that
    allocates nothing while it runs can be captured into a CUDA graph. Names and dtypes of layers stay in the engine,
    for the inspector.
    """
    flags = trt.BuilderFlag
    (config.set_flag if tf32 else config.clear_flag)(flags.TF32)
    if hasattr(flags, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(flags.REQUIRE_USER_ALLOCATION)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED


def create_context(trt: Any, engine: Any) -> Any:
    """An execution context; None when the GPU has no room for it.

    TensorRT for RTX compiles kernels for the shapes at hand in the background and uses general ones until they are
    ready; a captured graph would keep the general ones for good. So they are compiled before the first run returns.
    """
    strategies = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
    if strategies is None:
        return engine.create_execution_context()
    config = engine.create_runtime_config()
    config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
    return engine.create_execution_context(config)
