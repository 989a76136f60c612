"""A small S3 that is strict: it verifies what S3 verifies, refuses what S3 refuses in S3's words, and keeps a list of it.

    python tests/strict_s3.py PORT ACCESS_KEY SECRET_KEY REGION [CERTIFICATE]

No server that pip can install verifies a checksum (FACTS 22). This one judges: what it took, S3 would have taken, as far as
the rules go that stand here, each with the page of the S3 API reference, or of the S3 user guide (UG), that it is from.
Objects live in memory. `/-/report` tells what it refused and how often it verified what; a PUT to `/-/settings` changes
`Settings` while it runs: its clock, who may ask, what buckets are set to; one to `/-/reset` makes it forget everything.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import itertools
import json
import re
import ssl
import sys
import threading
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, quote, unquote_to_bytes
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from awscrt import checksums

ALGORITHMS: dict[str, Callable[[bytes], bytes]] = {
    "crc32": lambda content: zlib.crc32(content).to_bytes(4, "big"),
    "crc32c": lambda content: checksums.crc32c(content).to_bytes(4, "big"),
    "crc64nvme": lambda content: checksums.crc64nvme(content).to_bytes(8, "big"),
    "sha1": lambda content: hashlib.sha1(content, usedforsecurity=False).digest(),
    "sha256": lambda content: hashlib.sha256(content).digest(),
}
TYPES = {"crc32": {"COMPOSITE", "FULL_OBJECT"}, "crc32c": {"COMPOSITE", "FULL_OBJECT"}, "crc64nvme": {"FULL_OBJECT"}}
"""UG, Checking object integrity: a SHA of an object in parts can be composite only."""
ACLS = {
    "private", "public-read", "public-read-write", "authenticated-read", "aws-exec-read", "bucket-owner-read",
    "bucket-owner-full-control",
}  # fmt: skip
STORAGE_CLASSES = {
    "STANDARD", "REDUCED_REDUNDANCY", "STANDARD_IA", "ONEZONE_IA", "INTELLIGENT_TIERING", "GLACIER", "DEEP_ARCHIVE",
    "GLACIER_IR", "EXPRESS_ONEZONE",
}  # fmt: skip
ECHOED = {"cache-control", "content-disposition", "content-encoding", "content-language", "expires", "x-amz-storage-class"}
STATUS = {
    "AccessDenied": 403, "BucketNotEmpty": 409, "ConditionalRequestConflict": 409, "InternalError": 500,
    "InvalidAccessKeyId": 403, "MissingContentLength": 411, "NoSuchBucket": 404, "NoSuchKey": 404, "NoSuchUpload": 404,
    "NoSuchVersion": 404, "NotImplemented": 501, "PreconditionFailed": 412, "RequestTimeTooSkewed": 403,
    "SignatureDoesNotMatch": 403,
}  # fmt: skip
"""Error responses: the codes that come with another status than 400."""
ASKED_IN_VAIN = {"NoSuchKey", "NoSuchVersion", "PreconditionFailed", "ConditionalRequestConflict"}
"""Answers about what there is. Whoever gets one has sent nothing that is wrong."""
LEAST_PART_BYTES = 5 << 20
SKEW_S = 15 * 60


class Refused(Exception):
    """What S3 would not do: its code, and its message."""

    def __init__(self, code: str, message: str = "") -> None:
        super().__init__(f"{code}: {message}" if message else code)
        self.code, self.message = code, message


@dataclass
class Settings:
    """What a test may change while the server runs, by a PUT of JSON.

    keys: access key → {"secret": …, "token": None or the session's, "expires_at": None or epoch seconds}. acls: the bucket
    takes ACLs, as none does that was made since April 2023. kms: it encrypts by KMS, so that ETags are no MD5s.
    vanished: buckets that are not there for now.
    """

    region: str
    keys: dict[str, dict[str, Any]]
    clock_offset_s: float = 0.0
    acls: bool = False
    kms: bool = False
    versioning: bool = False
    vanished: list[str] = field(default_factory=list)

    def now(self) -> float:
        return time.time() + self.clock_offset_s


@dataclass
class Request:
    """One request; its body as it is after aws-chunked was undone. moment: counts up, taken before the body is read."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    moment: int

    @property
    def place(self) -> tuple[str, str]:
        """Bucket and key."""
        try:
            bucket, _, key = unquote_to_bytes(self.path).decode().lstrip("/").partition("/")
        except UnicodeDecodeError:
            raise Refused("InvalidURI", "Couldn't parse the specified URI.") from None
        return bucket, key


@dataclass
class Answer:
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass
class Object:
    """checksum: the headers that tell it, type included. kept: the headers it was put with."""

    body: bytes
    etag: str
    checksum: dict[str, str]
    kept: dict[str, str]
    version: str | None = None
    modified: float = 0.0


@dataclass
class Upload:
    key: str
    kept: dict[str, str]
    algorithm: str | None
    type: str
    parts: dict[int, tuple[bytes, str]] = field(default_factory=dict)


@dataclass
class Bucket:
    """objects: key → versions, the newest last; None is a delete marker."""

    objects: dict[str, list[Object | None]] = field(default_factory=dict)
    uploads: dict[str, Upload] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)


