"""What came back, as a fault of ours: botocore's errors, the server's codes, and answers that are not S3's at all.

A fault is named for what the daemon does next. As in store, botocore is imported by the first request.
"""

from __future__ import annotations

import http.client
import socket
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any

from spoold.errors import ObjectRefused, SpooldError, StoreDenied, StoreUnavailable, Unproven

_SOMETHING_ELSE = "something else than S3 answered: look for a proxy or a login page, and at s3.endpoint_url"
CREDENTIALS = "renew the credentials; they are read again at the next try"
_REGION = "the bucket is in another region: set s3.region"
_PROVIDER = "look at the account with the provider"
_CLOCK = "this machine's clock is wrong: let NTP set it"
_BUCKET = "create the bucket, or correct its name"
_UNKNOWN_WISH = "the server does not know one of the settings below object, or try s3.checksum: none"

_DENIED = {
    "AccessControlListNotSupported": "the bucket refuses ACLs (BucketOwnerEnforced): set object.acl: null",
    "AccountProblem": _PROVIDER,
    "AllAccessDisabled": _PROVIDER,
    "AuthorizationHeaderMalformed": _REGION,
    "ExpiredToken": CREDENTIALS,
    "IllegalLocationConstraintException": _REGION,
    "InvalidAccessKeyId": CREDENTIALS,
    "InvalidBucketName": _BUCKET,
    "InvalidSecurity": CREDENTIALS,
    "InvalidToken": CREDENTIALS,
    "MethodNotAllowed": _SOMETHING_ELSE,
    "NoSuchBucket": _BUCKET,
    "NotSignedUp": _PROVIDER,
    "PermanentRedirect": _REGION,
    "RequestExpired": _CLOCK,
    "RequestTimeTooSkewed": _CLOCK,
    "SignatureDoesNotMatch": "the secret key is wrong, or a proxy changes what is sent",
    "TokenRefreshRequired": CREDENTIALS,
}
_OF_ONE_KEY = {"AccessControlListNotSupported", "MethodNotAllowed", "SignatureDoesNotMatch"}
"""Of these, what can be true of one key: it has an ACL of its own, or a proxy in between changes how it is written."""
_PERMISSIONS = {
    "put": "s3:PutObject, and s3:PutObjectAcl or s3:PutObjectTagging where those are set",
    "head": "s3:GetObject, and s3:ListBucket, without which a missing key is denied",
    "get": "s3:GetObject",
    "delete": "s3:DeleteObject",
    "abort": "s3:AbortMultipartUpload",
    "list": "s3:ListBucket",
}
_DAMAGED = {
    "BadDigest",
    "IncompleteBody",
    "InvalidDigest",
    "InvalidPart",
    "NoSuchUpload",  # somebody aborted it under us: from the beginning, then
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
}
_REFUSED = {
    "EntityTooLarge": "more than the server takes in one request: lower upload.multipart_threshold",
    "InvalidRequest": _UNKNOWN_WISH,
    "InvalidStorageClass": "correct object.storage_class",
    "InvalidTag": "correct object.tags",
    "KeyTooLongError": "a key has at most 1024 bytes",
    "MetadataTooLarge": "object.metadata may have 2 KB",
    "NotImplemented": _UNKNOWN_WISH,
}
_OURS = ("Object", "MultipartUpload", "UploadPart", "ListObjectsV2")
"""How the names of our operations end; others are botocore's own, when it asks STS or SSO for credentials."""


def fault_of(what: str, error: Exception) -> SpooldError | None:
    """Return the fault of ours that `error` is; None if it is no fault of the store."""
    import urllib3.exceptions
    from botocore import exceptions
    from botocore.parsers import ResponseParserError

    unknown_name = (urllib3.exceptions.NameResolutionError, socket.gaierror)
    never_sent = (exceptions.EndpointConnectionError, exceptions.ConnectTimeoutError, exceptions.ProxyConnectionError)
    cause = getattr(error, "kwargs", {}).get("error")
    because = f"{what}: {type(error).__name__}" + (f" ({_last_words(cause)})" if cause else "")
    match error:
        case exceptions.ClientError():
            return _answered(what, error)
        case ResponseParserError():
            return Unproven(f"{what}: the answer is not XML as S3 writes it", hint=_SOMETHING_ELSE)
        case exceptions.EndpointConnectionError() if isinstance(cause, unknown_name):
            hint = "look at s3.endpoint_url and s3.region, and at this machine's DNS"
            return StoreDenied(because, hint=hint, is_everywhere=True)
        case exceptions.SSLError() if "CERTIFICATE_VERIFY_FAILED" in str(cause):
            hint = "make the server's CA known (AWS_CA_BUNDLE), or renew its certificate"
            return StoreDenied(because, hint=hint, is_everywhere=True)
        case exceptions.ParamValidationError():
            report = str(error.kwargs.get("report"))
            if "bucket name" in report.lower():
                return StoreDenied(f"{what}: {report}", hint=_BUCKET, is_everywhere=True)
            return ObjectRefused(f"{what}: {report}")
        case exceptions.ConnectionError() | exceptions.HTTPClientError() | exceptions.IncompleteReadError():
            is_unreachable = isinstance(error, never_sent)
            return StoreUnavailable(because, never_sent=is_unreachable, is_everywhere=is_unreachable)
        case urllib3.exceptions.HTTPError():
            return StoreUnavailable(because)
        case exceptions.BotoCoreError() | OSError() | ValueError():  # the rest is about credentials, as in `Store.connect`
            hint = "give boto3 credentials: environment, ~/.aws/credentials, s3.profile, or the machine's role"
            return StoreDenied(f"{what}: {safely_said(error)}", hint=hint)
    return None


