"""Bytes and names: blobs by digest, manifests, versions, tags; the device's pull.

Imports neither torch nor ray; numpy, zstandard and boto3 only in the modules that need them (`storage.shard`,
`storage.s3`).
"""

from storage.blob_store import BlobStore, ObjectInfo
from storage.errors import AlreadyExists, NotFound, StorageError
from storage.manifest import Descriptor, Manifest
from storage.registry import Published, Registry, Resolved
from storage.uri import open_store

__all__ = [
    "AlreadyExists",
    "BlobStore",
    "Descriptor",
    "Manifest",
    "NotFound",
    "ObjectInfo",
    "Published",
    "Registry",
    "Resolved",
    "StorageError",
    "open_store",
]
