"""What the catalogue says of a store, and how it is written: figures, damage, publishing, a thousand models."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

import pytest
from huggingface_hub import ModelCard

from jobs.catalog.destination import CatalogError, SiteFolder, StoreSite
from jobs.catalog.read import ModelReader, read_trust
from jobs.catalog.record import Model, Version
from jobs.catalog.site import Summary, build_site
from storage.errors import StoreUnavailable
from storage.layout import manifest_key
from storage.registry import Registry
from storage.retention import delete_version, fsck, gc
from storage.stores.blob_store import BlobStore
from storage.stores.local import LocalStore
from storage.stores.uri import open_store
from tests.jobs.catalog_store import HOSTILE, break_things, report, signed_store
from tests.jobs.conftest import Run
from tests.servers.s3_server import S3Server
from tests.storage.artifacts import publish_new

MADE = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)


def build(store: BlobStore, folder: Path) -> Summary:
    with SiteFolder(folder) as out:
        return build_site(store, out, address="https://cdn.example/x", title="Ours", time=MADE)


def read(store: BlobStore, name: str) -> tuple[Model, list[Version]]:
    reader = ModelReader(store, name, read_trust(store))
    return reader.model, [version for _, _, version in reader.versions()]


def test_a_version_says_what_moves_what_was_measured_and_who_signed(tmp_path: Path) -> None:
    store = signed_store(tmp_path)
    _, (first, second) = read(store, "net")
    manifests = [Registry(store).resolve("net", number).manifest for number in (1, 2)]
    base = [sum(blob.size_bytes for blob in manifest.base) for manifest in manifests]
    highs = [[group.levels[0].size_bytes for group in manifest.groups] for manifest in manifests]
    lows = [[group.levels[1].size_bytes for group in manifest.groups] for manifest in manifests]
    assert [level.fetch_bytes for level in second.levels] == [
        base[1] + sum(highs[1]),
        base[1] + sum(highs[1]) + sum(lows[1]),
    ]
    assert second.levels[1].step_bytes == sum(lows[1])
    assert second.update is not None
    assert second.update.version == 1
    assert second.update.level_bytes == (base[1] + highs[1][1], base[1] + highs[1][1] + lows[1][1])
    assert (first.update, first.measured, first.nesting) == (None, False, "8 over 4")
    assert second.part.best is not None
    assert second.part.best.top1 == 90.0
    assert second.part.best.error == pytest.approx(2.1213, abs=1e-4)
    assert second.layers[1].sqnr_db == (15.5, None)
    assert second.layers[1].damage is not None
    assert [(run.mode, run.seconds_per_image, run.resident_bytes) for run in second.runs] == [
        ("float", 0.0025, None),
        ("part-bit", 0.0025, 1000),
        ("full-bit", 0.0025, 2000),
    ]
    assert (first.signature.state, second.signature.state) == ("unsigned", "signed")
    signers = dict(second.signature.signers)
    assert set(signers) == {"targets", "snapshot", "timestamp"}
    assert signers["targets"] != signers["snapshot"] == signers["timestamp"]
    assert second.signature.end == min(end for _, end in second.signature.ends)
    assert second.tags == ("latest",)


def test_a_manifest_that_is_not_the_signed_one_is_not_signed(tmp_path: Path) -> None:
    store = signed_store(tmp_path)
    raw = store.get(manifest_key("net", 2))
    store.put(manifest_key("net", 2), raw.replace(b'"seed":2', b'"seed":3'), mode="overwrite")
    _, (_, second) = read(store, "net")
    assert second.signature.state == "broken"
    assert second.signature.problem == "another manifest is signed under this number"
    store.put("models/net/trust/timestamp.json", store.get("models/net/trust/1.snapshot.json"), mode="overwrite")
    model, (first, _) = read(store, "net")
    assert first.signature.state == "broken"
    assert len(model.problems) == 1


def test_what_is_broken_is_a_line_that_says_so(tmp_path: Path) -> None:
    store = signed_store(tmp_path)
    break_things(store)
    delete_version(store, "plain", 1)
    summary = build(store, tmp_path / "site")
    faults = {line.partition(":")[0]: line for line in summary.faults}
    assert set(faults) == {"foreign+name", "half", "misnamed", "rotten"}
    assert "not canonical JSON" in faults["rotten"]
    assert "half: version 2" in faults["half"]
    index = (tmp_path / "site" / "index.html").read_text()
    assert index.count("<tbody") == summary.models == 8
    for name in ("rotten", "half", "misnamed", "foreign+name"):
        page = (tmp_path / "site" / "models" / name / "index.html").read_text()
        assert '<p class="fault">' in page, name
    assert "not measured" in (tmp_path / "site" / "models" / "half" / "1" / "index.html").read_text()
    unreported = (tmp_path / "site" / "models" / "unreported" / "1" / "index.html").read_text()
    assert "report of unreported version 1: field measured.0.mode" in unreported
    assert "every version was deleted" in index


def test_strangers_words_stay_words_in_every_page(tmp_path: Path) -> None:
    store = signed_store(tmp_path)
    break_things(store)
    build(store, tmp_path / "site")
    for page in (tmp_path / "site").rglob("*.html"):
        text = page.read_text()
        assert "<script>document" not in text, page
        assert "<img" not in text, page
        assert "49" not in text.partition("{{7*7}}")[0][-10:], page
    hostile = tmp_path / "site" / "models" / "hostile" / "1"
    assert text_of(hostile / "index.html").count("&lt;img src=x onerror") >= 4
    card = ModelCard.load(hostile / "README.md")
    assert card.data.to_dict()["library_name"] == HOSTILE
    spans = [span for span in card.text.split("`") if "onerror" in span]
    assert len(spans) >= 3
    assert all(position % 2 == 1 for position, span in enumerate(card.text.split("`")) if "onerror" in span)


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_every_version_has_a_card_that_the_hub_reads(tmp_path: Path) -> None:
    build(signed_store(tmp_path), tmp_path / "site")
    card = ModelCard.load(tmp_path / "site" / "models" / "net" / "2" / "README.md")
    assert card.data.to_dict()["pipeline_tag"] == "image-classification"
    assert "| part-bit | 4 bits |" in card.text
    assert "| 90.00 % of 200 | not measured |" in card.text
    assert "nestquant pull net@2 --store https://cdn.example/x" in card.text


def test_every_link_leads_to_a_file(tmp_path: Path) -> None:
    import re

    build(signed_store(tmp_path), tmp_path / "site")
    pages = list((tmp_path / "site").rglob("*.html"))
    links = [(page, link) for page in pages for link in re.findall(r'(?:href|src)="([^"#][^"]*)"', text_of(page))]
    assert len(pages) == 6
    for page, link in links:
        assert link.startswith("data:,") or (page.parent / link).is_file(), (page, link)


def test_a_folder_changes_at_once_and_only_where_a_catalogue_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, site = signed_store(tmp_path), tmp_path / "site"
    build(store, site)
    before = text_of(site / "index.html")
    publish_new(store, name="new", seed=9)

    def down(self: Registry, name: str, ref: str | int = "latest") -> None:
        raise StoreUnavailable("the network is down")

    with monkeypatch.context() as broken:
        broken.setattr(Registry, "resolve", down)
        with pytest.raises(StoreUnavailable):
            build(store, site)
    assert text_of(site / "index.html") == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["site", "store"]
    build(store, site)
    assert (site / "models" / "new" / "1" / "README.md").is_file()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(CatalogError, match="choose another folder"):
        build(store, other)


def publish(store: BlobStore) -> Summary:
    return build_site(store, StoreSite(store), address="https://cdn.example/x", title="Ours", time=MADE)


def test_a_published_site_is_left_by_gc_and_fsck_and_leaves_them_what_was_there(tmp_path: Path) -> None:
    store = signed_store(tmp_path)
    own = ("catalog/", "gc/clock")  # the clock is the store's time, asked for by whoever needs it
    before = {info.key: info.etag for info in store.list() if not info.key.startswith(own)}
    sound = fsck(store)
    publish(store)
    after = {info.key: info.etag for info in store.list()}
    assert {key: etag for key, etag in after.items() if not key.startswith(own)} == before
    assert fsck(store) == sound
    assert sound.problems == ()
    gone = gc(
        store, grace_s=0, dry_run=False
    ).removed  # blobs of the second version's draft that it shares with the first
    assert {key.partition("/")[0] for key in gone} == {"blobs"}
    assert {key for key in after if key.startswith("catalog/")} <= {info.key for info in store.list()}
    assert Registry(store).models() == ["net", "plain"]


def test_publishing_again_overwrites_pages_creates_no_asset_anew_and_removes_what_is_gone(tmp_path: Path) -> None:
    store = signed_store(tmp_path)
    publish(store)
    first = {info.key: info for info in store.list("catalog/")}
    assert "catalog/models/plain/1/readme.md" in first
    delete_version(store, "plain", 1)
    aged = [tmp_path / "store" / key for key in first]
    import os

    for path in aged:
        os.utime(path, (1_000_000_000, 1_000_000_000))
    publish(store)
    second = {info.key: info for info in store.list("catalog/")}
    assert set(first) - set(second) == {"catalog/models/plain/1/index.html", "catalog/models/plain/1/readme.md"}
    kept = {key for key, info in second.items() if info.modified_s == 1_000_000_000}
    assert kept == {key for key in first if key.startswith("catalog/assets/")}


def test_a_rivals_page_that_came_meanwhile_stays(tmp_path: Path) -> None:
    store = signed_store(tmp_path)
    slow = StoreSite(store)
    publish_new(store, name="new", seed=9)
    publish(store)  # a rival, who saw a model more
    slow.finish(b"front", b"[]")
    assert store.exists("catalog/models/new/1/index.html")


def test_a_bucket_serves_the_pages_as_what_they_are(moto_s3: S3Server, tmp_path: Path) -> None:
    from storage.stores.s3 import S3Store

    store = open_store(moto_s3.uri())
    assert isinstance(store, S3Store)
    publish_new(store, name="net")
    publish(store)
    kinds = {}
    for info in store.list("catalog/"):
        head = store.client.head_object(Bucket=store.bucket, Key=f"{store.prefix}{info.key}")
        kinds[PurePosixPath(info.key).suffix] = head["ContentType"].partition(";")[0]
    assert kinds[".html"] == "text/html"
    assert (kinds[".css"], kinds[".js"], kinds[".md"]) == ("text/css", "text/javascript", "text/markdown")


def test_the_command_makes_a_site_and_says_what_it_could_not_read(tmp_path: Path, nestquant: Run) -> None:
    store = signed_store(tmp_path)
    code, out, err = nestquant("catalog", "--store", store.uri, "--out", tmp_path / "site")
    assert (code, err) == (0, "")
    assert out.startswith(f"{tmp_path}/site/index.html: 2 models, 3 versions, 0 zoos; ")
    listed = json.loads((tmp_path / "site" / "catalog.json").read_text())
    assert [(one["name"], one["versions"], one["front"]) for one in listed] == [("net", [2, 1], 2), ("plain", [1], 1)]
    break_things(store)
    code, out, err = nestquant("catalog", "--store", store.uri, "--publish", "--json")
    assert code == 0
    assert len(json.loads(out)["faults"]) == 4
    assert store.exists("catalog/index.html")
    code, _, err = nestquant("catalog", "--store", store.uri)
    assert (code, "give one of --out and --publish" in err) == (2, True)


def test_secrets_of_an_address_are_not_shown(tmp_path: Path) -> None:
    store = signed_store(tmp_path)
    with SiteFolder(tmp_path / "site") as out:
        build_site(store, out, address="https://me:hunter2@cdn.example/x?sig=hunter2", title="Ours", time=MADE)
    for path in (tmp_path / "site").rglob("*"):
        assert path.is_dir() or "hunter2" not in text_of(path), path


def test_each_manifest_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = signed_store(tmp_path)
    report(store, "plain", 1)
    reads: list[str] = []
    original = LocalStore.get

    def get(self: LocalStore, key: str, *, max_bytes: int | None = None) -> bytes:
        reads.append(key)
        return original(self, key, max_bytes=max_bytes)

    monkeypatch.setattr(LocalStore, "get", get)
    build(store, tmp_path / "site")
    manifests = [key for key in reads if "/versions/" in key]
    assert sorted(manifests) == sorted(set(manifests))
    assert len(manifests) == 3 + 2  # and two reports
