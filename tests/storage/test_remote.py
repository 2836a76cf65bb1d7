"""Remote stores beyond the contract: options, errors without secrets, servers that break their word, forks."""

import http.server
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.errors import (
    AccessDenied,
    BucketNotFound,
    ConfigError,
    KeyNotFound,
    ObjectChanged,
    StokerError,
    StoreUnavailable,
    UnsafeName,
    UnsupportedError,
)
from stoker.metrics import counters
from stoker.storage import ObjectInfo, ObjectStore, _listing, _remote_options, open_store, remote
from stoker.storage.network import NetworkPolicy
from stoker.storage.remote import RemoteStore, RemoteWriter
from stoker.testing import Fault, FaultProxy, S3Server

MIB = 2**20


@pytest.fixture
def store(s3_server: S3Server) -> Iterator[ObjectStore]:
    with open_store(s3_server.url("stoker", uuid.uuid4().hex), **s3_server.storage_options) as store:
        yield store


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short patience, for what is going to fail."""
    monkeypatch.setitem(_remote_options._RETRIES, "max_retries", 1)
    monkeypatch.setattr(remote, "NetworkPolicy", lambda: NetworkPolicy(timeout_s=1.0))


def requests(store: ObjectStore) -> list[Callable[[], object]]:
    def write() -> object:
        with store.open_writer("object", 1) as writer:
            writer.write_at(0, b"1")
            return writer.commit()

    return [
        lambda: store.get("object"),
        lambda: store.get("object", 3, 7),
        lambda: store.get_into("object", memoryview(bytearray(3))),
        lambda: store.head("object"),
        lambda: store.exists("object"),
        lambda: store.put("object", b"1"),
        lambda: store.create("object", b"1"),
        write,
        lambda: list(store.list()),
        lambda: store.delete("object"),
    ]


# --- options --------------------------------------------------------------------------------------------------------


def test_the_options_of_fsspec_users_are_understood(s3_server: S3Server) -> None:
    given = s3_server.storage_options
    forms: list[dict[str, Any]] = [
        given,
        {**given, "anon": False, "token": None},
        {
            "key": given["key"],
            "secret": given["secret"],
            "client_kwargs": {"endpoint_url": given["endpoint_url"], "region_name": "us-east-1"},
        },
        {**given, "anon": "false", "requester_pays": "0"},
    ]
    url = s3_server.url("stoker", uuid.uuid4().hex)
    for number, options in enumerate(forms):
        for scheme in ("s3", "s3a"):
            with open_store(url.replace("s3:", f"{scheme}:"), **options) as store:
                store.put(f"{number}", scheme.encode())
                assert bytes(store.get(f"{number}")) == scheme.encode()


def test_the_aws_variables_are_honoured(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    with open_store(s3_server.url("stoker", uuid.uuid4().hex)) as store:
        store.put("object", b"1")
        assert store.head("object").size == 1
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")  # the more special one wins
    assert _remote_options.parse("s3://bucket", {})[3].endpoint_url == "http://127.0.0.1:1"


@pytest.mark.parametrize(
    ("url", "options", "words"),
    [
        ("s3://bucket", {"keys": "k"}, "no such option, got 'keys'"),
        ("s3://bucket", {"client_kwargs": {"verify": False}}, "no such client_kwargs option, got 'verify'"),
        ("s3://bucket", {"client_kwargs": 3}, "client_kwargs must be a dict"),
        ("s3://bucket", {"key": "k"}, "key and secret must be given together"),
        ("s3://bucket", {"key": "k", "secret": 7}, "secret must be text"),
        ("s3://bucket", {"anon": "perhaps"}, "anon must be true or false"),
        ("s3://bucket", {"endpoint_url": "127.0.0.1:8333"}, "endpoint_url must begin with"),
        ("s3://bucket", {"endpoint_url": "ftp://u:CANARY@host/?sig=CANARY"}, "http:// or https://, got 'ftp://host/'"),
        ("s3://bucket", {"endpoint_url": "u:CANARY@host"}, "http:// or https://, got 'host'"),
        ("s3://bucket", {"endpoint_url": "http://u:CANARY@host"}, "do not belong in endpoint_url, got 'http://host'"),
        ("s3://bucket", {"endpoint_url": 5}, "endpoint_url must be text, got 'int'"),
        ("s3://bucket", {"network": 5}, "network must be a NetworkPolicy, got 'int'"),
        ("s3://bucket/a\0b", {}, "no NUL character"),
        ("https://host/data", {"headers": 5}, "headers must be a dict, got 'int'"),
        ("s3:/bucket/CANARY", {}, "a URL has :// behind its scheme, got 's3:/...'"),
        ("s3:///prefix", {}, "must name a bucket"),
        ("s3://key:secret@bucket/prefix", {}, "credentials do not belong in a URL"),
        ("s3://bucket/prefix?versionId=3", {}, "no query"),
        ("s3://[bucket", {}, "well formed"),
        ("gs://bucket", {"project": "p"}, "no such option, got 'project'"),
        ("az://container", {"account_name": "a", "connection_string": "c"}, "no such option, got 'connection_string'"),
        ("az://container", {}, "Account must be specified (hint: pass account_name="),
        ("https://host/data", {"key": "k"}, "no such option, got 'key'"),
    ],
)
def test_a_wrong_option_or_url_is_named(url: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_store(url, **options)
    assert words in str(caught.value)
    assert "secret@" not in str(caught.value)
    assert "CANARY" not in str(caught.value)


@pytest.mark.parametrize("url", ["s3://bucket/../other", "s3://bucket/a//b", "s3://bucket/./a"])
def test_the_path_of_a_url_can_not_climb(url: str) -> None:
    with pytest.raises(UnsafeName):
        open_store(url)


@pytest.mark.parametrize(
    ("url", "options", "shown"),
    [
        ("gs://bucket/a/b/", {"token": "anon"}, "gs://bucket/a/b"),
        ("gcs://bucket", {"anon": True}, "gcs://bucket"),
        ("abfs://container@account.dfs.core.windows.net/a", {"anon": True}, "abfs://container/a"),
        ("az://container/a", {"account_name": "account", "sas_token": "sv=1&sig=c2VjcmV0"}, "az://container/a"),
        ("abfss://container/a", {"account_name": "account", "account_key": "c2VjcmV0"}, "abfss://container/a"),
        ("https://host:8443/data/", {"headers": {"Authorization": "Bearer c2VjcmV0"}}, "https://host:8443/data"),
    ],
)
def test_other_clouds_are_opened_by_their_own_options(url: str, options: dict[str, Any], shown: str) -> None:
    with open_store(url, **options) as store:
        assert (store.url, repr(store)) == (shown, f"RemoteStore({shown!r})")
        assert "c2VjcmV0" not in repr(store)


def test_unencrypted_http_needs_an_endpoint_that_says_so(s3_server: S3Server, impatient: None) -> None:
    options = {**s3_server.storage_options, "endpoint_url": s3_server.endpoint_url.replace("http:", "https:")}
    with open_store(s3_server.url(), **options) as store, pytest.raises(StoreUnavailable) as caught:
        store.get("object")
    assert "does not speak TLS" in str(caught.value)


# --- errors ---------------------------------------------------------------------------------------------------------


def check_all(store: ObjectStore, error: type[StokerError], secrets: tuple[str, ...] = ()) -> None:
    for call in requests(store):
        with pytest.raises(error) as caught:
            call()
        for text in (str(caught.value), repr(caught.value), repr(vars(caught.value))):
            assert "\n" not in text and "\\n" not in text and "Debug" not in text
            assert not any(secret in text for secret in secrets)
        # What it was made of, which a traceback would show, is left out too.
        assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_a_missing_bucket_is_named_by_every_request(s3_server: S3Server) -> None:
    with open_store("s3://no-such-bucket/prefix", **s3_server.storage_options) as store:
        check_all(store, BucketNotFound)


def test_an_object_is_missing_also_where_only_the_bucket_may_not_be_listed(
    s3_server: S3Server, fault_proxy: FaultProxy
) -> None:
    fault_proxy.add(Fault("status", status=403), methods=("GET",), path="list-type")
    url = s3_server.url("stoker", uuid.uuid4().hex)
    with (
        open_store(url, **fault_proxy.storage_options) as store,
        pytest.raises(KeyNotFound, match="/missing: no such object"),
    ):
        store.head("missing")
    assert sum("list-type" in request.path for request in fault_proxy.requests) == 1


def test_looking_for_the_bucket_of_a_missing_object_ends_by_the_deadline_of_the_call(
    s3_server: S3Server, fault_proxy: FaultProxy
) -> None:
    fault_proxy.add(Fault("status", status=503), methods=("GET",), path="list-type")
    policy = NetworkPolicy(timeout_s=0.5)
    url = s3_server.url("stoker", uuid.uuid4().hex)
    with (
        open_store(url, network=policy, **fault_proxy.storage_options) as store,
        pytest.raises(StoreUnavailable, match="/missing: the store must answer"),
    ):
        store.head("missing")
    asked = [request.method for request in fault_proxy.requests]
    assert asked.count("HEAD") == asked.count("GET") > 0  # each try is a whole one, by the one policy


@pytest.mark.parametrize("wrong", ["key", "secret"])
def test_wrong_keys_are_access_denied_and_never_shown(s3_server: S3Server, wrong: str) -> None:
    canary = "CANARY0123456789"
    options = {**s3_server.storage_options, wrong: canary}
    with open_store(s3_server.url(), **options) as store:
        check_all(store, AccessDenied, (canary, s3_server.storage_options["secret"]))
        with pytest.raises(AccessDenied, match="the secret is wrong" if wrong == "secret" else "not know this key"):
            store.get("object")


@pytest.mark.parametrize(
    ("status", "code", "error", "words"),
    [
        (403, "RequestTimeTooSkewed", AccessDenied, "this machine's clock is wrong"),
        (400, "ExpiredToken", AccessDenied, "the session token has expired"),
        (403, "ExpiredToken", AccessDenied, "the session token has expired"),
        (400, "AuthorizationHeaderMalformed", ConfigError, "must be in the region that is asked"),
        (301, "PermanentRedirect", ConfigError, "must be in the region that is asked"),
    ],
)
def test_what_the_store_finds_wrong_with_a_request_is_told_at_once(
    s3_server: S3Server, fault_proxy: FaultProxy, status: int, code: str, error: type[StokerError], words: str
) -> None:
    with open_store(s3_server.url("stoker", uuid.uuid4().hex), **fault_proxy.storage_options) as store:
        store.put("object", b"1")
        fault_proxy.add(Fault("status", status=status, code=code))
        fault_proxy.clear_requests()
        for call in (lambda: store.get("object"), lambda: store.put("object", b"1")):
            with pytest.raises(error, match=words):
                call()
        assert len(fault_proxy.requests) == 2


def test_a_write_is_never_redirected(s3_server: S3Server, fault_proxy: FaultProxy) -> None:
    with open_store(
        s3_server.url("stoker", uuid.uuid4().hex), network=NetworkPolicy(timeout_s=1.0), **fault_proxy.storage_options
    ) as store:
        fault_proxy.add(Fault("redirect", location="http://127.0.0.1:9"))
        for call in (lambda: store.put("object", b"1"), lambda: store.delete("object")):
            with pytest.raises(StokerError):
                call()


def test_a_redirected_read_takes_no_credentials_along(s3_server: S3Server, fault_proxy: FaultProxy) -> None:
    seen: list[dict[str, str]] = []

    class Elsewhere(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append({name.lower(): value for name, value in self.headers.items()})
            self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server,
        open_store(s3_server.url("stoker", uuid.uuid4().hex), **fault_proxy.storage_options) as store,
    ):
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        store.put("object", b"1")
        fault_proxy.add(Fault("redirect", location=f"http://127.0.0.1:{server.server_port}"))
        try:
            with pytest.raises(StokerError):
                store.get("object")
        finally:
            server.shutdown()
            thread.join()
    assert seen and not any("authorization" in headers for headers in seen)


def test_no_secret_is_logged_or_counted(
    s3_server: S3Server, fault_proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    secret = fault_proxy.storage_options["secret"]
    caplog.set_level("DEBUG")
    for fault in (Fault("status", status=403), Fault("reset"), Fault("status", status=500)):
        with open_store(s3_server.url(), network=NetworkPolicy(timeout_s=0.5), **fault_proxy.storage_options) as store:
            fault_proxy.clear()
            fault_proxy.add(fault)
            with pytest.raises(StokerError):
                store.get("object", 0, 1)
            assert secret not in repr(store) and secret not in repr(vars(store)["_config"])
    assert secret not in caplog.text
    assert secret not in repr(counters.snapshot())


def test_an_endpoint_where_nobody_listens_is_unavailable(impatient: None) -> None:
    with open_store("s3://bucket", endpoint_url="http://127.0.0.1:1", key="key", secret="CANARY") as store:
        check_all(store, StoreUnavailable, ("CANARY",))
        with pytest.raises(StoreUnavailable, match="nobody listens there"):
            store.head("object")


def test_without_credentials_the_error_says_how_to_give_them(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    with serving("right") as url:
        for metadata in (url, "http://127.0.0.1:1"):  # a machine of the cloud without a role; any other machine
            monkeypatch.setenv("AWS_METADATA_ENDPOINT", metadata)
            store = open_store("s3://bucket", endpoint_url="http://127.0.0.1:1")
            with pytest.raises(AccessDenied, match="credentials must be given.*anon=True"):
                store.get("object")


def test_a_writer_that_failed_stays_failed(s3_server: S3Server) -> None:
    options = {**s3_server.storage_options, "secret": "wrong"}
    with open_store(s3_server.url(), **options) as store, store.open_writer("object", 20 * MIB) as writer:
        with pytest.raises(AccessDenied):
            for offset in range(0, 20 * MIB, MIB):
                writer.write_at(offset, bytes(MIB))
        with pytest.raises(AccessDenied):
            writer.commit()


# --- uploads --------------------------------------------------------------------------------------------------------


def test_a_piece_that_comes_just_when_nothing_more_was_found_is_sent(s3_server: S3Server) -> None:
    content = os.urandom(2 << 20)
    found_nothing: list[int] = []

    class Pieces(dict[int, memoryview]):
        def pop(self, offset: int, *default: Any) -> Any:
            piece = super().pop(offset, *default)
            if piece is None:
                found_nothing.append(offset)
            return piece

    class Lock(threading.Condition):
        def __exit__(self, *exc_info: object) -> None:
            super().__exit__(*exc_info)  # type: ignore[arg-type]
            if found_nothing == [1 << 20]:
                found_nothing.append(0)
                writer.write_at(1 << 20, content[1 << 20 :])  # what another thread may do now

    with open_store(s3_server.url("stoker", uuid.uuid4().hex), **s3_server.storage_options) as store:
        with store.open_writer("object", len(content)) as writer:
            assert isinstance(writer, RemoteWriter)
            writer._waiting, writer._lock = Pieces(), Lock()
            writer.write_at(0, content[: 1 << 20])
            assert len(found_nothing) > 1
            writer.commit()
        assert bytes(store.get("object")) == content


def test_an_aborted_upload_leaves_no_parts_behind(s3_server: S3Server) -> None:
    bucket = f"uploads-{uuid.uuid4().hex[:8]}"
    with open_store(s3_server.create_bucket(bucket), **s3_server.storage_options) as store:
        for how in ("abort", "raise"):
            with pytest.raises(ZeroDivisionError), store.open_writer("object", 30 * MIB) as writer:
                for offset in range(0, 20 * MIB, 4 * MIB):
                    writer.write_at(offset, bytes(4 * MIB))
                if how == "abort":
                    writer.abort()
                raise ZeroDivisionError
            assert s3_server.unfinished_uploads(bucket) == 0
        assert list(store.list()) == []


def test_pieces_that_come_early_wait_by_reference(store: ObjectStore) -> None:
    late = bytearray(os.urandom(9 * MIB))
    with store.open_writer("object", 10 * MIB) as writer:
        writer.write_at(MIB, late)
        with pytest.raises(BufferError):
            late.append(0)  # the writer holds a view of our memory, no copy
        writer.write_at(0, bytes(MIB))
        writer.commit()
    assert store.get("object", MIB) == late


def test_requests_and_bytes_are_counted(store: ObjectStore) -> None:
    store.put("warm", b"1")
    before = counters.snapshot()
    store.put("object", b"0123456789")
    store.get("object", 2, 5)
    store.head("object")
    list(store.list())
    store.delete("object")
    assert counters.since(before) == {
        "store.put.requests": 1,
        "store.put.bytes": 10,
        "store.get.requests": 1,
        "store.get.bytes": 3,
        "store.head.requests": 1,
        "store.list.requests": 2,  # one page, and the end behind it
        "store.delete.requests": 1,
    }


def test_probing_for_exclusive_creation_happens_once_and_leaves_nothing(s3_server: S3Server) -> None:
    bucket = f"probe-{uuid.uuid4().hex[:8]}"
    with open_store(s3_server.create_bucket(bucket), **s3_server.storage_options) as store:
        assert isinstance(store, RemoteStore)
        store.create("one", b"1")
        before = counters.snapshot()
        store.create("two", b"2")
        assert counters.since(before)["store.put.requests"] == 1
        import obstore

        assert [meta["path"] for meta in obstore.list(store.client).collect()] == ["one", "two"]


# --- servers that break their word ----------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    """An HTTP server with one object, as right or as wrong as `mode` says."""

    mode = "right"
    body = b"0123456789" * 10

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        tag = {} if self.mode == "no tag" else {"ETag": 'W/"weak"' if self.mode == "weak tag" else '"tag"'}
        if not self.path.rstrip("/").endswith("object"):
            return self.answer(404)
        wanted = self.headers.get("Range", "").removeprefix("bytes=")
        if not wanted or self.mode == "ignores ranges":
            return self.answer(200, self.body, tag)
        first, _, last = wanted.partition("-")
        start, end = int(first), min(int(last or len(self.body)) + 1, len(self.body))
        if start >= len(self.body):
            return self.answer(416)
        if self.mode == "wrong range":
            start, end = start + 1, end + 1
        data = self.body[start:end]
        if self.mode == "short range":
            data = data[:-1]
        return self.answer(206, data, {**tag, "Content-Range": f"bytes {start}-{end - 1}/{len(self.body)}"})

    do_HEAD = do_GET

    def do_PUT(self) -> None:  # takes everything, also what it should refuse
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200, headers={"ETag": '"put"'})

    def do_POST(self) -> None:  # DeleteObjects
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200, b'<?xml version="1.0"?><DeleteResult></DeleteResult>')


@contextmanager
def serving(mode: str) -> Iterator[str]:
    handler = type("Handler", (Handler,), {"mode": mode})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("mode", ["right", "no tag", "weak tag"])
def test_plain_http_is_read_by_ranges_and_versions(mode: str) -> None:
    with serving(mode) as url, open_store(f"{url}/data") as store:
        info = store.head("object")
        assert info.size == 100
        assert bytes(store.get("object")) == Handler.body
        assert bytes(store.get("object", 7, 13, version=info.version)) == Handler.body[7:13]
        assert bytes(store.get("object", 90, version=info.version)) == Handler.body[90:]
        for start, end in ((95, 101), (100, 101), (101, None)):
            with pytest.raises(ObjectChanged):
                store.get("object", start, end)
        with pytest.raises(ObjectChanged):
            store.get("object", 1, 2, version="another")
        with pytest.raises(KeyNotFound):
            store.get("missing")


@pytest.mark.parametrize(
    ("mode", "error"),
    [
        ("ignores ranges", UnsupportedError),
        ("wrong range", ObjectChanged),
        ("short range", StoreUnavailable),
    ],
)
def test_a_server_that_sends_other_bytes_than_were_asked_for_is_not_believed(
    mode: str, error: type[StokerError], impatient: None
) -> None:
    with serving(mode) as url, open_store(f"{url}/data") as store:
        with pytest.raises(error) as caught:
            store.get("object", 10, 20)
        assert "object" in str(caught.value) and "\n" not in str(caught.value)
        with pytest.raises(error):
            store.get_into("object", memoryview(bytearray(10)), 10)


def test_plain_http_is_read_only_and_says_so() -> None:
    with serving("right") as url, open_store(url) as store:
        for call in (
            lambda: store.put("object", b"1"),
            lambda: store.create("object", b"1"),
            lambda: store.open_writer("object", 1),
            lambda: store.delete("object"),
            lambda: store.list(),
        ):
            with pytest.raises(UnsupportedError):
                call()


def test_an_endpoint_that_ignores_the_condition_of_create_is_refused_by_name() -> None:
    with serving("right") as url, open_store("s3://bucket/x", endpoint_url=url, key="k", secret="s") as store:
        for _ in range(2):
            with pytest.raises(UnsupportedError) as caught:
                store.create("log/0", b"1")
            assert "refuse to create an object twice" in str(caught.value) and "s3://bucket/x" in str(caught.value)
        store.put("log/0", b"1")  # what needs no promise goes on


# --- order of listings ----------------------------------------------------------------------------------------------

NAMES = st.text("a-.0_", min_size=1, max_size=3).filter(lambda name: name[0] in "a0_")
KEYS = st.lists(st.lists(NAMES, min_size=1, max_size=3).map("/".join), max_size=12, unique=True)


def in_folder_order(keys: list[str]) -> list[str]:
    """As servers list that keep folders: each folder where its name stands."""
    return sorted(keys, key=lambda key: key.split("/"))


@given(keys=KEYS, folder=NAMES)
@settings(max_examples=200, deadline=None)
def test_listings_in_either_order_come_out_in_lexical_order(keys: list[str], folder: str) -> None:
    for root in ("", f"{folder}/"):
        names = [root + key for key in keys]
        for order in (sorted(names), in_folder_order(names)):
            infos = (ObjectInfo(key=key, size=0, version="", modified_s=0) for key in order)
            assert [info.key for info in _listing.in_lexical_order(infos, len(root))] == sorted(names)


@given(keys=KEYS, text=st.lists(NAMES, min_size=1, max_size=3).map("/".join))
@settings(max_examples=300, deadline=None)
def test_an_offset_leaves_out_nothing_in_either_order(keys: list[str], text: str) -> None:
    offset = _listing.lowest_offset("", text)
    lexical = [key for key in keys if key > offset]
    by_folder = [key for key in keys if key.split("/") > offset.split("/")]
    for listed in (lexical, by_folder):
        assert {key for key in keys if key >= text} <= set(listed)
