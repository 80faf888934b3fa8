"""What would lock devices out, asked before it does: a signer's wrong clock, and roles that end.

A device refuses metadata of any role that has expired (TUF specification 1.0, 5.3.10, 5.4.4, 5.5.6, 5.6.6).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Snapshot, Targets, Timestamp

from storage.errors import NotFound, StorageError
from storage.layout import model_prefix
from storage.signing.keys import SigningError
from storage.signing.root import newest_root
from storage.stores.blob_store import BlobStore
from storage.stores.clock import store_time_s

CLOCK_SLACK_S = 300.0
WARN_BEFORE = timedelta(days=30)
_ADVICE = {
    "root": "renew it with 'nestquant keys renew'",
    "targets": "renew it with 'nestquant sign NAME --refresh' and the publisher's key",
    "snapshot": "renew it with 'nestquant sign NAME --refresh' and the publisher's key",
    "timestamp": "renew it with 'nestquant sign NAME --refresh'",
}
_MAX_BYTES = 5_000_000


def now() -> datetime:
    """Return this machine's time, to the second, as metadata is dated."""
    return datetime.fromtimestamp(int(time.time()), UTC)


def check_clock(store: BlobStore) -> None:
    """Raise ``SigningError`` where this machine's clock and the store's differ by more than five minutes.

    What a clock that is ahead has signed makes devices think that theirs is behind; one that is behind signs what has
    expired already.
    """
    ahead_s = time.time() - store_time_s(store)
    if abs(ahead_s) > CLOCK_SLACK_S:
        where = "ahead of" if ahead_s > 0 else "behind"
        raise SigningError(
            f"this machine's clock is {abs(ahead_s):.0f} s {where} that of {store.uri}; set it (NTP), then sign"
        )


def root_expiry(store: BlobStore) -> datetime:
    """Return when the newest root ends."""
    return newest_root(store).signed.expires


def expiries(store: BlobStore, name: str) -> dict[str, datetime]:
    """Return when each role of a signed model ends, the store's root among them; empty where nothing was signed.

    Signatures are not verified here: this tells a publisher what is due.
    """
    prefix = f"{model_prefix(name)}trust"
    try:
        ends = {"root": root_expiry(store)}
        timestamp = Metadata[Timestamp].from_bytes(store.get(f"{prefix}/timestamp.json", max_bytes=_MAX_BYTES)).signed
        edition = timestamp.snapshot_meta.version
        snapshot = Metadata[Snapshot].from_bytes(store.get(f"{prefix}/{edition}.snapshot.json", max_bytes=_MAX_BYTES))
        targets = Metadata[Targets].from_bytes(store.get(f"{prefix}/{edition}.targets.json", max_bytes=_MAX_BYTES))
    except NotFound:
        return {}
    except (RepositoryError, ValueError) as error:
        raise SigningError(f"{name}: what is signed there cannot be read: {error}") from error
    ends |= {"targets": targets.signed.expires, "snapshot": snapshot.signed.expires, "timestamp": timestamp.expires}
    return ends


def warnings_of(ends: Mapping[str, datetime], *, timestamps: bool = False) -> tuple[str, ...]:
    """Return a line for each role that has ended or ends within 30 days; of the short-lived timestamp only its end,
    and that only where ``timestamps`` is said.
    """
    lines = []
    for role, end in ends.items():
        before = timedelta(0) if role == "timestamp" else WARN_BEFORE
        if (role != "timestamp" or timestamps) and end - before <= now():
            word = "has ended: devices refuse it" if end <= now() else "ends"
            lines.append(f"the signed {role} {word} ({end:%Y-%m-%d %H:%M} UTC); {_ADVICE[role]}")
    return tuple(lines)


def trust_warnings(store: BlobStore, name: str) -> tuple[str, ...]:
    """Return what of a model's signatures is due, for whoever lists or inspects it; nothing where it is not signed."""
    try:
        return warnings_of(expiries(store, name), timestamps=True)
    except (SigningError, StorageError) as error:
        return (str(error),)
