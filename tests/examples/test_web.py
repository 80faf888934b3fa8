"""The page of examples/web in Chromium: part-bit first, full-bit in the background, and all of it verified."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from nestquant.engines.images import Preprocessing, photo_input
from nestquant.engines.onnx import Session
from nestquant.packing import pack
from storage.device import Device, StoreSource
from storage.layout import blob_key
from storage.manifest import Descriptor, Manifest
from storage.registry import Registry
from storage.shard import IntegerTensor, build_shard
from tests.browser import axe_findings, severe
from tests.engines.published import publish, publish_with_deltas, spec_of
from tests.examples.web_server import PageServer, install_page, serving

NAMES = [f"kind {index}" for index in range(10)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_page(tmp_path_factory.mktemp("web") / "page")


@pytest.fixture(scope="module")
def version(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Registry, Manifest]:
    """Version 1 of ``tiny`` with labels, activations of 8 bits and its store beside the page."""
    work = tmp_path_factory.mktemp("published")
    document = spec_of(work, recipe="calibrated", bits=[8, 4], activations={"bits": 8})
    (work / "labels.txt").write_text("\n".join(NAMES))
    document["labels"] = {"file": str(work / "labels.txt")}
    registry, manifest = publish(document)
    shutil.copytree(work / "store", folder / "store")
    return registry, manifest


@pytest.fixture
def server(folder: Path, version: tuple[Registry, Manifest]) -> Iterator[PageServer]:
    with serving(folder) as state:  # a port of its own is an origin of its own: no cache but its own
        yield state


@pytest.fixture
def photographs(tmp_path: Path) -> list[Path]:
    """As large as the input, larger (cut) and smaller (enlarged)."""
    random, paths = np.random.default_rng(2), []
    for index, (height, width) in enumerate(((32, 32), (41, 50), (17, 20))):
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(paths[-1])
    return paths


def path_of(blob: Descriptor) -> str:
    return f"/store/{blob_key(blob.digest)}"


def low_shards(manifest: Manifest) -> list[Descriptor]:
    return [group.levels[1] for group in manifest.groups]


def expected_answers(version: tuple[Registry, Manifest], folder: Path, photographs: list[Path]) -> list[np.ndarray]:
    """Return the device's logits of each level, [photographs, classes]."""
    registry, _ = version
    device = Device(folder, StoreSource(registry.store), unsigned=True)
    device.pull("tiny", level=1)
    sessions = [Session(device, "tiny", level=level) for level in (0, 1)]
    inputs = np.stack([photo_input(path, sessions[0].preprocessing) for path in photographs])
    return [np.concatenate([session.run(one[None]).logits for one in inputs]) for session in sessions]


def best(logits: np.ndarray) -> list[tuple[str, float]]:
    powers = np.exp(logits - logits.max())
    order = np.argsort(-powers)[:3]
    return [(NAMES[index], float(100 * powers[index] / powers.sum())) for index in order]


def shown(cell: str) -> list[tuple[str, float]]:
    return [(name, float(value)) for name, value in re.findall(r"(kind \d) ([\d.]+)%", cell)]


def until(browser: Chrome, text: str) -> None:
    WebDriverWait(browser, 60).until(lambda one: text in one.find_element(By.TAG_NAME, "main").text)


def script(browser: Chrome, body: str, *words: Any) -> Any:
    """Run the body of an async function in the page; ``words`` are its ``args``. An error comes back as its message."""
    browser.set_script_timeout(120)
    return browser.execute_async_script(
        f"const done = arguments[arguments.length - 1], args = [...arguments].slice(0, -1);"
        f"(async () => {{{body}}})().then(done, error => done({{error: error.message}}))",
        *words,
    )


