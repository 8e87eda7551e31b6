"""Taking off what trainers wrap around a state dict: entries beside it, prefixes of its names, a second copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .unpickle import Inert

# Entries that hold the weights, and their moving average.
_RAW = ("model", "state_dict", "model_state_dict", "net", "network", "unet", "module", "params")
_EMA = ("ema", "ema_model", "model_ema", "ema_state_dict", "ema_model_state_dict", "model_ema_state_dict", "shadow")
_PREFIXES = ("module.", "_orig_mod.", "model.", "unet.", "net.", "network.", "online_model.")
_EMA_PREFIXES = ("ema_model.", "ema.", "model_ema.")
# What stands beside the names of averaged models.
_COUNTERS = ("n_averaged", "initted", "step", "num_updates", "decay")

# The networks of a published PDAE file, as entries.
NETWORKS = ("denoise_fn", "encoder", "decoder", "latent_denoise_fn", "classifier")
ENTRIES = NETWORKS + tuple(f"ema_{name}" for name in NETWORKS)
# What this project calls them in a PDAE's own state dict, where it differs.
_OWN = {"latent_denoiser": "latent_denoise_fn"}


@dataclass(frozen=True)
class Copies:
    """The weights in a file: as trained, averaged, or both."""

    raw: Mapping[str, Any] | None = None
    ema: Mapping[str, Any] | None = None

    def preferred(self, weights: str) -> Mapping[str, Any]:
        """The copy that ``weights`` ("ema" or "raw") asks for, else the other one."""
        first, second = (self.raw, self.ema) if weights == "raw" else (self.ema, self.raw)
        return first if first is not None else second if second is not None else {}


def unwrap(contents: Any) -> Copies:
    """The state dict(s) in ``contents``, or what a PDAE or Diff-AE file holds as it is."""
    if isinstance(contents, list | tuple):
        # ermongroup/ddim: [model, optimiser, epoch, step, EMA], the last only with an EMA.
        states = [part for part in contents if _is_state(part)]
        if not states:
            return Copies({})
        last = states[-1] if len(states) > 1 else None
        return Copies(unwrap(states[0]).raw, last and unwrap(last).preferred("raw"))
    if any(name in contents for name in ENTRIES):
        return Copies(strip(contents, ("module.", "_orig_mod.")))
    if _is_diffae(contents):
        return Copies(contents)
    if _is_diffae({"state_dict": contents}) and not any(_begins(name, "classifier.") for name in contents):
        return Copies({"state_dict": dict(contents)})
    raw, ema = _entry(contents, _RAW), _entry(contents, _EMA)
    if raw is None and ema is None:
        return _flat(contents)
    if ema is None:
        return unwrap(raw)
    average = unwrap(ema)
    if raw is not None:
        return Copies(unwrap(raw).preferred("raw"), average.preferred("ema"))
    return average if average.ema is not None else Copies(ema=average.raw)


def strip(state: Mapping[str, Any], prefixes: tuple[str, ...] = _PREFIXES) -> dict[str, Any]:
    """``state`` without the ``prefixes`` that every name carries, in whatever order they are nested."""
    state = dict(state)
    while prefix := next((p for p in prefixes if state and _all_begin(state, p)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A flat PDAE state dict as entries: ``ema_decoder.out.0.weight`` goes under ``ema_decoder``.

    So are PDAE files kept as .safetensors, and so is the state dict of this project's PDAE. Another one stays flat.
    """
    # A bare encoder's own names start with "encoder." too; its first tensor is encoder.0.weight.
    entries = (*ENTRIES, *_OWN)
    own = any(_begins(name, *(f"{entry}." for entry in entries)) for name in flat)
    if not own or "encoder.0.weight" in flat or any(_begins(name, "encoder.down_blocks.") for name in flat):
        return dict(flat)
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        entry, _, rest = name.partition(".") if isinstance(name, str) else (name, "", "")
        if entry in entries and rest:
            nested.setdefault(_OWN.get(entry, entry), {})[rest] = value
        else:
            nested[name] = value
    return nested


def _flat(contents: Mapping[str, Any]) -> Copies:
    """A state dict, perhaps of several copies told apart by a prefix."""
    state, averaged = dict(contents), False
    while True:
        counted = {name: value for name, value in state.items() if name not in _COUNTERS}
        averaged |= "n_averaged" in state
        groups = {p: [n for n in counted if _begins(n, p)] for p in (*_PREFIXES, *_EMA_PREFIXES)}
        ema = next((p for p in _EMA_PREFIXES if groups[p]), None)
        raw = next((p for p in _PREFIXES if groups[p]), None)
        if ema is not None:
            average = _flat({n.removeprefix(ema): counted[n] for n in groups[ema]}).preferred("ema")
            rest = {n: v for n, v in counted.items() if n not in set(groups[ema])}
            # Buffers of a schedule may stand beside the two copies.
            rest = {n.removeprefix(raw): rest[n] for n in groups[raw]} if raw else rest if _is_state(rest) else {}
            return Copies(_flat(rest).preferred("raw") if rest else None, average)
        if raw is None or len(groups[raw]) < len(counted):
            break
        state = {name.removeprefix(raw): value for name, value in counted.items()}
    found = nest(counted if averaged else state)
    return Copies(ema=found) if averaged else Copies(found)


def _entry(contents: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    found = (contents[name] for name in names if isinstance(contents.get(name), Mapping) and contents[name])
    return next((value for value in found if not isinstance(value, Inert)), None)


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())


def _is_diffae(contents: Mapping[str, Any]) -> bool:
    """A Lightning file of Diff-AE, whose settings and buffers stand beside the networks."""
    state = contents.get("state_dict")
    if not isinstance(state, Mapping):
        return False
    networks = ("model.time_embed.", "model.encoder.", "model.latent_net.", "model.ema_latent_net.")
    networks += tuple(f"ema_{name}" for name in networks) + ("classifier.", "ema_classifier.")
    # This project's own PDAE has an encoder too, and a decoder.
    others = ("decoder.", "model.decoder.", "online_model.")
    return any(_begins(name, *networks) for name in state) and not any(_begins(name, *others) for name in state)


def _begins(name: Any, *prefixes: str) -> bool:
    return isinstance(name, str) and name.startswith(prefixes)


def _all_begin(state: Mapping[str, Any], prefix: str) -> bool:
    return all(_begins(name, prefix) for name in state)
