"""A version in an OCI registry: an artifact whose layers are the very objects that a device would read from a store.

    oci://host[:port]/repository[:tag]

The artifact follows the CNCF ModelPack specification (config ``application/vnd.cncf.model.config.v1+json``, a raw layer
a file). Each layer is named twice: ``org.cncf.model.filepath`` for the tools of others, ``org.nestquant.key`` for ours.
Signed documents are layers, too, so a device believes a registry no more than any other source. Layers stand in
fetching order: documents, base, high shards, low shards.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from storage.device.bundle import documents_of
from storage.device.cache import blobs_of
from storage.device.errors import SourceDenied, SourceError, SourceNotFound
from storage.device.http import HttpClient
from storage.device.registry_auth import LOCAL_HOSTS, At, RegistryClient, docker_credentials
from storage.device.source import Body, Documents
from storage.digest import digest_bytes
from storage.document import parse_json
from storage.errors import AccessDenied, BadStoreURI, Corrupt, StoreUnavailable
from storage.layout import blob_key
from storage.manifest import Manifest, canonical_json
from storage.registry import Registry, Resolved
from storage.stores.blob_store import BlobStore, is_key

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
WEIGHT_TYPE = "application/vnd.cncf.model.weight.v1.raw"
DOCUMENT_TYPE = "application/vnd.cncf.model.weight.config.v1.raw"
FILE_PATH, OWN_KEY = "org.cncf.model.filepath", "org.nestquant.key"

_URI = re.compile(
    r"oci://(?P<host>[a-zA-Z0-9.-]+(?::[0-9]{1,5})?)/(?P<repository>[a-z0-9]+(?:[._/-]+[a-z0-9]+)*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?"
)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MAX_MANIFEST_BYTES = 4 << 20  # what registries take (OCI distribution specification 1.1, pushing manifests)


@dataclass(frozen=True)
class Place:
    """A repository of a registry, and a tag in it."""

    host: str
    repository: str
    tag: str = "latest"

    @classmethod
    def parse(cls, uri: str) -> Place:
        """Return the place that a URI names. Raises ``BadStoreURI``."""
        match = _URI.fullmatch(uri)
        if match is None:
            raise BadStoreURI(f"registry {uri!r}: expected oci://host/repository or oci://host:port/repository:tag")
        return cls(match["host"], match["repository"], match["tag"] or "latest")

    @property
    def base_url(self) -> str:
        """The repository's address: http on this machine alone, https elsewhere."""
        scheme = "http" if self.host.partition(":")[0] in LOCAL_HOSTS else "https"
        return f"{scheme}://{self.host}/v2/{self.repository}"


@dataclass(frozen=True, slots=True)
class Pushed:
    """What was pushed: the artifact's digest, its tags, and how many bytes travelled of how many."""

    version: int
    digest: str
    tags: tuple[str, ...]
    sent_bytes: int
    size_bytes: int


def push(store: BlobStore, name: str, ref: str, uri: str) -> Pushed:
    """Push a version with all of its levels; blobs that the registry holds are not sent again.

    The artifact gets the version's number as its tag, then the tag in ``uri``, or ``latest``. Credentials are those of
    ``docker login``.

    Raises:
        storage.StorageError: the version is not there, or is damaged; the registry refuses or does not answer.
    """
    from oras.provider import Registry as Oras

    place = Place.parse(uri)
    version = Registry(store).resolve(name, ref)
    documents = documents_of(store, name, version)
    scheme = "basic" if _greet(place).lower().startswith("basic") else "token"
    oras = Oras(hostname=place.host, insecure=place.base_url.startswith("http:"), auth_backend=scheme)
    try:
        credentials = docker_credentials(place.host)
    except SourceDenied as error:
        raise AccessDenied(str(error)) from error
    if credentials is not None:
        user, _, password = base64.b64decode(credentials).decode().partition(":")
        oras.auth.set_basic_auth(user, password)
    config = _config(version)
    layers = [_layer(DOCUMENT_TYPE, raw, key) for key, raw in documents]
    sent = 0
    with TemporaryDirectory(prefix="nestquant-push-") as scratch, _registry_errors(place):
        file = Path(scratch) / "blob"
        upload = _Upload(oras, place, file)
        for raw in [config, *(raw for _, raw in documents)]:
            file.write_bytes(raw)
            sent += upload.send(digest_bytes(raw), len(raw))
        for index, blob in enumerate(blobs_of(version.manifest, version.manifest.level_count() - 1)):
            key = blob_key(blob.digest)
            if not upload.has(blob.digest, blob.size_bytes):
                with file.open("wb") as out:
                    for piece in store.stream(key):
                        out.write(piece)
                sent += upload.send(blob.digest, blob.size_bytes)
            layers.append(_described(WEIGHT_TYPE, blob.digest, blob.size_bytes, f"{index:04d}.safetensors", key))
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "artifactType": ARTIFACT_TYPE,
            "config": {"mediaType": CONFIG_TYPE, "digest": digest_bytes(config), "size": len(config)},
            "layers": layers,
        }
        tags = tuple(dict.fromkeys((str(version.version), place.tag)))
        for tag in tags:
            upload.name(manifest, tag)
    size_bytes = len(config) + sum(layer["size"] for layer in layers)
    return Pushed(version.version, upload.digest, tags, sent, size_bytes)


def _greet(place: Place) -> str:
    """Ask whether a registry answers at all, once: oras would try for two minutes. Return its challenge, if any."""
    address = f"{place.base_url.partition('/v2/')[0]}/v2/"
    try:
        with HttpClient().open(address, "the registry's greeting"):
            return ""
    except SourceDenied as error:  # it wants credentials, which oras brings
        return error.challenge or ""
    except SourceError as error:
        raise StoreUnavailable(f"{place.host}: {error}; is it a registry?") from error