def test_part_bit_answers_before_a_low_shard_is_here_and_full_bit_follows(
    browser: Chrome, server: PageServer, version: tuple[Registry, Manifest], photographs: list[Path], tmp_path: Path
) -> None:
    registry, manifest = version
    server.barred = {path_of(blob) for blob in low_shards(manifest)}
    part, full = expected_answers(version, tmp_path / "device", photographs)
    browser.get_log("performance")
    severe(browser)
    digest = registry.resolve("tiny", "1").digest
    browser.get(f"{server.address}/index.html?name=tiny&digest={digest}")
    until(browser, "version 1 answers part-bit")
    browser.find_element(By.ID, "photographs").send_keys("\n".join(map(str, photographs)))
    WebDriverWait(browser, 60).until(lambda one: len(one.find_elements(By.CSS_SELECTOR, "#answers ol")) == 3)

    def cells() -> dict[str, list[str]]:
        rows = browser.find_elements(By.CSS_SELECTOR, "#answers tbody tr")
        table = [[cell.text for cell in row.find_elements(By.TAG_NAME, "td")] for row in rows]
        return {row[0]: row[1:] for row in table}

    def check(column: int, logits: np.ndarray) -> None:
        for path, one in zip(photographs, logits, strict=True):
            seen = shown(cells()[path.name][column])
            assert [name for name, _ in seen] == [name for name, _ in best(one)]
            np.testing.assert_allclose([value for _, value in seen], [value for _, value in best(one)], atol=0.15)

    check(0, part)
    assert all(row[1:] == ["", ""] for row in cells().values())
    assert axe_findings(browser) == []
    server.gate.set()
    until(browser, "version 1 answers full-bit")
    check(0, part)
    check(1, full)
    for path, low, high in zip(photographs, part, full, strict=True):
        before, after = NAMES[int(low.argmax())], NAMES[int(high.argmax())]
        assert cells()[path.name][2].startswith("same class; " if before == after else f"{before} → {after}; ")

    levels = [row.text.split() for row in browser.find_elements(By.CSS_SELECTOR, "#levels tbody tr")]
    engine = manifest.engine("onnx")
    assert engine is not None
    high = [engine.graph, engine.layout, *(group.levels[0] for group in manifest.groups)]
    for (_, count, *_rest), blobs in zip(levels, (high, low_shards(manifest)), strict=True):
        assert int(count.replace(",", "")) == sum({blob.digest: blob.size_bytes for blob in blobs}.values())
    entries = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [entry["params"]["request"]["url"] for entry in entries if entry["method"] == "Network.requestWillBeSent"]
    assert urls
    assert all(url.startswith((server.address, "blob:", "data:")) for url in urls)
    assert severe(browser) == []

    before = len(server.paths)  # opened again: every blob is in the browser's cache, and verified there
    browser.get(f"{server.address}/index.html?name=tiny&ref=1")
    until(browser, "version 1 answers full-bit")
    assert not [path for path in server.paths[before:] if "/blobs/" in path]


def test_logits_of_both_levels_are_the_devices(
    browser: Chrome, server: PageServer, version: tuple[Registry, Manifest], photographs: list[Path], tmp_path: Path
) -> None:
    browser.get(f"{server.address}/index.html")
    preprocessing = Preprocessing.from_record(version[1].preprocessing or {})
    inputs = np.concatenate([photo_input(path, preprocessing).ravel() for path in photographs])
    answers = script(
        browser,
        "const {Session} = await import('/session.js'); const {resolve} = await import('/version.js');"
        "const session = await Session.open('store/', await resolve('store/', 'tiny', 'latest'));"
        "const input = Float32Array.from(args[0]), shape = [3, 3, 32, 32], answers = [];"
        "for (const level of [0, 1, 0]) { await session.setLevel(level);"
        "answers.push((await session.run(input, shape)).logits); } session.close();"
        "return answers.map(one => Array.from(one));",
        inputs.tolist(),
    )
    assert "error" not in answers, answers
    for logits, expected in zip(
        answers, (*(both := expected_answers(version, tmp_path / "device", photographs)), both[0]), strict=True
    ):
        spread = float(np.ptp(expected))
        difference = float(np.abs(np.reshape(logits, expected.shape) - expected).max()) / spread
        print(f"logits apart: {difference:.2e} of their spread")
        assert difference < 0.01
    assert answers[0] == answers[2] != answers[1]


def test_a_version_with_deltas_is_read_like_one_without(
    browser: Chrome, server: PageServer, folder: Path, tmp_path: Path
) -> None:
    registry, manifest = publish_with_deltas(tmp_path)
    assert manifest.schema_version == 4
    assert manifest.deltas
    shutil.copytree(tmp_path / "store", folder / "deltas")
    browser.get(f"{server.address}/index.html")
    answers = script(
        browser,
        "const {Session} = await import('/session.js'); const {resolve} = await import('/version.js');"
        "const session = await Session.open('deltas/', await resolve('deltas/', 'tiny', '3')), answers = [];"
        "for (const level of [0, 1]) { await session.setLevel(level);"
        "answers.push(Array.from((await session.run(new Float32Array(3072).fill(0.5), [1, 3, 32, 32])).logits)); }"
        "session.close(); return answers;",
    )
    assert "error" not in answers, answers
    device = Device(tmp_path / "device", StoreSource(registry.store), unsigned=True)
    device.pull("tiny", "3", level=1)
    for level, logits in enumerate(answers):
        expected = Session(device, "tiny", level=level).run(np.full((1, 3, 32, 32), 0.5, dtype=np.float32)).logits[0]
        np.testing.assert_allclose(logits, expected, atol=1e-4 * float(np.ptp(expected)))


def test_requests_under_way_during_switches_end_at_one_level(browser: Chrome, server: PageServer) -> None:
    browser.get(f"{server.address}/index.html")
    counts = script(
        browser,
        "const {Session} = await import('/session.js'); const {resolve} = await import('/version.js');"
        "const session = await Session.open('store/', await resolve('store/', 'tiny', 'latest'));"
        "const input = new Float32Array(3072).fill(0.5), shape = [1, 3, 32, 32], expected = [], counts = [0, 0, 0];"
        "for (const level of [0, 1]) { await session.setLevel(level);"
        "expected.push((await session.run(input, shape)).logits.join()); }"
        "let over = false; const ask = async () => { while (!over) { const one = await session.run(input, shape);"
        "counts[one.logits.join() === expected[one.level] ? one.level : 2] += 1; } };"
        "const asking = [ask(), ask(), ask()];"
        "for (const level of [0, 1, 0, 1]) await session.setLevel(level);"
        "over = true; await Promise.all(asking); session.close(); return [...counts, expected[0] === expected[1]];",
    )
    assert counts[0] > 0
    assert counts[1] > 0
    assert counts[2:] == [0, False]


