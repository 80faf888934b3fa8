"""Every error a store raises.

Each says in one line what was seen, what was expected and what to try; ``key`` names the object where there is one.

    StorageError
    ├── BadStoreURI          the URI names no store: wrong scheme, unknown parameter, no such bucket, a secret inside
    ├── BadKey               a key, name or tag that no store may hold
    ├── NotFound             no such object, tag or version
    │   └── VersionDeleted   the version was there and was deleted; its number is not given out again
    ├── AlreadyExists        create-only write, and the key is taken
    ├── PreconditionFailed   the object is not (or no longer) the one that the ETag names
    ├── WouldGoBack          a tag would move to an earlier version, and nobody said that this is meant
    ├── WriteConflict        the store gave up on two writes at once; which of them counts must be read back
    ├── Corrupt              the bytes are not those that the digest or length promises
    ├── Damaged              a check of the whole store, or of what was just published, found damage
    ├── TooLarge             more bytes than the caller allows
    ├── InvalidManifest      not a manifest that this version may trust
    ├── InvalidShard         not a shard that this version may trust
    ├── AccessDenied         credentials missing, wrong, expired, or the clocks disagree
    ├── StoreUnavailable     not reachable, or failing beyond the retry budget: whether a write landed is unknown
    ├── NoSpace              disk or quota full; nothing is left under the key
    └── UnsafeStore          the store has no working put-if-absent, so two publishers could overwrite each other
"""

from __future__ import annotations

from storage.wording import bounded, without_secrets


class StorageError(Exception):
    """Root of the tree. ``key`` is the object's key in the store, where the error is about one."""

    def __init__(self, message: str, *, key: str | None = None) -> None:
        super().__init__(bounded(without_secrets(message)))
        self.key = key

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by state, so that a worker process can hand any of these to its driver."""
        return (_rebuild, (type(self), self.args, self.__dict__))


def _rebuild(kind: type[StorageError], args: tuple[object, ...], state: dict[str, object]) -> StorageError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class BadStoreURI(StorageError):
    """The URI names no store."""


class BadKey(StorageError):
    """A key, name or tag that no store may hold."""


class NotFound(StorageError):
    """No such object, tag or version."""


class VersionDeleted(NotFound):
    """The version was published and later deleted."""


class AlreadyExists(StorageError):
    """A create-only write met an object under its key."""


class PreconditionFailed(StorageError):
    """The object is not, or no longer, the one that the ETag names."""


class WouldGoBack(StorageError):
    """A tag would move to an earlier version than it names, which is a person's word alone."""


class WriteConflict(StorageError):
    """The store refused one of two writes at once (S3 ``409``); read back to learn which one counts."""


class Corrupt(StorageError):
    """The bytes under ``key`` are not those that were promised."""

    def __init__(self, key: str, *, expected: str, seen: str) -> None:
        super().__init__(
            f"{key}: expected {expected}, seen {seen}; fetch it again, and if it stays so, run 'nestquant fsck'",
            key=key,
        )
        self.expected = expected
        self.seen = seen


class Damaged(StorageError):
    """A check of a whole store, or of a version just published, found damage; the message names each blob."""


class TooLarge(StorageError):
    """The object holds more bytes than the caller allows."""

    def __init__(self, key: str, *, limit_bytes: int, seen_bytes: int) -> None:
        super().__init__(f"{key}: {seen_bytes} bytes, at most {limit_bytes} expected; nothing was read", key=key)
        self.limit_bytes = limit_bytes
        self.seen_bytes = seen_bytes


class InvalidManifest(StorageError):
    """Not a manifest that may be trusted; the message names the field."""


class InvalidShard(StorageError):
    """Not a shard that may be trusted; the message names the tensor or header field."""


class AccessDenied(StorageError):
    """Credentials are missing, wrong or expired, or the clocks disagree."""


class StoreUnavailable(StorageError):
    """The store could not be reached or kept failing; whether a write landed is unknown."""


class NoSpace(StorageError):
    """The disk or quota is full; nothing was left under the key."""


class UnsafeStore(StorageError):
    """The store has no working put-if-absent."""
