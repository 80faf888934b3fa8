"""The command lines of the pages, run in their order on a real S3 server, a real registry and a device's cache.

The tutorial, the pages on own networks and on models in memory, and the cluster's walk have tests of their own
(``tests/test_docs.py``, ``tests/integration/test_cluster_page.py``). Of the pages here every line is run but those in
``NOT_RUN``, each for a reason.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from jobs.driver import run_job
from jobs.spec.file import parse_spec
from storage.errors import NotFound
from storage.registry import Registry
from storage.stores.blob_store import BlobStore
from storage.stores.uri import open_store
from tests import tiny
from tests.conftest import ROOT
from tests.jobs.conftest import InitSigning, Run
from tests.servers.s3_server import S3Server
from tests.test_docs import blocks, command_lines
from workers.executor import InProcessExecutor

NOT_RUN = {
    "README.md": {
        "quantize .demo/spec.yaml": "make demo prints it; tests/jobs/test_demo.py runs the demo",
        "pull efficientnet-lite0 --store .demo/store --allow-unsigned --cache .demo/device": "as above",
        "upgrade efficientnet-lite0 --store .demo/store --cache .demo/device": "as above",
        "verify efficientnet-lite0 --cache .demo/device": "as above",
        "downgrade efficientnet-lite0 --cache .demo/device": "as above",
        "agent agent.yaml": "runs until it is stopped; tests/storage/agent/test_agent.py runs the command",
    },
}
FINISH = "rollout resnet18 --finish ..."
"""Stands behind the line that withdraws: a rollout is begun again for it, in the end."""

LOCAL = {"quantize", "analyze"}
"""Commands that start a Ray by themselves: they get ``--local`` here, as the suite has one Ray already."""

Walk = Callable[..., str]


class _Cdn(BaseHTTPRequestHandler):
    """Any web server in front of a store."""

    store: BlobStore

    def do_GET(self) -> None:
        try:
            body, status = self.store.get(unquote(self.path.lstrip("/"))), 200
        except NotFound:
            body, status = b"", 404
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def cdn(store: BlobStore) -> Iterator[str]:
    """Serve a store's objects; yield the address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Cdn", (_Cdn,), {"store": store})) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A job that was run, as YAML for any name and store, and the folder of the store that it wrote."""
    folder = tmp_path_factory.mktemp("exported")
    document = tiny.job_document(
        checkpoint=str(tiny.write_checkpoint(folder / "weights.safetensors")),
        images=str(tiny.write_images(folder / "images.npz")),
        store=str(folder / "store"),
    )
    document |= {"name": "NAME", "export": {"engines": ["onnx"]}, "evaluate": None}
    document["quantize"]["scheme"] = "symmetric"
    run_job(parse_spec({**document, "name": "made"}, where="test"), InProcessExecutor())
    document["store"]["uri"] = "STORE"
    return folder / "store", yaml.safe_dump(document)


