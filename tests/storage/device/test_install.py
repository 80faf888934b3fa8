"""What a device installs: the base dependencies and what they bring, without the service."""

from __future__ import annotations

import tomllib
from importlib.metadata import Distribution, distribution

from packaging.requirements import Requirement

from tests.conftest import ROOT

LIMIT_BYTES = 60_000_000


def _closure(wanted: list[str]) -> dict[str, Distribution]:
    """Return every distribution that the requirements bring on this machine, extras included."""
    found: dict[tuple[str, frozenset[str]], Distribution] = {}
    queue = [Requirement(text) for text in wanted]
    while queue:
        requirement = queue.pop()
        key = (requirement.name.lower(), frozenset(requirement.extras))
        if key in found:
            continue
        found[key] = distribution(requirement.name)
        for text in found[key].requires or []:
            inner = Requirement(text)
            extras = requirement.extras or {""}
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                queue.append(inner)
    return {name: found_distribution for (name, _), found_distribution in found.items()}


def _size_bytes(one: Distribution) -> int:
    """Return its files' bytes; what pip compiles is counted as large as its source."""
    total = 0
    for file in one.files or []:
        path = file.locate()
        if "__pycache__" not in file.parts and path.is_file():
            total += path.stat().st_size * (2 if file.suffix == ".py" else 1)
    return total


def test_the_base_install_is_small() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    sizes = {name: _size_bytes(one) for name, one in _closure(dependencies).items()}
    own = sum(
        path.stat().st_size * 2
        for folder in ("jobs", "storage", "workers", "nestquant")
        for path in (ROOT / folder).rglob("*.py")
    )
    print(f"{(sum(sizes.values()) + own) / 1e6:.1f} MB in {len(sizes)} packages")
    assert not {"torch", "ray", "timm", "pytorchcv", "numpy", "boto3"} & sizes.keys()
    assert sizes["cryptography"] > 5_000_000  # the closure was really walked
    assert sum(sizes.values()) + own < LIMIT_BYTES
