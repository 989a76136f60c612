"""What apps do to a spool: how they write, replace, remake and remove files, and what else lies beside them."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.paperclip import App, How, interpolate, picture
from tests.proxy import FaultProxy, Hold
from tests.servers import RcloneServer
from tests.system.harness import BRISK, Daemon, Site, until

RECORD = "avatars/42"
THUMB: dict[str, Any] = {"complete": {"styles": ["thumb"]}}
OFTEN = {**BRISK, "spoold.daemon._REMOVE_EVERY_S": 0.2}  # how often replaced keys are removed; 5 s otherwise
SOON = {**BRISK, "spoold.cleanup._OPEN_AGAIN_S": 0.3}  # when a file that is open for writing is looked at again; else 15 s
DEAF = {**BRISK, "spoold.spool._NETWORK": ("",)}  # every filesystem is taken for one that tells no events


def photo(seed: int) -> bytes:
    return picture(40, 30, seed)


def both(seed: int) -> dict[str, bytes]:
    """Return an original and its thumb."""
    return {"original": photo(2 * seed), "thumb": photo(2 * seed + 1)}


def at(record: str, name: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return where these styles lie, and their keys, which are the same."""
    return {f"{record}/{style}/{name}": content for style, content in files.items()}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def proxy(rclone_server: RcloneServer) -> Iterator[FaultProxy]:
    with FaultProxy(rclone_server.endpoint_url) as proxy:
        yield proxy


def puts(proxy: FaultProxy) -> dict[str, list[str]]:
    """Return the SHA-256 of every body that was put, by key, in order."""
    found: dict[str, list[str]] = {}
    for seen in proxy.requests("PUT"):
        found.setdefault(seen.key.partition("/")[2], []).append(seen.sha256)
    return found


def until_version(site: Site, version: int, record: str = RECORD) -> dict[str, Any]:
    """Wait until this version of the record is done, and return its row."""

    def row() -> dict[str, Any] | None:
        status = site.status(record)
        return status if status.get("version") == version and status["state"] == "done" else None

    found: dict[str, Any] = until(row, f"version {version} of {record} is done")
    return found


# How apps write


def test_a_slow_copy_with_an_old_mtime_is_never_published_half(
    proxy: FaultProxy, rclone_server: RcloneServer, tmp_path: Path
) -> None:
    """Every pause is longer than `settle`, and nobody says which styles there are: only the vetoes know that it goes on."""
    site = Site(tmp_path, rclone_server, endpoint_url=proxy.endpoint_url)
    files = {"original": photo(1), "thumb": os.urandom(40_000)}  # one has no end to look for
    written = at(RECORD, "me.jpg", files)

    with site.daemon(constants=BRISK) as daemon:
        App(site.root).save("avatars", 42, "me.jpg", files, how="copy", slow=0.3)
        until(lambda: not site.files(), "everything has gone up")
        site.until_state(RECORD, "done")

        daemon.demand_legal_path(RECORD)

    assert {key: [sha256(content)] for key, content in written.items()} == puts(proxy)
    site.demand_laws(written)


