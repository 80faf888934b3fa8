"""How many members a gang gets: as many as fit beside each other, with what each of them needs then."""

from __future__ import annotations

from jobs.spec.job import CalibrationSpec
from jobs.stages.memory import chunks_of, gang_size
from workers.errors import Need
from workers.executor import InProcessExecutor

IMAGES = CalibrationSpec(data="", samples=500, batch_size=32)


class Nodes(InProcessExecutor):
    """Machines of some CPUs and so much memory."""

    def __init__(self, *nodes: tuple[int, int]) -> None:
        super().__init__()
        self.nodes = nodes

    def places(self, memory_bytes: int) -> int:
        return sum(min(cpus, memory // memory_bytes) for cpus, memory in self.nodes)


def need(members: int) -> Need:
    """Five for the network, and two for each chunk that a member holds."""
    return Need("reconstruct", 5 + 2 * -(-len(chunks_of(IMAGES)) // members), "calibration.samples")


def test_a_gang_is_as_large_as_its_chunks_the_cpus_and_the_memory_allow() -> None:
    assert chunks_of(IMAGES)[-1] == (448, 500)
    assert len(chunks_of(IMAGES)) == 8
    assert gang_size(InProcessExecutor(), IMAGES, need) == 1
    assert gang_size(Nodes((4, 1000)), IMAGES, need) == 4
    assert gang_size(Nodes((100, 1000)), IMAGES, need) == 8
    assert gang_size(Nodes((4, 30)), IMAGES, need) == 2  # two hold 13 each; three would hold 11 each, 33 in all
    assert gang_size(Nodes((4, 20), (4, 20), (4, 12)), IMAGES, need) == 5  # 9 each
    assert gang_size(Nodes((4, 3)), IMAGES, need) == 1  # which fits nowhere, as `require` says before any work
