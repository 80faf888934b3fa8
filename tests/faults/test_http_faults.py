"""Every fault of the network: the right bytes in the end, or a clear error and nothing under its final name."""

from __future__ import annotations

import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path

import pytest

from storage.device import Device, HttpClient, HttpSource, Moved, Pace, Retry
from storage.device.errors import DeviceError, GaveUp, SourceDenied, SourceError
from storage.layout import CACHE_MARKER, blob_key
from storage.manifest import Manifest
from tests.faults import proxy as fault
from tests.faults.conftest import Origin
from tests.faults.proxy import Answer, Fault, Plan, Request
from tests.storage.device.artifacts import content, publish

SHARD_BYTES = 300_000
FAST = Retry(attempts=4, base_s=0.001, cap_s=0.01)
Make = Callable[..., Device]


@pytest.fixture
def manifest(origin: Origin) -> Manifest:
    return publish(origin.store, shard_bytes=SHARD_BYTES)[0]


@pytest.fixture
def make(origin: Origin, tmp_path: Path) -> Make:
    def device(pace: Pace | None = None, read_timeout_s: float = 5.0, answer_timeout_s: float = 5.0) -> Device:
        client = HttpClient(read_timeout_s=read_timeout_s, answer_timeout_s=answer_timeout_s)
        source = HttpSource(origin.url, client)
        return Device(tmp_path / "cache", source, unsigned=True, retry=FAST, pace=pace or Pace())

    return device


def shard_of(manifest: Manifest, group: int = 1) -> str:
    return blob_key(manifest.groups[group].levels[0].digest)


def on_shard(manifest: Manifest, *faults: Fault | None) -> Plan:
    """Apply ``faults`` to the requests for one shard, in order; later requests pass."""

    def plan(request: Request) -> Fault | None:
        hit = request.path.endswith(shard_of(manifest)) and request.attempt < len(faults)
        return faults[request.attempt] if hit else None

    return plan


def whole(device: Device, manifest: Manifest) -> None:
    assert device.verify("net").whole
    assert device.levels("net") == (0,)
    root = Path(device.root)
    assert not list(root.glob("staging/*"))
    names = {f"sha256:{path.name}" for path in root.glob("blobs/sha256/*/*")}
    assert names == {blob.digest for blob in manifest.base} | {group.levels[0].digest for group in manifest.groups}


def nothing_wrong_under_a_final_name(device: Device, manifest: Manifest) -> None:
    sizes = {blob.digest: blob for blob in manifest.descriptors()}
    found = [f"sha256:{path.name}" for path in Path(device.root).glob("blobs/sha256/*/*")]
    assert manifest.groups[1].levels[0].digest not in found
    for digest in found:
        assert device.drop_damaged(sizes[digest]) is None
    assert device.status("net").phase == "failed"


SURVIVED: dict[str, tuple[Fault, int]] = {
    # fault on the first request for a shard -> bytes of that shard that travel twice
    "503 SlowDown": (fault.refuse(503, "SlowDown"), 0),
    "429": (fault.refuse(429, headers={"Retry-After": "0"}), 0),
    "408": (fault.refuse(408), 0),
    "500 after the work was done": (fault.refuse(500, "InternalError"), 0),
    "cut in the status line": (fault.cut_head(5, reset=False), 0),
    "reset in the status line": (fault.cut_head(5, reset=True), 0),
    "cut in the headers": (fault.cut_head(60, reset=False), 0),
    "reset in the headers": (fault.cut_head(60, reset=True), 0),
    "closed without a word": (fault.cut_head(0, reset=False), 0),
    "cut before the body": (fault.cut_body(0, reset=False), 0),
    "cut in the body": (fault.cut_body(100_000, reset=False), 0),
    "cut before the last byte": (fault.cut_body(-1, reset=False), 0),
    "reset in the body": (fault.cut_body(200_000, reset=True), 0),
    "flipped first bit": (fault.flip(0), SHARD_BYTES + 100),
    "flipped last bit": (fault.flip(-1), SHARD_BYTES + 100),
    "an error inside a 200": (fault.body(b"<Error><Code>InternalError</Code></Error>"), 0),
    "empty 200": (fault.body(b""), 0),
    "longer than declared": (fault.body(bytes(SHARD_BYTES + 101)), 0),
    "Content-Length too small": (fault.header("Content-Length", "1000"), 0),
    "other bytes of the right length": (fault.body(bytes(SHARD_BYTES + 100)), SHARD_BYTES + 100),
    "206 to a whole request": (lambda answer: Answer(206, answer.headers, answer.body), 0),
}


