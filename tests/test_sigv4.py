"""botocore's own signer is the oracle: the same request at the same instant has the same header."""

from __future__ import annotations

import datetime
from typing import Any
from unittest import mock

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import given
from hypothesis import strategies as st

from spoold.sigv4 import Secrets, Signer

NOW = 1_796_000_000.25
PAYLOAD = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def by_botocore(secrets: Secrets, region: str, method: str, path: str, headers: dict[str, str]) -> dict[str, str]:
    """Return all headers of the request as botocore would send it."""
    request: Any = AWSRequest(method=method, url=f"http://{headers['host']}{path}", headers=headers)
    request.headers["X-Amz-Content-SHA256"] = PAYLOAD
    credentials = Credentials(secrets.access_key, secrets.secret_key, secrets.token)
    auth = S3SigV4Auth(credentials, "s3", region)
    moment = datetime.datetime.fromtimestamp(NOW, datetime.UTC)
    with (
        mock.patch("botocore.auth.get_current_datetime", lambda: moment),
        mock.patch.object(S3SigV4Auth, "payload", lambda self, request: PAYLOAD),
        mock.patch.object(S3SigV4Auth, "_should_sha256_sign_payload", lambda self, request: True),
    ):
        auth.add_auth(request)
    return {name.lower(): value for name, value in request.headers.items()}


SECRETS = Secrets("AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY")
HEADERS = {"host": "127.0.0.1:9000", "content-type": "image/jpeg"}


@pytest.mark.parametrize("token", [None, "FwoGZXIvYXdzE//////////wEaDM=="])
@pytest.mark.parametrize("region", ["us-east-1", "eu-central-1", "auto"])
@pytest.mark.parametrize(
    "path", ["/bucket/a", "/bucket/a%20b%2Bc", "/bucket//a/./b/../c", "/%C3%BC~tilde_-.", "/", "/bucket/%E6%97%A5%E6%9C%AC"]
)
def test_the_header_is_botocores(path: str, region: str, token: str | None) -> None:
    secrets = Secrets(SECRETS.access_key, SECRETS.secret_key, token)

    signed = Signer(region).sign(secrets, "PUT", path, HEADERS, PAYLOAD, NOW)

    assert by_botocore(secrets, region, "PUT", path, HEADERS) == signed


NAMES = st.sampled_from([
    "cache-control", "content-md5", "x-amz-acl", "x-amz-meta-a", "x-amz-meta-zz", "x-amz-tagging", "x-amz-checksum-crc32",
    "expect", "user-agent", "content-length",
])  # fmt: skip
VALUES = st.text(st.sampled_from(list(" aZ09=&%+/;,:\"'~")), min_size=1, max_size=30)


@given(more=st.dictionaries(NAMES, VALUES, max_size=6))
def test_whatever_the_headers(more: dict[str, str]) -> None:
    headers = HEADERS | more
    if "content-length" in headers:
        headers["content-length"] = "5"

    ours = Signer("us-east-1").sign(SECRETS, "PUT", "/bucket/key", headers, PAYLOAD, NOW)
    theirs = by_botocore(
        SECRETS, "us-east-1", "PUT", "/bucket/key", {n: v for n, v in headers.items() if n != "content-length"}
    )

    assert theirs["authorization"] == ours["authorization"]


def test_a_day_has_its_key_and_nobody_reads_the_secret() -> None:
    signer = Signer("us-east-1")
    days = [signer.sign(SECRETS, "PUT", "/b/k", HEADERS, PAYLOAD, NOW + 86_400 * day)["authorization"] for day in range(20)]
    again = signer.sign(SECRETS, "PUT", "/b/k", HEADERS, PAYLOAD, NOW)["authorization"]

    assert 20 == len(set(days))
    assert days[0] == again
    assert SECRETS.secret_key not in repr(SECRETS)