# Who asks, and did it arrive as it was sent?


def authenticate(request: Request, settings: Settings) -> None:
    """Signature Version 4 in the header. Source: Authenticating Requests: Using the Authorization Header; Error responses."""
    scope = r"([^/]+)/(\d{8})/([^/]+)/s3/aws4_request"
    pattern = rf"AWS4-HMAC-SHA256 +Credential={scope}, *SignedHeaders=([^,]+), *Signature=([0-9a-f]{{64}})"
    if "authorization" not in request.headers:
        raise Refused("AccessDenied", "nobody is let in without a name here")
    if not (found := re.fullmatch(pattern, request.headers["authorization"])):
        raise Refused("AuthorizationHeaderMalformed", "the authorization header is malformed")
    access_key, day, region, names, signature = found.groups()
    if region != settings.region:
        raise Refused("AuthorizationHeaderMalformed", f"the region '{region}' is wrong; expecting '{settings.region}'")
    try:
        moment = request.headers.get("x-amz-date", "")
        asked_at = datetime.strptime(moment, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()
    except ValueError:
        raise Refused("AccessDenied", "a valid x-amz-date is required") from None
    if abs(asked_at - settings.now()) > SKEW_S:
        raise Refused("RequestTimeTooSkewed", "the difference between the request time and the current time is too large")
    key = settings.keys.get(access_key)
    token = request.headers.get("x-amz-security-token")
    if key is None or (key.get("token") and not token):
        raise Refused("InvalidAccessKeyId", "the access key does not exist in our records")
    if key.get("token") != token:
        raise Refused("InvalidToken", "the provided token is malformed or otherwise invalid")
    if key.get("expires_at") is not None and settings.now() >= key["expires_at"]:
        raise Refused("ExpiredToken", "the provided token has expired")
    unsigned = {name for name in request.headers if name == "host" or name.startswith("x-amz-")} - set(names.split(";"))
    if unsigned:
        raise Refused("AccessDenied", f"there were headers present in the request which were not signed: {sorted(unsigned)}")
    if "x-amz-content-sha256" not in request.headers:
        raise Refused("InvalidRequest", "missing required header for this request: x-amz-content-sha256")
    canonical = "\n".join([
        request.method,
        quote(unquote_to_bytes(request.path), safe="/-_.~"),
        "&".join(sorted(f"{quote(name, safe='-_.~')}={quote(value, safe='-_.~')}" for name, value in request.query.items())),
        *(f"{name}:{' '.join(request.headers.get(name, '').split())}" for name in names.split(";")),
        "",
        names,
        request.headers["x-amz-content-sha256"],
    ])  # fmt: skip
    scope = f"{day}/{region}/s3/aws4_request"
    to_sign = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    secret = f"AWS4{key['secret']}".encode()
    for part in (*scope.split("/"), to_sign):
        secret = hmac.digest(secret, part.encode(), "sha256")
    if not moment.startswith(day) or secret.hex() != signature:
        raise Refused("SignatureDoesNotMatch", "the request signature we calculated does not match")


def unchunked(request: Request) -> None:
    """Undo aws-chunked, and make its trailers headers.

    Source: Signature calculations: Including trailing headers (chunked upload). Unsigned only: what botocore sends over TLS.
    """
    if "aws-chunked" not in request.headers.get("content-encoding", ""):
        raise Refused("InvalidArgument", "a streaming payload must be aws-chunked")
    content, rest = b"", request.body
    with suppress(ValueError):
        while size := int(rest.partition(b"\r\n")[0].partition(b";")[0], 16):
            rest = rest.partition(b"\r\n")[2]
            content, rest = content + rest[:size], rest[size:].removeprefix(b"\r\n")
    if str(len(content)) != request.headers.get("x-amz-decoded-content-length"):
        raise Refused("IncompleteBody", "x-amz-decoded-content-length tells another length")
    trailers = dict(line.split(":", 1) for line in rest.decode().split("\r\n")[1:] if line)
    if set(trailers) != set(filter(None, request.headers.get("x-amz-trailer", "").split(","))):
        raise Refused("MalformedTrailerError", "the trailers are not those that x-amz-trailer names")
    request.headers |= {name: value.strip() for name, value in trailers.items()}
    request.body = content


def verify_payload(request: Request) -> str:
    """Source: Error responses; PutObject, x-amz-content-sha256. Returns by what it was verified."""
    told = request.headers["x-amz-content-sha256"]
    if told == "STREAMING-UNSIGNED-PAYLOAD-TRAILER":
        unchunked(request)
    elif told.startswith("STREAMING-"):
        raise Refused("NotImplemented", f"{told} is not known here")
    elif told != "UNSIGNED-PAYLOAD":
        if not re.fullmatch("[0-9a-f]{64}", told):
            raise Refused("InvalidArgument", "x-amz-content-sha256 must be UNSIGNED-PAYLOAD or a valid sha256 value")
        if told != hashlib.sha256(request.body).hexdigest():
            raise Refused("XAmzContentSHA256Mismatch", "the provided header does not match what was computed")
        return "payload"
    return "nothing"


def decoded(value: str, size: int, code: str, name: str) -> bytes:
    with suppress(binascii.Error, ValueError):
        if len(raw := base64.b64decode(value, validate=True)) == size:
            return raw
    raise Refused(code, f"value for {name} header is invalid")


def verify_md5(request: Request) -> bool:
    """Source: PutObject, Content-MD5; Error responses, BadDigest and InvalidDigest."""
    if "content-md5" not in request.headers:
        return False
    told = decoded(request.headers["content-md5"], 16, "InvalidDigest", "Content-MD5")
    if told != hashlib.md5(request.body, usedforsecurity=False).digest():
        raise Refused("BadDigest", "the Content-MD5 you specified did not match what we received")
    return True


def told_checksum(request: Request) -> tuple[str, str] | None:
    """Return the algorithm and the value of the one checksum that a request may have. Source: UG, Checking object integrity."""
    told = {name: value for name in ALGORITHMS if (value := request.headers.get(f"x-amz-checksum-{name}")) is not None}
    if len(told) > 1:
        raise Refused("InvalidRequest", "expecting a single x-amz-checksum- header; multiple checksum types are not allowed")
    named = request.headers.get("x-amz-sdk-checksum-algorithm", "").lower()
    if named and named not in told:
        raise Refused("InvalidRequest", "x-amz-sdk-checksum-algorithm specified, but no corresponding x-amz-checksum-* header")
    return next(iter(told.items()), None)


def verify_checksum(request: Request, content: bytes) -> tuple[str, str] | None:
    """Compare `content` with the checksum that the request has, and return it."""
    told = told_checksum(request)
    if told is not None:
        algorithm, value = told
        raw = ALGORITHMS[algorithm](content)
        if decoded(value, len(raw), "InvalidRequest", f"x-amz-checksum-{algorithm}") != raw:
            raise Refused("BadDigest", f"the {algorithm.upper()} you specified did not match the calculated checksum")
    return told


# What may be put


def verify_object(key: str, headers: dict[str, str], settings: Settings) -> None:
    """Source: UG, Creating object key names; PutObject; UG, Object metadata; UG, Controlling object ownership."""
    if len(key.encode()) > 1024:
        raise Refused("KeyTooLongError", "your key is too long")
    acl = headers.get("x-amz-acl")
    if acl is not None and acl not in ACLS:
        raise Refused("InvalidArgument", f"no canned ACL: {acl}")
    if acl not in (None, "bucket-owner-full-control") and not settings.acls:
        raise Refused("AccessControlListNotSupported", "the bucket does not allow ACLs")
    if headers.get("x-amz-storage-class", "STANDARD") not in STORAGE_CLASSES:
        raise Refused("InvalidStorageClass", "the storage class you specified is not valid")
    if headers.get("x-amz-server-side-encryption", "AES256") not in ("AES256", "aws:kms", "aws:kms:dsse"):
        raise Refused("InvalidEncryptionAlgorithmError", "the encryption request you specified is not valid")
    metadata = [(name.removeprefix("x-amz-meta-"), value) for name, value in headers.items() if name.startswith("x-amz-meta-")]
    if sum(len(name.encode()) + len(value.encode()) for name, value in metadata) > 2048:
        raise Refused("MetadataTooLarge", "your metadata headers exceed the maximum allowed metadata size")
    verify_tags(headers.get("x-amz-tagging", ""))


def verify_tags(tagging: str) -> None:
    """Source: UG, Categorizing your objects using tags: ten at most, names of 128 characters, values of 256, each name once."""
    try:
        tags = parse_qsl(tagging, keep_blank_values=True, strict_parsing=bool(tagging), errors="strict")
    except ValueError:
        raise Refused("InvalidArgument", "the header 'x-amz-tagging' shall be encoded as UTF-8 then URLEncoded") from None
    if len(tags) > 10:
        raise Refused("BadRequest", "object tags cannot be greater than 10")
    for name, value in tags:
        if not (1 <= len(name) <= 128 and len(value) <= 256) or not re.fullmatch(r"[\w\s+\-=.:/@]*", name + value):
            raise Refused("InvalidTag", "the tag you have provided is invalid")
    if len(dict(tags)) < len(tags):
        raise Refused("InvalidTag", "cannot provide multiple tags with the same key")


def etag_of(content: bytes, kms: bool) -> str:
    """Source: Object, ETag: the MD5, but where KMS encrypts."""
    return uuid.uuid4().hex if kms else hashlib.md5(content, usedforsecurity=False).hexdigest()


def base64_of(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def xml(name: str, *children: tuple[str, object]) -> bytes:
    """Return a document; a child whose value is a list of pairs has children of its own."""

    def written(pairs: tuple[tuple[str, object], ...] | list[tuple[str, object]]) -> str:
        return "".join(f"<{tag}>{written(v) if isinstance(v, list) else escape(str(v))}</{tag}>" for tag, v in pairs)

    space = "" if name == "Error" else ' xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<{name}{space}>{written(children)}</{name}>'.encode()


class S3:
    """The buckets, and the verbs: each takes bucket, key and the request, verified, and returns the answer."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.initially = settings, replace(settings)
        self.buckets: dict[str, Bucket] = {}
        self.refused: list[dict[str, str]] = []
        self.verified: Counter[str] = Counter()
        self.moments = itertools.count(1)
        self.lock = threading.Lock()

    def report(self) -> dict[str, Any]:
        kept = {
            f"{name}/{key}": versions[-1].kept
            for name, bucket in self.buckets.items() for key, versions in bucket.objects.items() if versions[-1] is not None
        }  # fmt: skip
        return {"refused": self.refused, "verified": dict(self.verified), "kept": kept}

    def answer(self, request: Request) -> Answer:
        """Verify a request and carry it out. Raises Refused."""
        authenticate(request, self.settings)
        verified = [verify_payload(request)]
        bucket, key = request.place
        completes = request.method == "POST" and "uploadId" in request.query  # its checksum is the object's
        if verify_md5(request):
            verified.append("md5")
        if not completes and (told := verify_checksum(request, request.body)):
            verified.append(told[0])
        verb = self._verb(request, bucket, key)
        with self.lock:
            self.verified.update(["signature", *verified])
            is_there = bucket in self.buckets or verb in (self.create, self.list_buckets)
            if not is_there or bucket in self.settings.vanished:
                raise Refused("NoSuchBucket", f"the specified bucket does not exist: {bucket}")
            return verb(bucket, key, request)

    def _verb(self, request: Request, bucket: str, key: str) -> Callable[[str, str, Request], Answer]:
        of_object = {
            ("PUT",): self.put, ("GET",): self.get, ("HEAD",): self.get, ("DELETE",): self.delete,
            ("POST", "uploads"): self.begin, ("PUT", "partNumber", "uploadId"): self.put_part,
            ("POST", "uploadId"): self.complete, ("DELETE", "uploadId"): self.abort,
            ("GET", "versionId"): self.get, ("HEAD", "versionId"): self.get,
        }  # fmt: skip
        of_bucket = {
            ("PUT",): self.create, ("HEAD",): self.head_bucket, ("DELETE",): self.delete_bucket,
            ("GET", "uploads"): self.uploads, ("GET", "list-type"): self.list_objects,
        }  # fmt: skip
        of_all = {("GET",): self.list_buckets}
        known: dict[Any, Callable[[str, str, Request], Answer]] = of_object if key else of_bucket if bucket else of_all
        paging = {"prefix", "max-keys", "continuation-token", "start-after", "encoding-type", "fetch-owner"}
        verb = known.get((request.method, *sorted(set(request.query) - (set() if key else paging))))
        if verb is None or "range" in request.headers:
            raise Refused("NotImplemented", f"{request.method} of this is not known here")
        return verb

    # Buckets

    def create(self, bucket: str, _: str, __: Request) -> Answer:
        """Source: UG, Bucket naming rules."""
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket) or ".." in bucket:
            raise Refused("InvalidBucketName", "the specified bucket is not valid")
        self.buckets.setdefault(bucket, Bucket())
        return Answer(headers={"Location": f"/{bucket}"})

    def head_bucket(self, *_: object) -> Answer:
        return Answer(headers={"x-amz-bucket-region": self.settings.region})

    def delete_bucket(self, bucket: str, _: str, __: Request) -> Answer:
        if any(versions[-1] for versions in self.buckets[bucket].objects.values()):
            raise Refused("BucketNotEmpty", "the bucket you tried to delete is not empty")
        del self.buckets[bucket]
        return Answer(204)

    def list_buckets(self, *_: object) -> Answer:
        return Answer(body=xml("ListAllMyBucketsResult", ("Buckets", [("Bucket", [("Name", name)]) for name in self.buckets])))

    def list_objects(self, bucket: str, _: str, request: Request) -> Answer:
        """Source: ListObjectsV2: in the order of UTF-8, at most 1,000 at a time."""
        query = request.query
        last = query.get("start-after", "")
        if "continuation-token" in query:
            try:
                last = base64.b64decode(query["continuation-token"], validate=True).decode()
            except ValueError:
                raise Refused("InvalidArgument", "the continuation token provided is incorrect") from None
        all_ = {key: versions[-1] for key, versions in self.buckets[bucket].objects.items()}
        after = {key: there for key, there in all_.items() if there and key.startswith(query.get("prefix", "")) and key > last}
        page = sorted(after, key=str.encode)[: min(1000, int(query.get("max-keys", 1000)))]
        is_quoted = query.get("encoding-type") == "url"
        contents = [("Contents", [("Key", quote(key) if is_quoted else key), ("Size", len(after[key].body))]) for key in page]
        is_cut = len(page) < len(after)
        told = [("IsTruncated", str(is_cut).lower()), ("KeyCount", len(page))]
        told += [("NextContinuationToken", base64_of(page[-1].encode()))] if is_cut and page else []
        told += [("EncodingType", "url")] if is_quoted else []
        return Answer(body=xml("ListBucketResult", *told, *contents))

    def uploads(self, bucket: str, _: str, __: Request) -> Answer:
        found = [("Upload", [("Key", upload.key), ("UploadId", name)]) for name, upload in self.buckets[bucket].uploads.items()]
        return Answer(body=xml("ListMultipartUploadsResult", ("Bucket", bucket), ("IsTruncated", "false"), *found))

    # Objects

    def put(self, bucket: str, key: str, request: Request) -> Answer:
        """Source: PutObject. Without a checksum S3 adds a CRC64NVME of its own."""
        verify_object(key, request.headers, self.settings)
        told = told_checksum(request) or ("crc64nvme", base64_of(ALGORITHMS["crc64nvme"](request.body)))
        checksum = {f"x-amz-checksum-{told[0]}": told[1], "x-amz-checksum-type": "FULL_OBJECT"}
        etag = etag_of(request.body, self._is_kms(request.headers))
        made = self._keep(bucket, key, request, Object(request.body, etag, checksum, request.headers))
        return Answer(headers={"ETag": f'"{made.etag}"', **made.checksum, **self._confirmed(made)})

    def get(self, bucket: str, key: str, request: Request) -> Answer:
        """Source: GetObject, HeadObject: checksums are told only where they are asked for."""
        versions = self.buckets[bucket].objects.get(key, [])
        if wanted := request.query.get("versionId"):
            versions = [there for there in versions if there and there.version == wanted]
        if not versions or (found := versions[-1]) is None:
            raise Refused("NoSuchVersion" if wanted else "NoSuchKey", "the specified key does not exist")
        headers = {"Content-Type": found.kept.get("content-type", "binary/octet-stream"), "ETag": f'"{found.etag}"'}
        headers |= {name: v for name, v in found.kept.items() if name in ECHOED or name.startswith("x-amz-meta-")}
        headers |= {"Last-Modified": formatdate(found.modified, usegmt=True)}
        if tags := parse_qsl(found.kept.get("x-amz-tagging", ""), keep_blank_values=True):
            headers["x-amz-tagging-count"] = str(len(tags))
        asked = request.headers.get("x-amz-checksum-mode", "").upper() == "ENABLED"
        return Answer(200, headers | self._confirmed(found) | (found.checksum if asked else {}), found.body)

    def delete(self, bucket: str, key: str, request: Request) -> Answer:
        """Source: DeleteObject: 204 whether it was there or not; a version stays under its delete marker."""
        here = self.buckets[bucket]
        here.changed[key] = next(self.moments)
        if self.settings.versioning:
            here.objects.setdefault(key, []).append(None)
            return Answer(204, {"x-amz-delete-marker": "true", "x-amz-version-id": uuid.uuid4().hex})
        here.objects.pop(key, None)
        return Answer(204)

    def _keep(self, bucket: str, key: str, request: Request, made: Object) -> Object:
        """Make an object live, if its conditions hold. Source: UG, Conditional writes."""
        here = self.buckets[bucket]
        versions = here.objects.get(key, [])
        there = versions[-1] if versions else None
        wanted, unwanted = request.headers.get("if-match"), request.headers.get("if-none-match")
        if unwanted not in (None, "*"):
            raise Refused("NotImplemented", "If-None-Match knows * only")
        if (wanted or unwanted) and here.changed.get(key, 0) > request.moment:
            raise Refused("ConditionalRequestConflict", "a conflicting operation occurred during the upload")
        if wanted and there is None:
            raise Refused("NoSuchKey", "there is nothing that could match")
        if (unwanted and there is not None) or (wanted and there is not None and wanted.strip('"') != there.etag):
            raise Refused("PreconditionFailed", "at least one of the pre-conditions you specified did not hold")
        made.modified = self.settings.now()
        made.version = uuid.uuid4().hex if self.settings.versioning else None
        here.objects[key] = [*versions, made] if self.settings.versioning else [made]
        here.changed[key] = next(self.moments)
        return made

    def _is_kms(self, headers: dict[str, str]) -> bool:
        return headers.get("x-amz-server-side-encryption", "aws:kms" if self.settings.kms else "").startswith("aws:kms")

    def _confirmed(self, made: Object) -> dict[str, str]:
        encryption = made.kept.get("x-amz-server-side-encryption", "aws:kms" if self.settings.kms else "AES256")
        version = {"x-amz-version-id": made.version} if made.version else {}
        return {"x-amz-server-side-encryption": encryption, **version}

    # Parts

    def begin(self, bucket: str, key: str, request: Request) -> Answer:
        """Source: CreateMultipartUpload; UG, Checking object integrity: what is not said is composite, or CRC64NVME."""
        verify_object(key, request.headers, self.settings)
        algorithm = request.headers.get("x-amz-checksum-algorithm", "").lower() or None
        if algorithm is not None and algorithm not in ALGORITHMS:
            raise Refused("InvalidRequest", "checksum algorithm provided is unsupported")
        types = TYPES.get(algorithm or "crc64nvme", {"COMPOSITE"})
        kind = request.headers.get("x-amz-checksum-type", min(types))
        if kind not in types or (algorithm is None and "x-amz-checksum-type" in request.headers):
            raise Refused("InvalidRequest", f"the {kind} checksum type cannot be used with the {algorithm} checksum algorithm")
        name = uuid.uuid4().hex
        self.buckets[bucket].uploads[name] = Upload(key, request.headers, algorithm, kind)
        chosen = {"x-amz-checksum-algorithm": algorithm.upper(), "x-amz-checksum-type": kind} if algorithm else {}
        return Answer(200, chosen, xml("InitiateMultipartUploadResult", ("Bucket", bucket), ("Key", key), ("UploadId", name)))

    def _upload(self, bucket: str, key: str, request: Request) -> Upload:
        upload = self.buckets[bucket].uploads.get(request.query["uploadId"])
        if upload is None or upload.key != key:
            raise Refused("NoSuchUpload", "the specified upload does not exist; it may have been aborted or completed")
        return upload

    def put_part(self, bucket: str, key: str, request: Request) -> Answer:
        """Source: UploadPart: the checksum is of the upload's algorithm."""
        upload = self._upload(bucket, key, request)
        if not re.fullmatch("[0-9]{1,5}", number := request.query["partNumber"]) or not 1 <= int(number) <= 10_000:
            raise Refused("InvalidArgument", "part number must be an integer between 1 and 10000, inclusive")
        told = told_checksum(request)
        if (told[0] if told else None) != upload.algorithm:
            raise Refused("InvalidRequest", f"checksum type mismatch occurred, expected {upload.algorithm}, actual {told}")
        etag = etag_of(request.body, self._is_kms(upload.kept))
        upload.parts[int(number)] = request.body, etag
        return Answer(headers={"ETag": f'"{etag}"', **({f"x-amz-checksum-{told[0]}": told[1]} if told else {})})

    def complete(self, bucket: str, key: str, request: Request) -> Answer:
        """Source: CompleteMultipartUpload; UG, Checking object integrity: the composite one is of the parts' own, with -N."""
        upload = self._upload(bucket, key, request)
        parts = self._listed(upload, request.body)
        body = b"".join(part for part, _ in parts)
        algorithm = upload.algorithm or "crc64nvme"
        if request.headers.get("x-amz-checksum-type", upload.type) != upload.type:
            raise Refused("InvalidRequest", f"the upload was created using the {upload.type} checksum mode")
        if request.headers.get("x-amz-mp-object-size", str(len(body))) != str(len(body)):
            raise Refused("InvalidRequest", "the provided 'x-amz-mp-object-size' header does not match what was computed")
        if upload.type == "FULL_OBJECT":
            if (told := verify_checksum(request, body)) is not None and told[0] != algorithm:
                raise Refused("InvalidRequest", f"the upload was created using a {algorithm} checksum")
            self.verified.update([f"whole {algorithm}"] if told else [])
            value = base64_of(ALGORITHMS[algorithm](body))
        else:
            own = b"".join(ALGORITHMS[algorithm](part) for part, _ in parts)
            value = f"{base64_of(ALGORITHMS[algorithm](own))}-{len(parts)}"
        checksum = {f"x-amz-checksum-{algorithm}": value, "x-amz-checksum-type": upload.type}
        etag = f"{etag_of(b''.join(bytes.fromhex(etag) for _, etag in parts), self._is_kms(upload.kept))}-{len(parts)}"
        made = self._keep(bucket, key, request, Object(body, etag, checksum, upload.kept))
        del self.buckets[bucket].uploads[request.query["uploadId"]]
        told_in_xml = [(f"Checksum{algorithm.upper()}", value), ("ChecksumType", upload.type)]
        names = [("Location", f"/{bucket}/{key}"), ("Bucket", bucket), ("Key", key), ("ETag", f'"{etag}"')]
        return Answer(200, self._confirmed(made), xml("CompleteMultipartUploadResult", *names, *told_in_xml))

    def _listed(self, upload: Upload, document: bytes) -> list[tuple[bytes, str]]:
        """Return the parts that a completion lists, as they were put."""
        try:
            listed = [
                {child.tag.rpartition("}")[2]: (child.text or "").strip() for child in part}
                for part in ElementTree.fromstring(document)
            ]
            numbers = [int(part["PartNumber"]) for part in listed]
        except (ElementTree.ParseError, KeyError, ValueError):
            listed, numbers = [], []
        if not listed:
            raise Refused("MalformedXML", "the XML you provided was not well-formed or did not validate")
        if numbers != sorted(set(numbers)):
            raise Refused("InvalidPartOrder", "the list of parts was not in ascending order")
        for number, part in zip(numbers, listed, strict=True):
            told = {name: value for name, value in part.items() if name.startswith("Checksum")}
            mine = f"Checksum{str(upload.algorithm).upper()}"
            content, etag = upload.parts.get(number, (b"", ""))
            if not etag or part.get("ETag", "").strip('"') != etag:
                raise Refused("InvalidPart", f"part {number} could not be found, or its entity tag does not match")
            if upload.algorithm and upload.type == "COMPOSITE" and mine not in told:
                raise Refused("InvalidRequest", f"the complete request must include the checksum of part {number}")
            if told and told != {mine: base64_of(ALGORITHMS[upload.algorithm or "crc32"](content))}:
                raise Refused("InvalidPart", f"part {number}: its checksum does not match")
            if number != numbers[-1] and len(content) < LEAST_PART_BYTES:
                raise Refused("EntityTooSmall", "your proposed upload is smaller than the minimum allowed size")
        return [upload.parts[number] for number in numbers]

    def abort(self, bucket: str, key: str, request: Request) -> Answer:
        self._upload(bucket, key, request)
        del self.buckets[bucket].uploads[request.query["uploadId"]]
        return Answer(204)


# The server


class Handler(BaseHTTPRequestHandler):
    """One client's connection, kept alive."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    s3: S3

    def handle_one(self) -> None:
        s3, moment = self.s3, next(self.s3.moments)
        path, _, query = self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, path, dict(parse_qsl(query, keep_blank_values=True)), headers, b"", moment)
        try:
            try:
                request.body = self._body(headers)
                answer = self._own(request) if path.startswith("/-/") else s3.answer(request)
            except (LookupError, TypeError, ValueError, AssertionError) as bug:
                raise Refused("InternalError", f"a bug of the double: {bug!r}") from bug
        except Refused as why:
            if why.code not in ASKED_IN_VAIN:
                s3.refused.append({"method": self.command, "path": self.path, "code": why.code, "message": why.message})
            document = xml("Error", ("Code", why.code), ("Message", why.message), ("Resource", path))
            answer = Answer(STATUS.get(why.code, 400), {"Content-Type": "application/xml"}, document)
        self.send_response_only(answer.status)
        length = {} if answer.status == 204 else {"Content-Length": str(len(answer.body))}
        common = {"Server": "strict", "Date": formatdate(s3.settings.now(), usegmt=True), "x-amz-request-id": f"{moment:016X}"}
        for name, value in (common | answer.headers | length).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else answer.body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_one

    def _body(self, headers: dict[str, str]) -> bytes:
        """Source: Error responses: S3 takes no body without a Content-Length, unless it is aws-chunked and told that way."""
        if "transfer-encoding" in headers and "x-amz-decoded-content-length" in headers:
            return b"".join(iter(self._chunk, b""))
        if "transfer-encoding" in headers:
            self.close_connection = True
            raise Refused("NotImplemented", "a header you provided implies functionality that is not implemented")
        if self.command == "PUT" and "content-length" not in headers:
            raise Refused("MissingContentLength", "you must provide the Content-Length HTTP header")
        body = self.rfile.read(size := int(headers.get("content-length", 0)))
        if len(body) < size:
            self.close_connection = True
            raise Refused("IncompleteBody", f"{len(body)} bytes came of {size}")
        return body

    def _chunk(self) -> bytes:
        chunk = self.rfile.read(int(self.rfile.readline().partition(b";")[0], 16))
        self.rfile.readline()
        return chunk

    def _own(self, request: Request) -> Answer:
        if request.path == "/-/reset":
            Handler.s3 = self.s3 = S3(self.s3.initially)
        if request.path == "/-/settings":
            for name, value in json.loads(request.body).items():
                assert hasattr(self.s3.settings, name), name
                setattr(self.s3.settings, name, value)
        with self.s3.lock:
            return Answer(body=json.dumps(self.s3.report()).encode())

    def log_message(self, *_: object) -> None:
        """Print nothing."""


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, *_: object) -> None:
        """Say nothing of a client that has gone; anything else is a fault of this server."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(*_)


def main(port: str, access_key: str, secret_key: str, region: str, certificate: str = "") -> None:
    Handler.s3 = S3(Settings(region, {access_key: {"secret": secret_key}}))
    listener = Listener(("127.0.0.1", int(port)), Handler)
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        listener.socket = context.wrap_socket(listener.socket, server_side=True, do_handshake_on_connect=False)
    listener.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