def test_what_is_damaged_is_never_used(
    browser: Chrome, server: PageServer, version: tuple[Registry, Manifest], photographs: list[Path]
) -> None:
    _, manifest = version
    blob = low_shards(manifest)[-1]
    server.damaged = {path_of(blob)}
    browser.get(f"{server.address}/index.html?name=tiny")
    until(browser, "blob is damaged: its digest is sha256:")
    assert blob.digest in browser.find_element(By.ID, "failure").text
    browser.find_element(By.ID, "photographs").send_keys(str(photographs[0]))  # part-bit goes on
    WebDriverWait(browser, 60).until(lambda one: len(one.find_elements(By.CSS_SELECTOR, "#answers ol")) == 1)
    server.damaged = {f"/store/models/tiny/versions/{1:08d}.json"}
    browser.get(f"{server.address}/index.html?name=tiny")
    until(browser, "manifest of tiny version 1 is damaged")
    server.damaged = set()
    browser.get(f"{server.address}/index.html?name=tiny&digest=sha256:{'0' * 64}")
    until(browser, 'tag "latest" of tiny names sha256:')


@pytest.mark.parametrize("codec", ["packed", "zstd"])
def test_shards_decode_to_the_integers_that_were_stored(
    browser: Chrome, server: PageServer, folder: Path, codec: str
) -> None:
    random, integers = np.random.default_rng(1), {}
    for bits in range(1, 9):
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        for count in (1, 7, 8, 1001, 70_000):
            uniform = random.integers(low, high + 1, count)
            values = (uniform if codec == "packed" else np.clip(random.geometric(0.9, count) - 1, low, high)).astype(
                np.int8
            )
            integers[f"{bits}/{count}"] = IntegerTensor(values, pack(values, bits), bits, (count,))
    scales = {"scales": np.linspace(0, 1, 9, dtype=np.float32)}
    encoded = build_shard(integers, scales)
    assert encoded.codec == codec
    (folder / "shard.safetensors").write_bytes(encoded.data)
    browser.get(f"{server.address}/index.html")
    decoded = script(
        browser,
        "const {readShard} = await import('/shard.js');"
        "const shard = readShard(new Uint8Array(await (await fetch('/shard.safetensors')).arrayBuffer()));"
        "const values = ([key, count, bits]) => [key, Array.from(shard.integers(key, count, bits))];"
        "return Object.fromEntries(args[0].map(values));",
        [[key, one.values.size, one.bits] for key, one in integers.items()],
    )
    assert "error" not in decoded, decoded
    for key, one in integers.items():
        assert decoded[key] == one.values.tolist(), key
    wrong = script(
        browser,
        "const {readShard} = await import('/shard.js'); const out = [];"
        "const whole = new Uint8Array(await (await fetch('/shard.safetensors')).arrayBuffer());"
        "const tries = [() => readShard(whole.subarray(0, 4)), () => readShard(whole.subarray(0, -1)),"
        "() => readShard(whole).integers('4/7', 8, 4), () => readShard(whole).integers('4/7', 7, 5),"
        "() => readShard(whole).integers('none', 7, 4)];"
        "for (const one of tries) try { one(); out.push('accepted'); } catch (error) { out.push(error.message); }"
        "return out;",
    )
    for message, pattern in zip(wrong, ("header of -1", "tensors", "4 bits", "7 of 4 bits", "seen none"), strict=True):
        assert pattern in message, wrong


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_photographs_become_the_devices_inputs_to_the_bit(
    browser: Chrome, server: PageServer, folder: Path, interpolation: Any
) -> None:
    random = np.random.default_rng(4)
    browser.get(f"{server.address}/index.html")
    for height, width, mean in ((97, 133, (0.485, 0.456, 0.406)), (20, 31, (0.5, 0.4, 0.3)), (90, 110, (0.45,))):
        preprocessing = Preprocessing((40, 48), 52, mean, tuple(0.2 + one / 10 for one in mean), interpolation)
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / "photo.png")
        expected = photo_input(folder / "photo.png", preprocessing)
        seen = script(
            browser,
            "const {photoInput} = await import('/photo.js');"
            "const file = await (await fetch('/photo.png', {cache: 'no-store'})).blob();"
            "const {input, shape} = await photoInput(file, args[0]); return [Array.from(input), shape];",
            preprocessing.to_record(),
        )
        assert "error" not in seen, seen
        assert seen[1] == [1, *expected.shape]
        assert np.array_equal(np.reshape(seen[0], expected.shape).astype(np.float32), expected)
