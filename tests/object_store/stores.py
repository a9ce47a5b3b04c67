"""Real S3 stores as processes of their own on loopback: moto's server, and a Ceph RADOS Gateway."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
import s3fs
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

HERE = Path(__file__).parent
PACKAGES = ("radosgw", "ceph-mon", "ceph-osd")


@dataclass(frozen=True)
class Store:
    """A running store and a user who may do everything there."""

    name: str
    endpoint: str
    key: str
    secret: str
    data: Path
    """Its folder."""

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use the store, as a user would set it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            # For readers by pyarrow's own client, which sends checksums that RADOS Gateway 16 does not know.
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        }

    def client(self, **changes: str) -> s3fs.S3FileSystem:
        """A client with this user's credentials, or others."""
        options = {"key": self.key, "secret": self.secret, "endpoint_url": self.endpoint, **changes}
        return s3fs.S3FileSystem(**options, skip_instance_cache=True)

    def unconditional(self, method: str, path: str, headers: dict[str, str], body: bytes) -> dict[str, str]:
        """The headers of a request without its condition, which they have signed, signed anew."""
        kept = {name: value for name, value in headers.items() if name.lower() != "if-none-match"}
        if len(kept) == len(headers):
            return headers
        request = AWSRequest(method, self.endpoint + path, kept, body)
        S3SigV4Auth(Credentials(self.key, self.secret), "s3", "us-east-1").add_auth(request)
        return dict(request.headers)

    def kill(self) -> None:
        """End every process of the store at once, as a power cut does."""
        for file in (self.data / "run").glob("*.pid"):
            pid = int(file.read_text())
            os.kill(pid, signal.SIGKILL)
            _wait_for_end(pid)

    def restart(self) -> None:
        """Start the processes again, on the data that the kill left."""
        _run_ceph_script(self)


def _wait_for_end(pid: int) -> None:
    for _ in range(500):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z":
            return
        time.sleep(0.02)
    raise TimeoutError(f"process {pid} does not end")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_until_listening(endpoint: str, seconds: float = 300) -> None:
    """Return when something answers there."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(endpoint, timeout=2).close()
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise TimeoutError(f"nothing listens on {endpoint}")


# --- moto ------------------------------------------------------------------------------------------------------------


@contextmanager
def moto(data: Path) -> Iterator[Store]:
    """Moto's server with authentication on: everything after the first four calls, which make its user, is checked."""
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    with (data / "moto.log").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            env={**os.environ, "INITIAL_NO_AUTH_ACTION_COUNT": "3"},
            stdout=output,
            stderr=output,
        )
    try:
        wait_until_listening(f"{endpoint}/moto-api/")
        yield Store("moto", endpoint, *make_user(endpoint, "tests", {"Action": ["s3:*", "iam:*"]}), data)
    finally:
        process.kill()
        process.wait()


def make_user(endpoint: str, name: str, rights: dict[str, Any], **credentials: str) -> tuple[str, str]:
    """A user of moto with these rights: access key and secret."""
    known = {"aws_access_key_id": "none", "aws_secret_access_key": "none", **credentials}
    iam = boto3.client("iam", endpoint_url=endpoint, region_name="us-east-1", **known)
    iam.create_user(UserName=name)
    key = iam.create_access_key(UserName=name)["AccessKey"]
    statement = {"Effect": "Allow", "Resource": "*", **rights}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    iam.put_user_policy(UserName=name, PolicyName="rights", PolicyDocument=policy)
    return key["AccessKeyId"], key["SecretAccessKey"]


# --- Ceph ------------------------------------------------------------------------------------------------------------


def find_ceph() -> Path | None:
    """Where the Debian packages of Ceph are: DAVIR_TEST_CEPH, a folder they were unpacked in, or installed."""
    root = Path(os.environ.get("DAVIR_TEST_CEPH", "/"))
    programs = [root / "usr/bin/radosgw", root / "usr/bin/ceph-mon", root / "usr/bin/ceph-osd"]
    return root if all(program.exists() for program in programs) else None


def require_ceph() -> None:
    """Skip without Ceph; fail where S3_TEST_REQUIRE says that a real store must be tested."""
    if find_ceph() is not None:
        return
    if os.environ.get("S3_TEST_REQUIRE") == "1":
        pytest.fail(f"S3_TEST_REQUIRE is 1, but {', '.join(PACKAGES)} are not installed")
    pytest.skip(f"{', '.join(PACKAGES)} are not installed")


@contextmanager
def ceph(data: Path) -> Iterator[Store]:
    """A RADOS Gateway with one monitor and one disk."""
    store = Store("ceph", f"http://127.0.0.1:{free_port()}", "AKIDTEST000", "secretsecret123", data / "ceph")
    try:
        _run_ceph_script(store)
        yield store
    finally:
        store.kill()
        shutil.rmtree(store.data / "osd", ignore_errors=True)  # 6 GB, sparse


def _run_ceph_script(store: Store) -> None:
    settings = store.data / "settings.json"
    if settings.exists():
        ports = json.loads(settings.read_text())
    else:
        store.data.mkdir()
        ports = {"PORT": store.endpoint.rpartition(":")[2], "MON_PORT": str(free_port())}
        settings.write_text(json.dumps(ports))
    environment = {"ROOT": str(find_ceph()), "DATA": str(store.data), **ports}
    environment |= {"ACCESS_KEY": store.key, "SECRET_KEY": store.secret}
    done = subprocess.run(
        ["bash", str(HERE / "ceph.sh")], env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        raise RuntimeError(f"the store did not start: {done.stdout}{done.stderr}")
    wait_until_listening(store.endpoint)