@pytest.mark.parametrize("name", SURVIVED)
def test_survived(origin: Origin, manifest: Manifest, make: Make, name: str) -> None:
    broken, twice = SURVIVED[name]
    origin.proxy.plan = on_shard(manifest, broken)
    device = make()
    moved = device.pull("net")
    whole(device, manifest)
    total = sum(blob.size_bytes for blob in [*manifest.base, *(group.levels[0] for group in manifest.groups)])
    assert moved.wasted_bytes == twice
    assert total + twice - 200_000 <= moved.received_bytes <= total + twice  # a reset may swallow what was on its way
    assert moved.retries == 1


def skewed(answer: fault.Answer) -> fault.Answer:
    """Refuse with a clock two hours behind: that of the answer's moment, minutes after this file was read."""
    headers = {"Date": formatdate(time.time() - 7200, usegmt=True)}
    return fault.refuse(403, "RequestTimeTooSkewed", headers)(answer)


FATAL: dict[str, tuple[Fault, str]] = {
    "503 for ever": (fault.refuse(503, "SlowDown"), "gave up after 4 attempts: .*HTTP 503 SlowDown"),
    "404": (fault.refuse(404, "NoSuchKey"), "HTTP 404 NoSuchKey"),
    "403": (fault.refuse(403, "AccessDenied"), "HTTP 403 AccessDenied"),
    "400": (fault.refuse(400, "ExpiredToken"), "HTTP 400 ExpiredToken"),
    "flipped bit every time": (fault.flip(77), "gave up after 4 attempts: .*their SHA-256 is"),
    "an error inside a 200 every time": (fault.body(b"<Error/>"), "the source holds 8 bytes, the manifest says 300100"),
    "compressed": (fault.header("Content-Encoding", "gzip"), "sent it as gzip"),
    "cut at the same byte": (fault.cut_body(0, reset=False), "gave up after 4 attempts: .*connection broke"),
    "redirect to itself": (fault.refuse(302, headers={"Location": "?again"}), "more than 5 redirects"),
    "redirect to a file": (fault.refuse(302, headers={"Location": "file:///etc/passwd"}), r"not an http\(s\) address"),
    "redirect to no address": (
        fault.refuse(302, headers={"Location": "http://[evil"}),
        r"redirected to what is no address \(brackets or host\)$",
    ),
    "redirect to no port": (
        fault.refuse(302, headers={"Location": "http://127.0.0.1:99999/x"}),
        r"not an http\(s\) address \(its port\)$",
    ),
    "endless": (fault.endless(), "more than the 300100 bytes"),
    "no length": (fault.header("Content-Length", None), "does not say where it ends"),
    "clock skew": (
        skewed,
        r"403 RequestTimeTooSkewed; this machine's clock is \+7(19|20)\d s off",
    ),
}


@pytest.mark.parametrize("name", FATAL)
def test_given_up_with_a_reason(origin: Origin, manifest: Manifest, make: Make, name: str) -> None:
    broken, message = FATAL[name]
    hit = shard_of(manifest)
    origin.proxy.plan = lambda request: broken if hit in request.path else None
    device = make()
    with pytest.raises(DeviceError, match=message) as caught:
        device.pull("net")
    assert "\n" not in str(caught.value)
    nothing_wrong_under_a_final_name(device, manifest)
    origin.proxy.plan = lambda _: None
    device.pull("net")
    whole(device, manifest)


