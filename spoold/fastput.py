"""PUTs of small objects without botocore, which takes ten times as long over each as it takes to hash, sign and send it.

Only what went well before goes this way. The first PUT into a bucket is botocore's, and how it went, to which address, signed
for which region, is how those after it go. Whatever is not a plain success is asked once more of botocore, which knows about
redirects, clocks, proxies and a server's odd answers, and says what is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from spoold import __version__
from spoold.sigv4 import Secrets, Signer
from spoold.wire import Answer, End, Origin, Wire

_SCOPE = re.compile(r"AWS4-HMAC-SHA256 Credential=[^/,]+(?:/[^/,]+)*?/[0-9]{8}/([^/,]+)/(s3)/aws4_request, ")
_PLAIN = re.compile(r"[!-~]+(?: [!-~]+)*")
_AGENT = f"spoold/{__version__}"
_HEADER = {  # what botocore calls it → the header that says it
    "ACL": "x-amz-acl",
    "CacheControl": "cache-control",
    "ChecksumCRC32": "x-amz-checksum-crc32",
    "ChecksumCRC32C": "x-amz-checksum-crc32c",
    "ChecksumCRC64NVME": "x-amz-checksum-crc64nvme",
    "ChecksumSHA256": "x-amz-checksum-sha256",
    "ChecksumType": "x-amz-checksum-type",
    "ContentMD5": "content-md5",
    "ContentType": "content-type",
    "ETag": "etag",
    "SSECustomerAlgorithm": "x-amz-server-side-encryption-customer-algorithm",
    "ServerSideEncryption": "x-amz-server-side-encryption",
    "StorageClass": "x-amz-storage-class",
    "Tagging": "x-amz-tagging",
    "VersionId": "x-amz-version-id",
}


@dataclass(frozen=True, slots=True)
class _Address:
    """How requests to a bucket are written. path: what comes before the key, percent-encoded."""

    origin: Origin
    host: str
    path: str
    signer: Signer


class FastPut:
    """Knows how objects get into the buckets that one got into before; safe to share between threads."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._addresses: dict[str, _Address] = {}
        self._signers: dict[tuple[str, str], Signer] = {}
        self._unfit: set[str] = set()

    def learn(self, bucket: str, key: str, url: str, authorization: str) -> None:
        """Remember how an object got there. What is unlike all that is known here stays botocore's."""
        scope = _SCOPE.match(authorization)
        parts = urlsplit(url)
        written = _encoded(key)
        if scope is None or bucket in self._unfit or parts.query or not parts.path.endswith(written) or parts.hostname is None:
            return
        signer = self._signers.setdefault((scope[1], scope[2]), Signer(scope[1], scope[2]))
        is_tls = parts.scheme == "https"
        origin = Origin(parts.hostname, parts.port or (443 if is_tls else 80), is_tls)
        host = parts.netloc.rpartition("@")[2]
        if host.endswith(":443" if is_tls else ":80"):
            host = host.rpartition(":")[0]
        self._addresses[bucket] = _Address(origin, host, parts.path.removesuffix(written), signer)

    def forget(self, bucket: str, *, for_good: bool = False) -> None:
        """The next one is botocore's again, or all are."""
        self._addresses.pop(bucket, None)
        if for_good:
            self._unfit.add(bucket)

    def knows(self, bucket: str) -> bool:
        return bucket in self._addresses

    def put(
        self, bucket: str, key: str, body: bytes, said: Mapping[str, Any], payload_sha256: str, secrets: Secrets, *,
        now: float, done: Callable[[End], None],
    ) -> bool:  # fmt: skip
        """Send it, and call `done` with what came of it; False, and nothing is done, if it does not go this way.

        said: what goes with it, by botocore's names. now: seconds since the epoch.
        """
        address = self._addresses.get(bucket)
        headers = _headers(said)
        if address is None or not all(map(_PLAIN.fullmatch, headers.values())):
            return False
        path = address.path + _encoded(key)
        headers = {"host": address.host, "user-agent": _AGENT, **headers}
        signed = address.signer.sign(secrets, "PUT", path, headers, payload_sha256, now)
        lines = "".join(f"{name}: {value}\r\n" for name, value in signed.items())
        head = f"PUT {path} HTTP/1.1\r\n{lines}content-length: {len(body)}\r\n\r\n"
        self._wire.send(address.origin, head.encode("latin-1") + body, done)
        return True

    def close(self) -> None:
        self._wire.close()


def in_botocores_words(answer: Answer) -> dict[str, str]:
    """Return what an answer says by botocore's names: what is not said is not there."""
    return {name: answer.headers[header] for name, header in _HEADER.items() if header in answer.headers}


def _headers(said: Mapping[str, Any]) -> dict[str, str]:
    headers = {_HEADER[name]: value for name, value in said.items() if name != "Metadata"}
    return headers | {f"x-amz-meta-{name.lower()}": value for name, value in said.get("Metadata", {}).items()}


def _encoded(key: str) -> str:
    return quote(key, safe="/~")
