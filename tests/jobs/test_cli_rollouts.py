"""``nestquant rollout`` as a person types it, and a device that is told who it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from storage.stores.local import LocalStore
from tests.jobs.conftest import InitSigning, Run
from tests.storage.device.artifacts import publish


def test_a_rollout_by_commands(
    nestquant: Run, signing: InitSigning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path / "store")
    for version in (1, 2):
        publish(store, version=version, groups=1, fresh=[0])
    place, signer = ("--store", store.root), signing(store.root)
    keys = signer.options

    code, _, err = nestquant("rollout", "net@2", "--percent", 10, *place, *keys)
    assert (code, "net: tag 'latest' is not signed" in err) == (1, True)
    assert nestquant("sign", "net", "--tag", "latest=1", *place, *keys)[0] == 0
    assert nestquant("rollout", "net", *place)[1] == "net: no rollout; every device follows 'latest'.\n"
    words = ("rollout", "net@2", "--percent", 10, "--seed", "s", "--cohort", "kitchen")
    code, _, err = nestquant(*words, *place)
    assert (code, "rollouts are signed: give --key" in err) == (2, True)
    told = "net: version 2 to 10 % of the devices of kitchen that follow 'latest'"
    assert nestquant(*words, *place, *keys)[1] == f"{told}.\n"
    assert nestquant("rollout", "net", "--pause", "--cohort", "kitchen", *place, *keys)[1] == f"{told}, paused.\n"
    assert (
        nestquant(*words[:3], 50, "--cohort", "kitchen", "--json", *place, *keys)[1]
        == json.dumps(
            [{"cohort": "kitchen", "paused": False, "seed": "s", "share": 5000, "version": 2}], indent=2, sort_keys=True
        )
        + "\n"
    )

    def pulled(device_id: str, *cohort: str) -> int:
        monkeypatch.setenv("NESTQUANT_DEVICE_ID", device_id)
        cache = ("--cache", tmp_path / device_id, "--trust", signer.trust)
        return int(json.loads(nestquant("pull", "net", *cache, *place, *cohort, "--json")[1])["version"])

    # Places under the seed "s": d0 3,951 and d2 9,291.
    assert [pulled("d0"), pulled("d0", "--cohort", "kitchen"), pulled("d2", "--cohort", "kitchen")] == [1, 2, 1]
    assert nestquant("rollout", "net", "--withdraw", "--cohort", "kitchen", *place, *keys)[0] == 0
    assert pulled("d0", "--cohort", "kitchen") == 1
    for wrong in (("net@2", "--pause"), ("net", "--percent", 10), ("net", "--pause", "--withdraw"), ("net@2",)):
        assert nestquant("rollout", *wrong, *place, *keys)[0] == 2
