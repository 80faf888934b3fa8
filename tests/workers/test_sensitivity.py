"""One layer measured alone: which images it rests on, and what is said when it cannot be measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.events import StageClock
from jobs.spec.file import parse_spec
from jobs.stages.memory import sensitivity_samples
from jobs.stages.preparation import prepare
from jobs.stages.sensitivity import sensitivity_tasks
from storage.registry import Registry
from storage.stores.uri import open_store
from workers.errors import DataError, WorkError
from workers.executor import InProcessExecutor
from workers.inputs.images import spread
from workers.ledger import Ledger
from workers.sensitivity import SensitivityTask, measure_layer

Document = Callable[..., dict[str, Any]]
MIXED = {"mean_bits": 4.0, "choices": [3, 5], "samples": 10}


def tasks(document: dict[str, Any], folder: Path) -> list[SensitivityTask]:
    spec = parse_spec(document, where="test")
    prepared = prepare(spec, InProcessExecutor(), folder, StageClock(lambda _: None))
    return sensitivity_tasks(prepared, samples=sensitivity_samples(prepared))


def images(path: Path, x: np.ndarray, y: np.ndarray | None = None) -> Path:
    np.savez(path, **({"x": x} if y is None else {"x": x, "y": y}))
    return path


def test_the_images_that_choose_integers_are_not_those_that_judge_them(
    tiny_document: Document, tiny_images: Path, tmp_path: Path
) -> None:
    with np.load(tiny_images) as arrays:
        x, y = arrays["x"][:24], arrays["y"][:24]
    judging = spread(24, 10)
    resting = sorted(set(range(24)).difference(judging))
    quantize = {"recipe": "calibrated", "mixed": MIXED}
    found = {}
    for name in ("whole", "other-rest", "other-judges"):
        changed = x.copy()
        if name == "other-rest":
            changed[resting] = 255 - x[resting]
        if name == "other-judges":
            changed[judging] = 255 - x[judging]
        data = images(tmp_path / f"{name}.npz", changed, y)
        document = tiny_document(
            quantize=quantize, calibration__data=str(data), store__uri=str(tmp_path / f"store-{name}")
        )
        (tmp_path / name).mkdir()
        found[name] = measure_layer(tasks(document, tmp_path / name)[1])
    whole, rest, judges = found["whole"], found["other-rest"], found["other-judges"]
    assert (whole.images, whole.noise, len(whole.damages)) == (10, False, 2)
    # Other images choose: other integers. Other images judge: the same integers, another damage.
    assert [damage.sqnr_db for damage in rest.damages] != [damage.sqnr_db for damage in whole.damages]
    assert [damage.sqnr_db for damage in judges.damages] == [damage.sqnr_db for damage in whole.damages]
    assert [damage.divergence for damage in judges.damages] != [damage.divergence for damage in whole.damages]
    assert rest.float_correct == whole.float_correct


def test_a_small_set_is_halved_and_images_without_labels_give_no_top1(
    tiny_document: Document, tiny_images: Path, tmp_path: Path
) -> None:
    with np.load(tiny_images) as arrays:
        x = arrays["x"]
    document = tiny_document(
        quantize={"recipe": "calibrated", "mixed": MIXED},
        calibration__data=str(images(tmp_path / "six.npz", x[:6])),
        evaluate=None,
    )
    record = measure_layer(tasks(document, tmp_path)[0])
    assert (record.images, record.float_correct) == (3, None)
    assert {damage.correct for damage in record.damages} == {None}
    one = tiny_document(
        quantize={"recipe": "calibrated", "mixed": MIXED},
        calibration__data=str(images(tmp_path / "one.npz", x[:1])),
        evaluate=None,
    )
    with pytest.raises(DataError, match=r"calibration\.data: 1 images, 0 of them unreadable, are too few"):
        measure_layer(tasks(one, tmp_path)[0])


def test_a_layer_that_cannot_be_quantized_is_named_and_so_is_a_damaged_record(
    tiny_document: Document, tmp_path: Path
) -> None:
    document = tiny_document(quantize={"mixed": MIXED})
    task = tasks(document, tmp_path)[2]
    store = open_store(document["store"]["uri"])
    key = Ledger(Registry(store), task.context.job).sensitivity_key(task.index, task.samples, task.candidates)
    assert key.endswith("/sensitivity/000002-10-8-3_8-5.json")
    store.put(key, b"{}", mode="create")
    with pytest.raises(WorkError, match=r"sensitivity/000002-10-8-3_8-5\.json is damaged"):
        measure_layer(task)


def test_a_transformer_is_measured_too(tmp_path: Path) -> None:
    document = {
        "name": "vit",
        "model": {"library": "timm", "arch": "test_vit", "kwargs": {"num_classes": 10}, "random_seed": 0},
        "store": {"uri": str(tmp_path / "store")},
        "quantize": {"recipe": "paper", "bits": [8, 4], "mixed": {"mean_bits": 4.0, "choices": [2, 6]}},
        "preprocess": {"size": 160},
    }
    first = tasks(document, tmp_path)[0]
    record = measure_layer(first)
    narrow, wide = record.damages
    assert (record.noise, record.images) == (True, 32)
    assert narrow.divergence > 4 * wide.divergence > 0
    assert narrow.shard_bytes < wide.shard_bytes
