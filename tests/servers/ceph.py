"""Ceph's RADOS gateway from the distribution's packages: a monitor, manager, OSD (a sparse file), gateway on 127.0.0.1.

Needs ``ceph-mon ceph-osd ceph-mgr radosgw ceph-common`` (Debian 12: Ceph 16.2.15). Up in about 18 s. Manual deployment
as in Ceph's documentation (install/manual-deployment), reduced to what one test session wants: no replicas, no
autoscaling, small placement groups.
"""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.servers.process import ServerFailed, find_program, free_port, running, wait_for_port
from tests.servers.s3_server import ACCESS_KEY, SECRET_KEY, S3Server

PROGRAMS = ("ceph", "ceph-authtool", "ceph-mgr", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")

_CONFIG = """\
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{mon_port}
keyring = {folder}/keyring
public network = 127.0.0.0/8
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
osd crush chooseleaf type = 0
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
log file = {folder}/log/$name.log
admin socket = {folder}/run/$name.asok
run dir = {folder}/run
ms bind ipv6 = false
mgr initial modules =
[mon.a]
mon data = {folder}/mon
mon data avail crit = 1
mon data avail warn = 2
[osd.0]
osd data = {folder}/osd
osd objectstore = bluestore
bluestore block size = 4294967296
osd memory target = 1073741824
[mgr.x]
mgr data = {folder}/mgr
[client.rgw.a]
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw data = {folder}/rgw
"""
_KEYS = {
    "mon.": ["mon", "allow *"],
    "client.admin": ["mon", "allow *", "osd", "allow *", "mgr", "allow *"],
    "client.rgw.a": ["mon", "allow rw", "osd", "allow rwx", "mgr", "allow rw"],
    "mgr.x": ["mon", "allow profile mgr", "osd", "allow *"],
    "osd.0": ["mon", "allow profile osd", "mgr", "allow profile osd", "osd", "allow *"],
}


def missing_programs() -> list[str]:
    """Return which of Ceph's programs are not installed."""
    return [name for name in PROGRAMS if find_program(name) is None]


@contextmanager
def ceph(folder: Path) -> Iterator[S3Server]:
    """Run a whole cluster in ``folder``.

    Checks signatures and clocks, keeps create-only, refuses even a matching If-Match.
    """
    port, mon_port = free_port(), free_port()
    for name in ("mon", "mgr", "osd", "run", "log", "rgw"):
        (folder / name).mkdir()
    config = folder / "ceph.conf"
    config.write_text(_CONFIG.format(fsid=uuid.uuid4(), folder=folder, port=port, mon_port=mon_port))
    common = ["-c", str(config)]
    _make_keys(folder / "keyring")
    monmap = str(folder / "monmap")
    fsid = config.read_text().split("fsid = ")[1].splitlines()[0]
    _do("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{mon_port}]", monmap)
    _do("ceph-mon", *common, "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", str(folder / "keyring"))
    with ExitStack() as daemons:

        def start(program: str, *arguments: str) -> subprocess.Popen[bytes]:
            argv = [find_program(program) or program, "-f", *common, *arguments]
            return daemons.enter_context(running(argv, folder / "log" / f"{program}.out"))

        wait_for_port(mon_port, start("ceph-mon", "-i", "a"), folder / "log" / "ceph-mon.out")
        start("ceph-mgr", "-i", "x")
        osd_uuid = str(uuid.uuid4())
        _do("ceph", *common, "osd", "new", osd_uuid)
        _do("ceph-osd", *common, "-i", "0", "--mkfs", "--osd-uuid", osd_uuid)
        start("ceph-osd", "-i", "0")
        user = ["--uid=test", "--display-name=test", f"--access-key={ACCESS_KEY}", f"--secret={SECRET_KEY}"]
        _do("radosgw-admin", *common, "user", "create", *user)
        gateway = start("radosgw", "-n", "client.rgw.a")
        wait_for_port(port, gateway, folder / "log" / "radosgw.out")
        server = S3Server("ceph", f"http://127.0.0.1:{port}")
        server.make_bucket()
        yield server


def _make_keys(keyring: Path) -> None:
    for name, caps in _KEYS.items():
        pairs = [part for kind, what in zip(caps[::2], caps[1::2], strict=True) for part in ("--cap", kind, what)]
        create = [] if keyring.exists() else ["--create-keyring"]
        _do("ceph-authtool", str(keyring), *create, "--gen-key", "-n", name, *pairs)


def _do(program: str, *arguments: str) -> None:
    done = subprocess.run(
        [find_program(program) or program, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "CEPH_ARGS": ""},
    )
    if done.returncode:
        raise ServerFailed(f"{program} {' '.join(arguments[:4])}: exit {done.returncode}: {done.stderr.strip()[-500:]}")
