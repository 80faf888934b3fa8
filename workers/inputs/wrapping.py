"""Where the weights are in what training tools save: tables of containers, prefixes and extras, one row a case.

What decides is the network: the weights are where each of its names is found. The tables say how to look, and which of
two that fit are averaged ones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from workers.errors import CheckpointError, printable, shown

Choice = Literal["ema", "model"]
T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """A key that holds a state dict, or a prefix of all its names; ``averaged``: the weights are means over steps."""

    text: str
    averaged: bool
    tools: str
    averaged_beside: str | None = None  # it holds averaged weights where this key stands beside it


CONTAINERS = (
    Place("state_dict_ema", averaged=True, tools="timm's CheckpointSaver"),
    Place("model_ema", averaged=True, tools="torchvision's references, DeiT, ConvNeXt, Swin"),
    Place("ema_state_dict", averaged=True, tools="FixMatch and its kin"),
    Place("model_ema_state_dict", averaged=True, tools="hand-written loops"),
    Place("params_ema", averaged=True, tools="BasicSR"),
    Place("ema_model", averaged=True, tools="hand-written loops"),
    Place("ema", averaged=True, tools="hand-written loops"),
    Place("current_model_state", averaged=False, tools="PyTorch Lightning's WeightAveraging"),
    Place(
        "state_dict",
        averaged=False,
        tools="timm, PyTorch Lightning, PyTorch's ImageNet example",
        averaged_beside="current_model_state",
    ),
    Place("model", averaged=False, tools="torchvision's references, DeiT, ConvNeXt, Swin, fastai, ignite"),
    Place("model_state", averaged=False, tools="pycls"),
    Place("model_state_dict", averaged=False, tools="PyTorch's tutorials"),
    Place("net", averaged=False, tools="pytorch-cifar"),
    Place("module", averaged=False, tools="DeepSpeed"),
    Place("params", averaged=False, tools="BasicSR"),
    Place("network", averaged=False, tools="hand-written loops"),
    Place("state", averaged=False, tools="Composer"),
    Place("weights", averaged=False, tools="hand-written loops"),
)

PREFIXES = (
    Place("model_ema.", averaged=True, tools="Lightning modules with an averaged copy"),
    Place("ema_model.", averaged=True, tools="Lightning modules with an averaged copy, ema-pytorch"),
    Place("ema.", averaged=True, tools="Lightning modules with an averaged copy"),
    Place("averaged_model.", averaged=True, tools="Lightning's weight averaging"),
    Place("module.", averaged=False, tools="DataParallel, DistributedDataParallel, AveragedModel"),
    Place("_orig_mod.", averaged=False, tools="torch.compile"),
    Place("model.", averaged=False, tools="Lightning modules"),
    Place("net.", averaged=False, tools="Lightning modules"),
    Place("network.", averaged=False, tools="Lightning modules"),
    Place("backbone.", averaged=False, tools="Lightning modules"),
    Place("timm_model.", averaged=False, tools="transformers' wrapper of timm"),
    Place("online_model.", averaged=False, tools="ema-pytorch"),
)

EXTRAS: Mapping[str, str] = {
    "n_averaged": "AveragedModel's count",
    "total_ops": "a profiler's counts",
    "total_params": "a profiler's counts",
    "num_batches_tracked": "counts of batches",
}
"""The last part of names that are no weights, where the network has none of the name."""

_AVERAGED_MARK = "n_averaged"
_DEEPEST = 4


@dataclass(frozen=True)
class Unwrapped(Generic[T]):
    """The weights by the network's names, and lines for people on where they were found.

    ``plain``: they stood under these very names, and nothing else was there.
    """

    state: Mapping[str, T]
    notes: tuple[str, ...]
    plain: bool


@dataclass(frozen=True)
class _Candidate(Generic[T]):
    """A state dict at a place, seen through a prefix."""

    path: tuple[str, ...]
    prefix: str
    averaged: bool
    in_table: bool
    state: Mapping[str, T]
    beside: tuple[str, ...]
    extras: tuple[str, ...]
    missing: int

    @property
    def place(self) -> str:
        where = f"'{printable('.'.join(self.path))}'" if self.path else "the file itself"
        return f"{where} under {self.prefix!r}" if self.prefix else where


def unwrap(
    document: Any, keys: Collection[str], leaf: type[T], *, name: str, choice: Choice | None = None
) -> Unwrapped[T]:
    """Find a network's weights in what a tool saved.

    Args:
        document: what the file holds: dicts in dicts, tensors at their ends.
        keys: the names in the network's state dict.
        leaf: the type of a tensor.
        name: what the user calls the file.
        choice: averaged weights or the model's own, where the file has both; by default the averaged, as timm does.

    Raises:
        CheckpointError: there is no state dict in it, or not the one that was asked for, or several that fit.
    """
    candidates = list(_candidates(document, frozenset(keys), leaf))
    if not candidates:
        raise CheckpointError(_nothing(document, name))
    fitting = [one for one in candidates if not one.missing]
    if not fitting:  # the nearest, for whoever says what it lacks
        return _result(min(candidates, key=lambda one: one.missing), (), keys, name)
    pool = _chosen(fitting, choice, name)
    if not pool[0].in_table and len(pool) > 1:
        raise CheckpointError(
            f"{name} holds the network {len(pool)} times ({', '.join(one.place for one in pool)}); "
            "save the one that is meant alone."
        )
    others = [one for one in fitting if one.averaged != pool[0].averaged]
    return _result(pool[0], tuple(others), keys, name)


def _chosen(fitting: list[_Candidate[T]], choice: Choice | None, name: str) -> list[_Candidate[T]]:
    """Return those of the kind that was asked for, in the order of the tables; what no table names stands last."""
    by_kind = {averaged: [one for one in fitting if one.averaged is averaged] for averaged in (True, False)}
    if choice is not None and not by_kind[choice == "ema"]:
        there = "averaged weights" if choice == "model" else "weights that are not averaged"
        places = shown([one.place for one in fitting], most=3)
        raise CheckpointError(f"{name}: model.weights is {choice!r}, but it holds {there} alone, in {places}.")
    pool = by_kind[choice == "ema"] if choice is not None else by_kind[True] or by_kind[False]
    return [one for one in pool if one.in_table] or pool


def _result(
    candidate: _Candidate[T], others: tuple[_Candidate[T], ...], keys: Collection[str], name: str
) -> Unwrapped[T]:
    names = frozenset(keys)
    dropped = [key for key in candidate.state if key not in names and key.rpartition(".")[2] in EXTRAS]
    state = {key: value for key, value in candidate.state.items() if key not in dropped}
    leftovers = sorted({EXTRAS[key.rpartition(".")[2]] for key in (*dropped, *candidate.extras)})
    if candidate.beside:
        leftovers.append(f"{len(candidate.beside)} names without that prefix ({shown(candidate.beside, most=3)})")
    notes = []
    if others:
        what, other = ("averaged weights", "model") if candidate.averaged else ("weights that are not averaged", "ema")
        notes.append(
            f"{name}: took the {what} in {candidate.place}; 'model.weights: {other}' takes those in {others[0].place}."
        )
    elif candidate.path or candidate.prefix:
        notes.append(f"{name}: the weights are in {candidate.place}.")
    if leftovers:
        notes.append(f"{name}: left out {', '.join(leftovers)}.")
    return Unwrapped(state, tuple(notes), plain=not (candidate.path or candidate.prefix or dropped))


def _nothing(document: Any, name: str) -> str:
    if isinstance(document, Mapping) and document:
        keys = shown([str(key) for key in document])
        return f"{name} holds no state dict: its keys are {keys}; expected tensors by name."
    return f"{name} holds a {type(document).__name__}; expected a state dict, tensors by name."


def _candidates(document: Any, keys: frozenset[str], leaf: type[T]) -> Iterator[_Candidate[T]]:
    for path, averaged, in_table, state in _states(document, leaf, (), set(), averaged=False, in_table=True):
        extras = {key for key in state if key not in keys and key.rpartition(".")[2] in EXTRAS}
        marked = any(key.rpartition(".")[2] == _AVERAGED_MARK for key in extras)
        for prefix, by_prefix, tabled in _prefixes(state, keys):
            inner = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            outside = [key for key in state if not key.startswith(prefix)]
            yield _Candidate(
                path,
                prefix,
                averaged or by_prefix or marked,
                in_table and tabled,
                inner,
                beside=tuple(key for key in outside if key not in extras),
                extras=tuple(key for key in outside if key in extras),
                missing=sum(key not in inner for key in keys if not key.endswith("num_batches_tracked")),
            )


def _states(
    document: Any, leaf: type[T], path: tuple[str, ...], identities: set[int], *, averaged: bool, in_table: bool
) -> Iterator[tuple[tuple[str, ...], bool, bool, dict[str, T]]]:
    """Yield every dict that holds tensors by name, those that the table names first, in its order."""
    if not isinstance(document, Mapping) or len(path) > _DEEPEST or id(document) in identities:
        return
    identities.add(id(document))
    state = {key: value for key, value in document.items() if isinstance(key, str) and isinstance(value, leaf)}
    if state:
        yield path, averaged, in_table, state
    places = {place.text: place for place in CONTAINERS}
    strange = [key for key in document if isinstance(key, str) and key not in places]
    for key in [*(text for text in places if text in document), *strange]:
        place = places.get(key)
        yield from _states(
            document[key],
            leaf,
            (*path, key),
            identities,
            averaged=averaged or (place is not None and (place.averaged or place.averaged_beside in document)),
            in_table=in_table and place is not None,
        )


def _prefixes(state: Mapping[str, T], keys: frozenset[str]) -> Iterator[tuple[str, bool, bool]]:
    """Yield the prefixes to look through: (prefix, averaged, whether the table names all of it), none at all first."""
    yield "", False, True
    prefixes: dict[str, bool] = {}
    for key in state:
        prefix, averaged = "", False
        while place := next((one for one in PREFIXES if key.startswith(one.text, len(prefix))), None):
            prefix, averaged = prefix + place.text, averaged or place.averaged
            prefixes.setdefault(prefix, averaged)
    yield from ((prefix, averaged, True) for prefix, averaged in prefixes.items())
    # Any other prefix under which the network's longest name stands.
    longest = max(keys, key=len, default="")
    strange = {key[: -len(longest)] for key in state if longest and key.endswith(f".{longest}")} - set(prefixes)
    yield from ((prefix, False, False) for prefix in sorted(strange))
