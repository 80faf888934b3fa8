"""What a person does with a rollout: begin or widen it, pause it, withdraw it, finish it. One edition each."""

from __future__ import annotations

from collections.abc import Sequence

from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, TargetFile, Targets

from storage.layout import manifest_key
from storage.registry import Registry
from storage.signing.keys import SigningError
from storage.signing.metadata import MAX_TARGETS_BYTES, Signed, amend, newest_edition, sign, tag_target, trust_key
from storage.signing.rollouts import WHOLE, Rollout, custom_of, rollout_target, rollouts_of
from storage.stores.blob_store import BlobStore


def roll_out(
    store: BlobStore,
    name: str,
    version: int,
    signers: Sequence[CryptoSigner],
    *,
    share: int,
    tag: str = "latest",
    cohort: str | None = None,
    seed: str | None = None,
) -> Signed:
    """Begin a rollout of a version to ``share`` of 10,000 devices, or widen it; one that was paused goes on.

    ``seed`` decides who comes first; by default it is the version's own digest.

    Raises:
        SigningError: the tag is not signed, or names that version or a later one already; another rollout is open; the
            share would shrink or the seed change, since devices would then leave the version again.
    """
    path = rollout_target(name, tag, cohort)
    resolved = Registry(store).resolve(name, version)

    def change(before: dict[str, TargetFile]) -> dict[str, TargetFile]:
        tagged = _tagged(before, name, tag)
        if version <= tagged:
            raise SigningError(f"{name}: tag {tag!r} is signed for version {tagged}; roll out a later one")
        old = _open(before, name, tag, cohort, tagged)
        if old is not None and old.version != version:
            raise SigningError(
                f"{name}: version {old.version} is being rolled out to {old.share / 100:g} %; "
                "finish or withdraw it first"
            )
        if old is not None and (share < old.share or seed not in (None, old.seed)):
            raise SigningError(
                f"{name}: version {version} is at {old.share / 100:g} % with the seed {old.seed!r}; with a smaller "
                "share or another seed devices would leave it again: withdraw it if that is meant"
            )
        said = seed if seed is not None else resolved.digest.removeprefix("sha256:")[:16]
        rollout = Rollout(version=version, share=share, seed=old.seed if old else said, cohort=cohort)
        files = {}
        for one in (manifest_key(name, version), path):
            files[one] = TargetFile.from_data(one, resolved.raw, ["sha256"])
            files[one].unrecognized_fields["custom"] = {"version": version} if one != path else custom_of(rollout)
        return before | files

    if not 0 < share <= WHOLE:
        raise SigningError(f"a share of {share / 100:g} %: expected above 0 and up to 100")
    return amend(store, name, signers, change)


def pause(
    store: BlobStore, name: str, signers: Sequence[CryptoSigner], *, tag: str = "latest", cohort: str | None = None
) -> Signed:
    """Let no further device take a rollout's version; those that run it keep it. Raises ``SigningError``."""
    path = rollout_target(name, tag, cohort)

    def change(before: dict[str, TargetFile]) -> dict[str, TargetFile]:
        old = _need(before, name, tag, cohort)
        before[path].unrecognized_fields["custom"] = custom_of(old.model_copy(update={"paused": True}))
        return before

    return amend(store, name, signers, change)


def withdraw(
    store: BlobStore, name: str, signers: Sequence[CryptoSigner], *, tag: str = "latest", cohort: str | None = None
) -> Signed:
    """End a rollout: the devices that took its version follow the tag again. Raises ``SigningError``."""
    path = rollout_target(name, tag, cohort)

    def change(before: dict[str, TargetFile]) -> dict[str, TargetFile]:
        _need(before, name, tag, cohort)
        return {one: file for one, file in before.items() if one != path}

    return amend(store, name, signers, change)


def finish(
    store: BlobStore, name: str, signers: Sequence[CryptoSigner], *, tag: str = "latest", cohort: str | None = None
) -> Signed:
    """Point the tag itself at a rollout's version, and end the rollout, in one edition. Raises ``SigningError``.

    The store's own tag moves along, unless it is beyond that version already.
    """
    version = _need(newest_targets(store, name), name, tag, cohort).version
    entry = Registry(store).tag_forward(name, tag, version)
    return sign(store, name, signers, tags={} if entry else {tag: version}, moves=[entry] if entry else [])


def read_rollouts(store: BlobStore, name: str, tag: str = "latest") -> list[Rollout]:
    """Return the rollouts that the newest edition holds, signatures not verified: for a person to see."""
    return list(rollouts_of(newest_targets(store, name), name, tag))


def newest_targets(store: BlobStore, name: str) -> dict[str, TargetFile]:
    """Return what the newest edition vouches for, by path, signatures not verified. Raises ``SigningError``."""
    edition = newest_edition(store, name)
    if not edition:
        raise SigningError(f"{name}: nothing was signed yet; rollouts are signed, so sign a tag first")
    try:
        raw = store.get(trust_key(name, f"{edition}.targets"), max_bytes=MAX_TARGETS_BYTES)
        return dict(Metadata[Targets].from_bytes(raw).signed.targets)
    except (RepositoryError, ValueError) as error:
        raise SigningError(f"{name}: what is signed there cannot be read: {error}") from error


def _tagged(before: dict[str, TargetFile], name: str, tag: str) -> int:
    signed = before.get(tag_target(name, tag))
    if signed is None:
        raise SigningError(f"{name}: tag {tag!r} is not signed; sign it for the version that the other devices run")
    return int(signed.custom["version"])


def _open(before: dict[str, TargetFile], name: str, tag: str, cohort: str | None, tagged: int = 0) -> Rollout | None:
    try:
        rollouts = [rollout for rollout in rollouts_of(before, name, tag) if rollout.cohort == cohort]
    except ValueError as error:
        raise SigningError(f"{name}: {error}") from error
    return next((rollout for rollout in rollouts if rollout.version > tagged), None)


def _need(before: dict[str, TargetFile], name: str, tag: str, cohort: str | None) -> Rollout:
    rollout = _open(before, name, tag, cohort)
    if rollout is None:
        whom = "" if cohort is None else f" for the cohort {cohort!r}"
        raise SigningError(f"{name}: no rollout of tag {tag!r}{whom}; 'nestquant rollout {name}' shows what there is")
    return rollout