def _cut_then(second: Fault | None) -> tuple[Fault, Fault | None]:
    return fault.cut_body(120_000, reset=False), second


def _resume(origin: Origin, manifest: Manifest, make: Make, second: Fault | None) -> tuple[Moved, list[dict[str, str]]]:
    origin.proxy.plan = on_shard(manifest, *_cut_then(second))
    device = make()
    moved = device.pull("net")
    whole(device, manifest)
    asked = [request.headers for request in origin.proxy.seen if request.path.endswith(shard_of(manifest))]
    return moved, asked


def test_a_resume_asks_for_the_rest_of_the_same_bytes(origin: Origin, manifest: Manifest, make: Make) -> None:
    moved, asked = _resume(origin, manifest, make, None)
    assert moved.wasted_bytes == 0
    assert [headers.get("Range") for headers in asked] == [None, "bytes=120000-"]
    assert asked[1]["If-Range"].startswith('"')


RESUMES: dict[str, tuple[Fault, int, int]] = {
    # what meets the ranged request -> bytes thrown away, requests in all
    "wrong Content-Range": (fault.header("Content-Range", "bytes 0-300099/300100"), 0, 3),
    "no Content-Range": (fault.header("Content-Range", None), 0, 3),
    "Content-Range off by one": (fault.header("Content-Range", "bytes 120001-300100/300100"), 0, 3),
    "another length": (fault.header("Content-Range", "bytes 120000-300099/400000"), 120_000, 3),
    "multipart ranges": (fault.header("Content-Type", "multipart/byteranges"), 0, 2),
    "entity tag changed": (fault.header("ETag", '"another"'), 120_000, 3),
    "flipped bit": (fault.flip(5), SHARD_BYTES + 100, 3),
    "416": (fault.refuse(416, "InvalidRange", {"Content-Range": "bytes */300100"}), 120_000, 3),
    "503": (fault.refuse(503, "SlowDown"), 0, 3),
    "cut again": (fault.cut_body(50_000, reset=False), 0, 3),
}


@pytest.mark.parametrize("name", RESUMES)
def test_resumes(origin: Origin, manifest: Manifest, make: Make, name: str) -> None:
    second, wasted, requests = RESUMES[name]
    moved, asked = _resume(origin, manifest, make, second)
    assert (moved.wasted_bytes, len(asked)) == (wasted, requests)


def test_200_to_a_range_request_starts_over(origin: Origin, manifest: Manifest, make: Make) -> None:
    origin.proxy.drop = frozenset({"range"})
    moved, asked = _resume(origin, manifest, make, None)
    assert (moved.wasted_bytes, len(asked)) == (120_000, 2)


def test_a_resume_without_an_entity_tag_is_judged_by_the_digest(origin: Origin, manifest: Manifest, make: Make) -> None:
    untagged = fault.header("ETag", None)
    origin.proxy.plan = on_shard(manifest, lambda answer: fault.cut_body(120_000, reset=False)(untagged(answer)))
    device = make()
    assert device.pull("net").wasted_bytes == 0
    whole(device, manifest)
    asked = [request.headers for request in origin.proxy.seen if request.path.endswith(shard_of(manifest))]
    assert (asked[1].get("Range"), asked[1].get("If-Range")) == ("bytes=120000-", None)


@pytest.mark.parametrize("cut", [20, 60, 120, 200])
def test_documents_whose_headers_are_cut(origin: Origin, manifest: Manifest, make: Make, cut: int) -> None:
    """http.client takes what it has for all the headers: without a length, an empty body would look whole."""
    cut_once = fault.cut_head(cut, reset=False)
    origin.proxy.plan = lambda r: cut_once if "models" in r.path and r.attempt == 0 else None
    device = make()
    device.pull("net")
    # The tag and the manifest twice; the tag's two entries are not there, which a cut head says, too.
    assert len([request for request in origin.proxy.seen if "models" in request.path]) == 6
    whole(device, manifest)


