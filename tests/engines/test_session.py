"""A device's session: what it answers at each level, and that no answer is of two levels, whatever is switched."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import nestquant
from nestquant.engines.errors import LevelMissing, NotExported, PhotoError
from nestquant.engines.onnx import Residency, Session
from storage.device import Device, StoreSource
from storage.errors import Damaged
from storage.stores.uri import open_store
from tests.engines.published import images, publish, publish_with_deltas, spec_of, torch_answers
from tests.storage.device.updates import keep_canonical

RESIDENCIES = ("fast", "hot")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with version 1 of ``tiny``: three levels, activations of 8 bits; biases differ from level to level."""
    folder = tmp_path_factory.mktemp("published")
    publish(spec_of(folder, recipe="calibrated", bits=[8, 6, 4], activations={"bits": 8}))
    return folder / "store"


@pytest.fixture
def device(published: Path, tmp_path: Path) -> Device:
    made = Device(tmp_path / "device", StoreSource(open_store(str(published))), unsigned=True)
    made.pull("tiny")
    made.upgrade("tiny")
    return made


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_weights_and_biases_of_each_level_are_those_of_torch(tmp_path: Path, residency: Residency) -> None:
    registry, manifest = publish(spec_of(tmp_path, recipe="calibrated", bits=[8, 6, 4]))
    device = Device(tmp_path / "device", StoreSource(registry.store), unsigned=True)
    device.pull("tiny", level=2)
    inputs = images(4)
    session = Session(device, "tiny", residency=residency)
    assert session.level == 2
    for level in (0, 1, 2, 0):
        session.set_level(level)
        seen = session.run(inputs)
        expected = torch_answers(registry, manifest, inputs, level=level, activations=False)
        assert seen.level == session.level == level
        np.testing.assert_allclose(seen.logits, expected, atol=2e-5 * np.abs(expected).max())


def test_shards_in_their_canonical_form_run_as_the_published_ones(tmp_path: Path) -> None:
    """As after an update by deltas on a device whose zstd compresses otherwise: the session, torch and the API."""
    registry, _ = publish_with_deltas(tmp_path)
    device = Device(tmp_path / "device", StoreSource(registry.store), unsigned=True)
    device.pull("tiny", "3", level=1)
    manifest, inputs = device.manifest("tiny"), images(2)
    published = [Session(device, "tiny", level=level).run(inputs).logits for level in (0, 1)]
    assert keep_canonical(registry.store, tmp_path / "device", manifest) > 0
    for level, expected in enumerate(published):
        assert np.array_equal(Session(device, "tiny", level=level).run(inputs).logits, expected)
    model = nestquant.pull(
        "tiny", store=str(tmp_path / "store"), ref=3, cache=tmp_path / "device", unsigned=True, level=1
    )
    with torch.inference_mode():
        answers = model(torch.from_numpy(inputs))
    np.testing.assert_allclose(answers.numpy(), published[1], atol=2e-5 * np.abs(published[1]).max())
    shard = next(shard for group in manifest.groups for shard in group.levels if shard.canonical is not None)
    path = device.blob_path(shard)
    path.write_bytes(path.read_bytes()[:-1] + b"\x77")
    with pytest.raises(Damaged, match="brings it anew"):
        Session(device, "tiny")


def test_both_residencies_answer_to_the_bit_and_levels_differ(device: Device) -> None:
    inputs = images(3)
    answers = []
    for level in range(3):
        fast, hot = (Session(device, "tiny", level=level, residency=kind) for kind in RESIDENCIES)
        answers.append(fast.run(inputs).logits)
        assert np.array_equal(answers[-1], hot.run(inputs).logits)
    assert not any(np.array_equal(answers[low], answers[high]) for low, high in ((0, 1), (1, 2), (0, 2)))


@pytest.mark.parametrize("residency", RESIDENCIES)
@pytest.mark.parametrize("switches", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_answer_is_lost_or_of_two_levels(device: Device, residency: Residency, switches: int) -> None:
    session = Session(device, "tiny", level=0, residency=residency, threads=1)
    inputs = images(2)
    expected = []
    for level in range(3):
        session.set_level(level)
        expected.append(session.run(inputs).logits)
    done = threading.Event()
    asked, answered, wrong = [0] * 8, [[0] * 3 for _ in range(8)], list[str]()

    def ask(thread: int) -> None:
        while not done.is_set():
            asked[thread] += 1
            answer = session.run(inputs)
            answered[thread][answer.level] += 1
            if not np.array_equal(answer.logits, expected[answer.level]):
                wrong.append(f"thread {thread}, level {answer.level}")

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for switch in range(switches):
        session.set_level((switch + session.level + 1) % 3 if switch % 3 == 0 else (session.level + 1) % 3)
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert [sum(counts) for counts in answered] == asked
    assert all(sum(counts[level] for counts in answered) for level in range(3))


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_a_request_in_flight_ends_at_the_level_at_which_it_began(device: Device, residency: Residency) -> None:
    """The switch happens while the request is under way, not beside it: the engine is entered after it."""
    session = Session(device, "tiny", level=0, residency=residency)
    inputs = images(1)
    expected = session.run(inputs).logits
    loaded = session._loaded

    class Interrupted:
        level = loaded.level

        def run(self, image: str, answer: str, values: np.ndarray) -> np.ndarray:
            session.set_level(2)
            return loaded.run(image, answer, values)

    session._loaded = Interrupted()
    answer = session.run(inputs)
    assert (answer.level, session.level) == (0, 2)
    assert np.array_equal(answer.logits, expected)


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_a_level_that_is_not_here_or_damaged_leaves_the_session_as_it_was(device: Device, residency: Residency) -> None:
    device.downgrade("tiny")
    session = Session(device, "tiny", residency=residency)
    inputs = images(1)
    before = session.run(inputs)
    assert (before.level, session.levels()) == (0, (0,))
    with pytest.raises(LevelMissing, match=r"tiny version 1: level 2 is not here; 'nestquant upgrade tiny --level 2'"):
        session.set_level(2)
    with pytest.raises(LevelMissing, match="has levels 0 to 2, not 3"):
        session.set_level(3)
    device.upgrade("tiny")
    path = device.blob_path(session.manifest.groups[-1].levels[2])
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(Damaged, match=r"tiny version 1: .* 'nestquant pull tiny' brings it anew"):
        session.upgrade()
    assert np.array_equal(session.run(inputs).logits, before.logits)
    path.write_bytes(whole)
    session.upgrade()
    assert session.level == 2
    session.downgrade()
    assert np.array_equal(session.run(inputs).logits, before.logits)


def test_what_cannot_be_run_is_said_in_one_line(device: Device, tmp_path: Path) -> None:
    with pytest.raises(PhotoError, match=r"float64 \[1, 3, 32, 32\]; tiny version 1 takes float32 \[batch, 3"):
        Session(device, "tiny").run(np.zeros((1, 3, 32, 32)))
    document = spec_of(tmp_path)
    del document["export"]
    registry, _ = publish(document)
    plain = Device(tmp_path / "plain", StoreSource(registry.store), unsigned=True)
    plain.pull("tiny")
    with pytest.raises(NotExported, match=r"'nestquant export tiny@1 --engine onnx --tag latest'"):
        Session(plain, "tiny")
