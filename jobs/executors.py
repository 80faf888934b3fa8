"""Who does a job's work: this process, or the Ray cluster that its spec names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from jobs.spec.job import ClusterSpec
from workers.executor import Executor, InProcessExecutor


@contextmanager
def open_executor(cluster: ClusterSpec, *, local: bool, json_logs: bool = False) -> Iterator[Executor]:
    """Yield who does the work: this process with ``local``, else the Ray cluster that the spec names.

    Raises:
        NoCluster: no cluster answers there.
    """
    if local:
        yield InProcessExecutor()
        return
    from workers.on_ray.executor import RayExecutor, RaySettings

    settings = RaySettings(
        address=cluster.address,
        num_cpus=cluster.num_cpus,
        cpus_per_task=cluster.cpus_per_task,
        max_in_flight=cluster.max_in_flight,
        max_retries=cluster.max_retries,
        task_timeout_s=cluster.task_timeout_s,
        node_timeout_s=0 if cluster.address == "local" else cluster.node_timeout_s,
        json_logs=json_logs,
    )
    with RayExecutor(settings) as executor:
        yield executor
