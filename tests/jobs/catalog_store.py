"""A store for the catalogue's tests: two versions, signed and not, measured and not, and every kind of damage."""

from __future__ import annotations

import json
from pathlib import Path

from storage.layout import JOB_REPORT, manifest_key, report_key
from storage.manifest import canonical_json
from storage.registry import Registry
from storage.signing.keys import generate_key
from storage.signing.metadata import sign
from storage.signing.root import create_root
from storage.stores.local import LocalStore
from tests.storage.artifacts import make_draft, publish_new

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=document.title='owned'>\"'`{{7*7}}"


def mode(level: int | None, correct: int, *, activations: bool = False) -> dict[str, object]:
    word = {None: "float", 0: "part-bit", 1: "full-bit"}[level]
    return {
        "mode": word,
        "level": level,
        "activations": activations,
        "correct": correct,
        "total": 200,
        "resident_bytes": None if level is None else 1000 * (level + 1),
        "seconds": 0.5,
    }


def report(store: LocalStore, name: str, version: int, *, part: int = 180, note: str = "a note") -> None:
    layers = [
        {"name": "conv0", "bits": [8, 4], "weights": 1152, "sqnr_db": [14.5, 38.25]},
        {
            "name": "conv1",
            "bits": [8, 4],
            "weights": 1152,
            "sqnr_db": [15.5, None],
            "damage": {"images": 64, "noise": False, "divergence": 0.25, "same": 90.5, "drop": 1.5},
        },
    ]
    document = {"measured": [mode(None, 190), mode(0, part), mode(1, 189)], "layers": layers, "notes": [note]}
    store.put(report_key(name, version, JOB_REPORT), json.dumps(document).encode(), mode="overwrite")


def signed_store(folder: Path) -> LocalStore:
    """Return a store with ``net`` (two versions, one signed and measured) and ``plain`` (neither)."""
    store = LocalStore(folder / "store")
    keys = {role: generate_key(folder / f"{role}.pem") for role in ("root", "publisher", "online")}
    create_root(store, [keys["root"]], publishers=[keys["publisher"].public_key], online=[keys["online"].public_key])
    registry = Registry(store)
    for seed in (1, 2):
        draft = make_draft(registry, name="net", seed=seed)
        groups = draft.groups
        if seed == 2:  # the second version shares the first's first group
            first = registry.resolve("net", 1).manifest
            groups = (first.groups[0], draft.groups[1])
        registry.publish(draft.model_copy(update={"groups": groups}))
    registry.tag("net", "latest", 2)
    report(store, "net", 2)
    sign(store, "net", [keys["publisher"], keys["online"]], tags={"latest": 2})
    publish_new(store, name="plain", seed=3)
    return store


def break_things(store: LocalStore) -> None:
    """Add models that are broken in every way that one can be, and hostile words wherever a stranger may write."""
    registry = Registry(store)
    publish_new(store, name="rotten", seed=4)
    store.put(manifest_key("rotten", 1), b"{not json", mode="overwrite")
    publish_new(store, name="half", seed=5)
    store.put(manifest_key("half", 2), b'{"name": "half"}', mode="overwrite")
    publish_new(store, name="unreported", seed=6)
    store.put(report_key("unreported", 1, JOB_REPORT), b'{"measured": [{"correct": 9}]}', mode="overwrite")
    publish_new(store, name="misnamed", seed=7)
    store.put("models/misnamed/tags/latest.json", b"[]", mode="overwrite")
    store.put("models/foreign+name/versions/00000001.json", b"x", mode="overwrite")
    draft = make_draft(registry, name="hostile", seed=8)
    layers = tuple(layer.model_copy(update={"name": f"{HOSTILE}{i}"}) for i, layer in enumerate(draft.layers))
    hostile = draft.model_copy(
        update={
            "model": draft.model.model_copy(update={"arch": HOSTILE, "library": HOSTILE, "kwargs": {HOSTILE: HOSTILE}}),
            "recipe": {HOSTILE: HOSTILE, "long": "x" * 5000},
            "tool_versions": {HOSTILE: HOSTILE},
            "layers": layers,
            "version": 1,
        }
    )
    store.put(manifest_key("hostile", 1), canonical_json(hostile), mode="overwrite")
    report(store, "hostile", 1, note=HOSTILE)
