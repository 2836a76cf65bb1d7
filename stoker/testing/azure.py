"""A real Azure Blob service on this machine: Azurite, from npm, reachable from nowhere else."""

import base64
import hashlib
import hmac
import os
import secrets
import shutil
import socket
import sys
import urllib.error
import urllib.request
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any

from ..errors import AlreadyExists, MissingExtra, StoreError
from ._server import HOST, LoopbackServer

__all__ = ["AzureServer"]

_API_VERSION = "2021-08-06"


class AzureServer(LoopbackServer):
    """Azurite's blob service on a free loopback port with an account of its own, its data in a temporary directory,
    telemetry off.

    Starts when the ``with`` block is entered and returns when it answers (about two seconds); at the end exactly this
    process is killed and its directory removed. One object, one thread.

    Args:
        containers: made before it is entered; others with :meth:`create_container`.
        start_timeout_s: seconds until a server that does not answer is given up.

    Raises:
        MissingExtra: Azurite is not installed.
        DeadlineExceeded: no answer within `start_timeout_s`.
        StoreError: the server ended while it was starting.

    ::

        with AzureServer() as server:
            store = open_store(server.url("stoker"), **server.storage_options)
    """

    def __init__(self, *, containers: tuple[str, ...] = ("stoker",), start_timeout_s: float = 60.0) -> None:
        super().__init__(kind="Azure", program="azurite", start_timeout_s=start_timeout_s)
        self._containers = containers
        self._account = f"stoker{secrets.token_hex(4)}"
        self._key = base64.b64encode(secrets.token_bytes(64)).decode()
        self._port = 0

    @property
    def endpoint_url(self) -> str:
        """The address of the account's blob service."""
        return f"http://{HOST}:{self._port}/{self._account}"

    @property
    def storage_options(self) -> dict[str, Any]:
        """What :func:`stoker.storage.open_store` needs to reach it."""
        return {"endpoint_url": self.endpoint_url, "account_name": self._account, "account_key": self._key}

    def url(self, container: str = "stoker", prefix: str = "") -> str:
        """``az://container/prefix``."""
        return f"az://{container}/{prefix}".rstrip("/")

    def create_container(self, container: str) -> str:
        """Make an empty container (3 to 63 small letters, digits and single dashes) and return its URL.

        Raises:
            AlreadyExists: there is one of that name.
        """
        request = urllib.request.Request(f"{self.endpoint_url}/{container}?restype=container", method="PUT")
        request.add_header("x-ms-date", format_datetime(datetime.now(UTC), usegmt=True))
        request.add_header("x-ms-version", _API_VERSION)
        request.add_header("Authorization", f"SharedKey {self._account}:{self._signature(request, container)}")
        try:
            urllib.request.urlopen(request, timeout=10).close()
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 409:
                raise AlreadyExists("the container must not exist yet", place=self.url(container)) from None
            raise StoreError("must make a container", value=f"status {error.code}", place=self.url(container)) from None
        return self.url(container)

    def _signature(self, request: urllib.request.Request, container: str) -> str:
        # https://learn.microsoft.com/en-us/rest/api/storageservices/authorize-with-shared-key: the method, eleven
        # headers that are all empty here, those of x-ms-, the resource. The account stands twice: in front as such, and
        # as the first part of the path, where a server of its own name would have it in the name.
        headers = "".join(
            f"{name.lower()}:{value}\n"
            for name, value in sorted(request.header_items())
            if name.lower().startswith("x-ms-")
        )
        resource = f"/{self._account}/{self._account}/{container}\nrestype:container"
        text = f"{request.get_method()}\n" + "\n" * 11 + headers + resource
        return base64.b64encode(hmac.digest(base64.b64decode(self._key), text.encode(), hashlib.sha256)).decode()

    def _prepare(self) -> tuple[list[str], dict[str, str]]:
        assert self._directory is not None
        program = _find_azurite()
        self._port = _free_port()
        env = {
            name: value for name, value in os.environ.items() if not name.startswith(("AZURE_", "AZURITE_", "NODE_"))
        }
        env["AZURITE_ACCOUNTS"] = f"{self._account}:{self._key}"
        command = [program, "--blobHost", HOST, "--blobPort", str(self._port)]
        # The client speaks a newer version of the protocol than Azurite knows by name.
        command += [
            "--location",
            str(self._directory / "data"),
            "--skipApiVersionCheck",
            "--disableTelemetry",
            "--silent",
        ]
        return command, env

    def _furnish(self) -> None:
        for container in self._containers:
            self.create_container(container)

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(self.endpoint_url, timeout=5).close()
        except urllib.error.HTTPError as error:  # it wants a signature: it is there
            error.close()
        except OSError:
            return False
        return True


def _find_azurite() -> str:
    beside = Path(sys.prefix) / "azurite" / "node_modules" / ".bin" / "azurite-blob"
    found = str(beside) if beside.is_file() else shutil.which("azurite-blob")
    if found is None:
        raise MissingExtra(
            "the Azure server needs the program 'azurite-blob'",
            place="AzureServer",
            hint=f"npm install --prefix {Path(sys.prefix) / 'azurite'} azurite",
        )
    return found


def _free_port() -> int:
    try:
        with socket.socket() as held:
            held.bind((HOST, 0))
            return int(held.getsockname()[1])
    except OSError as error:
        raise StoreError(f"needs a free port on {HOST}", value=error.strerror, place="AzureServer") from error
