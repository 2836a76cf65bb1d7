"""URLs and options of remote stores, in the names that fsspec users know, and the obstore clients made of them."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any, Literal
from urllib.parse import urlsplit

from ..errors import ConfigError, MissingExtra, UnsafeName
from .network import NetworkPolicy
from .store import redact_url

__all__ = ["ClientKind", "Config", "make_client", "obstore", "parse"]

ClientKind = Literal["read", "spare", "write", "bulk"]
"""``spare`` has connections of its own, for second requests. Only ``bulk`` retries by itself: the parts of uploads, which
no caller sees."""

_RETRIES: dict[str, Any] = {
    "max_retries": 10,
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2},
}
_LONGEST_REQUEST_S = 300.0
"""For a write that its caller has left: the end of the thread that waits for it."""
RANGE_BYTES = 8 * 2**20
"""The largest GET. AWS advises 8 to 16 MiB; of one size, so that a late one shows."""

_HTTP = ("http", "https")
_AZURE = ("az", "abfs", "abfss")


@dataclass(kw_only=True, slots=True, repr=False)
class Config:
    """What a client is made of. Never printed: it holds secrets."""

    native: dict[str, Any]
    endpoint_url: str | None = None
    headers: dict[str, str] | None = None


def parse(url: str, options: Mapping[str, Any]) -> tuple[str, str, str, Config]:
    """Scheme, bucket (host for HTTP), prefix and configuration; every mistake in them is found here."""
    place = redact_url(url)
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ConfigError("the URL must be well formed", value=place, place="open_store") from None
    scheme = parts.scheme.lower()
    if parts.query or parts.fragment:
        raise ConfigError("the URL of a store has no query and no fragment", value=place, place="open_store")
    user, _, host = parts.netloc.rpartition("@")
    if user and (":" in user or scheme not in _AZURE):
        raise ConfigError(
            "credentials do not belong in a URL", value=place, place="open_store", hint="pass key= and secret="
        )
    bucket = user or host
    if not bucket:
        raise ConfigError("the URL must name a bucket", value=place, place="open_store", hint=f"{scheme}://bucket/path")
    prefix = parts.path.strip("/")
    if any(part in ("", ".", "..") for part in prefix.split("/")) and prefix:
        raise UnsafeName("the path of a URL must have no empty, '.' or '..' part", value=prefix, place=place)
    given = {name: value for name, value in options.items() if value is not None}
    if scheme in ("s3", "s3a"):
        config = _s3(given, place)
    elif scheme in ("gs", "gcs"):
        config = _gcs(given, place)
    elif scheme in _AZURE:
        config = _azure(given, place, account=host.partition(".")[0] if user else None)
    else:
        config = Config(native={}, endpoint_url=f"{scheme}://{parts.netloc}", headers=given.pop("headers", None))
        _refuse_unknown(given, ("headers",), place)
    if config.endpoint_url is not None:
        _check_endpoint(config.endpoint_url, place)
    if not isinstance(config.headers, Mapping | None):
        raise ConfigError("headers must be a dict", value=type(config.headers).__name__, place=place)
    return scheme, bucket, prefix, config


def _check_endpoint(endpoint_url: object, place: str) -> None:
    if not isinstance(endpoint_url, str):
        raise ConfigError("endpoint_url must be text", value=type(endpoint_url).__name__, place=place)
    scheme, separator, rest = endpoint_url.rpartition("://")
    user, _, rest = rest.rpartition("@")
    shown = redact_url(f"{scheme}{separator}{rest.partition('?')[0]}")
    if scheme not in ("http", "https"):
        raise ConfigError("endpoint_url must begin with http:// or https://", value=shown, place=place)
    if user:
        hint = "pass key= and secret="
        raise ConfigError("credentials do not belong in endpoint_url", value=shown, place=place, hint=hint)


def _s3(given: dict[str, Any], place: str) -> Config:
    names = {
        "key": "access_key_id",
        "secret": "secret_access_key",
        "token": "session_token",
        "region": "region",
        "requester_pays": "request_payer",
        "anon": "skip_signature",
    }
    client_kwargs = given.pop("client_kwargs", {})
    if not isinstance(client_kwargs, Mapping):
        raise ConfigError("client_kwargs must be a dict", value=type(client_kwargs).__name__, place=place)
    _refuse_unknown(client_kwargs, ("endpoint_url", "region_name"), place, "client_kwargs option")
    endpoint_url = given.pop("endpoint_url", client_kwargs.get("endpoint_url"))
    if endpoint_url is None:
        variables = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
        endpoint_url = next((os.environ[name] for name in variables if os.environ.get(name)), None)
    if "region_name" in client_kwargs:
        given.setdefault("region", client_kwargs["region_name"])
    native = _rename(given, names, place, extra=("endpoint_url", "client_kwargs"))
    if ("access_key_id" in native) != ("secret_access_key" in native):
        raise ConfigError("key and secret must be given together", place=place)
    return Config(native=native, endpoint_url=endpoint_url)


def _gcs(given: dict[str, Any], place: str) -> Config:
    token, native = given.pop("token", None), {}
    endpoint_url = given.pop("endpoint_url", None)
    if token == "anon":
        given.setdefault("anon", True)
    elif isinstance(token, Mapping):
        native["service_account_key"] = json.dumps(dict(token))
    elif token is not None:
        native["application_credentials"] = os.fspath(token)
    native |= _rename(given, {"anon": "skip_signature"}, place, extra=("token", "endpoint_url"))
    return Config(native=native, endpoint_url=endpoint_url)


def _azure(given: dict[str, Any], place: str, *, account: str | None) -> Config:
    names = {name: name for name in ("account_name", "account_key", "tenant_id", "client_id", "client_secret")}
    names |= {"sas_token": "sas_key", "anon": "skip_signature"}
    endpoint_url = given.pop("endpoint_url", None)
    if account is not None:
        given.setdefault("account_name", account)
    native = _rename(given, names, place, extra=("endpoint_url",))
    return Config(native=native, endpoint_url=endpoint_url)


def _rename(
    given: Mapping[str, Any], names: Mapping[str, str], place: str, *, extra: tuple[str, ...]
) -> dict[str, Any]:
    _refuse_unknown(given, (*names, *extra), place)
    renamed: dict[str, Any] = {}
    for name, value in given.items():
        if name in ("anon", "requester_pays"):
            if (flag := _flag(name, value, place)) is True:
                renamed[names[name]] = flag
        elif not isinstance(value, str):
            raise ConfigError(f"{name} must be text", value=type(value).__name__, place=place)
        else:
            renamed[names[name]] = value
    return renamed


def _flag(name: str, value: object, place: str) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false", "1", "0"):
        return value.lower() in ("true", "1")
    raise ConfigError(f"{name} must be true or false", value=type(value).__name__, place=place)


def _refuse_unknown(given: Mapping[str, Any], known: tuple[str, ...], place: str, what: str = "option") -> None:
    for name in given:
        if name not in known:
            raise ConfigError(f"no such {what}", value=name, place=place, hint=f"there are {', '.join(sorted(known))}")


def make_client(
    scheme: str, place: str, bucket: str, prefix: str, config: Config, *, kind: ClientKind, policy: NetworkPolicy
) -> Any:
    # Also where the process was forked: constructing a client starts nothing.
    obstore()
    from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store

    client_options: dict[str, Any] = {"connect_timeout": timedelta(seconds=policy.connect_timeout_s)}
    longest_s = policy.attempt_timeout_s if kind == "bulk" else _LONGEST_REQUEST_S
    if kind in ("read", "spare"):
        # Counted from the start of a request, so it would cut long uploads.
        client_options["read_timeout"] = timedelta(seconds=policy.stall_timeout_s)
        longest_s = policy.request_timeout_s(RANGE_BYTES)
    client_options["timeout"] = timedelta(seconds=longest_s)
    endpoint_url = (config.endpoint_url or "").rstrip("/")
    if endpoint_url.startswith("http://"):
        client_options["allow_http"] = True
    if config.headers:
        client_options["default_headers"] = dict(config.headers)
    native: Any = dict(config.native)
    retries = {**_RETRIES, "retry_timeout": timedelta(seconds=policy.timeout_s)}
    if kind != "bulk":
        retries["max_retries"] = 0
    common: dict[str, Any] = {"client_options": client_options, "retry_config": retries}
    try:
        if scheme in _HTTP:
            return HTTPStore(f"{endpoint_url}/{prefix}", **common)
        if endpoint_url:
            native["base_url" if scheme in ("gs", "gcs") else "endpoint"] = endpoint_url
        store_class = S3Store if scheme in ("s3", "s3a") else GCSStore if scheme in ("gs", "gcs") else AzureStore
        return store_class(bucket, prefix=prefix or None, config=native, **common)
    except Exception as error:  # noqa: BLE001 - raised again, typed
        # Its text may quote the value that it does not like, which may be a secret: keep the first words only.
        reason = _first_line(error).partition(":")[2].strip() or "the client refused its configuration"
        raise ConfigError(
            _without(reason, [native[name] for name in native if name != "application_credentials"]),
            place=place,
            hint="pass account_name= or set AZURE_STORAGE_ACCOUNT_NAME" if "Account must" in reason else "",
        ) from None


def _without(text: str, secrets: Any) -> str:
    for secret in secrets:
        if isinstance(secret, str) and secret:
            text = text.replace(secret, "***")
    return text


@lru_cache(maxsize=1)
def obstore() -> Any:
    try:
        import obstore
    except ImportError as error:
        raise MissingExtra(
            "this URL needs the package obstore", place="open_store", hint="pip install obstore"
        ) from error
    return obstore


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
