"""An S3 endpoint that costs next to nothing, so that a bench on one machine shows what its clients cost.

A real server shares the processors with the client that is measured, and takes more of them. This one answers a GET from
the files of a directory with one ``sendfile(2)``: no signatures, no listing, no writing. For nothing but benches.

    python -m stoker.bench.lean_server DIRECTORY    # prints its port; ends when its standard input does
"""

import os
import re
import signal
import subprocess
import sys
import threading
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from ..errors import StoreUnavailable

__all__ = ["LeanServer"]

_BUCKET = "bench"
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    root: Path

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line for each request would cost more than the request."""

    def _path(self) -> Path:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[0] != _BUCKET or any(part in ("", ".", "..") for part in parts):
            raise FileNotFoundError(self.path)
        return self.root.joinpath(*parts[1:])

    def do_HEAD(self) -> None:
        self._send(body=False)

    def do_GET(self) -> None:
        self._send(body=True)

    def _send(self, *, body: bool) -> None:
        try:
            fd = os.open(self._path(), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            self._answer(404)
            return
        try:
            info = os.fstat(fd)
            start, end = 0, info.st_size
            asked = _RANGE.fullmatch(self.headers.get("Range", ""))
            if asked:
                start, end = int(asked[1]), min(end, int(asked[2] or end) + 1)
            headers = {
                "ETag": f'"{info.st_ino:x}-{info.st_mtime_ns:x}"',
                "Last-Modified": formatdate(info.st_mtime, usegmt=True),
            }
            if asked:
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{info.st_size}"
            self._answer(206 if asked else 200, length=end - start, headers=headers)
            while body and start < end:
                start += os.sendfile(self.connection.fileno(), fd, start, end - start)
        finally:
            os.close(fd)

    def _answer(self, status: int, *, length: int = 0, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()


class LeanServer:
    """The server as a process of its own, inside the block.

    Args:
        directory: what it serves.

    Attributes:
        storage_options: how :func:`stoker.storage.open_store` reaches it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.storage_options: dict[str, Any] = {}

    def url(self) -> str:
        """The bucket."""
        return f"s3://{_BUCKET}"

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", __spec__.name, str(self._directory)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        port = self._process.stdout.readline().strip()
        if not port:
            self.__exit__(None, None, None)
            raise StoreUnavailable("the bench's own server must start", value=self._process.returncode)
        self.storage_options = {"endpoint_url": f"http://127.0.0.1:{port}", "region": "us-east-1", "anon": True}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._process:  # which closes the pipes, and waits
            self._process.terminate()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves is its own business; anything else is a mistake here."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def _serve(directory: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the bench ends it
    _Handler.root = directory
    server = _Server(("127.0.0.1", 0), _Handler)

    def end_with_parent() -> None:
        sys.stdin.read()
        server.shutdown()

    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.stdout.write(f"{server.server_address[1]}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