def test_documents_are_tried_again_too(origin: Origin, manifest: Manifest, make: Make) -> None:
    origin.proxy.plan = lambda r: fault.refuse(503) if "models" in r.path and r.attempt < 3 else None
    device = make()
    device.pull("net")
    # The tag, its two entries that are not there, and the manifest, each at the fourth attempt.
    assert len([request for request in origin.proxy.seen if "models" in request.path]) == 16
    whole(device, manifest)


def test_changed_bytes_are_not_mixed(origin: Origin, manifest: Manifest, make: Make) -> None:
    """Damaged bytes at first, the right ones under a new tag later: If-Range gets the new ones whole."""
    key, size = shard_of(manifest), SHARD_BYTES + 100
    right = origin.store.get(key)
    origin.store.put(key, content("wrong", size), mode="overwrite")

    def mend(answer: Answer) -> Answer:
        origin.store.put(key, right, mode="overwrite")
        return fault.cut_body(120_000, reset=False)(answer)

    origin.proxy.plan = on_shard(manifest, mend)
    device = make()
    moved = device.pull("net")
    whole(device, manifest)
    assert (moved.wasted_bytes, moved.retries) == (120_000, 1)


def test_416_at_completion_is_never_asked_for(origin: Origin, manifest: Manifest, make: Make) -> None:
    """Killed between the last byte and the rename: the staged bytes are hashed and named, without a request."""
    blob = manifest.groups[1].levels[0]
    device = make()
    part = Path(device.root) / "staging" / f"{blob.digest[7:]}.part"
    part.parent.mkdir(parents=True)
    (Path(device.root) / CACHE_MARKER).touch()
    part.write_bytes(origin.store.get(shard_of(manifest)))
    moved = device.pull("net")
    whole(device, manifest)
    assert moved.resumed_bytes == blob.size_bytes
    assert not [request for request in origin.proxy.seen if request.path.endswith(shard_of(manifest))]


@pytest.mark.parametrize("extra", [0, 1, 5_000])
def test_staged_bytes_are_hashed_first(origin: Origin, manifest: Manifest, make: Make, extra: int) -> None:
    blob = manifest.groups[1].levels[0]
    device = make()
    part = Path(device.root) / "staging" / f"{blob.digest[7:]}.part"
    part.parent.mkdir(parents=True)
    (Path(device.root) / CACHE_MARKER).touch()
    part.write_bytes(content("rubbish", blob.size_bytes + extra if extra else 1_000))
    device.pull("net")
    whole(device, manifest)


def test_a_stalled_server_ends_in_a_time_out(origin: Origin, manifest: Manifest, make: Make) -> None:
    origin.proxy.plan = on_shard(manifest, fault.trickle(100_000, 30.0))
    begun = time.monotonic()
    device = make(read_timeout_s=0.3)
    assert device.pull("net").retries == 1
    assert time.monotonic() - begun < 30
    whole(device, manifest)


def test_a_trickle_counts_as_a_dead_connection(origin: Origin, manifest: Manifest, make: Make) -> None:
    origin.proxy.plan = on_shard(manifest, fault.trickle(1, 0.02))
    device = make(pace=Pace(least=2_000, window_s=1.0))
    begun = time.monotonic()
    assert device.pull("net").retries >= 1
    assert time.monotonic() - begun < 30
    whole(device, manifest)


def test_headers_that_drip_are_not_waited_for(origin: Origin, manifest: Manifest, make: Make) -> None:
    origin.proxy.plan = on_shard(manifest, fault.drip_head(1.0))
    device = make(answer_timeout_s=0.5)
    begun = time.monotonic()
    assert device.pull("net").retries == 1
    assert time.monotonic() - begun < 30
    whole(device, manifest)


def test_documents_that_trickle_are_not_waited_for(origin: Origin, manifest: Manifest, make: Make) -> None:
    origin.proxy.plan = lambda r: fault.trickle(1, 0.02) if "tags" in r.path and r.attempt == 0 else None
    device = make(pace=Pace(least=2_000, window_s=1.0))
    device.pull("net")
    assert len([request for request in origin.proxy.seen if "tags" in request.path]) >= 2
    whole(device, manifest)