@pytest.fixture
def place(
    exported: tuple[Path, str], moto_s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], str]:
    """Publish seven versions under a name on a real S3 server, and write what pages name as files; return its URI."""

    def publish(name: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("NESTQUANT_DEVICE_ID", "d0")
        made, store = open_store(exported[0]), open_store(moto_s3.uri())
        for info in made.list("blobs/"):
            store.put(info.key, made.get(info.key), mode="create")
        manifest = Registry(made).resolve("made").manifest
        for version in range(1, 8):
            Registry(store).publish(
                manifest.model_copy(update={"name": name, "tool_versions": {"edition": str(version)}})
            )
        (tmp_path / "job.yaml").write_text(exported[1].replace("NAME", name).replace("STORE", store.uri))
        Image.fromarray(np.zeros((40, 40, 3), dtype=np.uint8)).save(tmp_path / "photo.jpg")
        return store.uri

    return publish


@pytest.fixture
def walk(place: Callable[[str], str], nestquant: Run, signing: InitSigning, oci_registry: str) -> Walk:
    """Sign what is published, then run a page's lines; return what they printed."""

    def run(page: str, name: str) -> str:
        uri = place(name)
        signer = signing(uri)
        on_store = ("--store", uri, *signer.options)
        for words in (
            ("sign", name, "--version", 3, "--version", 7, "--tag", "latest=1"),
            ("tag", f"{name}@1", "stable"),
        ):
            assert nestquant(*words, *on_store)[0] == 0
        printed = ""
        with cdn(open_store(uri)) as address:
            places = {
                "s3://models/vision": uri,
                "s3://models": uri,
                "https://cdn.example/vision": address,
                "oci://registry.example/vision/resnet18": f"oci://{oci_registry}/vision/{uuid.uuid4().hex}",
            }
            lines = command_lines((ROOT / page if page == "README.md" else ROOT / "docs" / page).read_text())
            if FINISH.split() in lines:
                lines.remove(FINISH.split())
                lines += [next(line for line in lines if line[0] == "rollout"), FINISH.split()]
            for line in lines:
                if " ".join(line) in NOT_RUN.get(page, {}):
                    continue
                words = [*line[:-1], *on_store] if line[-1] == "..." else list(line)
                for old, new in places.items():
                    words = [
                        new + word.removeprefix(old) if word == old or word.startswith(f"{old}:") else word
                        for word in words
                    ]
                code, out, err = nestquant(*words, *(["--local"] if words[0] in LOCAL else []))
                assert code == 0, (line, err)
                printed += out
        return printed

    return run


def test_readme(walk: Walk, tmp_path: Path) -> None:
    printed = walk("README.md", "mobilenet")
    assert "mobilenet version 1 runs full-bit" in printed
    assert (tmp_path / "site" / "index.html").is_file()


@pytest.mark.parametrize(
    ("page", "name", "last"),
    [
        ("rollouts.md", "resnet18", "resnet18"),
        ("offline.md", "resnet18", "full-bit"),
        ("updates.md", "resnet18", "nothing published"),
        ("hub.md", "resnet18", "resnet18"),
        ("registries.md", "resnet18", "resnet18 version 3 runs full-bit"),
        ("catalogue.md", "resnet18", "site"),
        ("engines.md", "mobilenet", "mobilenet version 1 runs part-bit"),
        ("index.md", "mobilenet", "mobilenet version 1 runs full-bit"),
    ],
)
def test_a_page(walk: Walk, page: str, name: str, last: str) -> None:
    assert last in walk(page, name)


@pytest.mark.parametrize(("page", "count"), [("README.md", 2), ("docs/index.md", 1), ("docs/engines.md", 1)])
def test_the_python_blocks_of_a_page_run(
    page: str, count: int, place: Callable[[str], str], nestquant: Run, tmp_path: Path
) -> None:
    """In a folder with a device's cache that holds every level; network and images are the reader's own."""
    uri = place("mobilenet")
    assert nestquant("pull", "mobilenet@1", "--store", uri, "--allow-unsigned")[0] == 0
    assert nestquant("upgrade", "mobilenet", "--store", uri)[0] == 0
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(7200, 10)
    )
    ran = 0
    for language, _, text in blocks(ROOT / page):
        if language == "python":
            names: dict[str, Any] = {"model": model.eval(), "images": torch.randn(8, 3, 32, 32)}
            exec(compile(text, page, "exec"), names)
            if "nested" in names:
                assert (names["nested"].level, (tmp_path / "model.nq").is_file()) == (0 if "index" in page else 1, True)
            else:
                assert names["logits"].shape[-1] == 10
            ran += 1
    assert ran == count


def test_what_is_not_run_stands_on_its_page() -> None:
    for page, lines in NOT_RUN.items():
        text = (ROOT / page if page == "README.md" else ROOT / "docs" / page).read_text()
        assert set(lines) <= {" ".join(line) for line in command_lines(text)}, page
