"""What would lock devices out of what is signed: a signer's wrong clock, roles that end, tags that go back; and each
documented way out, tried with a device that was locked out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import time_machine
from securesystemslib.signer import CryptoSigner

from storage.device import Device, Retry, StoreSource
from storage.device.errors import Untrusted
from storage.signing.expiry import expiries, trust_warnings
from storage.signing.keys import SigningError
from storage.signing.metadata import Lives, Signed, refresh, sign
from storage.signing.root import create_root, newest_root, renew_root, revoke_key
from storage.stores.blob_store import BlobStore
from storage.stores.local import LocalStore
from storage.stores.memory import MemoryStore
from tests.storage.device.artifacts import publish

DAY_S = 86_400.0


@dataclass
class Signers:
    """A store with a signed version 1, and the keys behind it."""

    store: BlobStore
    root: CryptoSigner
    publisher: CryptoSigner
    online: CryptoSigner
    anchor: bytes

    @classmethod
    def of(cls, store: BlobStore, life: timedelta = timedelta(days=365)) -> Signers:
        root, publisher, online = (CryptoSigner.generate_ed25519() for _ in range(3))
        anchor = create_root(store, [root], publishers=[publisher.public_key], online=[online.public_key], life=life)
        publish(store)
        return cls(store, root, publisher, online, anchor)

    def sign(self, **options: object) -> Signed:
        return sign(self.store, "net", [self.publisher, self.online], **options)  # type: ignore[arg-type]

    def device(self, folder: Path) -> Device:
        retry = Retry(attempts=1, base_s=0.001)
        return Device(folder, StoreSource(self.store), root_of_trust=self.anchor, retry=retry)


@pytest.fixture
def signers(request: pytest.FixtureRequest) -> Signers:
    """In a store that tells the time by the same clock, as a wrong server of the house would."""
    return Signers.of(MemoryStore(request.node.name))


class Clock:
    """This process's clock, so many seconds off, and running."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack, self._real_s = stack, time.time()

    def set(self, ahead_s: float) -> None:
        self._stack.close()
        self._stack.enter_context(time_machine.travel(self._real_s + ahead_s, tick=True))


@pytest.fixture
def clock() -> Iterator[Clock]:
    with ExitStack() as stack:
        yield Clock(stack)


@pytest.mark.parametrize(("ahead_s", "told"), [(365 * DAY_S, "s ahead of"), (-400.0, "s behind")])
def test_a_clock_that_differs_from_the_stores_signs_nothing(
    tmp_path: Path, clock: Clock, ahead_s: float, told: str
) -> None:
    signers = Signers.of(LocalStore(tmp_path / "store"))  # files are dated by the kernel
    signers.sign(tags={"latest": 1})
    before = {info.key: signers.store.get(info.key) for info in signers.store.list("models/net/trust/")}
    clock.set(ahead_s)
    for attempt in (signers.sign, lambda: refresh(signers.store, "net", [signers.online])):
        with pytest.raises(SigningError, match=rf"^this machine's clock is \d+ {told} .*; set it \(NTP\), then sign$"):
            attempt()
    assert {info.key: signers.store.get(info.key) for info in signers.store.list("models/net/trust/")} == before


def test_signing_again_mends_what_a_clock_that_was_ahead_has_done(
    signers: Signers, clock: Clock, tmp_path: Path
) -> None:
    device = signers.device(tmp_path / "cache")
    clock.set(300 * DAY_S)
    signers.sign(tags={"latest": 1})
    clock.set(0)
    with pytest.raises(Untrusted, match=r"this machine's clock is \d+ s behind the publisher's"):
        device.pull("net")
    refresh(signers.store, "net", [signers.online])
    assert device.pull("net").version == 1  # the device that saw the future
    assert signers.device(tmp_path / "other").pull("net").version == 1


