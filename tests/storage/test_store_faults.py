"""The publisher's side of a bad network: a proxy breaks HTTP between `S3Store` and a real server."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from storage.errors import (
    AccessDenied,
    Corrupt,
    NoSpace,
    PreconditionFailed,
    StorageError,
    StoreUnavailable,
    WriteConflict,
)
from storage.registry import Registry
from storage.retention import fsck
from storage.stores import capabilities
from storage.stores.s3 import S3Store
from storage.stores.uri import open_store
from tests.faults import proxy as fault
from tests.faults.proxy import Fault, Plan, Proxy, Request, faulty
from tests.servers.s3_server import S3Server
from tests.storage.artifacts import make_draft
from tests.storage.publishers import run_job

BIG = bytes(range(256)) * 2000  # 512,000 bytes


BOTH = pytest.mark.parametrize("server", ["moto", "ceph"], indirect=True)


@pytest.fixture
def server(request: pytest.FixtureRequest) -> S3Server:
    """moto's, unless a test asks for others: a fault that the proxy makes up is the same before any server."""
    found: S3Server = request.getfixturevalue(f"{getattr(request, 'param', 'moto')}_s3")
    return found


@pytest.fixture
def proxy(server: S3Server) -> Iterator[Proxy]:
    with faulty(server.endpoint_url) as running:
        yield running


@pytest.fixture
def store(server: S3Server, proxy: Proxy) -> S3Store:
    """A store behind the proxy, with a budget of three attempts."""
    opened = open_store(
        server.uri(max_attempts=3, read_timeout_s=2).replace(
            server.endpoint_url.rpartition(":")[2], proxy.url.rpartition(":")[2]
        )
    )
    assert isinstance(opened, S3Store)
    return opened


def times(count: int, broken: Fault, *, method: str, path: str) -> Plan:
    """Break the first ``count`` requests of this kind."""
    left = [count]

    def plan(request: Request) -> Fault | None:
        if request.method != method or path not in request.path or not left[0]:
            return None
        left[0] -= 1
        return broken

    return plan


LOST = {
    "forwarded, then 503": fault.refuse(503, "SlowDown"),
    "forwarded, then 500": fault.refuse(500, "InternalError"),
    "forwarded, then reset": fault.cut_head(0, reset=True),
    "forwarded, then cut in the headers": fault.cut_head(20, reset=False),
}


@BOTH
@pytest.mark.parametrize("name", LOST)
def test_lost_answer_to_the_commit(store: S3Store, proxy: Proxy, name: str) -> None:
    """The PUT lands and its answer is lost; the SDK tries again and meets 412 from its own write."""
    registry = Registry(store)
    draft = make_draft(registry, groups=1)
    assert capabilities.has_create_only(store)
    proxy.plan = times(1, LOST[name], method="PUT", path="/versions/")
    published = registry.publish(draft)
    assert (published.version, published.created) == (1, True)
    commits = [request for request in proxy.seen if request.method == "PUT" and "/versions/" in request.path]
    assert len(commits) == (1 if "headers" in name else 2)  # botocore takes an answer cut in its headers for whole
    assert registry.versions("net") == [1]
    assert registry.resolve("net", 1).digest == published.digest


@BOTH
def test_every_write_of_a_job_answered_by_a_reset(store: S3Store, proxy: Proxy) -> None:
    proxy.plan = lambda request: (
        fault.cut_head(0, reset=True) if request.method == "PUT" and request.attempt == 0 else None
    )
    assert run_job(store, groups=1).version == 1
    assert Registry(store).versions("net") == [1]
    assert fsck(store).problems == ()


