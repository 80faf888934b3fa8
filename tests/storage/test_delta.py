"""Deltas: what they make is exactly the later blob, and what they do not fit is refused."""

from __future__ import annotations

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from nestquant.packing import pack
from storage.delta import apply_deltas, canonical_bytes, describe, make_delta
from storage.digest import digest_bytes
from storage.errors import InvalidShard
from storage.manifest import MEDIA_TYPE_BASE, MEDIA_TYPE_SHARD
from storage.shard import IntegerTensor, build_base, build_shard, read_shard, shard_from_canonical


def shard_of(values: list[np.ndarray], bits: int, scale: np.ndarray) -> bytes:
    integers = {
        f"layer{i}[0:{one.shape[0]}]/level0": IntegerTensor(one, pack(one, bits), bits, one.shape)
        for i, one in enumerate(values)
    }
    return build_shard(integers, {"layer0/scale": scale, "layer0/zero_point": np.zeros(3, np.int16)}).data


@st.composite
def pairs(draw: st.DrawFn) -> tuple[bytes, bytes, bytes, int, list[np.ndarray]]:
    """Return three shards of the same layers, their bits, and the last one's integers; some of uniform integers."""
    bits = draw(st.integers(1, 8))
    seed = draw(st.integers(0, 2**32 - 1))
    shapes = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 300)), min_size=1, max_size=3))
    spread = draw(st.sampled_from([0.02, 0.25, 10.0]))
    random, bound = np.random.default_rng(seed), 1 << (bits - 1)

    def integers() -> list[np.ndarray]:
        normal = [random.normal(0, bound * spread, shape).round() for shape in shapes]
        return [one.clip(-bound, bound - 1).astype(np.int8) for one in normal]

    values = [integers() for _ in range(3)]
    scales = [random.normal(size=5).astype(np.float32) for _ in range(3)]
    one, two, three = (shard_of(value, bits, scale) for value, scale in zip(values, scales, strict=True))
    return one, two, three, bits, values[2]


@given(pairs())
@settings(max_examples=150, deadline=None)
def test_a_chain_of_deltas_makes_the_very_shard(drawn: tuple[bytes, bytes, bytes, int, list[np.ndarray]]) -> None:
    one, two, three, bits, values = drawn
    forms = [canonical_bytes(data, MEDIA_TYPE_SHARD) for data in (one, two, three)]
    codecs = [read_shard(data).codec for data in (one, two, three)]
    steps = [make_delta(forms[0], forms[1]), make_delta(forms[1], forms[2])]
    if len({len(form) for form in forms}) == 1:
        assert None not in steps
        made = apply_deltas(one, MEDIA_TYPE_SHARD, [step for step in steps if step is not None])
        assert made == forms[2]
        assert describe(made).size_bytes == len(made)
        assert shard_from_canonical(made) == three
        assert apply_deltas(bytes(forms[0]), MEDIA_TYPE_SHARD, [step for step in steps if step is not None]) == made
    else:
        assert len(set(codecs)) == 2  # packed integers are shorter than decoded ones
    plain = read_shard(bytes(forms[2]))
    assert plain.plain
    assert not read_shard(three).plain
    for index, expected in enumerate(values):
        key = f"layer{index}[0:{expected.shape[0]}]/level0"
        assert np.array_equal(
            plain.payload(key, count=expected.size), read_shard(three).payload(key, count=expected.size)
        )
        assert plain.integers[key].bits == bits
    assert np.array_equal(plain.tensor("layer0/scale"), read_shard(three).tensor("layer0/scale"))


def bell(seed: int, shape: tuple[int, ...] = (64, 700)) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, shape).round().clip(-8, 7).astype(np.int8)


def retrained(values: np.ndarray, share: float = 0.01) -> np.ndarray:
    random = np.random.default_rng(9)
    moves = random.choice([-1, 1], values.shape) * (random.random(values.shape) < share)
    return (values + moves).clip(-8, 7).astype(np.int8)


SCALE = np.ones(64, np.float32)


def test_a_few_integers_that_move_cost_a_fraction_of_the_shard() -> None:
    old = bell(0)
    one, two = (shard_of([values], 4, SCALE) for values in (old, retrained(old)))
    delta = make_delta(canonical_bytes(one, MEDIA_TYPE_SHARD), canonical_bytes(two, MEDIA_TYPE_SHARD))
    assert delta is not None
    assert len(delta) < len(two) / 15


def test_a_base_is_its_own_canonical_form() -> None:
    one, two = (build_base({"bias": np.arange(9, dtype=np.float32) + seed}) for seed in (0, 1))
    assert canonical_bytes(two, MEDIA_TYPE_BASE) == two
    delta = make_delta(one, two)
    assert delta is not None
    assert apply_deltas(one, MEDIA_TYPE_BASE, [delta]) == two


def test_blobs_of_other_layers_have_no_delta() -> None:
    one, two = (canonical_bytes(shard_of([bell(0, (8, n))], 4, SCALE), MEDIA_TYPE_SHARD) for n in (30, 31))
    assert make_delta(one, two) is None


@pytest.mark.parametrize("seed", range(40))
def test_no_damage_makes_the_right_bytes_or_anything_but_a_named_error(seed: int) -> None:
    old = bell(0)
    one, two = (shard_of([values], 4, SCALE) for values in (old, retrained(old)))
    form = canonical_bytes(two, MEDIA_TYPE_SHARD)
    delta = make_delta(canonical_bytes(one, MEDIA_TYPE_SHARD), form)
    assert delta is not None
    random = np.random.default_rng(seed)
    broken = bytearray(delta)
    broken[random.integers(len(broken))] ^= 1 << int(random.integers(8))
    if seed % 4 == 0:
        broken = broken[: random.integers(1, len(broken))]
    errors = []
    try:
        made = apply_deltas(one, MEDIA_TYPE_SHARD, [broken])
    except InvalidShard as error:
        errors.append(str(error))
    else:
        assert (digest_bytes(made) == digest_bytes(form)) is (made == form)
    assert all(line.startswith("delta: ") for line in errors)


def test_a_delta_that_claims_another_length_is_refused_before_it_is_decoded() -> None:
    one = shard_of([bell(0)], 4, SCALE)
    length = len(canonical_bytes(one, MEDIA_TYPE_SHARD))
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 24))
    with pytest.raises(InvalidShard, match=f"delta: {1 << 24} differences, expected {length}: it starts from another"):
        apply_deltas(one, MEDIA_TYPE_SHARD, [bomb])
    liar = bytearray(zstandard.ZstdCompressor().compress(bytes(length)))
    with pytest.raises(InvalidShard, match="delta: "):
        apply_deltas(one, MEDIA_TYPE_SHARD, [liar[:-1]])
    with pytest.raises(InvalidShard, match="delta: not a zstd frame"):
        apply_deltas(one, MEDIA_TYPE_SHARD, [b"nothing"])
    with pytest.raises(InvalidShard):
        apply_deltas(b"no shard", MEDIA_TYPE_SHARD, [])


@pytest.mark.parametrize("at", [9, 200, 500, -200, -1])
def test_a_canonical_form_is_read_as_strictly_as_a_shard(at: int) -> None:
    form = canonical_bytes(shard_of([bell(0, (8, 30))], 4, SCALE), MEDIA_TYPE_SHARD)
    with pytest.raises(InvalidShard):
        read_shard(bytes(form[: at % len(form)]))
    with pytest.raises(InvalidShard, match=r"format 'nestquant.shard.v1', expected 'nestquant.shard.canonical.v1'"):
        shard_from_canonical(shard_of([bell(0, (8, 30))], 4, SCALE))
