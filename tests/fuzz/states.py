"""Hostile state files by hand, each with the words that the first command on its model must say."""

from __future__ import annotations

import json
from typing import Any

from tests.fuzz.corpus import Hostile


def good_state(**changes: Any) -> dict[str, Any]:
    """Return the document of a state with version 1 of ``net`` in use."""
    from tests.fuzz.trusted import bench
    from tests.storage.device.artifacts import digest_of

    current = {"version": 1, "digest": digest_of(bench().raw), "level": 0, "signed": False}
    document: dict[str, Any] = {"schema_version": 1, "name": "net", "current": current, "failed": None}
    return document | {"previous": None, "pending": None} | changes


def states() -> dict[str, Hostile]:
    """Return hostile states of ``net`` by name."""

    def change(**changes: Any) -> bytes:
        return json.dumps(good_state(**changes)).encode()

    current = good_state()["current"]
    return {
        "empty": Hostile(b"", "is not the state of net"),
        "not UTF-8": Hostile(b"\xff\xfe" + change(), "is not the state of net"),
        "a list": Hostile(b"[]", "field document"),
        "null": Hostile(b"null", "field document"),
        "nested without end": Hostile(b"[" * 100_000, "nested more than 64 deep"),
        "nested 250 deep": Hostile(b'{"a":' * 250 + b"1" + b"}" * 250, "nested more than 64 deep"),
        "a key twice": Hostile(change().replace(b'"failed"', b'"name": "net", "failed"'), "a key stands twice"),
        "NaN": Hostile(change(failed=0).replace(b'"failed": 0', b'"failed": NaN'), "NaN is no number of JSON"),
        "a number of 10,000 digits": Hostile(change().replace(b'"level": 0', b'"level": ' + b"9" * 10_000), "digits"),
        "a key too many": Hostile(change(more=1), "field more"),
        "another schema": Hostile(change(schema_version=2), "field schema_version"),
        "another model's": Hostile(change(name="other"), "it is that of other"),
        "a name that climbs": Hostile(change(name="../../etc"), "field name"),
        "a digest that climbs": Hostile(change(current={**current, "digest": "sha256:../../x"}), "current.digest"),
        "a digest of nothing": Hostile(change(current={**current, "digest": f"sha256:{'0' * 64}"}), "No such file"),
        "another version's digest": Hostile(change(current={**current, "version": 2}), "says that it is net version 1"),
        "version 10**30": Hostile(change(current={**current, "version": 10**30}), "says that it is net version 1"),
        "a negative level": Hostile(change(current={**current, "level": -1}), "field current.level"),
        "level 10**12": Hostile(change(current={**current, "level": 10**12}), ""),
        "a lone surrogate": Hostile(change(failed="\ud800"), ""),
        "lines in what failed": Hostile(change(failed="a\nb"), ""),
    }
