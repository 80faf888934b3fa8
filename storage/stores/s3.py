"""A store in an S3 bucket, through boto3, for AWS and the servers that speak its language.

Differences between servers are met here once: ETags lose their quotes; a range request answered with the whole object
is cut to measure; a body that ends early is asked for again from where it stopped, and only of the same object. What a
server does *not* keep (preconditions) `storage.stores.doctor` finds out. A conditional write is always one PUT, because
several servers ignore conditions when a multipart upload completes.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import re
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from typing_extensions import override

from storage.digest import Data
from storage.errors import AlreadyExists, Corrupt, NotFound, PreconditionFailed, StorageError, StoreUnavailable
from storage.stores.blob_store import BlobStore, ObjectInfo, Opened, PutMode, check_key, check_limit, is_key
from storage.stores.s3_errors import NotModified, RangeBeyondEnd, boto_errors, cut_body_errors, translate

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedMultipartUploadTypeDef, CompletedPartTypeDef, GetObjectOutputTypeDef

_PIECE_BYTES = 1 << 20
# A bucket may serve a site to browsers, which show a page by its type; keys without one of these endings have none.
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".md": "text/markdown; charset=utf-8",
}
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class S3Options:
    """How to reach the server. Credentials come from the environment or ``profile``, never from here.

    ``checksum`` is boto3's ``request_checksum_calculation`` and ``response_checksum_validation``: ``when_required``
    suits stores that do not know the CRC32 trailers that boto3 sends by default since 1.36. SHA-256 of our own covers
    every blob either way.
    """

    endpoint_url: str | None = None
    region: str | None = None
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    profile: str | None = None
    retry_mode: Literal["standard", "adaptive", "legacy"] = "standard"
    max_attempts: int = 8
    checksum: Literal["when_supported", "when_required"] = "when_required"
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 30.0
    multipart_bytes: int = 64 << 20


class S3Store(BlobStore):
    """Objects under ``prefix`` of ``bucket``.

    The client is made on first use, anew in every process, from the credential chain.
    """

    def __init__(
        self, bucket: str, prefix: str = "", options: S3Options | None = None, *, uri: str | None = None
    ) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self.options = options or S3Options()
        self.place = f"s3://{bucket}/{self.prefix}".rstrip("/")
        self.endpoint = self.options.endpoint_url
        self.uri = uri or self.place
        self._client: S3Client | None = None
        self._client_pid = -1
        self._client_lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"bucket": self.bucket, "prefix": self.prefix, "options": self.options, "uri": self.uri}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["bucket"], state["prefix"], state["options"], uri=state["uri"])  # type: ignore[misc]

    @property
    def client(self) -> S3Client:
        """The boto3 client of this process (a forked one must not share its parent's sockets)."""
        with self._client_lock:
            if self._client is None or self._client_pid != os.getpid():
                self._client = self._guard("connect", "", self._make_client)
                self._client_pid = os.getpid()
            return self._client

    def _make_client(self) -> S3Client:
        from boto3.session import Session
        from botocore.config import Config

        options = self.options
        config = Config(
            region_name=options.region,
            retries={"mode": options.retry_mode, "total_max_attempts": options.max_attempts},
            s3={"addressing_style": options.addressing_style},
            request_checksum_calculation=options.checksum,
            response_checksum_validation=options.checksum,
            connect_timeout=options.connect_timeout_s,
            read_timeout=options.read_timeout_s,
            max_pool_connections=32,
        )
        return Session(profile_name=options.profile).client("s3", endpoint_url=options.endpoint_url, config=config)

    def _guard(self, operation: str, key: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except boto_errors() as error:
            raise translate(error, operation=operation, key=key, store=self) from error

    @contextmanager
    def _whole_answer(self, operation: str, key: str) -> Iterator[None]:
        """Tell an answer without its headers: botocore takes one that was cut there for a whole one."""
        try:
            yield
        except KeyError as error:
            raise StoreUnavailable(
                f"{operation} {key} in {self.place}: the answer has no {error}; was it cut, is it S3?", key=key
            ) from None

    @override
    def head(self, key: str) -> ObjectInfo:
        name = self._name(key)
        answer = self._guard("HEAD", key, lambda: self.client.head_object(Bucket=self.bucket, Key=name))
        with self._whole_answer("HEAD", key):
            return ObjectInfo(key, answer["ContentLength"], _bare(answer["ETag"]), answer["LastModified"].timestamp())

    @override
    def get(self, key: str, *, max_bytes: int | None = None) -> bytes:
        return b"".join(self._read(key, self._name(key), max_bytes=max_bytes))

    @override
    def get_range(self, key: str, start: int, length: int) -> bytes:
        if length <= 0:
            self.head(key)
            return b""
        return b"".join(self._read(key, self._name(key), start=start, length=length))

    @override
    @contextmanager
    def open(self, key: str, *, start: int = 0) -> Iterator[Opened]:
        name = self._name(key)
        answer = self._open(key, name, start, None)
        if answer is None:  # the one answer that says nothing of the object
            info = self.head(key)
            yield Opened(info.size_bytes, info.etag, start, iter(()))
            return
        with closing(answer.body), closing(self._read(key, name, start=start, answer=answer)) as pieces:
            yield Opened(answer.size_bytes, answer.etag, start, pieces)

    @contextmanager
    def open_own(self, *, unless_etag: str | None = None) -> Iterator[Opened | None]:
        """Open the one object that the URI itself names (``s3://bucket/model.safetensors``), as ``open`` does.

        None where it still has the ETag ``unless_etag``: one request, without a body (RFC 9110, If-None-Match).
        """
        name = self.prefix.rstrip("/")
        try:
            answer = self._open(name, name, 0, None, unless_etag=unless_etag)
        except NotModified:
            yield None
            return
        assert answer is not None, "a whole object has no end to lie beyond"
        with closing(answer.body), closing(self._read(name, name, answer=answer)) as pieces:
            yield Opened(answer.size_bytes, answer.etag, 0, pieces)

    def _read(
        self,
        key: str,
        name: str,
        *,
        start: int = 0,
        length: int | None = None,
        answer: _Answer | None = None,
        max_bytes: int | None = None,
    ) -> Generator[bytes]:
        """Yield ``length`` bytes (to the end, where None) from ``start``, asking again from where a body was cut.

        ``answer`` is the first one, where the caller has it already.
        """
        offset, failures, end, etag = start, 0, None, None
        while end is None or offset < end:
            answer = answer or self._open(key, name, offset, None if length is None else start + length)
            if answer is None:  # nothing at or beyond this offset
                if end is None:
                    return
                raise PreconditionFailed(f"{key}: shorter than before; it was replaced while being read", key=key)
            body = answer.body
            if etag is not None and answer.etag != etag:
                body.close()
                raise PreconditionFailed(f"{key}: ETag is {answer.etag}, expected {etag}; it was replaced", key=key)
            etag = answer.etag
            check_limit(key, answer.size_bytes, max_bytes)
            end = answer.size_bytes if length is None else min(answer.size_bytes, start + length)
            try:
                for piece in _pieces(body, answer.skip, end - offset):
                    offset += len(piece)
                    failures = 0
                    yield piece
                cut: Exception | None = None
            except cut_body_errors() as error:
                cut = error
            finally:
                body.close()
            answer = None
            if offset < end:
                failures += 1
                if failures >= self.options.max_attempts:
                    raise StoreUnavailable(
                        f"{key}: the body ended at byte {offset} of {end}, {failures} times; check the network",
                        key=key,
                    ) from cut

    def _open(
        self, key: str, name: str, offset: int, stop: int | None, *, unless_etag: str | None = None
    ) -> _Answer | None:
        """Ask for the bytes from ``offset``; None where the object ends before."""
        ranged = offset > 0 or stop is not None
        headers = {"Range": f"bytes={offset}-{'' if stop is None else stop - 1}"} if ranged else {}
        if unless_etag is not None:
            headers["IfNoneMatch"] = f'"{unless_etag}"'
        try:
            answer: GetObjectOutputTypeDef = self._guard(
                "GET",
                key,
                lambda: self.client.get_object(Bucket=self.bucket, Key=name, **headers),  # type: ignore[arg-type]
            )
        except RangeBeyondEnd:
            return None
        with self._whole_answer("GET", key):
            etag, size = _bare(answer["ETag"]), answer["ContentLength"]
        if "ContentRange" not in answer:  # the server ignored the range and sends everything
            return _Answer(answer["Body"], etag, offset, size)
        match = _CONTENT_RANGE.fullmatch(answer["ContentRange"])
        if match is None or int(match[1]) != offset or match[3] == "*":
            answer["Body"].close()
            raise Corrupt(
                key, expected=f"Content-Range from byte {offset}", seen=f"Content-Range {answer['ContentRange']!r}"
            )
        return _Answer(answer["Body"], etag, 0, int(match[3]))

    @override
    def put(self, key: str, data: Data, *, mode: PutMode) -> ObjectInfo:
        if mode == "create":
            try:
                return self._put_whole(key, data, {"IfNoneMatch": "*"})
            except PreconditionFailed as error:
                raise AlreadyExists(f"{key}: already in {self.place}", key=key) from error
        if len(data) >= self.options.multipart_bytes:
            view = memoryview(data)
            return self._put_parts(key, len(view), lambda start, stop: bytes(view[start:stop]))
        return self._put_whole(key, data, {})

    @override
    def put_file(self, key: str, path: Path) -> ObjectInfo:
        size = path.stat().st_size
        if size < self.options.multipart_bytes:
            return self._put_whole(key, path.read_bytes(), {})
        with path.open("rb") as file:

            def read(start: int, stop: int) -> bytes:
                file.seek(start)
                return file.read(stop - start)

            return self._put_parts(key, size, read)

    @override
    def put_if_match(self, key: str, data: Data, *, etag: str) -> ObjectInfo:
        try:
            return self._put_whole(key, data, {"IfMatch": f'"{etag}"'})
        except NotFound as error:  # AWS answers 404 to If-Match on a missing key
            raise PreconditionFailed(f"{key}: no such object, expected ETag {etag}", key=key) from error

    def _put_whole(self, key: str, data: Data, condition: dict[str, str]) -> ObjectInfo:
        return self.put_with_md5(key, data, _md5(data), **condition)

    def put_with_md5(self, key: str, data: Data, md5: str, **condition: str) -> ObjectInfo:
        """Send one PUT with this base64 MD5 for the server to check. Raises `Corrupt` where it finds other bytes."""
        name = self._name(key)
        call = functools.partial(self.client.put_object, Bucket=self.bucket, Key=name, Body=bytes(data), ContentMD5=md5)
        kind = _MEDIA_TYPES.get(PurePosixPath(key).suffix)
        options = condition | ({"ContentType": kind} if kind else {})
        answer = self._guard("PUT", key, lambda: call(**options))  # type: ignore[arg-type]
        with self._whole_answer("PUT", key):
            return ObjectInfo(key, len(data), _bare(answer["ETag"]), _answered_s(answer["ResponseMetadata"]))

    def _put_parts(self, key: str, size: int, read_range: Callable[[int, int], bytes]) -> ObjectInfo:
        """Send ``size`` bytes part by part; ``read(start, stop)`` gives one."""
        name, part_bytes, client = self._name(key), max(8 << 20, -(-size // 10_000)), self.client
        begun = self._guard("PUT", key, lambda: client.create_multipart_upload(Bucket=self.bucket, Key=name))
        with self._whole_answer("PUT", key):
            upload = begun["UploadId"]

        def send() -> None:
            parts: list[CompletedPartTypeDef] = []
            for number, start in enumerate(range(0, size, part_bytes), start=1):
                part = read_range(start, min(size, start + part_bytes))
                sent = client.upload_part(
                    Bucket=self.bucket, Key=name, UploadId=upload, PartNumber=number, Body=part, ContentMD5=_md5(part)
                )
                parts.append({"ETag": sent["ETag"], "PartNumber": number})
            assembly: CompletedMultipartUploadTypeDef = {"Parts": parts}
            client.complete_multipart_upload(Bucket=self.bucket, Key=name, UploadId=upload, MultipartUpload=assembly)

        try:
            with self._whole_answer("PUT", key):
                self._guard("PUT", key, send)
        except BaseException as error:  # also on a signal: parts of an unfinished upload are billed and never listed
            try:
                self._guard(
                    "ABORT", key, lambda: client.abort_multipart_upload(Bucket=self.bucket, Key=name, UploadId=upload)
                )
            except StorageError as second:
                error.add_note(f"and the upload could not be aborted: {second}")
            raise
        return self.head(key)  # Ceph answers the completion without an ETag

    @override
    def delete(self, key: str) -> None:
        name = self._name(key)
        self._guard("DELETE", key, lambda: self.client.delete_object(Bucket=self.bucket, Key=name))

    @override
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix + prefix)
        for page in self._pages(pages, prefix):
            for item in page.get("Contents", ()):
                key = item["Key"][len(self.prefix) :]
                if is_key(key):
                    yield ObjectInfo(key, item["Size"], _bare(item["ETag"]), item["LastModified"].timestamp())

    @override
    def folders(self, prefix: str = "") -> Iterator[str]:
        start = self.prefix + prefix
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=start, Delimiter="/")
        prefixes = (item["Prefix"] for page in self._pages(pages, prefix) for item in page.get("CommonPrefixes", ()))
        names = (name[len(start) :].rstrip("/") for name in prefixes)
        yield from sorted(name for name in names if is_key(name))  # the server sorts "a-b/" before "a/"

    def _pages(self, pages: Any, prefix: str) -> Iterator[Any]:
        iterator = iter(pages)
        while (page := self._guard("LIST", prefix, lambda: next(iterator, None))) is not None:
            yield page

    def _name(self, key: str) -> str:
        return self.prefix + check_key(key)


@dataclass(frozen=True, slots=True)
class _Answer:
    """A body, how many of its bytes to skip, and of what object it is: its ETag, and the size of the whole of it."""

    body: Any
    etag: str
    skip: int
    size_bytes: int


def _pieces(body: Any, skip: int, remaining: int) -> Iterator[bytes]:
    """Yield ``wanted`` bytes of an HTTP body after dropping ``skip``; fewer where it ends early."""
    while remaining > 0 and (piece := body.read(min(_PIECE_BYTES, skip + remaining))):
        part = piece[skip:][:remaining]
        skip = max(0, skip - len(piece))
        remaining -= len(part)
        if part:
            yield part


def _md5(data: Data) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _bare(etag: str) -> str:
    return etag.strip('"')


def _answered_s(metadata: Any) -> float:
    return parsedate_to_datetime(metadata["HTTPHeaders"]["date"]).timestamp()
