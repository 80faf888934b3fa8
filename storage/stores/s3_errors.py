"""What botocore raises, told as one line of what was seen, expected, and to try."""

from __future__ import annotations

from typing import Any, Protocol

from storage.errors import (
    AccessDenied,
    BadStoreURI,
    Corrupt,
    NoSpace,
    NotFound,
    PreconditionFailed,
    StorageError,
    StoreUnavailable,
    WriteConflict,
)


class Place(Protocol):
    """What a message needs to know of the store that it is about: its URI's beginning, and who answers there."""

    @property
    def place(self) -> str:
        """Return the bucket as it may be shown."""
        ...

    @property
    def endpoint(self) -> str | None:
        """Return the address that was given, or None for AWS's own."""
        ...


class RangeBeyondEnd(StorageError):
    """``416``: the range begins at or beyond the end of the object. Stays inside `storage.stores.s3`."""


class NotModified(StorageError):
    """``304``: the object still has the ETag that was sent along. Stays inside `storage.stores.s3`."""


_BY_CODE: dict[str, type[StorageError]] = {
    "NoSuchBucket": BadStoreURI,
    "PermanentRedirect": BadStoreURI,
    "AuthorizationHeaderMalformed": BadStoreURI,
    "IllegalLocationConstraintException": BadStoreURI,
    "NoSuchUpload": StoreUnavailable,
    "PreconditionFailed": PreconditionFailed,
    "InvalidRange": RangeBeyondEnd,
    "QuotaExceeded": NoSpace,
    "InsufficientCapacity": NoSpace,
    "BadDigest": Corrupt,
    "InvalidDigest": Corrupt,
    "XAmzContentSHA256Mismatch": Corrupt,
    "XAmzContentChecksumMismatch": Corrupt,
    "ExpiredToken": AccessDenied,
    "ExpiredTokenException": AccessDenied,
    "InvalidToken": AccessDenied,
}
_BY_STATUS: dict[int, type[StorageError]] = {
    304: NotModified,
    401: AccessDenied,
    403: AccessDenied,
    404: NotFound,
    409: WriteConflict,
    412: PreconditionFailed,
    416: RangeBeyondEnd,
    507: NoSpace,
}
_EXPIRED = "the credentials have expired; get new ones"
_SKEWED = "this machine's clock and the server's differ too much; set the clock (NTP)"
_REGION = "the bucket lives in another region; set ?region=..."
_ADVICE = {
    "NoSuchBucket": "no such bucket; create it or correct the URI",
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "InvalidAccessKeyId": "the server does not know this access key; check AWS_ACCESS_KEY_ID or the profile",
    "SignatureDoesNotMatch": "the signature does not match; check AWS_SECRET_ACCESS_KEY and the region",
    "InvalidToken": "the session token is not valid; check AWS_SESSION_TOKEN",
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,
    "RequestTimeTooSkewed": _SKEWED,
    "RequestExpired": _SKEWED,
    "AccessDenied": "these credentials may not do this; check the bucket's policy",
}
_KIND_ADVICE: dict[type[StorageError], str] = {
    AccessDenied: "check key, secret and the bucket's policy",
    NotModified: "nobody asked for that",
    NoSpace: "the store is full, free some space or raise the quota",
    PreconditionFailed: "the object is not the one expected",
    RangeBeyondEnd: "the object ends before",
    StoreUnavailable: "it kept failing, try again later",
    WriteConflict: "another write to it is under way; read back, then try again",
}


def boto_errors() -> tuple[type[Exception], ...]:
    """Return the roots of what boto3 raises."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    return (BotoCoreError, ClientError, Boto3Error, OSError)


def cut_body_errors() -> tuple[type[Exception], ...]:
    """Return what reading a body raises when the connection breaks, stalls or ends early."""
    from botocore.exceptions import HTTPClientError, IncompleteReadError
    from urllib3.exceptions import HTTPError

    return (IncompleteReadError, HTTPClientError, HTTPError, OSError)


def translate(error: Exception, *, operation: str, key: str, store: Place) -> StorageError:
    """Return the store's error for one of botocore's."""
    from botocore import exceptions as boto

    where = f"{operation} {key or '(bucket)'} in {store.place}"
    if isinstance(error, boto.ClientError):
        return _from_answer(error.response, where, key, store)
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
        return AccessDenied(
            f"{where}: no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile",
            key=key,
        )
    if isinstance(error, boto.ProfileNotFound | boto.CredentialRetrievalError | boto.TokenRetrievalError):
        return AccessDenied(f"{where}: {error}; check the profile and its credentials", key=key)
    if isinstance(error, boto.NoRegionError):
        return BadStoreURI(f"{store.place}: no region known; add ?region=... or set AWS_REGION")
    if isinstance(error, boto.ParamValidationError):
        return BadStoreURI(f"{store.place}: {_line(error)}; check bucket name and endpoint_url")
    what = "cannot connect" if isinstance(error, boto.ConnectionError) else _line(error)
    return StoreUnavailable(
        f"{where}: {what}; check that {store.endpoint or 'S3'} is up and reachable, then try again",
        key=key,
    )


def _from_answer(response: Any, where: str, key: str, store: Place) -> StorageError:
    error = response.get("Error", {})
    code, message = str(error.get("Code", "")), _line(error.get("Message") or "no reason given")
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    kind = _BY_CODE.get(code) or _BY_STATUS.get(status) or StoreUnavailable
    if kind is NotFound:
        return NotFound(f"{key}: no such object in {store.place}", key=key)
    if kind is Corrupt:
        return Corrupt(key, expected="the checksum sent along", seen=f"other bytes at the server ({code})")
    return kind(f"{where}: {code or status}: {_ADVICE.get(code) or f'{message}; {_KIND_ADVICE[kind]}'}", key=key)


def _line(error: object) -> str:
    return " ".join(str(error).split()).rstrip(".")
