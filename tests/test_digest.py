from __future__ import annotations

import subprocess
import sys

import pytest

from spoold.digest import ALGORITHMS, FULL_OBJECT, Digester, checksum_of

CHECK = b"123456789"
"""The content whose CRCs every catalogue of CRCs gives as its `check` value."""

KNOWN = {
    "crc32": "y/Q5Jg==",  # cbf43926
    "crc32c": "4waSgw==",  # e3069283
    "crc64nvme": "rosUhgp5mIg=",  # ae8b14860a799888
    "sha256": "FeKw08M4keuw8e9gnsQZQgwg4yDOlMZfvIwzEkSOsiU=",
    "none": "",
}
EMPTY = {
    "crc32": "AAAAAA==",
    "crc32c": "AAAAAA==",
    "crc64nvme": "AAAAAAAAAAA=",
    "sha256": "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=",
    "none": "",
}


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_a_checksum_is_the_published_one(algorithm: str) -> None:
    assert KNOWN[algorithm] == checksum_of(CHECK, algorithm)
    assert EMPTY[algorithm] == checksum_of(b"", algorithm)


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_one_pass_gives_every_digest(algorithm: str) -> None:
    digester = Digester(algorithm)

    digester.update(CHECK)

    digests = digester.digests()
    assert 9 == digests.size
    assert "15e2b0d3c33891ebb0f1ef609ec419420c20e320ce94c65fbc8c3312448eb225" == digests.sha256
    assert "25f9e794323b453885f5181f1b624d0b" == digests.md5
    assert (algorithm, KNOWN[algorithm]) == (digests.checksum_algorithm, digests.checksum)


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_pieces_count_as_the_whole(algorithm: str) -> None:
    whole, pieces = Digester(algorithm), Digester(algorithm)

    whole.update(CHECK)
    for piece in (b"1234", b"", b"56789"):
        pieces.update(piece)

    assert whole.digests() == pieces.digests()


def test_digests_may_be_asked_for_on_the_way() -> None:
    digester = Digester("crc32")
    digester.update(b"12345")

    early = digester.digests()
    digester.update(b"6789")

    assert checksum_of(b"12345", "crc32") == early.checksum
    assert KNOWN["crc32"] == digester.digests().checksum


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_nothing_has_digests_too(algorithm: str) -> None:
    digests = Digester(algorithm).digests()

    assert (0, "d41d8cd98f00b204e9800998ecf8427e") == (digests.size, digests.md5)
    assert EMPTY[algorithm] == digests.checksum


def test_full_object_checksums_exist_for_crcs_only() -> None:
    """FACTS 25."""
    assert {"crc32", "crc32c", "crc64nvme"} == FULL_OBJECT


def test_an_unknown_algorithm_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="md5"):
        Digester("md5")


def test_the_usual_algorithm_needs_no_awscrt() -> None:
    """Importing it takes 50 ms, which `spoold status` would wait for."""
    code = "import sys, spoold.digest as d; d.checksum_of(b'', 'crc32'); sys.exit('awscrt' in sys.modules)"

    assert 0 == subprocess.run([sys.executable, "-c", code], check=False).returncode
