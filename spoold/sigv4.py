"""Signature Version 4, by which S3 knows who asks. Source: Signature Version 4 signing process, Amazon S3 API reference."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

_NOT_SIGNED = frozenset({"authorization", "connection", "content-length", "expect", "transfer-encoding", "user-agent"})
_KEYS_KEPT = 8


@dataclass(frozen=True, slots=True)
class Secrets:
    """What S3 knows somebody by. token: of credentials that expire; None if they do not."""

    access_key: str
    secret_key: str = field(repr=False)
    token: str | None = field(default=None, repr=False)


class Signer:
    """Signs requests for one region; safe to share between threads."""

    def __init__(self, region: str, service: str = "s3") -> None:
        self._region = region
        self._service = service
        self._keys: dict[tuple[str, str], bytes] = {}

    def sign(
        self, secrets: Secrets, method: str, path: str, headers: Mapping[str, str], payload_sha256: str, now: float
    ) -> dict[str, str]:
        """Return `headers` with those that prove who sends them.

        path: as it is sent, percent-encoded; there is no query. headers: by lower-case name, `host` among them.
        payload_sha256: lower-case hex. now: seconds since the epoch.
        """
        moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
        signed = {**headers, "x-amz-content-sha256": payload_sha256, "x-amz-date": moment}
        if secrets.token is not None:
            signed["x-amz-security-token"] = secrets.token
        names = sorted(name for name in signed if name not in _NOT_SIGNED)
        listed = ";".join(names)
        canonical = "\n".join([
            method, path, "", *(f"{name}:{' '.join(signed[name].split())}" for name in names), "", listed, payload_sha256,
        ])  # fmt: skip
        scope = f"{moment[:8]}/{self._region}/{self._service}/aws4_request"
        to_sign = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
        signature = hmac.digest(self._key(secrets.secret_key, moment[:8]), to_sign.encode(), "sha256").hex()
        signed["authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={secrets.access_key}/{scope}, SignedHeaders={listed}, Signature={signature}"
        )
        return signed

    def _key(self, secret: str, day: str) -> bytes:
        found = self._keys.get((secret, day))
        if found is None:
            found = f"AWS4{secret}".encode()
            for part in (day, self._region, self._service, "aws4_request"):
                found = hmac.digest(found, part.encode(), "sha256")
            while len(self._keys) >= _KEYS_KEPT:
                self._keys.pop(next(iter(self._keys)), None)
            self._keys[secret, day] = found
        return found