@pytest.mark.parametrize("method", ["GET", "PUT", "HEAD"])
def test_slow_down_within_and_beyond_the_budget(store: S3Store, proxy: Proxy, method: str) -> None:
    store.put("k", b"before", mode="overwrite")

    operations: dict[str, Callable[[], object]] = {
        "GET": lambda: store.get("k"),
        "HEAD": lambda: store.head("k"),
        "PUT": lambda: store.put("k", b"after", mode="overwrite"),
    }
    operate = operations[method]

    proxy.plan = times(1, fault.refuse(503, "SlowDown"), method=method, path="/k")
    operate()
    proxy.plan = times(99, fault.refuse(503, "SlowDown"), method=method, path="/k")
    proxy.seen.clear()
    with pytest.raises(StoreUnavailable, match=rf"{method} k in s3://.*: (SlowDown|503)"):
        operate()
    assert len(proxy.seen) == 3


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("at", [0, 100_000, -1])
def test_a_cut_body_is_resumed_where_it_stopped(store: S3Store, proxy: Proxy, at: int, reset: bool) -> None:
    store.put("big", BIG, mode="overwrite")
    proxy.seen.clear()
    proxy.plan = times(2, fault.cut_body(at, reset=reset), method="GET", path="/big")
    assert store.get("big") == BIG
    assert len(proxy.seen) == 3
    proxy.plan = times(2, fault.cut_body(at, reset=reset), method="GET", path="/big")
    assert store.get_range("big", 1000, 300_000) == BIG[1000:301_000]
    proxy.plan = times(2, fault.cut_body(at, reset=reset), method="GET", path="/big")
    assert b"".join(store.stream("big", start=77)) == BIG[77:]


def test_a_body_that_never_gets_on_is_given_up(store: S3Store, proxy: Proxy) -> None:
    store.put("big", BIG, mode="overwrite")
    proxy.plan = times(99, fault.cut_body(0, reset=False), method="GET", path="/big")
    with pytest.raises(StoreUnavailable, match=r"big: the body ended at byte 0 of 512000, 3 times"):
        store.get("big")


def test_a_range_answered_with_everything(store: S3Store, proxy: Proxy) -> None:
    store.put("big", BIG, mode="overwrite")
    proxy.drop = frozenset({"range"})
    assert store.get_range("big", 300_000, 1000) == BIG[300_000:301_000]
    assert b"".join(store.stream("big", start=511_000)) == BIG[511_000:]
    assert store.get_range("big", len(BIG), 10) == b""
    proxy.plan = times(1, fault.cut_body(100_000, reset=False), method="GET", path="/big")
    assert store.get("big") == BIG


@pytest.mark.parametrize("wrong", ["bytes 5-14/512000", "bytes 0-9/*", "rubbish"])
def test_a_wrong_content_range_is_refused(store: S3Store, proxy: Proxy, wrong: str) -> None:
    store.put("big", BIG, mode="overwrite")
    proxy.plan = times(1, fault.header("Content-Range", wrong), method="GET", path="/big")
    with pytest.raises(Corrupt, match="big: expected Content-Range from byte 0, seen Content-Range"):
        store.get_range("big", 0, 10)


def test_an_object_replaced_while_it_is_read(store: S3Store, proxy: Proxy) -> None:
    store.put("big", BIG, mode="overwrite")
    proxy.plan = times(1, fault.cut_body(100_000, reset=False), method="GET", path="/big")
    stream = store.stream("big")
    first = next(stream)
    store.put("big", BIG[::-1], mode="overwrite")
    with pytest.raises(PreconditionFailed, match="big: ETag is"):
        list(stream)
    proxy.plan = times(1, fault.cut_body(100_000, reset=False), method="GET", path="/big")
    stream = store.stream("big")
    first = next(stream)
    store.put("big", first[:10], mode="overwrite")
    with pytest.raises(PreconditionFailed, match=r"big: (shorter than before|ETag is)"):
        list(stream)


def test_damage_is_found_by_our_digest(store: S3Store, proxy: Proxy) -> None:
    registry = Registry(store)
    blob = registry.put_blob(BIG, "application/octet-stream")
    for broken in (fault.flip(300_000), fault.body(b"<Error><Code>InternalError</Code></Error>"), fault.body(BIG[:-1])):
        proxy.plan = times(1, broken, method="GET", path="/blobs/")
        with pytest.raises(Corrupt, match="blobs/sha256/"):
            registry.get_blob(blob)
    assert registry.get_blob(blob) == BIG


