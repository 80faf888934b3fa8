"""What botocore raises, told as one line of what was seen, expected, and to try."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from storage.s3 import S3Store

_CREDENTIAL_ADVICE = {
    "InvalidAccessKeyId": "the server does not know this access key; check AWS_ACCESS_KEY_ID or the profile",
    "SignatureDoesNotMatch": "the signature does not match; check AWS_SECRET_ACCESS_KEY and the region",
    "ExpiredToken": "the credentials have expired; get new ones",
    "ExpiredTokenException": "the credentials have expired; get new ones",
    "InvalidToken": "the session token is not valid; check AWS_SESSION_TOKEN",
    "RequestTimeTooSkewed": "this machine's clock and the server's differ too much; set the clock (NTP)",
    "RequestExpired": "this machine's clock and the server's differ too much; set the clock (NTP)",
    "AccessDenied": "these credentials may not do this; check the bucket's policy",
    "403": "the server refuses these credentials; check key, secret and the bucket's policy",
}


class RangeBeyondEnd(StorageError):
    """``416``: the range begins at or beyond the end of the object. Stays inside `storage.s3`."""


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


def translate(error: Exception, *, operation: str, key: str, store: S3Store) -> StorageError:
    """Return the store's error for one of botocore's."""
    from botocore import exceptions as boto

    where = f"{operation} {key or '(bucket)'} in {store.uri}"
    if isinstance(error, boto.ClientError):
        return _from_answer(error.response, where, key, store)
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
        return AccessDenied(
            f"{where}: no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile in the URI",
            key=key,
        )
    if isinstance(error, boto.ProfileNotFound | boto.CredentialRetrievalError | boto.TokenRetrievalError):
        return AccessDenied(f"{where}: {error}; check the profile and its credentials", key=key)
    if isinstance(error, boto.NoRegionError):
        return BadStoreURI(f"{store.uri}: no region known; add ?region=... or set AWS_REGION")
    if isinstance(error, boto.ParamValidationError | boto.InvalidEndpointDiscoveryConfigurationError) or isinstance(
        error, ValueError
    ):
        return BadStoreURI(f"{store.uri}: {_line(error)}; check bucket name and endpoint_url")
    return StoreUnavailable(
        f"{where}: {_line(error)}; check that {store.options.endpoint_url or 'the S3 endpoint'} is up and reachable, then try again",
        key=key,
    )


def _from_answer(response: Any, where: str, key: str, store: S3Store) -> StorageError:
    error = response.get("Error", {})
    code, message = str(error.get("Code", "")), _line(error.get("Message") or "")
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code == "NoSuchBucket":
        return BadStoreURI(f"{where}: no such bucket {store.bucket!r}; create it or correct the URI")
    if code in ("NoSuchKey", "NotFound", "404") or (status == 404 and code != "NoSuchUpload"):
        return NotFound(f"{key}: no such object in {store.uri}", key=key)
    if code == "PreconditionFailed" or status == 412:
        return PreconditionFailed(f"{where}: the object is not the one expected (412)", key=key)
    if code == "InvalidRange" or status == 416:
        return RangeBeyondEnd(f"{where}: range beyond the end (416)", key=key)
    if code in ("QuotaExceeded", "InsufficientCapacity", "StorageFull") or status == 507:
        return NoSpace(f"{where}: {code}: {message}; the store is full, free some space or raise the quota", key=key)
    if code in ("BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"):
        return Corrupt(key, expected="the checksum sent along", seen=f"other bytes at the server ({code})")
    if status == 409:
        return WriteConflict(
            f"{where}: {code}: another write to it is under way (409); read back, then try again", key=key
        )
    if code in _CREDENTIAL_ADVICE:
        return AccessDenied(f"{where}: {code}: {_CREDENTIAL_ADVICE[code]}", key=key)
    if status in (401, 403):
        return AccessDenied(f"{where}: {code}: {message}; {_CREDENTIAL_ADVICE['403']}", key=key)
    if status in (301, 307, 400) and code in (
        "PermanentRedirect",
        "AuthorizationHeaderMalformed",
        "IllegalLocationConstraintException",
    ):
        return BadStoreURI(f"{where}: {code}: {message}; the bucket lives in another region, set ?region=...")
    return StoreUnavailable(
        f"{where}: {code or status}: {message or 'no reason given'}; it kept failing, try again later", key=key
    )


def _line(error: object) -> str:
    return " ".join(str(error).split()).rstrip(".")
