"""The loop: look at the machine, decide for each model, tell engines, fetch beside it all."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from storage.agent.current import Current, current_of, publish, read_current, read_past, write_past
from storage.agent.events import AgentEvent, EventKind, Metrics
from storage.agent.policy import Decision, Past, Situation, decide
from storage.agent.settings import AgentSettings, ModelSettings
from storage.agent.signals import Sensors, Signals
from storage.agent.traffic import CountedSource, Stopped, Traffic
from storage.device import Device, Pace, open_source
from storage.device.cache import Cache, Installed, blobs_of
from storage.device.files import disk_errors
from storage.errors import StorageError
from storage.manifest import Manifest
from storage.wording import one_line

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 60.0, 3600.0  # between two tries of a fetch that fails
_METRICS_EVERY_S = 60.0


def boot_s() -> float:
    """Return seconds since the boot, sleep included: a clock that nobody sets."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass
class _Model:
    """What the agent knows of one model between two looks."""

    settings: ModelSettings
    folder: Path
    past: Past
    current: Current | None
    manifest: tuple[str, Manifest] | None = None
    last: tuple[str, str] = ("", "")
    fetch: Future[None] | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    failures: int = 0
    not_before_s: float = 0.0
    unheard: bool = True


class Agent:
    """Keeps the models of a device's folder at the level that the policy allows.

    Engines follow ``<state>/<name>/current`` (`storage.agent.current`), or ``on_current`` is called with the same in
    this process, at the start and at every switch; where it raises, it is called again at the next look. Whatever fails
    (store, disk, callback) is an event of kind ``failure``, and the model goes on as it was.
    """

    def __init__(
        self,
        settings: AgentSettings,
        *,
        root: Path = Path("/"),
        on_event: Callable[[AgentEvent], None] = lambda _: None,
        on_current: Callable[[Current], None] = lambda _: None,
        dry_run: bool = False,
        clock: Callable[[], float] = boot_s,
        local: Callable[[], datetime] = datetime.now,
    ) -> None:
        """Read what an earlier agent left.

        Args:
            settings: the agent's file.
            root: what ``/proc`` and ``/sys`` lie below.
            on_event: hears everything.
            on_current: an engine of this process.
            dry_run: decide and tell; write, fetch and delete nothing.
            clock: seconds that never go back.
            local: the wall clock, in local time.
        """
        self.settings, self.dry_run, self.metrics = settings, dry_run, Metrics()
        self._tell, self._on_current, self._clock, self._local = on_event, on_current, clock, local
        policy = settings.policy
        self._sensors = Sensors(root, settings.cgroup, settings.cache, policy.network.metered)
        self._cache = Cache(settings.cache)
        self._traffic = Traffic(settings.state / "traffic.json")
        self._boot_id = self._read_boot_id(root)
        self._worker = ThreadPoolExecutor(1, "fetch")
        self._metrics_s = float("-inf")
        self._models = [self._begin(model) for model in settings.models]

    def tick(self) -> dict[str, Decision]:
        """Look once and act; return the decision for each model that is here."""
        decisions = {}
        signals = self._sensors.look(self._local())
        for model in self._models:
            try:
                decision = self._tick(model, signals)
            except (StorageError, OSError) as error:
                self._event(model, "failure", "device", one_line(error))
                continue
            if decision is not None:
                decisions[model.settings.name] = decision
        if not self.dry_run and self._clock() - self._metrics_s >= _METRICS_EVERY_S:
            self._metrics_s = self._clock()
            with contextlib.suppress(OSError):  # a full disk; the figures are no reason to stop
                self.metrics.write(self.settings.state / "metrics.prom", signals, self._traffic.total_bytes)
        return decisions

    def explain(self) -> dict[str, Decision]:
        """Decide once and do nothing: each decision has the verdicts of all rules."""
        signals = self._sensors.look(self._local())
        decisions = {}
        for model in self._models:
            here = self._here(model)
            if here is not None:
                situation = self._situation(model, *here)
                decisions[model.settings.name] = decide(
                    self.settings.policy, model.past, signals, situation, self._clock()
                )
        return decisions

    def once(self) -> dict[str, Decision]:
        """Look and act, wait for what is fetched, and act on that; for a timer in the place of a service."""
        decisions = self.tick()
        under_way = [model.fetch for model in self._models if model.fetch is not None]
        for fetch in under_way:
            fetch.exception()
        if under_way:
            decisions = self.tick()
        self.close()
        return decisions

    def run(self, stop: threading.Event) -> None:
        """Look every ``interval_s`` until ``stop`` is set."""
        while not stop.is_set():
            self.tick()
            stop.wait(self.settings.interval_s)
        self.close()

    def close(self) -> None:
        """Stop what is fetched and write down what the policy remembers."""
        for model in self._models:
            model.stop.set()
        self._worker.shutdown(wait=True, cancel_futures=True)
        if not self.dry_run:
            for model in self._models:
                self._save(model)

    def _tick(self, model: _Model, signals: Signals) -> Decision | None:
        self._reap(model)
        here = self._here(model)
        if here is None:
            if model.fetch is None and self._clock() >= model.not_before_s and not self.dry_run:
                self._event(model, "decision", "absent", f"{model.settings.ref} is pulled, part-bit")
                self._fetch(model, lambda device: device.pull(model.settings.name, model.settings.ref, level=0))
            return None
        installed, manifest = here
        self._follow_version(model, installed, manifest)
        situation = self._situation(model, installed, manifest)
        decision = decide(self.settings.policy, model.past, signals, situation, self._clock())
        model.past = decision.past
        if (decision.action, decision.rule) != model.last:
            model.last = (decision.action, decision.rule)
            self._event(model, "decision", decision.rule, f"{decision.action}: {decision.reason}", level=decision.level)
        if not self.dry_run:
            self._act(model, decision, installed, manifest)
        return decision

    def _act(self, model: _Model, decision: Decision, installed: Installed, manifest: Manifest) -> None:
        if any(verdict.stance != "rise" for verdict in decision.verdicts):
            model.stop.set()  # of a fetch under way, which a rise alone has use for
        if decision.action in ("drop", "rise"):
            self._save(model)  # first: an agent that is killed here waits for the dwell time and decides anew
            self._publish(model, installed, manifest, decision.level)
            self._event(model, "switch", decision.rule, f"{decision.action}: {decision.reason}")
            if decision.action == "rise":  # what the others see does not tell yet what this one takes
                for other in self._models:
                    if other is not model and other.past.calm_since_s is not None:
                        other.past = replace(other.past, calm_since_s=self._clock())
        elif decision.action == "fetch" and model.fetch is None and self._clock() >= model.not_before_s:
            self._fetch(model, lambda device: device.upgrade(model.settings.name))
        elif decision.action == "shed" and model.fetch is None:
            self._device(None).downgrade(model.settings.name)
        if model.unheard:
            self._call(model)

    def _here(self, model: _Model) -> tuple[Installed, Manifest] | None:
        """Return the version in use; its manifest is parsed once."""
        installed = self._cache.state(model.settings.name).current
        if installed is None:
            return None
        if model.manifest is None or model.manifest[0] != installed.digest:
            model.manifest = (installed.digest, self._cache.manifest(model.settings.name, installed))
        return installed, model.manifest[1]

    def _situation(self, model: _Model, installed: Installed, manifest: Manifest) -> Situation:
        top = manifest.level_count() - 1
        blobs, part = blobs_of(manifest, top), {blob.digest for blob in blobs_of(manifest, 0)}
        absent = {blob.digest: blob.size_bytes for blob in blobs if not self._cache.holds(blob)}
        low = {blob.digest: blob.size_bytes for blob in blobs if blob.digest not in part}
        budget = self.settings.policy.network.bytes_a_day
        current = model.current
        return Situation(
            level=current.level if current is not None and current.digest == installed.digest else 0,
            top=top,
            top_bytes=sum(blob.size_bytes for blob in blobs),
            absent_bytes=sum(absent.values()),
            low_bytes=sum(count for digest, count in low.items() if digest not in absent),
            budget_bytes=None if budget is None else max(0, budget - self._traffic.of(_today())),
        )

    def _follow_version(self, model: _Model, installed: Installed, manifest: Manifest) -> None:
        """Tell engines of a version that a person pulled or went back to: part-bit first, as with any other."""
        if not self.dry_run and (model.current is None or model.current.digest != installed.digest):
            self._publish(model, installed, manifest, 0)
            self._event(model, "switch", "version", f"version {installed.version} came into use")

    def _publish(self, model: _Model, installed: Installed, manifest: Manifest, level: int) -> None:
        current = current_of(self._cache, installed, manifest, level)
        publish(model.folder, current, current_of(self._cache, installed, manifest, 0))
        model.current, model.unheard = current, True
        self._call(model)

    def _call(self, model: _Model) -> None:
        current = model.current
        if current is None:
            return
        self.metrics.levels[current.name] = current.level
        try:
            self._on_current(current)
        except Exception as error:  # somebody else's code: the agent outlives it
            self._event(model, "failure", "callback", one_line(error))
        else:
            model.unheard = False

    def _fetch(self, model: _Model, work: Callable[[Device], object]) -> None:
        model.stop = threading.Event()

        def run() -> None:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # of this thread alone (Linux)
            work(self._device(model.stop))

        model.fetch = self._worker.submit(run)

    def _reap(self, model: _Model) -> None:
        fetch = model.fetch
        if fetch is None or not fetch.done():
            return
        model.fetch = None
        try:
            self._traffic.save()
        except StorageError as error:
            self._event(model, "failure", "disk", one_line(error))
        failure = fetch.exception()
        received_bytes = self._traffic.of(_today())
        if failure is None:
            model.failures = 0
            self._event(model, "fetch", "fetch", "shards are here", received_bytes=received_bytes)
        elif isinstance(failure, Stopped):
            self._event(model, "fetch", "fetch", str(failure), received_bytes=received_bytes)
        else:
            pause_s = min(_FIRST_PAUSE_S * 2**model.failures, _LONGEST_PAUSE_S)
            model.failures, model.not_before_s = min(model.failures + 1, 16), self._clock() + pause_s
            reason = f"{one_line(failure)}; again in {pause_s:.0f} s"
            self._event(model, "failure", "fetch", reason, received_bytes=received_bytes)

    def _device(self, stop: threading.Event | None) -> Device:
        settings = self.settings
        source = None
        if stop is not None:
            source = CountedSource(open_source(settings.store), lambda count: self._traffic.add(_today(), count), stop)
        trust = None
        if settings.trust is not None:
            with disk_errors(f"trust {settings.trust}"):
                trust = settings.trust.read_bytes()
        return Device(
            settings.cache,
            source,
            unsigned=settings.allow_unsigned,
            root_of_trust=trust,
            pace=Pace(settings.policy.network.max_rate),
            lock_timeout_s=1.0,
        )

    def _save(self, model: _Model) -> None:
        try:
            write_past(model.folder, model.past, self._boot_id)
        except StorageError as error:
            self._event(model, "failure", "disk", one_line(error))

    def _begin(self, settings: ModelSettings) -> _Model:
        folder = self.settings.state / settings.name
        past = read_past(folder, self._boot_id, self._clock())
        return _Model(settings, folder, past, read_current(folder))

    def _event(
        self,
        model: _Model,
        kind: EventKind,
        rule: str,
        reason: str,
        *,
        level: int | None = None,
        received_bytes: int = 0,
    ) -> None:
        current = model.current
        runs, version = (0, 0) if current is None else (current.level, current.version)
        event = AgentEvent(
            kind,
            model.settings.name,
            runs if level is None else level,
            version,
            rule,
            reason,
            received_bytes,
        )
        self.metrics.event(event)
        self._tell(event)

    @staticmethod
    def _read_boot_id(root: Path) -> str:
        try:
            return (root / "proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return ""


def _today() -> str:
    return datetime.now(UTC).date().isoformat()