def test_bandwidth_is_capped(origin: Origin, manifest: Manifest, make: Make) -> None:
    device = make(pace=Pace(most=2_000_000))
    begun = time.monotonic()
    moved = device.pull("net")
    seconds = time.monotonic() - begun
    assert moved.received_bytes / seconds < 2_000_000
    whole(device, manifest)


def test_retry_after_is_kept(origin: Origin, manifest: Manifest, make: Make) -> None:
    origin.proxy.plan = on_shard(manifest, fault.refuse(503, headers={"Retry-After": "1"}))
    begun = time.monotonic()
    device = make()
    device.pull("net")
    assert time.monotonic() - begun >= 1.0
    whole(device, manifest)


@pytest.mark.parametrize(
    "headers",
    [
        {"Retry-After": "9" * 19},
        {"Retry-After": "Fri, 31 Dec 9999 23:59:59 -9999"},
        {"Retry-After": "Mon, 01 Jan 0001 00:00:00 +2359"},
        {"Retry-After": "soon\ufffd", "Date": "never"},
        {"Date": "Thu, 01 Jan 0001 00:00:00 +2359"},
        {"Retry-After": "-1"},
    ],
    ids=str,
)
def test_dates_out_of_range_are_passed_over(
    origin: Origin, manifest: Manifest, tmp_path: Path, headers: dict[str, str]
) -> None:
    plain = {name: value.encode("ascii", "replace").decode() for name, value in headers.items()}
    retry = Retry(attempts=2, base_s=0.001, longest_s=0.01)
    for status, told in ((503, "HTTP 503"), (403, "HTTP 403")):
        origin.proxy.plan = lambda _, status=status: fault.refuse(status, headers=plain)  # type: ignore[misc]
        device = Device(tmp_path / str(status), HttpSource(origin.proxy.url), unsigned=True, retry=retry)
        with pytest.raises(DeviceError, match=told):
            device.pull("net")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://user:hunter2@127.0.0.1:1", r"127\.0\.0\.1:1 does not answer"),
        ("http://user:hunter2@[bad", r"not an http\(s\) address \(brackets or host\)"),
        ("http://user:hunter2@127.0.0.1:99999", r"not an http\(s\) address \(its port\)"),
        ("http://127.0.0.1:1/?X-Amz-Signature=hunter2", r"127\.0\.0\.1:1 does not answer"),
    ],
)
def test_no_password_or_signature_is_ever_shown(tmp_path: Path, url: str, told: str) -> None:
    shown: list[str] = []
    device = Device(
        tmp_path, HttpSource(url), unsigned=True, retry=FAST, on_event=lambda event: shown.append(event.message)
    )
    with pytest.raises(DeviceError, match=told) as caught:
        device.pull("net")
    assert "hunter2" not in "".join([str(caught.value), *shown])


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    device = Device(tmp_path, HttpSource("http://127.0.0.1:1"), unsigned=True, retry=FAST)
    with pytest.raises(GaveUp, match=r"127\.0\.0\.1:1 does not answer"):
        device.pull("net")


def test_an_endless_manifest_is_not_read(origin: Origin, manifest: Manifest, make: Make) -> None:
    origin.proxy.plan = lambda request: fault.endless() if "tags" in request.path else None
    with pytest.raises(SourceError, match="more than the 4096 bytes accepted"):
        make().pull("net")


def test_denied_says_so(origin: Origin, manifest: Manifest, make: Make) -> None:
    origin.proxy.plan = lambda _: fault.refuse(401)
    with pytest.raises(SourceDenied, match="HTTP 401"):
        make().pull("net")


def test_the_budget_is_per_blob(origin: Origin, manifest: Manifest, make: Make) -> None:
    """Three faults on every one of four blobs exceed any single budget of four attempts, and yet the pull ends well."""
    origin.proxy.plan = lambda r: fault.refuse(503) if "blobs" in r.path and r.attempt < 3 else None
    device = make()
    assert device.pull("net").retries == 12
    whole(device, manifest)
