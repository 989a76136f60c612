"""The nouns."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from spoold.model import BatchFile, Digests, Headers, Identity, Put, Verdict, fingerprint
from tests.parts import batch_of, spooled

CAT = spooled("avatars/42/original/cat.jpg", b"a cat")
DOG = spooled("avatars/42/original/dog.jpg", b"a dog")


def test_an_identity_changes_with_every_way_to_change_a_file(tmp_path: Path) -> None:
    path = tmp_path / "cat.jpg"
    path.write_bytes(b"a cat")
    seen = [Identity.of(path.stat())]

    for change in (
        lambda: path.write_bytes(b"a bat"),
        lambda: path.chmod(0o600),
        lambda: os.utime(path, (0, 0)),
        lambda: os.link(path, tmp_path / "link"),
        lambda: path.rename(tmp_path / "elsewhere") and (tmp_path / "elsewhere").rename(path),
        lambda: path.with_name("new").write_bytes(b"a cat") and path.with_name("new").rename(path),
    ):
        change()
        seen.append(Identity.of(path.stat()))

    assert len(seen) == len(set(seen))


def test_a_fingerprint_does_not_depend_on_the_order_of_files() -> None:
    assert fingerprint([CAT, DOG]) == fingerprint([DOG, CAT])


@pytest.mark.parametrize("field", ["dev", "ino", "size", "mtime_ns", "ctime_ns"])
def test_a_fingerprint_changes_with_whatever_changes_of_a_file(field: str) -> None:
    identity = dataclasses.replace(CAT.identity, **{field: 77})

    changed = dataclasses.replace(CAT, identity=identity)

    assert fingerprint([CAT]) != fingerprint([changed])


def test_a_fingerprint_tells_files_apart_that_only_differ_in_name() -> None:
    renamed = dataclasses.replace(CAT, path=DOG.path)

    assert fingerprint([CAT]) != fingerprint([renamed])
    assert fingerprint([CAT]) != fingerprint([CAT, renamed])


def test_a_fingerprint_can_be_made_of_names_that_are_no_utf_8() -> None:
    assert 32 == len(fingerprint([dataclasses.replace(CAT, path=os.fsdecode(b"\xff"))]))


def test_a_verdict_is_complete_if_somebody_decided_and_nobody_vetoed() -> None:
    assert Verdict("cat", "styles").is_complete
    assert not Verdict("cat").is_complete
    assert not Verdict("cat", "styles", "lease").is_complete
    assert not Verdict("cat", "styles", refused=True).is_complete


def test_the_marker_of_a_batch_is_not_uploaded() -> None:
    cat = BatchFile(1, CAT, False, None, None, False)
    marker = BatchFile(2, spooled("avatars/42/x/done"), True, None, None, False)

    assert (cat,) == batch_of(cat, marker).uploads


def test_a_put_does_not_print_the_file_it_carries() -> None:
    """It may be megabytes, and somebody's picture."""
    cat = BatchFile(1, CAT, False, None, None, False)

    put = Put(cat, "bucket", "key", None, Headers("image/jpeg"), Digests(5, "", "", "none", ""), b"a cat's own bytes")

    assert "own bytes" not in repr(put)
