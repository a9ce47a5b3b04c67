"""A Ray cluster of two nodes on this machine, for trying a run on a cluster without having one.

    python cluster/local_two_nodes.py                        runs until it is interrupted; prints how to submit
    python cluster/local_two_nodes.py COMMAND [ARGUMENT ...] runs the command against the cluster, then ends it

It listens only on 127.0.0.1, on free ports, requires a token that it generates, keeps everything in a temporary folder
that it removes, and ends only what it has started. Its exit status is the command's.

Needs `pip install -e ".[cluster]"`.
"""

import argparse
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OBJECT_STORE_BYTES = 256 * 2**20
"""Bytes of each node's object store. Ray's default is 30 % of the machine's memory for each node."""

SUBMIT = "ray job submit --working-dir . -- python jobs/score.py --config RUN.yaml --output /DIR --output_is_shared"


def main() -> int:
    """Start the cluster, and run the command or wait to be interrupted."""
    options = arguments()
    signal.signal(signal.SIGTERM, end)
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        client = prepare(Path(folder))
        with cluster(folder, options.num_cpus, client):
            if options.command:
                return subprocess.run(options.command, check=False).returncode
            print(how_to_submit(client), flush=True)
            signal.pause()
    return 0


def arguments() -> argparse.Namespace:
    """Parse the options and the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_cpus", type=int, default=2, help="CPUs that each node counts, real or not")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="command to run against the cluster")
    return parser.parse_args()


def prepare(folder: Path) -> dict[str, str]:
    """Set the environment of the nodes, and return that of clients; must run before Ray is imported, which reads it."""
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    client = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{free_port()}",
    }
    os.environ.update(client)
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # the only way to keep Ray on 127.0.0.1 (2.60)
    os.environ["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"
    return client


@contextmanager
def cluster(folder: str, num_cpus: int, client: dict[str, str]) -> Iterator[None]:
    """Run the two nodes for the duration of a block."""
    from ray._private.utils import write_ray_address
    from ray.cluster_utils import Cluster

    node = {
        "node_ip_address": "127.0.0.1",
        "num_cpus": num_cpus,
        "object_store_memory": OBJECT_STORE_BYTES,
        "dashboard_agent_listen_port": 0,
    }
    port = int(client["RAY_API_SERVER_ADDRESS"].rpartition(":")[2])
    head = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}
    nodes = Cluster()
    try:
        nodes.add_node(**node, **head, temp_dir=folder)
        # With one folder for both, the working directory of a job that ran on one was deleted by the other (2.60).
        nodes.add_node(**node, temp_dir=f"{folder}/2")
        signal.signal(signal.SIGTERM, end)  # Ray has set its own, which ends only one of the nodes
        # `ray start` does this too. Without it, a submitted job connects to any Ray that it finds here (2.60).
        write_ray_address(nodes.address, folder)
        os.environ["RAY_ADDRESS"] = nodes.address
        yield
    finally:
        nodes.shutdown()


def how_to_submit(client: dict[str, str]) -> str:
    """What to type in another terminal to submit a job."""
    exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in client.items())
    return f"Two nodes are up. In another terminal:\n\n    export {exports}\n    {SUBMIT}\n\nCtrl-C ends them."


def free_port() -> int:
    """A port that no process listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def end(*_: object) -> None:
    """Exit through the open `with` blocks, which clean up."""
    sys.exit(0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(0)
