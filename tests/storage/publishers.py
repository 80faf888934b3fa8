"""What publishing processes run: importable by name, so that a fork server can start them with everything loaded."""

from __future__ import annotations

import os
import signal
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from typing import Literal

import boto3  # noqa: F401 - loaded once, in the fork server
from typing_extensions import override

from storage.registry import Published, Registry
from storage.stores.blob_store import BlobStore
from storage.stores.uri import open_store
from tests.storage.artifacts import make_draft
from tests.storage.wrappers import Step, WatchedStore

When = Literal["before", "after"]


def fork_server() -> ForkServerContext:
    """Return a context whose children start in milliseconds and share no thread or socket with the test's process."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def run_job(store: BlobStore, *, groups: int = 2) -> Published:
    """Do what a job does to a store: blobs, manifest, tag, report."""
    registry = Registry(store)
    published = registry.publish(make_draft(registry, groups=groups))
    registry.tag(published.name, "latest", published.version)
    registry.put_report(published.name, published.version, "accuracy", b'{"top1":0.5}')
    return published


def publish_many(uri: str, publisher: int, count: int) -> list[tuple[int, int]]:
    """Publish ``count`` versions of one name and return (seed, version) of each."""
    registry = Registry(open_store(uri))
    seeds = [publisher * count + number for number in range(count)]
    return [(seed, registry.publish(make_draft(registry, seed=seed, groups=1)).version) for seed in seeds]


class Suicide(WatchedStore):
    """Kills its own process with SIGKILL before or after step ``index``."""

    def __init__(self, inner: BlobStore, index: int, when: When) -> None:
        super().__init__(inner)
        self._index, self._when = index, when

    @override
    def before(self, index: int, step: Step) -> None:
        if (index, "before") == (self._index, self._when):
            os.kill(os.getpid(), signal.SIGKILL)

    @override
    def after(self, index: int, step: Step) -> None:
        if (index, "after") == (self._index, self._when):
            os.kill(os.getpid(), signal.SIGKILL)


def run_job_and_die(uri: str, index: int, when: When) -> None:
    """Run the job in a process that is killed at one of its steps."""
    run_job(Suicide(open_store(uri), index, when))


class Dead(BaseException):
    """What every operation of a dead process raises: not even clean-up reaches the store."""


class DiesAt(WatchedStore):
    """Stands for a process that dies before or after step ``index``: no later step reaches the store."""

    def __init__(self, inner: BlobStore, index: int, when: When) -> None:
        super().__init__(inner)
        self._index, self._when, self._dead = index, when, False

    @override
    def before(self, index: int, step: Step) -> None:
        self._dead = self._dead or (index, "before") == (self._index, self._when)
        if self._dead:
            raise Dead

    @override
    def after(self, index: int, step: Step) -> None:
        self._dead = self._dead or (index, "after") == (self._index, self._when)
        if self._dead:
            raise Dead
