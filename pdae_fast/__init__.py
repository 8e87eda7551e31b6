"""pdae_fast: a fast engine for PDAE, which turns a pre-trained diffusion model into an autoencoder."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoints import available
    from .config import DiffAEConfig, LatentConfig, PDAEConfig, PriorConfig, ScheduleConfig, UNetConfig, presets
    from .errors import UserError
    from .models import PDAE, DiffAE, Prior, Student
    from .pipeline import Pipeline
    from .samplers import Recipe
    from .student_config import StudentConfig

__version__ = "0.1.0"

__all__ = [
    "PDAE",
    "DiffAE",
    "DiffAEConfig",
    "LatentConfig",
    "PDAEConfig",
    "Pipeline",
    "Prior",
    "PriorConfig",
    "Recipe",
    "ScheduleConfig",
    "Student",
    "StudentConfig",
    "UNetConfig",
    "UserError",
    "available",
    "presets",
]

# Names are imported when they are first used (PEP 562), because `pdae_fast.export.runtime` has to import on machines
# without PyTorch, and importing a submodule runs this file.
_HOME = {
    "available": "checkpoints",
    **dict.fromkeys(
        ("DiffAEConfig", "LatentConfig", "PDAEConfig", "PriorConfig", "ScheduleConfig", "UNetConfig", "presets"),
        "config",
    ),
    "UserError": "errors",
    **dict.fromkeys(("DiffAE", "PDAE", "Prior", "Student"), "models"),
    "Pipeline": "pipeline",
    "Recipe": "samplers",
    "StudentConfig": "student_config",
}
_SUBMODULES = (
    "checkpoints", "config", "engine", "errors", "files", "models", "pipeline", "samplers", "schedule",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