def test_what_opens_its_file_anew_for_each_piece_is_never_published_half(
    proxy: FaultProxy, rclone_server: RcloneServer, tmp_path: Path
) -> None:
    """Nobody has it open between the pieces, and each pause is longer than `settle`: the image's end decides."""
    site = Site(tmp_path, rclone_server, endpoint_url=proxy.endpoint_url)
    content = photo(1)
    path = site.root / RECORD / "original" / "me.jpg"
    path.parent.mkdir(parents=True)

    with site.daemon(constants=BRISK):
        for start in range(0, len(content), len(content) // 3 + 1):
            with path.open("ab") as file:
                file.write(content[start : start + len(content) // 3 + 1])
            threading.Event().wait(0.4)  # the app's pause
        site.until_state(RECORD, "done")

    assert {f"{RECORD}/original/me.jpg": [sha256(content)]} == puts(proxy)
    site.demand_laws({f"{RECORD}/original/me.jpg": content})


@pytest.mark.parametrize("how", ["rename", "close_before_rename"])
def test_an_app_that_renames_its_files_into_place(
    how: How, proxy: FaultProxy, rclone_server: RcloneServer, tmp_path: Path
) -> None:
    """One that closes before it renames makes no CLOSE_WRITE at all (FACTS 2)."""
    site = Site(tmp_path, rclone_server, endpoint_url=proxy.endpoint_url, spool=THUMB)
    written = at(RECORD, "me.jpg", both(1))

    with site.daemon(constants=BRISK) as daemon:
        App(site.root).save("avatars", 42, "me.jpg", both(1), how=how)
        site.until_state(RECORD, "done")
        until(lambda: site.directories() == {"avatars"}, "the record's directories are gone")

        assert 1 == len(daemon.events("batch.claimed", record=RECORD))
        daemon.demand_legal_path(RECORD)

    assert {key: [sha256(content)] for key, content in written.items()} == puts(proxy)
    site.demand_laws(written)


def test_whole_trees_that_are_moved_in_from_outside_go_up(rclone_server: RcloneServer, tmp_path: Path) -> None:
    site = Site(tmp_path, rclone_server, spool=THUMB)
    outside = App(tmp_path / "outside")
    written: dict[str, bytes] = {}
    for attachment, number in (("avatars", 42), ("covers", 7), ("covers", 8)):
        outside.save(attachment, number, "me.jpg", both(number))
        written |= at(f"{attachment}/{number}", "me.jpg", both(number))
    (site.root / "avatars").mkdir()

    with site.daemon(constants=BRISK) as daemon:
        (outside.root / "avatars" / "42").rename(site.root / "avatars" / "42")
        (outside.root / "covers").rename(site.root / "covers")
        for record in ("avatars/42", "covers/7", "covers/8"):
            site.until_state(record, "done")
            daemon.demand_legal_path(record)
        until(lambda: site.directories() == {"avatars", "covers"}, "the records' directories are gone")

    site.demand_laws(written)


def test_where_no_events_are_told_every_sweep_looks_also_at_what_waits(rclone_server: RcloneServer, tmp_path: Path) -> None:
    """As on NFS. The record would be looked at in ten minutes by itself, when `within` is over."""
    site = Site(tmp_path, rclone_server, spool={**THUMB, "sweep_every": "200ms"})
    app = App(site.root)

    with site.daemon(constants=DEAF) as daemon:
        app.save("avatars", 42, "me.jpg", {"original": both(1)["original"]})
        site.until_state(RECORD, "receiving")
        until(lambda: "thumb" in site.spoold("why", RECORD).stdout, "it is settled, and incomplete")
        sweeps = len(daemon.events("sweep.finished"))
        daemon.until_event("sweep.finished", count=sweeps + 2)
        app.save("avatars", 42, "me.jpg", {"thumb": both(1)["thumb"]})
        site.until_state(RECORD, "done", timeout_s=10)

        daemon.demand_legal_path(RECORD)

    site.demand_laws(at(RECORD, "me.jpg", both(1)))


def test_an_original_that_is_a_hard_link_leaves_the_apps_own_file_alone(rclone_server: RcloneServer, tmp_path: Path) -> None:
    site = Site(tmp_path, rclone_server)
    library = tmp_path / "library.jpg"
    library.write_bytes(photo(1))
    linked = site.root / RECORD / "original" / "me.jpg"

    with site.daemon(constants=BRISK) as daemon:
        linked.parent.mkdir(parents=True)
        os.link(library, linked)
        site.until_state(RECORD, "done")

        daemon.demand_legal_path(RECORD)

    assert photo(1) == library.read_bytes() and 1 == library.stat().st_nlink
    site.demand_laws({f"{RECORD}/original/me.jpg": photo(1)})


# Replacing


def test_a_file_that_is_replaced_before_its_upload_is_never_sent(
    proxy: FaultProxy, rclone_server: RcloneServer, tmp_path: Path
) -> None:
    site = Site(tmp_path, rclone_server, endpoint_url=proxy.endpoint_url, spool=THUMB)
    app = App(site.root)
    written = at(RECORD, "me.jpg", both(2))

    with site.daemon(constants=BRISK) as daemon:
        app.save("avatars", 42, "me.jpg", {"original": both(1)["original"]})
        site.until_state(RECORD, "receiving")
        app.replace("avatars", 42, "me.jpg", "me.jpg", both(2))
        row = site.until_state(RECORD, "done")

        daemon.demand_legal_path(RECORD)

    assert 1 == row["version"]
    assert {key: [sha256(content)] for key, content in written.items()} == puts(proxy)
    site.demand_laws(written)


def test_a_file_that_is_replaced_during_its_upload_is_followed_by_the_new_one(
    proxy: FaultProxy, rclone_server: RcloneServer, tmp_path: Path
) -> None:
    site = Site(tmp_path, rclone_server, endpoint_url=proxy.endpoint_url, spool=THUMB)
    app = App(site.root)
    written = at(RECORD, "me.jpg", both(2))
    gate = threading.Event()
    proxy.on("PUT", "/original/", Hold(gate), times=1)

    with site.daemon(constants=BRISK) as daemon:
        app.save("avatars", 42, "me.jpg", both(1))
        proxy.await_seen("PUT", "/original/")
        app.replace("avatars", 42, "me.jpg", "me.jpg", both(2))
        daemon.until_event("batch.settled", count=2, record=RECORD)
        gate.set()
        site.until_state(RECORD, "done")
        until(lambda: site.directories() == {"avatars"}, "the record's directories are gone")

        daemon.demand_legal_path(RECORD)

    original = f"{RECORD}/original/me.jpg"
    assert [sha256(both(1)["original"]), sha256(both(2)["original"])] == puts(proxy)[original]
    site.demand_laws(written)


def test_a_file_that_is_replaced_after_its_upload_is_the_next_version(rclone_server: RcloneServer, tmp_path: Path) -> None:
    site = Site(tmp_path, rclone_server, spool=THUMB)
    app = App(site.root)

    with site.daemon(constants=BRISK) as daemon:
        app.save("avatars", 42, "me.jpg", both(1))
        until_version(site, 1)
        app.replace("avatars", 42, "me.jpg", "me.jpg", both(2))
        row = until_version(site, 2)

        daemon.demand_legal_path(RECORD)

    assert 2 == row["files"]
    site.demand_laws(at(RECORD, "me.jpg", both(2)))


def test_a_file_that_is_replaced_while_the_old_one_lies_aside_goes_up_and_nothing_comes_back(
    rclone_server: RcloneServer, tmp_path: Path
) -> None:
    site = Site(tmp_path, rclone_server, spool={**THUMB, "cleanup": {"grace": "1500ms"}})
    app = App(site.root)

    with site.daemon(constants=BRISK) as daemon:
        app.save("avatars", 42, "me.jpg", both(1))
        until(lambda: 2 == len(site.aside()), "both files are set aside")
        app.save("avatars", 42, "me.jpg", both(2))
        until(lambda: 4 == len(site.aside()), "the new ones are set aside beside them")
        until_version(site, 2)
        until(lambda: not site.aside(), "nothing lies aside")

        assert not daemon.events("file.given_back")
        daemon.demand_legal_path(RECORD)

    site.demand_laws(at(RECORD, "me.jpg", both(2)))


def test_the_same_bytes_written_again_are_adopted_without_a_put_and_are_no_new_version(
    proxy: FaultProxy, rclone_server: RcloneServer, tmp_path: Path
) -> None:
    site = Site(tmp_path, rclone_server, endpoint_url=proxy.endpoint_url, spool=THUMB)
    app = App(site.root)
    written = at(RECORD, "me.jpg", both(1))

    with site.daemon(constants=BRISK) as daemon:
        for count in (1, 2):
            app.save("avatars", 42, "me.jpg", both(1))
            daemon.until_event("record.cleared", count=count, record=RECORD)
        row = site.status(RECORD)

        daemon.demand_legal_path(RECORD)

    assert ("done", 1, 2) == (row["state"], row["version"], row["files"])
    assert {key: [sha256(content)] for key, content in written.items()} == puts(proxy)
    site.demand_laws(written)


def test_rule_7_keys_of_another_name_that_a_newer_original_replaced_go_after_replaced_after(
    rclone_server: RcloneServer, tmp_path: Path
) -> None:
    site = Site(tmp_path, rclone_server, spool={**THUMB, "replaced_after": "1500ms"})
    app = App(site.root)
    old, new = at(RECORD, "old.jpg", both(1)), at(RECORD, "new.jpg", both(2))
    other = at("avatars/43", "old.jpg", both(3))

    with site.daemon(constants=OFTEN) as daemon:
        app.save("avatars", 43, "old.jpg", both(3))
        app.save("avatars", 42, "old.jpg", both(1))
        site.until_state("avatars/43", "done")
        until_version(site, 1)
        app.replace("avatars", 42, "old.jpg", "new.jpg", both(2))
        row = until_version(site, 2)
        at_first = site.objects()
        until(lambda: site.keys() == set(new) | set(other), "the old keys are deleted")

        daemon.demand_legal_path(RECORD)

    assert {**old, **new, **other} == at_first
    assert 2 == row["files"]
    assert sorted(new) == [row["key"] for row in site.query("SELECT key FROM record_object WHERE path = ? ORDER BY 1", RECORD)]
    site.demand_laws({**new, **other})


def test_rule_7_replaced_keep_keeps_them(proxy: FaultProxy, rclone_server: RcloneServer, tmp_path: Path) -> None:
    site = Site(
        tmp_path, rclone_server, endpoint_url=proxy.endpoint_url, spool={**THUMB, "replaced": "keep", "replaced_after": "0s"}
    )
    app = App(site.root)
    old, new = at(RECORD, "old.jpg", both(1)), at(RECORD, "new.jpg", both(2))

    with site.daemon(constants=OFTEN):
        app.save("avatars", 42, "old.jpg", both(1))
        until_version(site, 1)
        app.replace("avatars", 42, "old.jpg", "new.jpg", both(2))
        until_version(site, 2)

    assert {**old, **new} == site.objects()
    assert not site.query("SELECT * FROM replaced") and not proxy.requests("DELETE")
    site.demand_laws({**old, **new})


def test_rule_7_a_name_that_comes_back_is_live_again_and_stays(rclone_server: RcloneServer, tmp_path: Path) -> None:
    site = Site(tmp_path, rclone_server, spool={**THUMB, "replaced_after": "1h"})
    app = App(site.root)
    first, second = at(RECORD, "first.jpg", both(1)), at(RECORD, "second.jpg", both(2))

    with site.daemon(constants=BRISK) as daemon:
        app.save("avatars", 42, "first.jpg", both(1))
        daemon.until_event("record.cleared", record=RECORD)
        app.replace("avatars", 42, "first.jpg", "second.jpg", both(2))
        daemon.until_event("record.cleared", count=2, record=RECORD)
        app.replace("avatars", 42, "second.jpg", "first.jpg", both(1))
        daemon.until_event("record.cleared", count=3, record=RECORD)
    site.change("UPDATE replaced SET due_at = 0")
    before = site.objects()
    with site.daemon(constants=OFTEN):
        until(lambda: site.keys() == set(first), "only the second name's keys are deleted")

    assert {**first, **second} == before
    site.demand_laws(first)


def test_rule_7_the_fuse_holds_deletions_back_says_so_and_lets_go_when_it_is_raised(
    rclone_server: RcloneServer, tmp_path: Path
) -> None:
    site = Site(tmp_path, rclone_server, spool={**THUMB, "replaced_after": "0s", "max_deletes_per_hour": 1})
    app = App(site.root)
    new = at(RECORD, "new.jpg", both(2))

    with site.daemon(constants=OFTEN) as daemon:
        app.save("avatars", 42, "old.jpg", both(1))
        until_version(site, 1)
        app.replace("avatars", 42, "old.jpg", "new.jpg", both(2))
        until_version(site, 2)
        held_back = daemon.until_event("deletes.held_back")
        until(lambda: 1 == len(site.query("SELECT * FROM replaced")), "one key is deleted, and the other one waits")

        assert "max_deletes_per_hour" in held_back["hint"]
        assert 3 == len(site.keys())
        site.settings["spools"][0]["max_deletes_per_hour"] = 5
        site.write_config()
        daemon.process.send_signal(signal.SIGHUP)
        until(lambda: site.keys() == set(new), "the other one is deleted too")

    site.demand_laws(new)


# Styles that come later


def test_rule_3_a_style_made_again_later_joins_its_live_record(
    proxy: FaultProxy, rclone_server: RcloneServer, tmp_path: Path
) -> None:
    site = Site(
        tmp_path, rclone_server, endpoint_url=proxy.endpoint_url,
        spool={"complete": {"styles": ["thumb", "medium"]}, "replaced_after": "0s"},
    )  # fmt: skip
    app = App(site.root)
    files = {**both(1), "medium": photo(9)}
    remade = {"thumb": photo(10)}
    written = at(RECORD, "me.jpg", {**files, **remade})

    with site.daemon(constants=OFTEN) as daemon:
        app.save("avatars", 42, "me.jpg", files)
        until_version(site, 1)
        app.save("avatars", 42, "me.jpg", remade)
        row = until_version(site, 2)

        daemon.demand_legal_path(RECORD)

    assert 3 == row["files"]
    assert not site.query("SELECT * FROM replaced") and not proxy.requests("DELETE")
    assert [1, 1, 2] == sorted(map(len, puts(proxy).values()))
    site.demand_laws(written)


def test_rule_3_a_style_without_an_original_anywhere_waits_for_it(rclone_server: RcloneServer, tmp_path: Path) -> None:
    site = Site(tmp_path, rclone_server, spool=THUMB)
    app = App(site.root)

    with site.daemon(constants=BRISK) as daemon:
        app.save("avatars", 42, "me.jpg", {"thumb": both(1)["thumb"]})
        site.until_state(RECORD, "receiving")
        until(lambda: "no original" in site.spoold("why", RECORD).stdout, "why says what it waits for")
        app.save("avatars", 42, "me.jpg", {"original": both(1)["original"]})
        site.until_state(RECORD, "done")

        daemon.demand_legal_path(RECORD)

    site.demand_laws(at(RECORD, "me.jpg", both(1)))


def test_delayed_processing_the_original_goes_up_now_and_its_styles_join_it_later(
    rclone_server: RcloneServer, tmp_path: Path
) -> None:
    site = Site(tmp_path, rclone_server, spool={"replaced_after": "0s"})
    app = App(site.root)
    files = {**both(1), "medium": photo(9)}

    with site.daemon(constants=OFTEN) as daemon:
        app.save("avatars", 42, "me.jpg", {"original": files.pop("original")})
        first = until_version(site, 1)
        app.save("avatars", 42, "me.jpg", files)
        second = until_version(site, 2)

        assert ["batch.settled", "batch.claimed", "batch.stored", "record.cleared"] == daemon.demand_legal_path(RECORD)[-4:]

    assert (1, 0) == (first["files"], first["processing"])
    assert (3, 0) == (second["files"], second["processing"])
    site.demand_laws(at(RECORD, "me.jpg", {**both(1), **files}))


# Records that do not get there


def test_a_record_that_never_completes_stalls_once_stays_and_goes_up_when_it_completes(
    rclone_server: RcloneServer, tmp_path: Path
) -> None:
    site = Site(tmp_path, rclone_server, spool={"complete": {"styles": ["thumb"], "within": "500ms"}, "sweep_every": "200ms"})
    app = App(site.root)

    with site.daemon(constants=BRISK) as daemon:
        app.save("avatars", 42, "me.jpg", {"original": both(1)["original"]})
        stalled = site.until_state(RECORD, "stalled")
        sweeps = len(daemon.events("sweep.finished"))
        daemon.until_event("sweep.finished", count=sweeps + 3)
        files, objects = site.files(), site.objects()
        waited = site.spoold("wait", RECORD, "--timeout", "200ms")
        app.save("avatars", 42, "me.jpg", {"thumb": both(1)["thumb"]})
        site.until_state(RECORD, "done")

        [line] = daemon.events("record.stalled", record=RECORD)
        assert "warning" == line["level"] and "thumb" in line["detail"]
        daemon.demand_legal_path(RECORD)

    assert (1, "Stalled") == (stalled["processing"], stalled["error_code"]) and "thumb" in stalled["error"]
    assert {f"{RECORD}/original/me.jpg": both(1)["original"]} == files and not objects
    assert 75 == waited.returncode and "thumb" in waited.stderr
    site.demand_laws(at(RECORD, "me.jpg", both(1)))


def test_rule_1_a_rolled_back_saves_basename_waits_without_holding_back_the_others(
    rclone_server: RcloneServer, tmp_path: Path
) -> None:
    """The database gave the id to another row, so one directory holds two basenames (FACTS 4)."""
    site = Site(tmp_path, rclone_server, spool=THUMB)
    app = App(site.root)
    orphan = {f"{RECORD}/original/orphan.jpg": photo(9)}

    with site.daemon(constants=BRISK) as daemon:
        app.save("avatars", 42, "orphan.jpg", {"original": photo(9)})
        site.until_state(RECORD, "receiving")
        app.save("avatars", 42, "me.jpg", both(1))
        daemon.until_event("record.cleared", record=RECORD)
        row = site.status(RECORD)
        why = site.spoold("why", RECORD).stdout
        files, objects = site.files(), site.objects()
        app.save("avatars", 42, "orphan.jpg", {"thumb": photo(10)})
        site.until_state(RECORD, "done")

        daemon.demand_legal_paths(RECORD)

    assert ("receiving", 1, 3) == (row["state"], row["processing"], row["files"])
    assert "orphan" in why and "thumb" in why
    assert orphan == files
    assert at(RECORD, "me.jpg", both(1)) == objects
    site.demand_nothing_left()
    assert {"original": photo(9), "thumb": photo(10)}.items() <= {
        row["style"]: site.objects()[row["key"]]
        for row in site.query("SELECT style, key FROM record_object WHERE filename = 'orphan.jpg'")
    }.items()


def test_rule_1_the_waiting_basename_may_go_away_again(rclone_server: RcloneServer, tmp_path: Path) -> None:
    """What is in the bucket is not gone, whatever became of the rest."""
    site = Site(tmp_path, rclone_server, spool=THUMB)
    app = App(site.root)

    with site.daemon(constants=BRISK) as daemon:
        app.save("avatars", 42, "orphan.jpg", {"original": photo(9)})
        app.save("avatars", 42, "me.jpg", both(1))
        daemon.until_event("record.cleared", record=RECORD)
        app.destroy("avatars", 42, "orphan.jpg")
        row = site.until_state(RECORD, "done")

        daemon.demand_legal_paths(RECORD)

    assert (0, 2) == (row["processing"], row["files"])
    site.demand_laws(at(RECORD, "me.jpg", both(1)))


@pytest.mark.parametrize("is_new_version", [False, True])
def test_a_record_that_stays_done_is_not_logged_as_gone(
    is_new_version: bool, rclone_server: RcloneServer, tmp_path: Path
) -> None:
    """Contract, section 4: after `record.gone` the state is `gone`. The app removed what waited; the rest is uploaded."""
    site = Site(tmp_path, rclone_server, spool=THUMB)
    app = App(site.root)

    with site.daemon(constants=BRISK) as daemon:
        app.save("avatars", 42, "me.jpg", both(1))
        site.until_state(RECORD, "done")
        name = "me.jpg" if is_new_version else "orphan.jpg"
        app.save("avatars", 42, name, {"original": photo(9)})
        site.until_state(RECORD, "receiving")
        app.destroy("avatars", 42, name)
        site.until_state(RECORD, "done")

        assert not daemon.events("record.gone")
        daemon.demand_legal_path(RECORD)


def test_a_record_that_the_app_destroys_before_its_upload_is_gone(rclone_server: RcloneServer, tmp_path: Path) -> None:
    """Paperclip prunes empty directories upwards with no floor: our house keeps the root from it (FACTS 6)."""
    site = Site(tmp_path, rclone_server, spool=THUMB)
    app = App(site.root)

    with site.daemon(constants=BRISK) as daemon:
        app.save("avatars", 42, "me.jpg", {"original": photo(1)})
        site.until_state(RECORD, "receiving")
        app.destroy("avatars", 42, "me.jpg")
        row = site.until_state(RECORD, "gone")
        waited = site.spoold("wait", RECORD, "--timeout", "5s")

        assert ["record.seen", "record.gone"] == daemon.demand_legal_path(RECORD)
        app.save("avatars", 42, "me.jpg", both(1))
        site.until_state(RECORD, "done")
        daemon.demand_legal_path(RECORD)

    assert (0, None) == (row["processing"], row["error"])
    assert 69 == waited.returncode and "gone" in waited.stderr
    site.demand_laws(at(RECORD, "me.jpg", both(1)))


def test_a_record_that_the_app_destroys_during_its_upload_is_gone(
    proxy: FaultProxy, rclone_server: RcloneServer, tmp_path: Path
) -> None:
    site = Site(tmp_path, rclone_server, endpoint_url=proxy.endpoint_url, spool=THUMB)
    app = App(site.root)
    gate = threading.Event()
    proxy.on("PUT", "/original/", Hold(gate), times=1)

    with site.daemon(constants=BRISK) as daemon:
        app.save("avatars", 42, "me.jpg", both(1))
        proxy.await_seen("PUT", "/original/")
        app.destroy("avatars", 42, "me.jpg")
        gate.set()
        row = site.until_state(RECORD, "gone", "done")
        until(lambda: not site.query("SELECT * FROM claim"), "nobody works on it")
        row = site.status(RECORD)

        daemon.demand_legal_path(RECORD)

    # Bytes that fit into memory were read before they left: then all of it may have arrived, and be proven in time.
    assert row["state"] == "gone" or (row["state"], len(site.objects())) == ("done", 2)
    assert 0 == row["processing"]
    site.demand_nothing_left()


def test_a_root_that_vanishes_and_returns_is_served_again(rclone_server: RcloneServer, tmp_path: Path) -> None:
    site = Site(tmp_path, rclone_server, spool=THUMB)
    app = App(site.root)

    with site.daemon(constants=BRISK) as daemon:
        app.save("avatars", 42, "me.jpg", both(1))
        site.until_state(RECORD, "done")
        shutil.rmtree(site.root)
        held = daemon.until_event("spool.held")
        app.save("avatars", 43, "me.jpg", both(2))
        site.until_state("avatars/43", "done")

        assert "SpoolBroken" == held["error"] and "mkdir" in held["hint"]
        assert 0o700 == (site.root / ".spoold").stat().st_mode & 0o777
        daemon.demand_legal_path("avatars/43")

    site.demand_laws({**at(RECORD, "me.jpg", both(1)), **at("avatars/43", "me.jpg", both(2))})


def test_a_root_that_is_replaced_at_once_is_served_again(rclone_server: RcloneServer, tmp_path: Path) -> None:
    """Nobody sees it missing; it is another directory (FACTS 13)."""
    site = Site(tmp_path, rclone_server, spool=THUMB)
    app = App(site.root)
    new = App(tmp_path / "new")
    new.save("avatars", 42, "me.jpg", both(1))

    with site.daemon(constants=BRISK) as daemon:
        site.root.rename(tmp_path / "old")
        new.root.rename(site.root)
        daemon.until_event("watch.restarted")
        app.save("avatars", 43, "me.jpg", both(2))
        site.until_state(RECORD, "done")
        site.until_state("avatars/43", "done")

    site.demand_laws({**at(RECORD, "me.jpg", both(1)), **at("avatars/43", "me.jpg", both(2))})


# Layouts and names


def test_a_capistrano_root_is_a_link_that_moves_from_release_to_release(rclone_server: RcloneServer, tmp_path: Path) -> None:
    shared = tmp_path / "shared" / "system"
    shared.mkdir(parents=True)
    for release in ("1", "2"):
        public = tmp_path / "releases" / release / "public"
        public.mkdir(parents=True)
        (public / "system").symlink_to(shared)
    current = tmp_path / "current"
    current.symlink_to(tmp_path / "releases" / "1")
    site = Site(tmp_path, rclone_server, spool={**THUMB, "root": str(current / "public" / "system")})
    site.root = current / "public" / "system"

    with site.daemon(constants=BRISK) as daemon:
        App(site.root).save("avatars", 42, "me.jpg", both(1))
        site.until_state(RECORD, "done")
        (tmp_path / "next").symlink_to(tmp_path / "releases" / "2")
        (tmp_path / "next").rename(current)
        App(site.root).save("avatars", 43, "me.jpg", both(2))
        site.until_state("avatars/43", "done")

        daemon.demand_legal_path("avatars/43")

    site.demand_laws({**at(RECORD, "me.jpg", both(1)), **at("avatars/43", "me.jpg", both(2))})


ODD_NAMES = [
    "it's \"quoted\" & <tagged>.jpg", "tab\there.jpg", "new\nline.jpg", "Ünïcode ✓ 😀.jpg", "-rf.jpg", ".htaccess",
    ".hidden.jpg", "noext.", "noext", "100%25+a=b?c#d;e,f.jpg", "back\\slash.jpg", "*.jpg", "..jpg", " spaces .jpg ",
    ":style:id.jpg", "a.tar.gz", "long" * 60 + ".jpg",
]  # fmt: skip


def test_odd_names_go_up_under_exactly_these_names(rclone_server: RcloneServer, tmp_path: Path) -> None:
    template = ":attachment/:id/:style/:filename"
    site = Site(tmp_path, rclone_server, spool={"path": template, "key": template})
    written = {f"avatars/{number}/original/{name}": photo(number) for number, name in enumerate(ODD_NAMES)}

    with site.daemon(constants=BRISK) as daemon:
        for path, content in written.items():
            (site.root / path).parent.mkdir(parents=True)
            (site.root / path).write_bytes(content)
        for number in range(len(ODD_NAMES)):
            site.until_state(f"avatars/{number}", "done")
            daemon.demand_legal_path(f"avatars/{number}")
        until(lambda: site.directories() == {"avatars"}, "the records' directories are gone")

    site.demand_laws(written)
    assert set(ODD_NAMES) == {row["filename"] for row in site.query("SELECT filename FROM record_object")}


DEFAULT_LAYOUT = ":class/:attachment/:id_partition/:style/:filename"


@pytest.mark.parametrize("id", [42, 1_000_000_007])
def test_paperclips_default_layout_works(id: int, rclone_server: RcloneServer, tmp_path: Path) -> None:
    site = Site(tmp_path, rclone_server, spool={**THUMB, "path": DEFAULT_LAYOUT, "key": DEFAULT_LAYOUT})
    written = {
        interpolate(DEFAULT_LAYOUT, "avatars", id, style, "me.jpg"): content for style, content in both(1).items()
    }  # fmt: skip
    record = os.path.dirname(os.path.dirname(next(iter(written))))

    with site.daemon(constants=BRISK) as daemon:
        App(site.root, DEFAULT_LAYOUT).save("avatars", id, "me.jpg", both(1))
        row = site.until_state(record, "done")
        until(lambda: site.directories() == {"users", "users/avatars"}, "the record's directories are gone")

        daemon.demand_legal_path(record)

    assert ("avatars", str(id)) == (row["attachment"], row["record_id"])
    site.demand_laws(written)


def test_a_key_with_the_originals_fingerprint_also_for_styles_made_later(rclone_server: RcloneServer, tmp_path: Path) -> None:
    key = ":attachment/:id/:fingerprint/:style/:basename.:extension"
    site = Site(tmp_path, rclone_server, spool={"key": key})
    app = App(site.root)
    fingerprint = hashlib.md5(both(1)["original"]).hexdigest()

    with site.daemon(constants=BRISK) as daemon:
        app.save("avatars", 42, "me.jpg", {"original": both(1)["original"]})
        until_version(site, 1)
        app.save("avatars", 42, "me.jpg", {"thumb": both(1)["thumb"]})
        until_version(site, 2)

        daemon.demand_legal_path(RECORD)

    assert {f"{RECORD}/{fingerprint}/{style}/me.jpg": content for style, content in both(1).items()} == site.objects()
    site.demand_nothing_left()


def test_attachments_with_only_an_original_go_up_beside_others(rclone_server: RcloneServer, tmp_path: Path) -> None:
    site = Site(tmp_path, rclone_server, spool={"complete": {"styles": {"avatars": ["thumb"], "default": []}}})
    app = App(site.root)

    with site.daemon(constants=BRISK) as daemon:
        app.save("avatars", 42, "me.jpg", both(1))
        app.save("documents", 7, "cv.pdf", {"original": b"%PDF-1.4 %%EOF"})
        site.until_state(RECORD, "done")
        site.until_state("documents/7", "done")

        daemon.demand_legal_path("documents/7")

    site.demand_laws({**at(RECORD, "me.jpg", both(1)), "documents/7/original/cv.pdf": b"%PDF-1.4 %%EOF"})


def test_a_layout_without_styles_works(rclone_server: RcloneServer, tmp_path: Path) -> None:
    site = Site(tmp_path, rclone_server, spool={"path": "documents/:id/:filename", "key": "documents/:id/:filename"})
    written = {"documents/7/cv.pdf": b"%PDF-1.4 %%EOF", "documents/7/cv.txt": b"I was born"}

    with site.daemon(constants=BRISK):
        (site.root / "documents" / "7").mkdir(parents=True)
        for path, content in written.items():
            (site.root / path).write_bytes(content)
        site.until_state("documents/7", "done")
        until(lambda: site.directories() == {"documents"}, "the record's directory is gone")

    site.demand_laws(written)


def test_two_spools_do_not_get_in_each_others_way(rclone_server: RcloneServer, tmp_path: Path) -> None:
    """One waits for its bucket; the other one works, with a record of the same path."""
    site = Site(tmp_path, rclone_server, spool=THUMB)
    (tmp_path / "second").mkdir()
    second = Site(tmp_path / "second", rclone_server)
    client = rclone_server.client()
    client.delete_bucket(Bucket=second.bucket)
    site.settings["spools"].append({**second.settings["spools"][0], **THUMB, "name": "second"})
    site.write_config()

    with site.daemon(constants=BRISK) as daemon:
        App(second.root).save("avatars", 42, "me.jpg", both(2))
        daemon.until_event("spool.held", spool="second")
        App(site.root).save("avatars", 42, "me.jpg", both(1))
        daemon.until_event("record.cleared", spool="uploads", record=RECORD)
        ambiguous = site.spoold("why", RECORD)
        why = site.spoold("why", "--spool", "second", RECORD)
        rclone_server.create_bucket(second.bucket)
        daemon.until_event("record.cleared", spool="second", record=RECORD)

    assert 69 == ambiguous.returncode and "--spool" in ambiguous.stderr
    assert "held" in why.stdout
    site.demand_laws(at(RECORD, "me.jpg", both(1)))
    second.demand_laws(at(RECORD, "me.jpg", both(2)))


# Local files that stay, or are not ours to take


def looks(root: Path) -> dict[str, tuple[int, int, int, int]]:
    """Return what stat says of everything below a root but our house."""
    return {
        str(path.relative_to(root)): (status.st_ino, status.st_mode, status.st_mtime_ns, status.st_ctime_ns)
        for path in root.rglob("*")
        if ".spoold" not in path.parts and (status := path.lstat())
    }


def test_a_copy_becomes_a_move_when_the_configuration_says_so(rclone_server: RcloneServer, tmp_path: Path) -> None:
    """The careful way to begin: copy, compare, then set cleanup.delete. What was copied before goes too."""
    site = Site(tmp_path, rclone_server, spool={**THUMB, "cleanup": {"delete": False}})
    written = at(RECORD, "me.jpg", both(1))
    with site.daemon(constants=BRISK):
        App(site.root).save("avatars", 42, "me.jpg", both(1))
        site.until_state(RECORD, "done")
    copied = site.files()

    site.settings["spools"][0]["cleanup"]["delete"] = True
    site.write_config()
    with site.daemon(constants=BRISK):
        until(lambda: not site.files(), "what was copied has gone")
        site.until_state(RECORD, "done")

    assert written == copied
    site.demand_laws(written)


def test_without_cleanup_it_is_a_copy_and_nothing_is_touched(
    proxy: FaultProxy, rclone_server: RcloneServer, tmp_path: Path
) -> None:
    site = Site(
        tmp_path, rclone_server, endpoint_url=proxy.endpoint_url, spool={**THUMB, "cleanup": {"delete": False}}
    )  # fmt: skip
    written = at(RECORD, "me.jpg", both(1))

    with site.daemon(constants=BRISK) as daemon:
        App(site.root).save("avatars", 42, "me.jpg", both(1))
        before = looks(site.root)
        row = site.until_state(RECORD, "done")
        daemon.demand_legal_path(RECORD)
    with site.daemon(constants=BRISK) as daemon:
        daemon.until_event("sweep.finished")
        why = site.spoold("why", f"{RECORD}/original/me.jpg").stdout

        assert [] == daemon.events(record=RECORD)

    assert 0 == row["processing"]
    assert "cleanup.delete" in why
    assert before == looks(site.root)
    assert written == site.files() == site.objects()
    assert [1, 1] == [len(bodies) for bodies in puts(proxy).values()]


def test_keep_for_keeps_local_files_for_a_while_after_their_upload(rclone_server: RcloneServer, tmp_path: Path) -> None:
    site = Site(tmp_path, rclone_server, spool={**THUMB, "cleanup": {"keep_for": "5s"}})
    written = at(RECORD, "me.jpg", both(1))

    with site.daemon(constants=BRISK) as daemon:
        App(site.root).save("avatars", 42, "me.jpg", both(1))
        row = site.until_state(RECORD, "uploaded")
        files = site.files()
        stored = daemon.until_event("batch.stored")
        why = site.spoold("why", RECORD).stdout
        set_aside = daemon.until_event("file.set_aside")
        site.until_state(RECORD, "done")

        daemon.demand_legal_path(RECORD)

    assert 0 == row["processing"] and written == files
    assert "keep_for" in why
    assert 2.0 <= seconds_between(stored, set_aside)
    site.demand_laws(written)


def seconds_between(first: Mapping[str, Any], second: Mapping[str, Any]) -> float:
    """Return how long after one line of the log another one came."""
    from datetime import datetime

    moments = [datetime.fromisoformat(line["timestamp"]) for line in (first, second)]
    return (moments[1] - moments[0]).total_seconds()


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Have a file open for writing."""
    with path.open("r+b", buffering=0) as file:
        yield file


def test_a_file_that_is_open_for_writing_waits_until_it_is_closed(rclone_server: RcloneServer, tmp_path: Path) -> None:
    """Also by another of its names, where no event tells that it was closed."""
    site = Site(tmp_path, rclone_server, spool={"complete": {"within": "600ms"}})
    library = tmp_path / "library.jpg"
    library.write_bytes(photo(1))
    linked = site.root / RECORD / "original" / "me.jpg"
    linked.parent.mkdir(parents=True)

    with site.daemon(constants=BRISK) as daemon:
        with opened(library):
            os.link(library, linked)
            site.until_state(RECORD, "receiving")
            stalled = site.until_state(RECORD, "stalled")
            why = site.spoold("why", RECORD).stdout
            objects = site.objects()
        site.until_state(RECORD, "done")

        daemon.demand_legal_path(RECORD)

    assert "open for writing" in why and "open for writing" in stalled["error"]
    assert not objects
    assert photo(1) == library.read_bytes()
    site.demand_laws({f"{RECORD}/original/me.jpg": photo(1)})


def test_rule_4_a_file_rewritten_with_its_old_mtime_is_new(rclone_server: RcloneServer, tmp_path: Path) -> None:
    site = Site(tmp_path, rclone_server, spool={"cleanup": {"keep_for": "2s"}, "complete": {"images": "none"}})
    first, second = b"first " * 1000, b"secnd " * 1000
    [path] = App(site.root).save("avatars", 42, "me.jpg", {"original": first}).values()

    with site.daemon(constants=BRISK) as daemon:
        site.until_state(RECORD, "uploaded")
        before = path.stat()
        with opened(path) as file:
            file.write(second)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        until_version(site, 2)

        daemon.demand_legal_path(RECORD)

    assert len(first) == len(second)
    site.demand_laws({f"{RECORD}/original/me.jpg": second})


def test_rule_4_a_file_with_an_mtime_far_in_the_future_goes_up_at_once(rclone_server: RcloneServer, tmp_path: Path) -> None:
    site = Site(tmp_path, rclone_server)

    with site.daemon(constants=BRISK):
        [path] = App(site.root).save("avatars", 42, "me.jpg", {"original": photo(1)}).values()
        os.utime(path, (4e9, 4e9))
        site.until_state(RECORD, "done")

    site.demand_laws({f"{RECORD}/original/me.jpg": photo(1)})


@pytest.mark.parametrize("restores_mtime", [False, True])
def test_rule_5_what_is_written_by_an_old_descriptor_during_the_grace_comes_back_and_goes_up(
    restores_mtime: bool, rclone_server: RcloneServer, tmp_path: Path
) -> None:
    """A writer that was pre-empted inside open() has the file as soon as it goes on, wherever it lies by then."""
    site = Site(tmp_path, rclone_server, spool={"cleanup": {"grace": "1500ms"}})
    first, second = b"first " * 1000, b"secnd " * 1000

    with site.daemon(constants=SOON) as daemon:
        App(site.root).save("avatars", 42, "notes.txt", {"original": first})
        until(site.aside, "the file is set aside")
        [path] = site.aside()
        before = path.stat()
        with opened(path) as file:
            file.write(second)
        if restores_mtime:
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        daemon.until_event("file.given_back", record=RECORD)
        until_version(site, 2)

        daemon.demand_legal_path(RECORD)

    site.demand_laws({f"{RECORD}/original/notes.txt": second})


def test_rule_5_a_file_that_is_still_open_when_its_grace_ends_comes_back_and_waits(
    rclone_server: RcloneServer, tmp_path: Path
) -> None:
    """The writer has it by another name, so that no event tells of what is written at last."""
    site = Site(tmp_path, rclone_server)
    library = tmp_path / "library.txt"
    first, second = b"first " * 1000, b"secnd " * 1000
    library.write_bytes(first)
    linked = site.root / RECORD / "original" / "notes.txt"
    linked.parent.mkdir(parents=True)

    with site.daemon(constants=SOON) as daemon:
        os.link(library, linked)
        until(site.aside, "the file is set aside")
        with opened(library) as file:
            daemon.until_event("file.given_back", record=RECORD)
            state = site.status(RECORD)["state"]
            file.write(second)
        until_version(site, 2)

        daemon.demand_legal_path(RECORD)

    assert "uploaded" == state
    assert second == library.read_bytes()
    site.demand_laws({f"{RECORD}/original/notes.txt": second})


def test_rule_9_what_comes_back_to_a_taken_name_is_kept_and_shown(rclone_server: RcloneServer, tmp_path: Path) -> None:
    site = Site(tmp_path, rclone_server, spool={"cleanup": {"grace": "1500ms"}})
    app = App(site.root)
    first, late, newest = b"first " * 1000, b"late  " * 1000, b"newest" * 1000

    with site.daemon(constants=BRISK) as daemon:
        app.save("avatars", 42, "notes.txt", {"original": first})
        until(site.aside, "the file is set aside")
        [path] = site.aside()
        app.save("avatars", 42, "notes.txt", {"original": newest})
        with opened(path) as file:
            file.write(late)
        line = daemon.until_event("file.given_back", record=RECORD)
        until_version(site, 2)
        status = site.spoold("status").stdout

        daemon.demand_legal_path(RECORD)

    [kept] = (site.root / ".spoold" / "kept").iterdir()
    assert late == kept.read_bytes()
    assert kept.name in line["detail"]
    assert ".spoold/kept" in status
    assert 0o700 == kept.parent.stat().st_mode & 0o777
    site.demand_nothing_stale({f"{RECORD}/original/notes.txt": newest})
    assert not site.files() and not site.aside()


def test_rule_10_strangers_files_stand_untouched_and_so_do_root_and_attachment(
    rclone_server: RcloneServer, tmp_path: Path
) -> None:
    site = Site(tmp_path, rclone_server, spool=THUMB)
    strangers = {
        "README": b"of the root", "avatars/README": b"of the attachment", f"{RECORD}/notes.txt": b"in the record",
        f"{RECORD}/thumb/deep/er.jpg": b"too deep", "other/place/entirely/far/away.txt": b"elsewhere",
    }  # fmt: skip
    for path, content in strangers.items():
        (site.root / path).parent.mkdir(parents=True, exist_ok=True)
        (site.root / path).write_bytes(content)
    empty = {"empty", "avatars/1", "avatars/2/original"}
    for path in empty:
        (site.root / path).mkdir(parents=True)
    before = {path: look for path, look in looks(site.root).items() if path in strangers}

    with site.daemon(constants=BRISK) as daemon:
        for record in (42, 43):
            App(site.root).save("avatars", record, "me.jpg", both(record))
            site.until_state(f"avatars/{record}", "done")
            daemon.demand_legal_path(f"avatars/{record}")
        until(lambda: not (site.root / "avatars/43").exists(), "the directory without strangers is gone")
        until(lambda: not (site.root / RECORD / "original").exists(), "and so is one beside strangers")
        ignored = [line["path"] for line in daemon.events("path.ignored")]

        assert len(set(ignored)) == len(ignored)
        assert {"README", "avatars/README", f"{RECORD}/notes.txt", f"{RECORD}/thumb/deep"} <= set(ignored)

    assert strangers == site.files()
    assert before == {path: look for path, look in looks(site.root).items() if path in strangers}
    assert {*empty, "avatars", RECORD, f"{RECORD}/thumb", f"{RECORD}/thumb/deep"} <= site.directories()
    assert {**at(RECORD, "me.jpg", both(42)), **at("avatars/43", "me.jpg", both(43))} == site.objects()
    assert not site.aside() and not site.query("SELECT * FROM claim")


def test_rule_10_the_last_record_leaves_root_and_attachment_standing(rclone_server: RcloneServer, tmp_path: Path) -> None:
    site = Site(tmp_path, rclone_server)

    with site.daemon(constants=BRISK) as daemon:
        App(site.root).save("avatars", 42, "me.jpg", {"original": photo(1)})
        until(lambda: (site.root / RECORD).exists(), "the record is written")
        site.until_state(RECORD, "done")
        until(lambda: not (site.root / RECORD).exists(), "the record's directory is gone")
        until(lambda: nothing_is_due(site, daemon), "everything is done")

    assert {"avatars"} == site.directories()
    site.demand_laws({f"{RECORD}/original/me.jpg": photo(1)})


def nothing_is_due(site: Site, daemon: Daemon) -> bool:
    assert daemon.process.poll() is None
    return not site.query("SELECT * FROM batch WHERE due_at IS NOT NULL") and not site.query("SELECT * FROM claim")
