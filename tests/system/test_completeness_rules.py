"""When a record is complete: who decides, who vetoes, and what a person may overrule (contract, section 6, rules 1 to 4)."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.paperclip import App, picture
from tests.servers import RcloneServer
from tests.system.harness import BRISK, Daemon, Site, until

RECORD = "avatars/42"
MARKER = ".done"
MARKED: dict[str, Any] = {"complete": {"marker": MARKER}}
OFTEN = {"sweep_every": "200ms"}


def photo(seed: int, format: str = "JPEG") -> bytes:
    return picture(40, 30, seed, format)


def at(name: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {f"{RECORD}/{style}/{name}": content for style, content in files.items()}


FILES = {"original": photo(1), "thumb": photo(2)}
NEWER = {"original": photo(3), "thumb": photo(4)}


def mark(site: Site) -> Path:
    """Declare the record finished."""
    path = site.root / RECORD / MARKER
    path.write_bytes(b"")
    return path


def looked_at_often(daemon: Daemon, times: int = 3) -> None:
    """Wait until everything was looked at a few more times."""
    sweeps = len(daemon.events("sweep.finished"))
    daemon.until_event("sweep.finished", count=sweeps + times)


def decided_by(daemon: Daemon) -> list[str]:
    return [line["decided_by"] for line in daemon.events("batch.settled", record=RECORD)]


# Rule 2: who decides


def test_rule_2_the_marker_decides_and_goes_with_its_batch(rclone_server: RcloneServer, tmp_path: Path) -> None:
    site = Site(tmp_path, rclone_server, spool={**MARKED, **OFTEN})
    app = App(site.root)

    with site.daemon(constants=BRISK) as daemon:
        app.save("avatars", 42, "me.jpg", FILES)
        site.until_state(RECORD, "receiving")
        looked_at_often(daemon, 4)
        unmarked, why = site.files(), site.spoold("why", RECORD).stdout
        mark(site)
        site.until_state(RECORD, "done")
        until(lambda: site.directories() == {"avatars"}, "the record's directory is gone, and the marker with it")

        assert ["marker"] == decided_by(daemon)
        daemon.demand_legal_path(RECORD)

    assert at("me.jpg", FILES) == unmarked and MARKER in why
    assert at("me.jpg", FILES) == site.objects()
    site.demand_laws(at("me.jpg", FILES))


def test_rule_2_a_marker_does_not_speak_for_the_next_version(rclone_server: RcloneServer, tmp_path: Path) -> None:
    site = Site(tmp_path, rclone_server, spool={**MARKED, **OFTEN})
    app = App(site.root)

    with site.daemon(constants=BRISK) as daemon:
        app.save("avatars", 42, "me.jpg", FILES)
        mark(site)
        daemon.until_event("record.cleared", record=RECORD)
        app.save("avatars", 42, "me.jpg", NEWER)
        site.until_state(RECORD, "receiving")
        looked_at_often(daemon, 4)
        unmarked = site.objects()
        mark(site)
        daemon.until_event("record.cleared", count=2, record=RECORD)

        daemon.demand_legal_path(RECORD)

    assert at("me.jpg", FILES) == unmarked
    site.demand_laws(at("me.jpg", NEWER))


def test_rule_2_a_marker_older_than_a_file_does_not_count(rclone_server: RcloneServer, tmp_path: Path) -> None:
    site = Site(tmp_path, rclone_server, spool={**MARKED, **OFTEN})
    app = App(site.root)
    (site.root / RECORD).mkdir(parents=True)
    mark(site)

    with site.daemon(constants=BRISK) as daemon:
        app.save("avatars", 42, "me.jpg", FILES)
        site.until_state(RECORD, "receiving")
        looked_at_often(daemon, 4)
        objects, why = site.objects(), site.spoold("why", RECORD).stdout
        mark(site)
        site.until_state(RECORD, "done")

        daemon.demand_legal_path(RECORD)

    assert not objects and "newer than its marker" in why
    site.demand_laws(at("me.jpg", FILES))


def test_rule_2_where_marker_and_styles_are_configured_both_are_needed(rclone_server: RcloneServer, tmp_path: Path) -> None:
    site = Site(tmp_path, rclone_server, spool={"complete": {"marker": MARKER, "styles": ["thumb"]}, **OFTEN})
    app = App(site.root)

    with site.daemon(constants=BRISK) as daemon:
        app.save("avatars", 42, "me.jpg", {"original": FILES["original"]})
        mark(site)
        until(lambda: "style thumb missing" in site.spoold("why", RECORD).stdout, "the marker alone is not enough")
        app.save("avatars", 42, "me.jpg", {"thumb": FILES["thumb"]})
        until(lambda: "newer than its marker" in site.spoold("why", RECORD).stdout, "the styles alone are not enough")
        looked_at_often(daemon)
        objects = site.objects()
        mark(site)
        site.until_state(RECORD, "done")

        daemon.demand_legal_path(RECORD)

    assert not objects
    site.demand_laws(at("me.jpg", FILES))


def test_rule_2_styles_decide_by_attachment(rclone_server: RcloneServer, tmp_path: Path) -> None:
    site = Site(tmp_path, rclone_server, spool={"complete": {"styles": {"avatars": ["thumb"]}}, **OFTEN})
    app = App(site.root)
    cover = {"covers/7/original/me.jpg": photo(9)}

    with site.daemon(constants=BRISK) as daemon:
        app.save("avatars", 42, "me.jpg", {"original": FILES["original"]})
        app.save("covers", 7, "me.jpg", {"original": photo(9)})
        site.until_state("covers/7", "done")
        looked_at_often(daemon)
        state, objects = site.status(RECORD)["state"], site.objects()
        app.save("avatars", 42, "me.jpg", {"thumb": FILES["thumb"]})
        site.until_state(RECORD, "done")

        assert ["styles"] == decided_by(daemon)
        [line] = daemon.events("batch.settled", record="covers/7")
        assert "quiet" == line["decided_by"]

    assert "receiving" == state and cover == objects
    site.demand_laws({**at("me.jpg", FILES), **cover})


def test_rule_2_without_marker_and_styles_quiet_decides(rclone_server: RcloneServer, tmp_path: Path) -> None:
    """Quiet is judged by ctime: a chmod is news, and the mtime, set to long ago, says nothing (rule 4)."""
    site = Site(tmp_path, rclone_server, spool={"complete": {"settle": "400ms"}})
    paths = App(site.root).save("avatars", 42, "me.jpg", FILES, how="copy")
    modes = itertools.cycle([0o644, 0o640])

    with site.daemon(constants=BRISK) as daemon:
        until_s = time.monotonic() + 1.5

        def busy() -> bool:
            paths["thumb"].chmod(next(modes))
            os.utime(paths["thumb"], (1e9, 1e9))
            return time.monotonic() > until_s and site.status(RECORD) != {}

        until(busy, "the app has been busy for a while, and was seen at it")
        state, objects = site.status(RECORD)["state"], site.objects()
        site.until_state(RECORD, "done")

        assert ["quiet"] == decided_by(daemon)
        daemon.demand_legal_path(RECORD)

    assert "receiving" == state and not objects
    site.demand_laws(at("me.jpg", FILES))


def test_rule_4_what_lay_there_before_the_start_is_no_older_than_the_start(rclone_server: RcloneServer, tmp_path: Path) -> None:
    """A clock that jumped makes nothing old: age counts from when we first saw it."""
    site = Site(tmp_path, rclone_server, spool={"complete": {"settle": "1s"}})
    [path] = App(site.root).save("avatars", 42, "me.jpg", {"original": photo(1)}).values()
    until(lambda: time.time() - path.stat().st_ctime > 1.2, "it is older than `settle`")

    with site.daemon(constants=BRISK) as daemon:
        seen = daemon.until_event("record.seen")
        settled = daemon.until_event("batch.settled")
        site.until_state(RECORD, "done")

    assert seen["timestamp"] < settled["timestamp"]
    site.demand_laws({f"{RECORD}/original/me.jpg": photo(1)})


# Rule 2: image ends


def test_rule_2_a_truncated_jpeg_waits_although_styles_decided_and_goes_up_when_the_rest_arrives(
    rclone_server: RcloneServer, tmp_path: Path
) -> None:
    site = Site(tmp_path, rclone_server, spool={"complete": {"styles": ["thumb"]}, **OFTEN})
    half = len(FILES["original"]) // 2

    with site.daemon(constants=BRISK) as daemon:
        paths = App(site.root).save("avatars", 42, "me.jpg", {**FILES, "original": FILES["original"][:half]})
        site.until_state(RECORD, "receiving")
        looked_at_often(daemon, 4)
        objects, why = site.objects(), site.spoold("why", f"{RECORD}/original/me.jpg").stdout
        with paths["original"].open("ab") as file:
            file.write(FILES["original"][half:])
        site.until_state(RECORD, "done")

        assert 1 == len(daemon.events("batch.settled"))
        daemon.demand_legal_path(RECORD)

    assert not objects and "JPEG" in why
    site.demand_laws(at("me.jpg", FILES))


@pytest.mark.parametrize("format", ["PNG", "GIF", "WEBP"])
def test_rule_2_a_marker_does_not_overrule_an_image_that_is_cut_off(
    format: str, rclone_server: RcloneServer, tmp_path: Path
) -> None:
    site = Site(tmp_path, rclone_server, spool=MARKED)
    whole = photo(1, format)
    name = f"me.{format.lower()}"

    with site.daemon(constants=BRISK) as daemon:
        [path] = App(site.root).save("avatars", 42, name, {"original": whole[:-20]}).values()
        mark(site)
        until(lambda: format.lower() in site.spoold("why", RECORD).stdout.lower().replace(name, ""), "why says what is wrong")
        with path.open("ab") as file:
            file.write(whole[-20:])
        mark(site)
        site.until_state(RECORD, "done")

        daemon.demand_legal_path(RECORD)

    site.demand_laws({f"{RECORD}/original/{name}": whole})


def test_images_none_asks_nobody(rclone_server: RcloneServer, tmp_path: Path) -> None:
    site = Site(tmp_path, rclone_server, spool={"complete": {"images": "none"}})
    half = photo(1)[:200]

    with site.daemon(constants=BRISK):
        App(site.root).save("avatars", 42, "me.jpg", {"original": half})
        site.until_state(RECORD, "done")

    site.demand_laws({f"{RECORD}/original/me.jpg": half})


# Rule 2: every pixel


def png_of_zeros() -> bytes:
    """Return a PNG whose container is whole, and whose second half is zeros: what a hole in a file leaves."""
    whole = picture(200, 150, 1, "PNG")
    end = whole.index(b"IEND") - 4
    half = end // 2
    return whole[:half] + bytes(end - half) + whole[end:]


def jpeg_without_tables() -> bytes:
    """Return a JPEG whose segments are all there, and whose tables are zeros: it cannot be decoded."""
    whole = picture(200, 150, 1)
    start = whole.index(b"\xff\xc4")
    length = int.from_bytes(whole[start + 2 : start + 4], "big")
    return whole[: start + 4] + bytes(length - 2) + whole[start + 2 + length :]


@pytest.mark.parametrize(("name", "content"), [("me.png", png_of_zeros()), ("me.jpg", jpeg_without_tables())])
def test_images_decode_vetoes_what_does_not_decode_once_and_takes_what_replaces_it(
    name: str, content: bytes, rclone_server: RcloneServer, tmp_path: Path
) -> None:
    site = Site(tmp_path, rclone_server, spool={"complete": {"images": "decode", "within": "2s"}, **OFTEN})
    app = App(site.root)
    whole = photo(1, name[3:].upper().replace("JPG", "JPEG"))

    with site.daemon(constants=BRISK) as daemon:
        app.save("avatars", 42, name, {"original": content})
        vetoed = daemon.until_event("batch.superseded", record=RECORD)
        looked_at_often(daemon, 4)
        daemon.until_event("record.stalled", record=RECORD)
        offered = len(daemon.events("batch.settled"))
        objects, why = site.objects(), site.spoold("why", RECORD).stdout
        app.replace("avatars", 42, name, name, {"original": whole})
        site.until_state(RECORD, "done")

        daemon.demand_legal_path(RECORD)

    assert "decode" in vetoed["detail"]
    assert 1 == offered and not objects
    assert "decode" in why
    site.demand_laws({f"{RECORD}/original/{name}": whole})


def test_images_decode_does_not_hold_back_the_records_other_basenames(rclone_server: RcloneServer, tmp_path: Path) -> None:
    site = Site(tmp_path, rclone_server, spool={"complete": {"images": "decode"}, **OFTEN})
    app = App(site.root)
    good = {f"{RECORD}/original/good.jpg": photo(1)}

    with site.daemon(constants=BRISK) as daemon:
        app.save("avatars", 42, "bad.png", {"original": png_of_zeros()})
        app.save("avatars", 42, "good.jpg", {"original": photo(1)})
        until(lambda: site.objects() == good, "the good one goes up")
        until(lambda: not (site.root / RECORD / "original" / "good.jpg").exists(), "and is let go")
        row = site.status(RECORD)
        app.save("avatars", 42, "bad.png", {"original": photo(2, "PNG")})
        site.until_state(RECORD, "done")

        daemon.demand_legal_path(RECORD)

    assert 1 == row["processing"]
    site.demand_laws({**good, f"{RECORD}/original/bad.png": photo(2, "PNG")})


def test_images_decode_takes_whole_images_and_what_is_none(rclone_server: RcloneServer, tmp_path: Path) -> None:
    site = Site(tmp_path, rclone_server, spool={"complete": {"images": "decode"}})
    contents = {
        "a.jpg": photo(1),
        "b.png": photo(2, "PNG"),
        "c.gif": photo(3, "GIF"),
        "d.webp": photo(4, "WEBP"),
        "e.txt": b"-",
    }
    written = {f"{RECORD}/original/{name}": content for name, content in contents.items()}

    with site.daemon(constants=BRISK):
        for name, content in contents.items():
            App(site.root).save("avatars", 42, name, {"original": content})
        site.until_state(RECORD, "done")
        until(lambda: site.directories() == {"avatars"}, "everything is let go")

    site.demand_laws(written)


# What a person may overrule


def test_retry_as_is_takes_an_incomplete_record_as_it_lies(rclone_server: RcloneServer, tmp_path: Path) -> None:
    """Without its missing style, and with half an image."""
    site = Site(tmp_path, rclone_server, spool={"complete": {"styles": ["thumb"], "within": "300ms"}})
    half = photo(1)[:300]

    with site.daemon(constants=BRISK) as daemon:
        App(site.root).save("avatars", 42, "me.jpg", {"original": half})
        site.until_state(RECORD, "stalled")
        retried = site.spoold("retry", RECORD)
        as_is = site.spoold("retry", "--as-is", RECORD)
        site.until_state(RECORD, "done")

        assert ["as-is"] == decided_by(daemon)
        daemon.demand_legal_path(RECORD)

    assert 0 == retried.returncode == as_is.returncode
    site.demand_laws({f"{RECORD}/original/me.jpg": half})


def test_retry_as_is_takes_an_image_that_does_not_decode(rclone_server: RcloneServer, tmp_path: Path) -> None:
    site = Site(tmp_path, rclone_server, spool={"complete": {"images": "decode"}})

    with site.daemon(constants=BRISK) as daemon:
        App(site.root).save("avatars", 42, "me.png", {"original": png_of_zeros()})
        daemon.until_event("batch.superseded", record=RECORD)
        site.spoold("retry", "--as-is", RECORD)
        site.until_state(RECORD, "done")

        daemon.demand_legal_path(RECORD)

    site.demand_laws({f"{RECORD}/original/me.png": png_of_zeros()})


def test_retry_as_is_still_waits_for_who_is_writing(rclone_server: RcloneServer, tmp_path: Path) -> None:
    site = Site(tmp_path, rclone_server, spool={"complete": {"styles": ["thumb"]}, **OFTEN})

    with site.daemon(constants=BRISK) as daemon:
        [path] = App(site.root).save("avatars", 42, "me.jpg", {"original": photo(1)[:300]}).values()
        with path.open("ab") as file:
            site.until_state(RECORD, "receiving")
            site.spoold("retry", "--as-is", RECORD)
            looked_at_often(daemon, 4)
            objects = site.objects()
            file.write(photo(1)[300:])
        site.until_state(RECORD, "done")

    assert not objects
    site.demand_laws({f"{RECORD}/original/me.jpg": photo(1)})


def test_what_was_taken_as_it_lay_is_joined_by_what_comes_later(rclone_server: RcloneServer, tmp_path: Path) -> None:
    site = Site(tmp_path, rclone_server, spool={"complete": {"styles": ["thumb"]}})
    app = App(site.root)

    with site.daemon(constants=BRISK) as daemon:
        app.save("avatars", 42, "me.jpg", {"original": FILES["original"]})
        site.until_state(RECORD, "receiving")
        site.spoold("retry", "--as-is", RECORD)
        site.until_state(RECORD, "done")
        app.save("avatars", 42, "me.jpg", {"thumb": FILES["thumb"]})
        daemon.until_event("record.cleared", count=2, record=RECORD)

        daemon.demand_legal_path(RECORD)

    site.demand_laws(at("me.jpg", FILES))