def test_a_rotated_online_key_lets_devices_of_older_releases_in_again(
    signers: Signers, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They go by the timestamp's version alone, which only grows; with its key gone they forget it."""
    monkeypatch.setattr("storage.device.trust.SIGNED_AT_FIELD", "x-unknown-to-older-releases")
    device = signers.device(tmp_path / "cache")
    clock.set(300 * DAY_S)
    signers.sign(tags={"latest": 1})
    clock.set(0)
    with pytest.raises(Untrusted, match="behind the publisher's"):
        device.pull("net")
    refresh(signers.store, "net", [signers.online])
    with pytest.raises(Untrusted, match="behind the publisher's"):
        device.pull("net")
    fresh = CryptoSigner.generate_ed25519()
    revoke_key(signers.store, signers.online.public_key.keyid, [signers.root], replacement=fresh.public_key)
    sign(signers.store, "net", [signers.publisher, fresh], tags={"latest": 1}, afresh=True)
    assert device.pull("net").version == 1


def test_a_clock_that_was_behind_is_mended_by_signing_again(signers: Signers, clock: Clock, tmp_path: Path) -> None:
    device = signers.device(tmp_path / "cache")
    clock.set(-30 * DAY_S)
    signers.sign(tags={"latest": 1})
    clock.set(0)
    with pytest.raises(Untrusted, match="what is signed has expired"):
        device.pull("net")
    refresh(signers.store, "net", [signers.online])
    assert device.pull("net").version == 1


def test_an_ended_root_is_said_before_anything_is_signed_and_renewed_by_one_command(
    signers: Signers, clock: Clock, tmp_path: Path
) -> None:
    signers.sign(tags={"latest": 1})
    device = signers.device(tmp_path / "cache")
    device.pull("net")
    clock.set(340 * DAY_S)
    assert [line.split(" (")[0] for line in signers.sign().warnings] == ["the signed root ends"]
    clock.set(366 * DAY_S)
    for attempt in (signers.sign, lambda: refresh(signers.store, "net", [signers.online])):
        with pytest.raises(SigningError, match=r"the root of trust of .* ended on .*; renew it with 'nestqu"):
            attempt()
    with pytest.raises(Untrusted, match="expired"):
        device.pull("net")
    renew_root(signers.store, [signers.root])
    assert newest_root(signers.store).signed.version == 2
    refresh(signers.store, "net", [signers.publisher, signers.online])
    assert device.pull("net").version == 1


@pytest.mark.parametrize("role", ["snapshot", "targets"])
def test_a_refresh_that_cannot_help_says_so_and_with_the_publishers_key_renews(
    signers: Signers, clock: Clock, tmp_path: Path, role: str
) -> None:
    signers.sign(tags={"latest": 1}, lives=Lives(**{role: timedelta(days=60)}))
    device = signers.device(tmp_path / "cache")
    device.pull("net")
    clock.set(40 * DAY_S)
    warned = refresh(signers.store, "net", [signers.online]).warnings
    assert len(warned) == 1
    assert warned[0].startswith(f"the signed {role} ends (")
    assert device.pull("net").version == 1

    clock.set(61 * DAY_S)
    with pytest.raises(SigningError, match=rf"net: the signed {role} ended on .*; a new edition renews it: give"):
        refresh(signers.store, "net", [signers.online])
    with pytest.raises(Untrusted, match="what is signed has expired"):
        device.pull("net")
    done = refresh(signers.store, "net", [signers.publisher, signers.online])
    assert (done.edition, done.tags, done.warnings) == (2, {"latest": 1}, ())
    assert device.pull("net").version == 1


def test_whoever_lists_a_model_hears_what_is_due(signers: Signers, clock: Clock) -> None:
    assert trust_warnings(signers.store, "net") == ()
    signers.sign(tags={"latest": 1})
    assert list(expiries(signers.store, "net")) == ["root", "targets", "snapshot", "timestamp"]
    assert trust_warnings(signers.store, "net") == ()
    clock.set(8 * DAY_S)
    (line,) = trust_warnings(signers.store, "net")
    assert line.startswith("the signed timestamp has ended: devices refuse it (")
    assert line.endswith("; renew it with 'nestquant sign NAME --refresh'")


def test_a_signed_tag_goes_back_on_a_persons_word_alone(signers: Signers, tmp_path: Path) -> None:
    publish(signers.store, version=2, fresh=[0])
    signers.sign(tags={"latest": 2, "stable": 1})
    device = signers.device(tmp_path / "cache")
    assert device.pull("net").version == 2
    with pytest.raises(
        SigningError, match=r"^net: tag 'latest' is signed for version 2; at version 1 devices would go"
    ):
        signers.sign(tags={"latest": 1})
    assert device.pull("net").version == 2
    done = signers.sign(tags={"latest": 1, "stable": 2}, backwards="skip")
    assert done.tags == {"latest": 2, "stable": 2}
    done = signers.sign(tags={"latest": 1}, backwards="allow")
    assert done.tags == {"latest": 1, "stable": 2}
    assert device.pull("net").version == 1
