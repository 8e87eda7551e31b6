"""Unpickling without importing or running anything that the file names.

A class or function that is not needed for tensors becomes an inert stand-in, so that weights can be read from files
which carry classes of a trainer beside them.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Inert(dict):
    """Stands for an object of a class that is not read: accepts any construction and state, and does nothing.

    Its fields and items are those of the mapping, so that a saved Namespace or hyper-parameter dictionary can be
    looked up. :func:`describe` gives the name of the class it stands for.
    """

    dump_patches = False  # torch's reader of old files asks every container for it

    def __new__(cls, *arguments: Any, **named: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__()

    def __call__(self, *arguments: Any, **named: Any) -> Inert:
        return type(self)()

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.update(part)

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Iterable[Any]) -> None:
        pass

    add = append
    __hash__ = object.__hash__
    __eq__ = object.__eq__


class Unreadable:
    """Stands for a tensor that is no plain dense one; ``what`` says which kind."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __setstate__(self, state: Any) -> None:
        pass


class _StateDict(dict):
    """For OrderedDict, whose pickled attributes (``_metadata``) are of no use here."""

    def __setstate__(self, state: Any) -> None:
        pass


def describe(value: Any) -> str:
    """What ``value`` is, for a message: "a str", "a module.Class (not read: only tensors and plain values are)"."""
    if isinstance(value, Unreadable):
        return f"a {value.what} tensor"
    cls = value if isinstance(value, type) else type(value)
    if issubclass(cls, Inert):
        return f"a {cls.__module__}.{cls.__name__} (not read: only tensors and plain values are)"
    return "a dict" if cls is _StateDict else f"a {cls.__name__}"


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any) -> Tensor:
    size, stride = tuple(size), tuple(stride)
    if not all(isinstance(n, int) and n >= 0 for n in (offset, *size, *stride)) or len(size) != len(stride):
        raise pickle.UnpicklingError("a tensor of impossible size")
    reach = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) + 1 if all(size) else 0
    # Tensor.set_ would make the storage larger instead of complaining.
    if reach * storage.dtype.itemsize > storage._untyped_storage.nbytes():
        raise pickle.UnpicklingError("a tensor that reaches beyond its storage")
    return torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage, offset, size, stride)


def _typed_tensor(storage: Any, offset: int, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any):
    # _rebuild_tensor_v3, for types that have no storage of their own: float8 and the like.
    return Unreadable(str(dtype).removeprefix("torch."))


def _parameter(data: Any, *rest: Any) -> Any:
    return data


def _retyped(rebuild: Any, cls: Any, arguments: Any, state: Any = None) -> Any:
    # A subclass of Tensor: its plain content, where one of the functions here makes it.
    return rebuild(*arguments) if rebuild in (_tensor, _typed_tensor, _parameter) else Unreadable(describe(cls)[2:])


def _unreadable(what: str) -> Any:
    def rebuild(*arguments: Any) -> Unreadable:
        return Unreadable(what)

    return rebuild


def _latin1(text: str, encoding: str = "") -> Any:
    return text.encode("latin1") if isinstance(text, str) and encoding == "latin1" else Inert()


def _mapping(*arguments: Any) -> dict:
    return _StateDict(*(a for a in arguments if isinstance(a, list | dict)))


_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _StateDict,
    ("collections", "defaultdict"): _mapping,
    ("_codecs", "encode"): _latin1,
    ("torch", "Size"): tuple,
    ("torch.storage", "UntypedStorage"): torch.UntypedStorage,
    ("torch.nn.parameter", "Parameter"): _parameter,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _retyped,
    ("torch._utils", "_rebuild_sparse_tensor"): _unreadable("sparse"),
    ("torch._utils", "_rebuild_sparse_csr_tensor"): _unreadable("sparse"),
    ("torch._utils", "_rebuild_qtensor"): _unreadable("quantised"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _unreadable("meta (without values)"),
    ("torch._utils", "_rebuild_nested_tensor"): _unreadable("nested"),
    ("torch._utils", "_rebuild_wrapper_subclass"): _unreadable("wrapped"),
    **{
        (module, name): kind
        for module in ("builtins", "__builtin__")
        for name, kind in (("set", set), ("frozenset", frozenset), ("complex", complex), ("dict", dict))
    },
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, **options: Any) -> None:
        _check_memo(file)
        super().__init__(file, **options)

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        # Never super().find_class: that imports.
        return _KNOWN.get((module, name)) or type(name, (Inert,), {"__module__": module})


def _check_memo(file: Any) -> None:
    """Raise unless the pickle at the file's position keeps its objects under small numbers.

    An unpickler makes a table of as many entries as the largest number: one wrong byte can ask for 64 GiB.
    """
    start = file.tell()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > count:
            raise pickle.UnpicklingError(f"an object is kept as number {argument}")
    file.seek(start)


def _load(file: Any, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


# What torch.load asks of a pickle module.
_MODULE = SimpleNamespace(__name__=__name__, Unpickler=_Unpickler, load=_load)


class _NoDescriptor(io.BufferedReader):
    """A file that hides its descriptor, so that torch.load does not try whether it is a tar archive."""

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")


def load(path: Path, mapped: bool) -> Any:
    """What ``torch.save`` put into ``path``: plain values, tensors on the CPU, and inert stand-ins for the rest.

    ``mapped``: the file is a zip archive, whose tensors can stay in it until they are needed. A damaged stream can
    raise anything.
    """
    if mapped:
        return torch.load(path, map_location="cpu", pickle_module=_MODULE, weights_only=False, mmap=True)
    with _NoDescriptor(io.FileIO(path)) as file:
        return torch.load(file, map_location="cpu", pickle_module=_MODULE, weights_only=False)
