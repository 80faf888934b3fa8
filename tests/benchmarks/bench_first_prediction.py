"""From an empty folder to the first prediction over a slow line: ``python -m tests.benchmarks.bench_first_prediction``.

A device (an empty environment with the wheel and its extra ``onnx``) fetches over HTTPS from this machine, at 1 Mbit/s
for all connections together, and answers one photograph: the version part-bit, the version full-bit, and, by a program
of ten lines with the same engine, a whole int8 model and the float model. Processes start anew each time, so that
imports count. Printed: bytes that left the server, seconds.
"""

from __future__ import annotations

import argparse
import functools
import ssl
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.benchmarks.bench_engines import machine, publish
from tests.engines.empty_device import install, run
from tests.servers.certificate import write_certificate

PIECE_BYTES = 1250
PLAIN = """
import json, sys, urllib.request
from pathlib import Path
import onnxruntime
from nestquant.engines.images import Preprocessing, photo_input
url, photo, preprocessing = sys.argv[1:]
path = Path("model.onnx")
path.write_bytes(urllib.request.urlopen(url).read())
batch = photo_input(Path(photo), Preprocessing.from_record(json.loads(preprocessing)))[None]
print(onnxruntime.InferenceSession(path).run(None, {"image": batch})[0].argmax())
"""


@dataclass
class Line:
    """A line that carries so many bytes a second, whoever sends."""

    bytes_per_s: float
    sent_bytes: int = 0
    free_at: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def send(self, piece: bytes) -> None:
        """Wait until the line has carried the piece."""
        with self.lock:
            self.sent_bytes += len(piece)
            self.free_at = max(self.free_at, time.monotonic()) + len(piece) / self.bytes_per_s
            wait_s = self.free_at - time.monotonic()
        if wait_s > 0:
            time.sleep(wait_s)


@contextmanager
def serving(folder: Path, line: Line, certificate: Path) -> Iterator[str]:
    """Serve a folder over HTTPS through the line; yield its address."""

    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def copyfile(self, source: Any, outputfile: Any) -> None:
            while piece := source.read(PIECE_BYTES):
                line.send(piece)
                outputfile.write(piece)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    server.daemon_threads = True
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"https://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def measure(network: str, models: Path, environment: Path, mbit: float, folder: Path) -> None:
    """Print the rows of one network, whose files `publish` put into ``models``."""
    import json

    from storage.device import Device

    manifest = Device(models / "device").manifest(network)
    photo = folder / "photo.png"
    Image.fromarray(np.random.default_rng(4).integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(photo)
    certificate, line = write_certificate(folder / "server.pem"), Line(mbit * 125_000)
    nestquant, python = environment / "bin" / "nestquant", environment / "bin" / "python"
    with serving(models, line, certificate) as url:
        trust = {"SSL_CERT_FILE": str(certificate)}

        def nested(level: int, place: Path) -> None:
            words = ("pull", network, "--store", f"{url}/store", "--allow-unsigned", "--level", level)
            run(nestquant, *words, "--cache", place / "cache", cwd=place, **trust)
            run(nestquant, "run", network, photo, "--cache", place / "cache", cwd=place)

        def plain(name: str, place: Path) -> None:
            record = json.dumps(manifest.preprocessing)
            run(python, "-c", PLAIN, f"{url}/{name}", photo, record, cwd=place, **trust)

        ways = {
            "nested, part-bit": functools.partial(nested, 0),
            "nested, full-bit": functools.partial(nested, 1),
            "int8 model, whole": functools.partial(plain, "int8-1.onnx"),
            "float model": functools.partial(plain, "float.onnx"),
        }
        for way, fetch in ways.items():
            place = folder / way.replace(", ", "-").replace(" ", "-")
            place.mkdir()
            before, begin = line.sent_bytes, time.perf_counter()
            fetch(place)
            seconds = time.perf_counter() - begin
            moved = line.sent_bytes - before
            print(f"| {network} | {way} | {moved / 1e6:.2f} | {seconds:.1f} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=["fdmobilenet_wd2", "mobilenetv2_100"])
    parser.add_argument("--mbit", type=float, default=1.0, help="megabits a second")
    parser.add_argument("--folder", type=Path, help="where the models of one network were made before")
    arguments = parser.parse_args()
    print(f"{machine()}; {arguments.mbit:g} Mbit/s")
    with tempfile.TemporaryDirectory(prefix="nestquant-first-") as scratch:
        environment = install(Path(scratch))
        print("| network | what is fetched | MB moved | s to the first prediction |")
        print("| --- | --- | ---: | ---: |")
        for network in arguments.networks:
            models = arguments.folder or Path(scratch) / network
            if not (models / "float.onnx").exists():
                models.mkdir(parents=True, exist_ok=True)
                publish(network, models)
            place = Path(scratch) / f"{network}-device"
            place.mkdir()
            measure(network, models, environment, arguments.mbit, place)


if __name__ == "__main__":
    main()
