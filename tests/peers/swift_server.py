"""OpenStack Swift with its S3 layer on 127.0.0.1: `swift_server.py FOLDER` (in the environment of `make venv-swift`).

Swift's own proxy, account, container and object servers, a process each, with one replica of everything, below FOLDER.
Prints one line, the address of the S3 layer, once it takes requests; ends when its standard input ends. The user
``test:tester`` has the secret ``testing``, and signatures are checked. It needs no rights: the ports are free ones,
nothing outside FOLDER is written, and nobody becomes another user (as Swift's own commands would).
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import warnings
from pathlib import Path

# What Swift itself warns of is nobody's business here.
warnings.simplefilter("ignore")

from swift.common import utils, wsgi  # noqa: E402
from swift.common.ring import RingBuilder  # noqa: E402

SERVERS = ("account", "container", "object")
PIPELINE = "catch_errors gatekeeper listing_formats bulk s3api tempauth copy slo dlo versioned_writes"

STORAGE = """\
[DEFAULT]
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
disable_fallocate = true
bind_ip = 127.0.0.1
bind_port = {port}
log_level = ERROR

[pipeline:main]
pipeline = {name}-server

[app:{name}-server]
use = egg:swift#{name}
"""

PROXY = """\
[DEFAULT]
swift_dir = {folder}
bind_ip = 127.0.0.1
bind_port = {port}
log_level = ERROR

[pipeline:main]
pipeline = {pipeline} proxy-server

[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
node_timeout = 60

[filter:s3api]
use = egg:swift#s3api
location = us-east-1

[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
"""


def main(folder: Path) -> None:
    (folder / "devices" / "disk").mkdir(parents=True)
    sockets = {name: socket.create_server(("127.0.0.1", 0), backlog=256) for name in (*SERVERS, "proxy")}
    ports = {name: listening.getsockname()[1] for name, listening in sockets.items()}
    secret = os.urandom(16).hex()
    (folder / "swift.conf").write_text(
        f"[swift-hash]\nswift_hash_path_suffix = {secret}\nswift_hash_path_prefix = {secret}\n"
        "[storage-policy:0]\nname = only\ndefault = yes\n"
    )
    for name in SERVERS:
        (folder / f"{name}.conf").write_text(STORAGE.format(folder=folder, name=name, port=ports[name]))
        ring = RingBuilder(part_power=4, replicas=1, min_part_hours=0)
        ring.add_dev({
            "region": 1, "zone": 1, "ip": "127.0.0.1", "port": ports[name], "device": "disk", "weight": 1.0,
        })  # fmt: skip
        ring.rebalance()
        ring.get_ring().save(str(folder / f"{name}.ring.gz"))
    filters = "".join(
        f"\n[filter:{name}]\nuse = egg:swift#{name}\n" for name in PIPELINE.split() if name not in ("s3api", "tempauth")
    )
    proxy = PROXY.format(folder=folder, port=ports["proxy"], pipeline=PIPELINE) + filters
    (folder / "proxy.conf").write_text(proxy)

    children = [serve(name, folder, listening) for name, listening in sockets.items()]
    # They listen already: whoever connects now is answered as soon as the server runs.
    print(f"http://127.0.0.1:{ports['proxy']}", flush=True)
    try:
        sys.stdin.read()
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def serve(name: str, folder: Path, listening: socket.socket) -> int:
    """Run one of Swift's servers in a process of its own; its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.close(0)
        path = str(folder / f"{name}.conf")
        conf, logger, log_name = wsgi._initrp(path, f"{name}-server", verbose=True)
        utils.monkey_patch()
        utils.FALLOCATE_RESERVE = 0
        green = wsgi.eventlet.greenio.GreenSocket(listening)
        wsgi.run_server(conf, logger, green, global_conf={"log_name": log_name})
    finally:
        os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
