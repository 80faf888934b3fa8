"""A blob whose bits rot in the store: never tagged, and sent again by the next run of its job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.main import Exit, exit_code
from jobs.driver import run_job
from jobs.events import Event
from jobs.result import JobResult
from jobs.spec.file import parse_spec
from storage.errors import Damaged
from storage.layout import blob_key
from storage.manifest import MEDIA_TYPE_BASE, MEDIA_TYPE_SHARD
from storage.registry import Registry
from storage.retention import delete_version, fsck, gc
from storage.stores.uri import open_store
from workers.executor import InProcessExecutor

Document = Callable[..., dict[str, Any]]


def local(document: dict[str, Any]) -> JobResult:
    return run_job(parse_spec(document, where="test"), InProcessExecutor())


def flip_a_bit(path: Path) -> bytes:
    """Flip one bit in the middle of a file and return what it held before."""
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    path.write_bytes(damaged)
    return whole


@pytest.mark.parametrize("media_type", [MEDIA_TYPE_SHARD, MEDIA_TYPE_BASE])
def test_a_rotten_blob_is_sent_again_by_the_next_run(tiny_document: Document, media_type: str) -> None:
    document = tiny_document()
    first = local(document)
    registry = Registry(open_store(document["store"]["uri"]))
    blobs = registry.resolve("tiny", 1).manifest.descriptors()
    path = Path(document["store"]["uri"]) / blob_key(
        next(blob.digest for blob in blobs if blob.media_type == media_type)
    )
    whole = flip_a_bit(path)

    again = local(document)
    assert path.read_bytes() == whole
    assert (again.created, again.digest, again.work.units - again.work.reused) == (False, first.digest, 1)
    assert fsck(registry.store).problems == ()


def test_a_version_that_does_not_come_back_whole_is_not_tagged(tiny_document: Document) -> None:
    document = tiny_document()
    registry = Registry(open_store(document["store"]["uri"]))
    damaged: list[Path] = []

    def rot(event: Event) -> None:
        if (event.kind, event.stage) == ("finished", "publish") and not damaged:
            blob = registry.resolve("tiny", 1).manifest.descriptors()[1]
            damaged.append(Path(document["store"]["uri"]) / blob_key(blob.digest))
            flip_a_bit(damaged[0])

    with pytest.raises(Damaged, match=r"tiny version 1 is stored, but not tagged: .*; run the job again") as caught:
        run_job(parse_spec(document, where="test"), InProcessExecutor(), rot)
    assert exit_code(caught.value) == Exit.INTEGRITY
    assert damaged[0].name in str(caught.value)
    assert registry.tags("tiny") == {}

    assert local(document).version == 1
    assert registry.tags("tiny") == {"latest": 1}
    assert fsck(registry.store).problems == ()


def test_what_gc_condemned_between_two_jobs_of_one_process_is_sent_again(tiny_document: Document) -> None:
    document = tiny_document(evaluate=None)
    first = local(document)
    store = open_store(document["store"]["uri"])
    assert local(document).work.reused == first.work.units  # what was seen of gc's list is this job's alone
    delete_version(store, "tiny", 1)
    assert len(gc(store, dry_run=False).condemned) > 0
    again = local(document)
    assert (again.version, again.work.reused) == (2, 0)
