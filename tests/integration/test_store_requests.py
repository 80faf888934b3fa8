"""How many requests a job asks of an S3 server, to the last one: a store of a thousand workers counts them too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.driver import run_job
from jobs.events import Event
from jobs.spec.file import parse_spec
from storage.stores.capabilities import has_create_only
from storage.stores.uri import open_store
from tests.servers.requests import Requests, counted
from tests.servers.s3_server import S3Server
from workers.executor import InProcessExecutor

HEADER = 2  # its length, then itself


class Elsewhere(InProcessExecutor):
    """Workers that do not see the driver's files: weights go through the store."""

    same_machine = False


@pytest.fixture
def sent() -> Any:
    with counted() as requests:
        yield requests


def test_a_job_asks_for_nothing_twice(
    moto_s3: S3Server, sent: Requests, tiny_document: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    uri = moto_s3.uri()
    has_create_only(open_store(uri))  # asked once a process
    document = tiny_document(store__uri=uri, calibration=None, evaluate=None, quantize__activations=None)
    job = parse_spec(document, where="test")
    begin, stops = len(sent), dict[str, int]()

    def listen(event: Event) -> None:
        if event.kind == "finished":
            stops[event.stage] = len(sent)

    result = run_job(job, Elsewhere(), listen)
    units, shards = result.work.units, 8
    assert units == 5  # four groups of two shards, one base blob
    blobs = shards + 1
    assert sent.by_kind(begin, stops["stage"]) == {("HeadObject", "blob"): 1, ("PutObject", "blob"): 1}
    assert sent.by_kind(stops["stage"], stops["quantize"]) == {
        ("GetObject", "unit record"): units,
        ("GetObject", "blob"): HEADER + 10,  # where 92 tensors lie in 10 stretches
        ("HeadObject", "blob"): blobs,
        ("PutObject", "blob"): blobs,
        ("PutObject", "unit record"): units,
    }
    assert sent.by_kind(stops["quantize"], stops["publish"]) == {
        ("HeadObject", "blob"): blobs,
        ("GetObject", "tag"): 1,
        ("HeadObject", "manifest"): 1,
        ("PutObject", "manifest"): 1,
    }
    assert sent.by_kind(stops["publish"]) == {
        ("GetObject", "blob"): blobs,
        ("GetObject", "manifest"): 3,  # pulled back; is it withdrawn, before the upgrade; then read for the tag
        ("GetObject", "tag"): 1,  # does it point at a later version?
        ("GetObject", "entry"): 2,  # neither a hint nor a first entry
        ("PutObject", "entry"): 2,  # the entry, and the hint
        ("PutObject", "tag"): 1,
        ("HeadObject", "entry"): 1,  # has somebody moved it on meanwhile?
        ("PutObject", "report"): 1,
    }

    begin = len(sent)
    again = run_job(job, Elsewhere(), listen)
    assert (again.work.reused, again.digest) == (units, result.digest)
    assert sent.by_kind(begin, stops["stage"]) == {
        ("HeadObject", "blob"): 1,
        ("GetObject", "gc's list"): 1,
        ("GetObject", "blob"): 1,  # what an earlier run left is relied upon once it was read whole
    }
    assert sent.by_kind(stops["stage"], stops["quantize"]) == {
        ("GetObject", "unit record"): units,
        ("HeadObject", "blob"): blobs,
        ("GetObject", "gc's list"): 1,
        ("GetObject", "blob"): blobs,
    }