def test_a_slow_trickle_ends_within_the_read_timeout_or_is_resumed(store: S3Store, proxy: Proxy) -> None:
    store.put("k", bytes(1000), mode="overwrite")
    proxy.plan = times(1, fault.trickle(200, 0.05), method="GET", path="/k")
    assert store.get("k") == bytes(1000)
    proxy.plan = times(1, fault.trickle(200, 2.5), method="GET", path="/k")
    assert store.get("k") == bytes(1000)


@pytest.mark.parametrize(
    ("status", "code", "kind", "advice"),
    [
        (403, "RequestTimeTooSkewed", AccessDenied, r"set the clock \(NTP\)"),
        (400, "ExpiredToken", AccessDenied, "the credentials have expired; get new ones"),
        (403, "AccessDenied", AccessDenied, "check the bucket's policy"),
        (403, "QuotaExceeded", NoSpace, "free some space or raise the quota"),
        (507, "", NoSpace, "free some space or raise the quota"),
        (409, "ConditionalRequestConflict", WriteConflict, "read back, then try again"),
        (400, "BadDigest", Corrupt, "other bytes at the server"),
        (418, "Teapot", StoreUnavailable, "it kept failing"),
    ],
)
def test_answers_and_what_to_try(  # noqa: PLR0917
    store: S3Store, proxy: Proxy, status: int, code: str, kind: type[StorageError], advice: str
) -> None:
    proxy.plan = times(99, fault.refuse(status, code), method="PUT", path="/k")
    with pytest.raises(kind, match=advice) as caught:
        store.put("k", b"x", mode="create")
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def test_an_answer_without_its_headers(store: S3Store, proxy: Proxy) -> None:
    store.put("k", b"x", mode="overwrite")
    for name in ("Content-Length", "ETag", "Last-Modified"):
        proxy.plan = times(1, fault.header(name, None), method="HEAD", path="/k")
        with pytest.raises(StoreUnavailable, match=r"HEAD k in s3://.*: the answer has no .*; was it cut, is it S3\?"):
            store.head("k")


def test_an_error_inside_the_200_of_a_multipart_upload(store: S3Store, proxy: Proxy) -> None:
    parts = S3Store(store.bucket, store.prefix, replace(store.options, multipart_bytes=1), uri=store.uri)
    proxy.plan = times(
        99,
        fault.body(b"<Error><Code>InternalError</Code><Message>no</Message></Error>"),
        method="POST",
        path="uploadId",
    )
    with pytest.raises(StoreUnavailable, match=r"PUT big in s3://.*: InternalError"):
        parts.put("big", BIG, mode="overwrite")
    assert parts.client.list_multipart_uploads(Bucket=store.bucket, Prefix=store.prefix).get("Uploads", []) == []


_UPLOAD = """
import signal, sys
from storage.stores.uri import open_store
signal.signal(signal.SIGINT, signal.default_int_handler)  # a session in the background ignores it, and so would we
open_store(sys.argv[1]).put("k", bytes(40 << 20), mode="overwrite")
"""


def test_an_upload_that_is_interrupted_leaves_no_parts(server: S3Server, proxy: Proxy) -> None:
    """Parts of an upload that nobody completes are billed and never listed among the objects."""
    direct = server.uri(multipart_bytes=1 << 20)
    through = direct.replace(server.endpoint_url.rpartition(":")[2], proxy.url.rpartition(":")[2])
    arrived = threading.Event()

    def hold(request: Request) -> Fault | None:
        if "partNumber=3" in request.path:
            arrived.set()
            time.sleep(1)
        return None

    proxy.plan = hold
    process = subprocess.Popen([sys.executable, "-c", _UPLOAD, through], stderr=subprocess.DEVNULL)
    assert arrived.wait(120)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    store = open_store(direct)
    assert isinstance(store, S3Store)
    uploads = store.client.list_multipart_uploads(Bucket=store.bucket, Prefix=store.prefix)
    assert uploads.get("Uploads", []) == []
    assert any(request.method == "DELETE" and "uploadId=" in request.path for request in proxy.seen)
    assert list(store.list()) == []
