"""What obstore raises as stoker's errors: one clear sentence each, never a secret, a body or a debug dump."""

import re

from ..errors import (
    AccessDenied,
    AlreadyExists,
    BadReply,
    BucketNotFound,
    ConfigError,
    KeyNotFound,
    ObjectChanged,
    StoreError,
    StoreFull,
    StoreUnavailable,
    Throttled,
    Unreachable,
    UnsafeName,
    UnsupportedError,
)

__all__ = ["RangeNotSatisfiable", "WrongRange", "typed_error"]


class RangeNotSatisfiable(StoreError):
    """416: the range begins at or behind the object's end."""


class WrongRange(ObjectChanged):
    """Other bytes than were asked for: of a replaced object, or a mistake on the way."""


_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
# Where a client without credentials asks last, on a machine of the cloud: EC2, ECS, GCE, Azure.
_METADATA_SERVICE = re.compile(
    r" https?://[^/]+/(latest/(api/token|meta-data)|v2/credentials|computeMetadata|metadata/)"
)
_NO_BUCKET = {"NoSuchBucket", "ContainerNotFound", "FilesystemNotFound", "InvalidBucketName"}
_FULL = {"QuotaExceeded", "QuotaExceededException", "XMinioStorageFull", "InsufficientStorage"}
_ACCESS_HINTS = {
    "SignatureDoesNotMatch": "the secret is wrong",
    "InvalidAccessKeyId": "the store does not know this key",
    "ExpiredToken": "the session token has expired: get a new one",
    "RequestTimeTooSkewed": "this machine's clock is wrong",
}
_UNREACHABLE = (
    ("dns error", "the endpoint's name does not resolve"),
    ("Connection refused", "nobody listens there"),
    ("InvalidContentType", "the endpoint does not speak TLS"),
    ("certificate", "the endpoint's certificate is not trusted"),
    ("BadScheme", "https only"),
)
_TIMED_OUT = ("TimedOut", "operation timed out")


def typed_error(error: Exception, place: str, root: str) -> Exception:
    """The one clear sentence for an exception of obstore. Nothing of its text is quoted but codes."""
    from obstore import exceptions

    text = str(error)
    head = text.partition("Debug source:")[0]
    status = int(match[1]) if (match := _STATUS.search(head)) else 0
    code = match[1] if (match := _CODE.search(head)) else ""
    answer = f"{code} ({status})" if code else f"status {status}"
    if _METADATA_SERVICE.search(head):
        return AccessDenied(
            "credentials must be given",
            place=root,
            hint="pass them as storage options or environment variables (~/.aws is not read), or pass anon=True",
        )
    if code in _NO_BUCKET:
        return BucketNotFound("no such bucket", place=root)
    if isinstance(error, exceptions.AlreadyExistsError):
        return AlreadyExists("must not exist yet", place=place)
    if isinstance(error, exceptions.PreconditionError):
        return ObjectChanged("must still be the version that was asked for", place=place)
    if isinstance(error, FileNotFoundError):
        return KeyNotFound("no such object", place=place)
    if isinstance(error, exceptions.NotSupportedError):
        return UnsupportedError("the server must answer requests for byte ranges", place=place)
    if isinstance(error, exceptions.InvalidPathError):
        return UnsafeName("the store must accept the name", place=place)
    if status == 416 or "StartTooLarge" in text:
        return RangeNotSatisfiable("range behind the end", place=place)
    if "UnexpectedRange" in text or "ParseContentRange" in text:
        return WrongRange("the store must send the bytes that were asked for, not others", place=place)
    if (
        status in (401, 403)
        or code in _ACCESS_HINTS
        or isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError)
    ):
        return AccessDenied("the store must accept the credentials", value=answer, place=place, hint=_access_hint(code))
    if status == 507 or code in _FULL:
        return StoreFull("needs more space than the store has left", value=answer, place=place)
    moved = status in (301, 307, 308) or "redirect without LOCATION" in head
    if moved or code == "AuthorizationHeaderMalformed":
        return ConfigError(
            "the bucket must be in the region that is asked",
            value="a redirect" if moved else answer,
            place=root,
            hint="region=",
        )
    if status == 404:
        return KeyNotFound("no such object", place=place)
    if status in (429, 503):
        return Throttled("the store must answer", value=answer, place=place)
    if status >= 500:
        return StoreUnavailable("the store must answer", value=answer, place=place)
    if status:
        return StoreError("the store must do what it is asked", value=answer, place=place)
    for mark, reason in _UNREACHABLE:
        if mark in text:
            return Unreachable("the store must answer", value=reason, place=place)
    if any(mark in text for mark in _TIMED_OUT):
        return StoreUnavailable("the store must answer", value="timed out", place=place)
    if "HTTP error" in head:
        return StoreUnavailable("the store must answer", value="the connection broke", place=place)
    return BadReply("the store must answer", value="an answer that makes no sense", place=place)


def _access_hint(code: str) -> str:
    return _ACCESS_HINTS.get(code, "check the key, its permissions and the region")
