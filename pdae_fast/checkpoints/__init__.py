"""Every file format this project reads or writes; nothing else knows a foreign key name.

Works on configurations and dictionaries of tensors, below the models, so that they can load themselves.
"""

from .directory import Loaded, available, load_directory, save_directory
from .kinds import Kind, identify
from .load import Options, load
from .official import save_official

__all__ = [
    "Kind",
    "Loaded",
    "Options",
    "available",
    "identify",
    "load",
    "load_directory",
    "save_directory",
    "save_official",
]