def demand(what: str, answer: dict[str, Any], *fields: str) -> None:
    """Raise Unproven unless `answer` has what S3 never leaves away: botocore makes {} of a login page (FACTS 23)."""
    for field in fields:
        if not str(answer.get(field, "")).strip('"'):
            status = answer["ResponseMetadata"]["HTTPStatusCode"]
            raise Unproven(f"{what}: {status} without {field} proves nothing", hint=_SOMETHING_ELSE)


def answer_unless(codes: set[str], operation: Callable[..., dict[str, Any]], **parameters: Any) -> dict[str, Any] | None:
    """Return the operation's answer, or None if it is an error with one of these codes."""
    from botocore.exceptions import ClientError

    try:
        return operation(**parameters)
    except ClientError as error:
        if error.response["Error"].get("Code") in codes:
            return None
        raise


def safely_said(error: Exception) -> str:
    """Return the message of an error, or only its name if the output of a credential helper may be in it."""
    name = type(error).__name__
    return name if name in ("CredentialRetrievalError", "TokenRetrievalError") else f"{name}: {error}"


# Before botocore acts on an answer


def refuse_pages(response: Any, operation: Any, **_: object) -> None:
    """Raise ResponseParserError for a page in place of an answer; for botocore's event needs-retry."""
    # Of a login page with status 200 botocore makes {}, which is all that DELETE answers, or a 500 if it is no XML.
    # Only the raw answer still has its status. An object that is read may well be a page.
    method = operation.http["method"]
    if response is None or response[0].raw.status != 200 or method in ("GET", "HEAD"):
        return
    is_html = response[0].content and "html" in response[0].headers.get("content-type", "")
    if (is_html and method == "DELETE") or response[1].get("Error", {}).get("Code", "").isdigit():
        from botocore.parsers import ResponseParserError

        raise ResponseParserError("a page")


def stay_unless_told_where_to_go(request_dict: dict[str, Any], response: Any, **_: object) -> None:
    """Keep botocore from asking where the bucket is when it was sent elsewhere; for its event needs-retry."""
    # A redirect that names no region makes botocore ask HEAD for it, whose redirect makes it ask again, until the stack
    # is full: 82 requests for one PUT behind a login page (botocore 1.44.5, November 2026).
    if response is None:
        return
    is_told = "x-amz-bucket-region" in response[1]["ResponseMetadata"].get("HTTPHeaders", {})
    if not is_told and "Region" not in response[1].get("Error", {}):
        request_dict["context"].setdefault("s3_redirect", {})["redirected"] = True


# What an error says


def _answered(what: str, error: Any) -> SpooldError:
    """Return the fault that an answer of the server's is, by its code, else by its status."""
    metadata = error.response["ResponseMetadata"]
    status = int(metadata["HTTPStatusCode"])
    code = str(error.response["Error"].get("Code") or status)
    is_ours = error.operation_name.endswith(_OURS)  # else ours was never sent
    is_s3s = not code.isdigit()  # else there was no S3 error document: a HEAD, or not S3
    says = code if is_s3s else http.client.responses.get(status, "")
    because = f"{what}: {status} {says}" if is_ours else f"{what}: {error.operation_name}: {status} {says}"
    if code in _DAMAGED:
        return Unproven(because)
    if code in _DENIED:
        return StoreDenied(because, hint=_DENIED[code], is_everywhere=code not in _OF_ONE_KEY)
    if status in (401, 403) or code == "AccessDenied":  # without 403 after a 200, when an upload is completed
        needs = _PERMISSIONS.get(what.split(" ", 1)[0], "")
        return StoreDenied(because, hint=f"the credentials need {needs}" if is_ours else CREDENTIALS)
    is_busy = status in (307, 408, 409, 429) or (status >= 500 and status != 501)
    if is_busy or code == "RequestTimeout" or "Throttl" in code:  # both can come with 400
        retry_after_s = _retry_after_s(metadata.get("HTTPHeaders", {}))
        return StoreUnavailable(because, retry_after_s=retry_after_s, never_sent=not is_ours)
    if status in (301, 400) and what.startswith("head "):
        return StoreDenied(because, hint=f"HEAD gives no reason: {CREDENTIALS}; or {_REGION}")
    if code.startswith("KMS."):
        return StoreDenied(because, hint="look at the bucket's KMS key and who may use it")
    if not is_ours or status < 400 or status in (404, 405) or (not is_s3s and status != 413):
        return StoreDenied(because, hint=_SOMETHING_ELSE if is_ours else CREDENTIALS)
    message = str(error.response["Error"].get("Message", ""))[:200]
    return ObjectRefused(f"{because}: {message}" if message else because, hint=_REFUSED.get(code, ""))


def _retry_after_s(headers: dict[str, str]) -> float | None:
    """Return what the server asked for; a date counts from the answer's own, whatever our clock says."""
    value = headers.get("retry-after", "")
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - parsedate_to_datetime(headers["date"])).total_seconds())
    except (KeyError, TypeError, ValueError):
        return None


def _last_words(cause: BaseException) -> str:
    """Return the end of what urllib3 says of a fault, which is what the system said: "Connection refused"."""
    while inner := next((arg for arg in cause.args if isinstance(arg, BaseException)), None):
        cause = inner
    return str(cause).rpartition(": ")[2]
