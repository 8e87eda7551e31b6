"""A plan's own weights: what happens to the caller's model later cannot reach them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import UserError

M = TypeVar("M", bound=nn.Module)


def owned(
    model: M, device: torch.device, dtype: torch.dtype, unrounded: Collection[Tensor] = (), copy: bool = True
) -> M:
    """A copy of ``model`` on ``device`` in ``dtype``, in eval mode and without gradients; ``model`` is left alone.
    Parameters that are in ``unrounded`` become float32. Without ``copy`` it shares what it need not change.

    Not a deep copy: hooks, gradients and whatever else hangs on the caller's modules stay with them. Weights that are
    one tensor in the model are one in the copy. UserError for a model without values (on the meta device).
    """
    tensors: dict[int, Tensor] = {}
    exact = {id(value) for value in unrounded}

    def tensor(value: Tensor) -> Tensor:
        if id(value) not in tensors:
            to = torch.float32 if id(value) in exact else dtype if value.is_floating_point() else value.dtype
            own = value.detach().to(device, to, copy=copy)
            tensors[id(value)] = nn.Parameter(own, requires_grad=False) if isinstance(value, nn.Parameter) else own
        return tensors[id(value)]

    own = _rebuilt(model, tensor)
    tensors.clear()  # functions that call themselves live until the garbage is collected, and what they know of
    return own


def sharing(model: M) -> M:
    """The same with the tensors of ``model``: a layer can be replaced in it."""
    return _rebuilt(model, lambda value: value)


def _rebuilt(model: M, tensor: Callable[[Tensor], Tensor]) -> M:
    """A copy of ``model``'s modules that holds ``tensor`` of each of its parameters and buffers."""
    modules: dict[int, nn.Module] = {}

    def held(value: Tensor) -> Tensor:
        if value.is_meta:
            raise UserError(
                "the model has no weights (it is on the meta device, or a pipeline took them); load it before it is run"
            )
        return tensor(value)

    def module(given: nn.Module) -> nn.Module:
        if id(given) not in modules:
            own = modules[id(given)] = object.__new__(type(given))
            hooks = {name: type(value)() for name, value in vars(given).items() if name.endswith("_hooks")}
            own.__dict__.update({**vars(given), **hooks, "training": False})
            for name, change in (("_parameters", held), ("_buffers", held), ("_modules", module)):
                parts = copy.copy(vars(given)[name])
                parts.update({key: None if part is None else change(part) for key, part in parts.items()})
                own.__dict__[name] = parts
        return modules[id(given)]

    return module(model)
