"""Presigned URLs of an S3 store: what devices without keys are handed, and how a device with keys reads S3."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from storage.layout import blob_key, manifest_key, tag_key
from storage.manifest import Manifest, canonical_json
from storage.stores.s3 import S3Store

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


@dataclass(frozen=True)
class Presigner:
    """Signs GET requests (Signature Version 4) with the store's credentials, without contacting anyone."""

    store: S3Store
    expires_s: int = 900

    @cached_property
    def _client(self) -> S3Client:
        from boto3.session import Session
        from botocore.config import Config

        options, style = self.store.options, self.store.options.addressing_style
        if style == "auto" and options.endpoint_url is None and "." not in self.store.bucket:
            style = "virtual"  # else botocore signs for AWS's global host, which redirects, and a redirect voids v4
        config = Config(region_name=options.region, signature_version="s3v4", s3={"addressing_style": style})
        return Session(profile_name=options.profile).client("s3", endpoint_url=options.endpoint_url, config=config)

    def url(self, key: str) -> str:
        """Return a URL that reads ``key`` for ``expires_s`` seconds from now."""
        where = {"Bucket": self.store.bucket, "Key": self.store.prefix + key}
        return self._client.generate_presigned_url("get_object", Params=where, ExpiresIn=self.expires_s)

    def index(self, keys: Iterable[str]) -> bytes:
        """Return the index of URLs that ``presigned:`` sources read."""
        return canonical_json({"urls": {key: self.url(key) for key in keys}})


def keys_of(manifest: Manifest, *, tags: Iterable[str] = ("latest",)) -> list[str]:
    """Return every key that a device reads to pull and upgrade a version by the store's word."""
    documents = [manifest_key(manifest.name, manifest.version), *(tag_key(manifest.name, tag) for tag in tags)]
    return documents + [blob_key(blob.digest) for blob in manifest.named_blobs()]


def trust_keys_of(name: str, *, edition: int, root_version: int) -> list[str]:
    """Return the keys of the signed documents that come on top: those of an edition, and the chain of roots."""
    from storage.signing.metadata import trust_key  # python-tuf, which an unsigned reader of S3 does without
    from storage.signing.root import root_key

    documents = [
        trust_key(name, "timestamp"),
        trust_key(name, f"{edition}.snapshot"),
        trust_key(name, f"{edition}.targets"),
    ]
    return documents + [root_key(version) for version in range(1, root_version + 1)]
