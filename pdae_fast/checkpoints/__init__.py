"""Every file format this project reads or writes; nothing else knows a foreign key name.

Works on configurations and dictionaries of tensors, below the models, so that they can load themselves.
"""

from .directory import Loaded, available, load_directory, save_directory
from .load import load

__all__ = ["Loaded", "available", "load", "load_directory", "save_directory"]
