"""What can go wrong on the device.

StorageError
└── DeviceError
    ├── SourceError            the network or the server; says whether trying again may help
    │   ├── SourceNotFound     the key is not there
    │   ├── SourceDenied       401 / 403: credentials or a presigned URL that ended
    │   └── SourceChanged      the bytes under the key are no longer those that a resume began with
    ├── ContentError           bytes that are not what the manifest says: length or SHA-256
    ├── GaveUp                 the retry budget is spent
    ├── Untrusted              signature, expiry, rollback, or no root of trust
    └── CacheError             the device's own disk
        ├── NoSpace            the disk, quota or file-size limit is full
        ├── NotInstalled       the cache does not hold that model (or no version to go back to)
        ├── CacheBusy          another process works on this cache
        └── NotOurs            the folder is a store's or somebody's, or a link stands in it: not a cache's to change
"""

import errno

from storage.errors import StorageError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DeviceError(StorageError):
    """Base of every error of the device's side."""


class SourceError(DeviceError):
    """The source failed. ``retryable``: it may succeed later; ``retry_after_s``: the wait that the server asks for."""

    def __init__(self, message: str, *, retryable: bool = True, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retryable = retryable
        self.retry_after_s = retry_after_s


class SourceNotFound(SourceError):
    """The source has nothing under this key."""

    def __init__(self, message: str) -> None:
        super().__init__(message, retryable=False)


class SourceDenied(SourceError):
    """The source refuses: 401 or 403, an expired presigned URL, credentials that ended.

    ``challenge``: how it wants to be asked (``WWW-Authenticate``), where it says so.
    """

    def __init__(self, message: str, *, challenge: str | None = None) -> None:
        super().__init__(message, retryable=False)
        self.challenge = challenge


class SourceChanged(SourceError):
    """The entity tag is another one than that of the staged bytes (RFC 9110, 13.1.5)."""


class ContentError(DeviceError):
    """Bytes arrived whole, and are not the bytes that the manifest names."""


class GaveUp(DeviceError):
    """The retry budget of one blob is spent."""


class Untrusted(DeviceError):
    """The signed metadata does not vouch for what was asked."""


class CacheError(DeviceError):
    """The device's own disk."""


class NoSpace(CacheError):
    """No space left, over quota, or over the file-size limit."""


class NotInstalled(CacheError):
    """The cache does not hold the model, or no version to go back to."""


class NotOurs(CacheError):
    """The folder is not a cache's to change: somebody's files, a store, or a link in the place of a folder."""


class CacheBusy(CacheError):
    """Another process holds the cache's lock."""
