"""``nestquant bundle`` and ``pull --from`` as a person types them."""

from __future__ import annotations

import json
from pathlib import Path

from storage.stores.local import LocalStore
from tests.jobs.conftest import InitSigning, Run
from tests.storage.device.artifacts import publish


def test_a_bundle_travels(nestquant: Run, signing: InitSigning, tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    for version in (1, 2):
        publish(store, version=version, groups=1, fresh=[0])
    place, signer = ("--store", store.root), signing(store.root)
    assert nestquant("sign", "net", "--version", 1, "--tag", "latest=2", *place, *signer.options)[0] == 0

    usb, old = tmp_path / "usb.tar", tmp_path / "old.tar"
    lasting = ("--days", 90, "--key", signer.key("online"))
    code, out, _ = nestquant("bundle", "net", "--level", "full", "-o", usb, *place, *lasting)
    assert code == 0
    assert out.startswith(f"{usb}: net version 2 up to level 1, signed, ")
    assert nestquant("bundle", "net@1", "-o", old, *place, "--json")[0] == 0
    for wrong in (("--level", "half"), ("--days", 3), ("--key", signer.key("online"))):
        assert nestquant("bundle", "net", "-o", usb, *place, *wrong)[0] == 2

    cache = ("--cache", tmp_path / "cache")
    code, out, _ = nestquant("pull", "--from", usb, "--trust", signer.trust, *cache, "--json")
    assert (code, json.loads(out)["version"], json.loads(out)["level"]) == (0, 2, 0)
    assert json.loads(nestquant("upgrade", "net", "--from", usb, *cache, "--json")[1])["level"] == 1
    code, _, err = nestquant("pull", "--from", old, *cache)
    assert code == 4
    assert err == (f"nestquant: {old} holds net version 1, and version 2 is here; write net@1 if going back is meant\n")
    assert nestquant("pull", "net@1", "--level", 0, "--from", old, *cache)[0] == 0
    code, _, err = nestquant("pull", "other", "--from", usb, *cache)
    assert (code, f"{usb} holds net, not other" in err) == (2, True)
    assert nestquant("pull", *cache)[0] == 2
    code, _, err = nestquant("pull", "net", *cache)
    assert (code, "Missing option '--store'" in err) == (2, True)
