"""The site of a store: one page a version, one a model, one a zoo, and the index of all."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from threading import Lock
from typing import Any

from jobs.card import card, pull_command
from jobs.catalog.destination import Destination
from jobs.catalog.read import ModelReader, Trust, read_trust
from jobs.catalog.record import Model, Version, VersionRow
from jobs.catalog.zoos import zoo_pages
from jobs.pages.assets import site_assets
from jobs.pages.render import render_site_page
from storage.errors import BadKey
from storage.layout import model_prefix
from storage.registry import Registry
from storage.stores.blob_store import BlobStore
from storage.wording import without_secrets

_THREADS = 8
_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Summary:
    """What a site holds. ``faults``: lines about what could not be read; each stands on its page, too."""

    models: int
    versions: int
    zoos: int
    files: int
    size_bytes: int
    faults: tuple[str, ...]


@dataclass(slots=True)
class _Site:
    """What every page of a site is made with."""

    store: BlobStore
    out: Destination
    trust: Trust
    title: str
    address: str
    signed_anchor: str
    time: datetime
    files: int = 0
    size_bytes: int = 0
    _counting: Lock = field(default_factory=Lock)

    def page(self, path: str, template: str, *, charts: bool, **context: Any) -> None:
        self.write(path, self.render(path, template, charts=charts, **context))

    def render(self, path: str, template: str, *, charts: bool, **context: Any) -> bytes:
        root = "../" * path.count("/")
        page = render_site_page(template, root=root, charts=charts, title=self.title, made=self.time, **context)
        return page.encode()

    def write(self, path: str, data: bytes) -> None:
        self.out.put(path, data)
        self.count(data)

    def count(self, data: bytes) -> None:
        with self._counting:
            self.files += 1
            self.size_bytes += len(data)


def build_site(
    store: BlobStore,
    out: Destination,
    *,
    address: str,
    title: str,
    time: datetime,
) -> Summary:
    """Write the site of a store; the destination shows it when all of it is written.

    Args:
        store: what the site is about.
        out: where it goes.
        address: where devices read the store, for the snippets.
        title: of the index.
        time: when pages say they were made.

    Raises:
        StorageError: the store, or the destination in one, is out of reach.
        OSError: the destination's folder cannot be written.
    """
    trust = read_trust(store)
    anchor = "" if trust.root is None else " --trust root.json"
    site = _Site(store, out, trust, title, without_secrets(address), anchor, time)
    for asset in site_assets():
        out.put_asset(asset.path, asset.text.encode())
        site.count(asset.text.encode())
    models, versions = [], 0
    for model in _models(site, Registry(store).models()):
        models.append(model)
        versions += len(model.rows)
    zoos, zoo_faults = [], []
    for name, page in zoo_pages(store):
        if isinstance(page, str):
            zoo_faults.append(page)
            continue
        site.page(f"zoo/{name}/index.html", "zoo.html", charts=True, back=True, **page)
        zoos.append(name)
    front = site.render(
        "index.html",
        "index.html",
        charts=True,
        models=models,
        versions=versions,
        address=site.address,
        zoos=zoos,
        problems=[*([trust.problem] if trust.problem else []), *zoo_faults],
        points=[_point(model.name, model.front) for model in models if _drawable(model.front)],
    )
    marker = json.dumps([_listed(model) for model in models], indent=1, sort_keys=True).encode()
    site.count(front)
    site.count(marker)
    out.finish(front, marker)
    faults = [f"{model.name}: {fault}" for model in models for fault in model.faults]
    return Summary(len(models), versions, len(zoos), site.files, site.size_bytes, (*zoo_faults, *faults))


def _models(site: _Site, names: Sequence[str]) -> Iterator[Model]:
    """Write the pages of all models, several at a time, and yield their rows in the order of their names."""
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(names), _AT_ONCE):
            yield from pool.map(lambda name: _write_model(site, name), names[start : start + _AT_ONCE])


def _write_model(site: _Site, name: str) -> Model:
    try:
        model_prefix(name)
    except BadKey as error:
        model = Model(name, problems=[str(error)])
    else:
        reader = ModelReader(site.store, name, site.trust)
        model = reader.model
        for resolved, measured, version in reader.versions():
            folder = f"models/{name}/{version.version}"
            _write_version(site, folder, version)
            site.write(f"{folder}/{site.out.card_name}", card(resolved, measured, address=site.address).encode())
            model.rows.append(VersionRow.of(version))
        model.rows.reverse()
    front = model.front
    site.page(
        f"models/{name}/index.html",
        "model.html",
        charts=True,
        model=model,
        pull="" if front is None else _pull(site, name, front.version, signed=front.signature == "signed"),
        points=[_point(f"version {row.version}", row) for row in model.rows if _drawable(row)],
    )
    return model


def _pull(site: _Site, name: str, version: int, *, signed: bool) -> str:
    trust = site.signed_anchor if signed else " --allow-unsigned"
    upgrade = f"nestquant upgrade {name} --store {shlex.quote(site.address)}"
    return f"{pull_command(name, version, site.address)}{trust}\n{upgrade}"


def _write_version(site: _Site, folder: str, version: Version) -> None:
    signed = version.signature.state == "signed"
    ref, where = f"{version.name}@{version.version}", shlex.quote(site.address)
    site.page(
        f"{folder}/index.html",
        "version.html",
        charts=True,
        version=version,
        card=site.out.card_name,
        quantized=any(level.quantized for level in version.levels),
        pull=_pull(site, version.name, version.version, signed=signed),
        python=_PYTHON.format(name=version.name),
        evaluate=f"nestquant evaluate {ref} --data IMAGES --store {where}",
        noise=any(layer.sqnr_db for layer in version.layers),
        damage=any(layer.damage for layer in version.layers),
        chart_layers=[{"layers": [_chart_layer(layer) for layer in version.layers]}],
    )


_PYTHON = """from pathlib import Path
from storage.device import Device
from workers import runtime

device = Device(Path("nestquant-cache"))
model = runtime.load(device.manifest("{name}"), device.blob_path)
logits = model.network(images)   # part-bit
model.upgrade()                  # full-bit, once 'nestquant upgrade' fetched the rest"""


def _chart_layer(layer: Any) -> dict[str, Any]:
    damage = layer.damage
    return {
        "name": layer.name,
        "weights": layer.weights,
        "bits": list(layer.bits),
        "sqnr": list(layer.sqnr_db),
        "damage": None
        if damage is None
        else {
            "images": damage.images,
            "noise": damage.noise,
            "divergence": damage.divergence,
            "same": damage.same,
            "drop": damage.drop,
        },
    }


def _drawable(row: VersionRow | None) -> bool:
    return row is not None and row.part_top1 is not None and row.full_top1 is not None and row.part_bytes > 0


def _point(name: str, row: VersionRow | None) -> dict[str, Any]:
    assert row is not None
    assert row.part_top1 is not None
    assert row.full_top1 is not None
    return {
        "name": name,
        "short": name,
        "float": None if row.float_top1 is None else row.float_top1.top1,
        "part": [row.part_bytes, row.part_top1.top1, row.part_top1.error],
        "full": [row.full_bytes, row.full_top1.top1, row.full_top1.error],
    }


def _listed(model: Model) -> dict[str, Any]:
    """Return what ``catalog.json`` says of a model, for programs."""
    return {
        "name": model.name,
        "versions": [row.version for row in model.rows],
        "tags": model.tags,
        "faults": list(model.faults),
        "front": None if model.front is None else model.front.version,
    }