class _Upload:
    """Blobs and manifests on their way, through oras; each refusal is told by status."""

    def __init__(self, oras: Any, place: Place, file: Path) -> None:
        self._oras, self._place, self._file = oras, place, file
        self._container = oras.get_container(f"{place.host}/{place.repository}:{place.tag}")
        self.digest = ""

    def has(self, digest: str, size_bytes: int) -> bool:
        return bool(self._oras.blob_exists({"digest": digest, "size": size_bytes}, self._container))

    def send(self, digest: str, size_bytes: int) -> int:
        """Send the file unless it is there; return the bytes that travelled. The registry checks the digest."""
        if self.has(digest, size_bytes):
            return 0
        actual_bytes = self._file.stat().st_size
        if actual_bytes != size_bytes:
            raise Corrupt(blob_key(digest), expected=f"{size_bytes} bytes", seen=f"{actual_bytes} bytes")
        layer = {"digest": digest, "size": size_bytes}
        chunked = size_bytes > 64 << 20
        self._check(self._oras.upload_blob(str(self._file), self._container, layer, do_chunked=chunked), digest)
        return size_bytes

    def name(self, manifest: dict[str, Any], tag: str) -> None:
        container = self._oras.get_container(f"{self._place.host}/{self._place.repository}:{tag}")
        answer = self._oras.upload_manifest(manifest, container)
        self._check(answer, f"tag {tag}")
        self.digest = answer.headers.get("Docker-Content-Digest", "")

    def _check(self, answer: Any, what: str) -> None:
        if answer.status_code in {401, 403}:
            raise AccessDenied(f"{self._place.host}: {what}: HTTP {answer.status_code}; 'docker login' first")
        if answer.status_code not in {200, 201, 202}:
            said = " ".join(answer.text.split())[:200]
            raise StoreUnavailable(f"{self._place.host}: {what}: HTTP {answer.status_code} {said}")


@contextmanager
def _registry_errors(place: Place) -> Iterator[None]:
    from requests import RequestException

    try:
        yield
    except RequestException as error:
        raise StoreUnavailable(f"{place.host}: {' '.join(str(error).split())[:200]}; is it a registry?") from error
    except ValueError as error:  # what oras makes of an answer that it did not expect
        raise StoreUnavailable(f"{place.host}: {' '.join(str(error).split())[:200]}") from error


def _layer(media_type: str, raw: bytes, key: str) -> dict[str, Any]:
    return _described(media_type, digest_bytes(raw), len(raw), key, key)


def _described(media_type: str, digest: str, size_bytes: int, path: str, key: str) -> dict[str, Any]:
    annotations = {FILE_PATH: path, OWN_KEY: key}
    return {"mediaType": media_type, "digest": digest, "size": size_bytes, "annotations": annotations}


def _config(version: Resolved) -> bytes:
    """Return the ModelPack configuration: the same bytes for the same version, so without a date."""
    manifest: Manifest = version.manifest
    widths = sorted({bits for layer in manifest.layers for bits in layer.bits})
    blobs = blobs_of(manifest, manifest.level_count() - 1)
    return canonical_json(
        {
            "descriptor": {"name": manifest.name, "version": str(version.version), "revision": version.digest},
            "config": {
                "architecture": manifest.model.arch,
                "format": "safetensors",
                "precision": "|".join(f"int{bits}" for bits in widths),
                "quantization": "nestquant",
            },
            "modelfs": {"type": "layers", "diffIds": [blob.digest for blob in blobs]},
        }
    )


@dataclass
class OciSource:
    """Reads a version from a registry: as anyone, or as whom ``docker login`` noted (`storage.device.registry_auth`).

    The artifact's manifest is read once; each object is one request by digest, resumed like any other over HTTP.
    """

    place: Place
    client: HttpClient = field(default_factory=HttpClient)
    _urls: dict[str, str] | None = None

    @contextmanager
    def open(self, key: str, *, start: int = 0, etag: str | None = None) -> Iterator[Body]:
        """Open the layer that is named ``key``."""
        with self._registry.open(self._url(key), key, start=start, etag=etag) as body:
            yield body

    @cached_property
    def _registry(self) -> RegistryClient:
        # A blob has one form, whatever is asked for.
        asking = replace(self.client, headers={**self.client.headers, "Accept": f"{MANIFEST_TYPE}, */*;q=0.1"})
        return RegistryClient(self.place.host, self.place.repository, asking)

    def _url(self, key: str) -> str:
        if self._urls is None:
            self._urls = self._read()
        if key not in self._urls:
            where = f"{self.place.host}/{self.place.repository}:{self.place.tag}"
            raise SourceNotFound(f"{where} has no {key}; was another version or tag meant?")
        return self._urls[key]

    def _read(self) -> dict[str, str]:
        url = f"{self.place.base_url}/manifests/{self.place.tag}"
        what = f"{self.place.repository}:{self.place.tag}"
        raw = Documents(At(url, self._registry)).read(what, max_bytes=_MAX_MANIFEST_BYTES)
        try:
            fields: dict[str, str] = {}
            for layer in parse_json(raw)["layers"]:
                key, digest = layer["annotations"][OWN_KEY], layer["digest"]
                if not is_key(key) or not _DIGEST.fullmatch(digest):
                    raise ValueError("a layer is no object of ours")
                fields[key] = f"{self.place.base_url}/blobs/{digest}"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            said = "a field is missing" if isinstance(error, KeyError) else str(error)[:100]
            raise SourceError(f"{self.place.host}/{what} is no version of ours ({said})", retryable=False) from error
        return fields
