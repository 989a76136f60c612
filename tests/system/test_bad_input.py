"""What should not be there, or not be so: it is said with its remedy, it holds up nothing else, nothing is followed or lost."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.paperclip import App, picture
from tests.servers import RcloneServer
from tests.system.harness import BRISK, Daemon, Site, until

RECORD = "avatars/42"
ME = f"{RECORD}/original/me.jpg"
OFTEN = {"sweep_every": "200ms"}
NOBODY = 65534
POWERLESS = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
"""Root without capabilities: other users' files are theirs. (A user of its own may not be able to read our Python.)"""
NO_LEASES = {**BRISK, "fcntl.F_SETLEASE": 9999}  # a kernel that has never heard of them

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to other users")


def photo(seed: int) -> bytes:
    return picture(40, 30, seed)


def swept(daemon: Daemon, times: int = 2) -> None:
    """Wait until everything was looked at a few more times."""
    sweeps = len(daemon.events("sweep.finished"))
    daemon.until_event("sweep.finished", count=sweeps + times)


def ignored(daemon: Daemon) -> dict[str, str]:
    """Return why each path was ignored; said twice is once too often."""
    lines = [(line["path"], line["detail"]) for line in daemon.events("path.ignored")]
    assert len(lines) == len(dict(lines)), lines
    return dict(lines)


# What is no file of the app


def test_rule_12_links_and_special_files_are_reported_once_never_opened_and_never_in_the_way(
    rclone_server: RcloneServer, tmp_path: Path
) -> None:
    site = Site(tmp_path, rclone_server, spool=OFTEN)
    secret = tmp_path / "secret"
    App(secret).save("avatars", 43, "me.jpg", {"original": b"not yours"})
    record = site.root / RECORD
    (record / "original").mkdir(parents=True)
    links = {
        "avatars/43": secret / "avatars" / "43",
        "covers": secret / "avatars",
        f"{RECORD}/thumb": secret / "avatars" / "43" / "original",
        f"{RECORD}/original/linked.jpg": secret / "avatars" / "43" / "original" / "me.jpg",
        f"{RECORD}/original/dangling.jpg": tmp_path / "nowhere",
        f"{RECORD}/original/loop.jpg": Path("loop.jpg"),
    }
    for path, target in links.items():
        (site.root / path).symlink_to(target)

    with site.daemon(constants=BRISK) as daemon, socket.socket(socket.AF_UNIX) as server:
        os.mkfifo(record / "original" / "fifo.jpg")
        here = os.open(record / "original", os.O_RDONLY)
        server.bind(f"/proc/self/fd/{here}/socket.jpg")  # its path is longer than a socket's may be
        os.close(here)
        App(site.root).save("avatars", 42, "me.jpg", {"original": photo(1)})
        site.until_state(RECORD, "done")
        swept(daemon)
        why = site.spoold("why", f"{RECORD}/original/fifo.jpg").stdout

        said = ignored(daemon)
        daemon.demand_legal_path(RECORD)

    assert {*links, f"{RECORD}/original/fifo.jpg", f"{RECORD}/original/socket.jpg"} == set(said)
    assert all("symbolic link" in said[path] for path in links)
    assert "FIFO" in said[f"{RECORD}/original/fifo.jpg"] and "socket" in said[f"{RECORD}/original/socket.jpg"]
    assert "never opens" in why
    assert {ME: photo(1)} == site.objects()
    assert {Path(path).name for path in said if Path(path).parent.name == "original"} == set(os.listdir(record / "original"))
    assert b"not yours" == (secret / "avatars" / "43" / "original" / "me.jpg").read_bytes()
    assert not site.aside() and not site.query("SELECT * FROM claim")


def test_rule_12_names_that_are_no_utf_8_are_reported_once_and_stay(rclone_server: RcloneServer, tmp_path: Path) -> None:
    site = Site(tmp_path, rclone_server, spool=OFTEN)
    root = os.fsencode(site.root)
    odd = [
        root + b"/avatars/42/original/m\xff.jpg",
        root + b"/avatars/\xe9t\xe9/original/me.jpg",
        root + b"/\xff/42/original/me.jpg",
    ]
    for path in odd:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(photo(9))

    with site.daemon(constants=BRISK) as daemon:
        App(site.root).save("avatars", 42, "me.jpg", {"original": photo(1)})
        site.until_state(RECORD, "done")
        swept(daemon)

        assert {"avatars/42/original/m\\udcff.jpg", "avatars/\\udce9t\\udce9", "\\udcff"} == set(ignored(daemon))

    assert {ME: photo(1)} == site.objects()
    assert all(photo(9) == Path(os.fsdecode(path)).read_bytes() for path in odd)


def mounting(directory: Path) -> list[str]:
    """Return the command that mounts a filesystem there, with a picture in it, for itself and its children only."""
    script = f"mount -t tmpfs none '{directory}' && cp '{directory}.jpg' '{directory}/me.jpg' && exec \"$@\""
    return ["unshare", "--mount", "sh", "-c", script, "sh"]


@pytest.mark.skipif(
    os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode != 0,
    reason="nobody may mount here",
)
def test_rule_12_a_foreign_mount_is_reported_once_and_not_entered(rclone_server: RcloneServer, tmp_path: Path) -> None:
    site = Site(tmp_path, rclone_server, spool=OFTEN)
    mounted = site.root / "avatars" / "43" / "original"
    mounted.mkdir(parents=True)
    mounted.with_suffix(".jpg").write_bytes(photo(9))

    with site.daemon(constants=BRISK, within=mounting(mounted)) as daemon:
        App(site.root).save("avatars", 42, "me.jpg", {"original": photo(1)})
        site.until_state(RECORD, "done")
        swept(daemon)

        assert "is mounted there" in ignored(daemon)["avatars/43/original"]

    assert {ME: photo(1)} == site.objects()


def test_a_key_over_1024_bytes_is_refused_and_the_records_other_files_go_up(
    rclone_server: RcloneServer, tmp_path: Path
) -> None:
    site = Site(tmp_path, rclone_server, spool={"key": f"{'deep/' * 180}:attachment/:id/:style/:basename.:extension", **OFTEN})
    app = App(site.root)
    long = "x" * 150 + ".jpg"

    with site.daemon(constants=BRISK) as daemon:
        app.save("avatars", 42, long, {"original": photo(9)})
        for number in (1, 2):
            app.save("avatars", 42, f"me{number}.jpg", {"original": photo(number), "thumb": photo(10 + number)})
        dead = daemon.until_event("batch.dead", record=RECORD)
        until(lambda: list(site.files()) == [f"{RECORD}/original/{long}"], "all others are let go")
        row = site.until_state(RECORD, "dead")
        why = site.spoold("why", f"{RECORD}/original/{long}").stdout
        swept(daemon)

        assert 1 == len(daemon.events("batch.dead"))
        daemon.demand_legal_paths(RECORD)

    assert "BadPath" == dead["error"] == row["error_code"] and "1024" in row["error"] and "1024" in why
    assert {photo(1), photo(2), photo(11), photo(12)} == set(site.objects().values())


def test_an_empty_file_that_claims_to_be_an_image_is_incomplete(rclone_server: RcloneServer, tmp_path: Path) -> None:
    site = Site(tmp_path, rclone_server, spool={"complete": {"within": "500ms"}})
    written = {ME: photo(1), f"{RECORD}/original/empty.txt": b""}

    with site.daemon(constants=BRISK) as daemon:
        App(site.root).save("avatars", 42, "empty.txt", {"original": b""})  # text may be empty
        [path] = App(site.root).save("avatars", 42, "me.jpg", {"original": b""}).values()
        row = site.until_state(RECORD, "stalled")
        until(lambda: list(site.files()) == [ME], "the empty text has gone up")
        path.write_bytes(photo(1))
        site.until_state(RECORD, "done")

        daemon.demand_legal_paths(RECORD)

    assert "it is empty" in row["error"] and "me.jpg" in row["error"]
    site.demand_laws(written)


@needs_root
def test_a_file_that_may_not_be_read_waits_without_holding_back_the_others(rclone_server: RcloneServer, tmp_path: Path) -> None:
    site = Site(
        tmp_path, rclone_server, spool={"complete": {"within": "500ms"}, "cleanup": {"without_leases": "trust"}, **OFTEN}
    )
    app = App(site.root)

    with site.daemon(constants=BRISK, within=POWERLESS) as daemon:
        [path] = app.save("avatars", 42, "private.jpg", {"original": photo(9)}).values()
        path.chmod(0o600)
        os.chown(path, NOBODY, NOBODY)
        app.save("avatars", 42, "me.jpg", {"original": photo(1)})
        row = site.until_state(RECORD, "stalled")
        until(lambda: not (site.root / ME).exists(), "the other one is let go")
        at_first = site.objects()
        path.chmod(0o644)
        site.until_state(RECORD, "done")

        daemon.demand_legal_paths(RECORD)

    assert "private.jpg" in row["error"] and "Permission denied" in row["error"]
    assert {ME: photo(1)} == at_first
    site.demand_laws({ME: photo(1), f"{RECORD}/original/private.jpg": photo(9)})


# Keys


def test_rule_8_of_two_records_with_one_key_the_second_is_dead(rclone_server: RcloneServer, tmp_path: Path) -> None:
    """Two spools with one bucket and one `key`: nothing but the ledger can tell."""
    site = Site(tmp_path, rclone_server)
    other_root = tmp_path / "other"
    other_root.mkdir()
    site.settings["spools"].append({**site.settings["spools"][0], "name": "other", "root": str(other_root)})
    site.write_config()
    other = App(other_root)

    with site.daemon(constants=BRISK) as daemon:
        App(site.root).save("avatars", 42, "me.jpg", {"original": photo(1)})
        daemon.until_event("record.cleared", spool="uploads", record=RECORD)
        [path] = other.save("avatars", 42, "me.jpg", {"original": photo(2)}).values()
        other.save("avatars", 43, "me.jpg", {"original": photo(3)})
        dead = daemon.until_event("batch.dead", spool="other", record=RECORD)
        daemon.until_event("record.cleared", spool="other", record="avatars/43")
        at_first, left = site.objects(), path.read_bytes()
        [row] = site.query("SELECT * FROM record_status WHERE spool = 'other' AND path = ?", RECORD)
    site.settings["spools"][1]["key"] = "other/:attachment/:id/:style/:basename.:extension"
    site.write_config()
    with site.daemon(constants=BRISK) as daemon:
        retried = site.spoold("retry", "--spool", "other", RECORD)
        daemon.until_event("record.cleared", spool="other", record=RECORD)

    assert "KeyTaken" == dead["error"] == row["error_code"]
    assert "of spool uploads" in dead["detail"] and "key" in dead["hint"]
    assert {ME: photo(1), "avatars/43/original/me.jpg": photo(3)} == at_first and photo(2) == left
    assert 0 == retried.returncode
    assert {**at_first, f"other/{ME}": photo(2)} == site.objects()
    site.demand_nothing_left()


@pytest.mark.parametrize(
    ("setting", "template"),
    [
        ("key", ":attachment/:style/:basename.:extension"),
        ("key", ":attachment/:id/:style.:extension"),
        ("path", ":style/:attachment/:id/:basename.:extension"),
    ],
)
def test_rule_8_templates_that_cannot_tell_records_apart_are_refused(
    setting: str, template: str, rclone_server: RcloneServer, tmp_path: Path
) -> None:
    site = Site(tmp_path, rclone_server, spool={setting: template})

    checked, ran = site.spoold("check"), site.spoold("run")

    assert 78 == checked.returncode == ran.returncode
    assert f"spools[0].{setting}" in checked.stderr and checked.stderr == ran.stderr


# Spools


def test_rule_9_another_ledgers_spool_is_refused_and_not_touched_until_the_mark_is_removed(
    rclone_server: RcloneServer, tmp_path: Path
) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    first = Site(tmp_path / "first", rclone_server)
    second = Site(tmp_path / "second", rclone_server, spool={"root": str(first.root)})
    second.root = first.root
    mark = first.root / ".spoold" / "owner"

    with first.daemon(constants=BRISK), second.daemon(constants=BRISK) as refused:
        held = refused.until_event("spool.held")
        App(first.root).save("avatars", 42, "me.jpg", {"original": photo(1)})
        first.until_state(RECORD, "done")
        status = second.spoold("status")

        assert not refused.events("record.seen")
    mine = mark.read_text().strip()
    App(first.root).save("avatars", 43, "me.jpg", {"original": photo(2)})
    with second.daemon(constants=BRISK) as daemon:
        daemon.until_event("spool.held")
        untouched = second.files()
        mark.unlink()
        second.until_state("avatars/43", "done")

        daemon.demand_legal_path("avatars/43")

    assert mine in held["detail"] and str(mark) in held["hint"]
    assert mine in status.stdout
    assert {"avatars/43/original/me.jpg": photo(2)} == untouched
    assert mine != mark.read_text().strip()
    assert {ME: photo(1)} == first.objects()
    second.demand_laws({"avatars/43/original/me.jpg": photo(2)})


@pytest.mark.parametrize("is_file", [False, True])
def test_a_root_that_is_not_there_at_the_start_is_said_and_served_once_it_is(
    is_file: bool, rclone_server: RcloneServer, tmp_path: Path
) -> None:
    site = Site(tmp_path, rclone_server)
    site.root.rmdir()
    if is_file:
        site.root.write_text("I am no directory")

    with site.daemon(constants=BRISK) as daemon:
        held = daemon.until_event("spool.held")
        status, why = site.spoold("status").stdout, site.spoold("why", RECORD)
        site.root.unlink(missing_ok=True)
        App(site.root).save("avatars", 42, "me.jpg", {"original": photo(1)})
        site.until_state(RECORD, "done")

        assert [held] == daemon.events("spool.held")
        daemon.until_event("spool.released")
        daemon.demand_legal_path(RECORD)

    assert "SpoolBroken" == held["error"] and str(site.root) in held["detail"]
    assert ("must be a directory" if is_file else f"mkdir -p {site.root}") in held["hint"]
    assert str(site.root) in status and "held" in status
    assert "Traceback" not in why.stderr
    site.demand_laws({ME: photo(1)})


@needs_root
@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_a_root_that_may_not_be_read_or_written_is_said_and_served_once_it_may(
    mode: int, rclone_server: RcloneServer, tmp_path: Path
) -> None:
    site = Site(tmp_path, rclone_server)
    App(site.root).save("avatars", 42, "me.jpg", {"original": photo(1)})
    os.chown(site.root, NOBODY, NOBODY)
    site.root.chmod(mode)

    with site.daemon(constants=BRISK, within=POWERLESS) as daemon:
        held = daemon.until_event("spool.held")
        files, objects = site.files(), site.objects()
        site.root.chmod(0o777)
        site.until_state(RECORD, "done")

        daemon.demand_legal_path(RECORD)

    assert "Permission denied" in held["detail"] and str(site.root) in held["hint"]
    assert {ME: photo(1)} == files and not objects
    site.demand_laws({ME: photo(1)})


def test_a_hold_of_one_spools_disk_does_not_stop_the_other(rclone_server: RcloneServer, tmp_path: Path) -> None:
    site = Site(tmp_path, rclone_server)
    missing = {**site.settings["spools"][0], "name": "missing", "root": str(tmp_path / "missing"), "key": f"m/{KEY}"}
    site.settings["spools"].append(missing)
    site.write_config()

    with site.daemon(constants=BRISK) as daemon:
        daemon.until_event("spool.held", spool="missing")
        App(site.root).save("avatars", 42, "me.jpg", {"original": photo(1)})
        site.until_state(RECORD, "done")

    site.demand_laws({ME: photo(1)})


KEY = ":attachment/:id/:style/:basename.:extension"


# Leases


@pytest.mark.parametrize("without_leases", ["keep", "trust"])
def test_where_the_kernel_has_no_leases_it_is_said_at_the_start_and_files_stay_or_go_as_configured(
    without_leases: str, rclone_server: RcloneServer, tmp_path: Path
) -> None:
    site = Site(tmp_path, rclone_server, spool={"cleanup": {"without_leases": without_leases}})

    with site.daemon(constants=NO_LEASES) as daemon:
        [said] = daemon.events("leases.unavailable")
        App(site.root).save("avatars", 42, "me.jpg", {"original": photo(1)})
        row = site.until_state(RECORD, "done")
        why = site.spoold("why", ME).stdout

        daemon.demand_legal_path(RECORD)

    assert ("stay" if without_leases == "keep" else "without asking") in said["detail"]
    assert 0 == row["processing"] and {ME: photo(1)} == site.objects()
    if without_leases == "keep":
        assert {ME: photo(1)} == site.files()
        assert "without_leases" in why
    else:
        site.demand_laws({ME: photo(1)})


@needs_root
@pytest.mark.parametrize("without_leases", ["keep", "trust"])
def test_where_the_files_are_another_users_they_stay_or_go_as_configured(
    without_leases: str, rclone_server: RcloneServer, tmp_path: Path
) -> None:
    """The kernel tells about writers only the owner, and those with CAP_LEASE."""
    site = Site(tmp_path, rclone_server, spool={"cleanup": {"without_leases": without_leases}})
    [path] = App(site.root).save("avatars", 42, "me.jpg", {"original": photo(1)}).values()
    os.chown(path, NOBODY, NOBODY)

    with site.daemon(constants=BRISK, within=POWERLESS) as daemon:
        site.until_state(RECORD, "done")

        daemon.demand_legal_path(RECORD)

    assert {ME: photo(1)} == site.objects()
    assert ({ME: photo(1)} if without_leases == "keep" else {}) == site.files()


# Configuration


def run_with(tmp_path: Path, text: str, *arguments: str) -> tuple[int, list[str]]:
    """Run a command with this configuration; return its exit code and what it said on standard error."""
    config = tmp_path / "config.yaml"
    config.write_text(textwrap.dedent(text))
    environment: Mapping[str, Any] = dict(os.environ)
    ended = subprocess.run(
        [sys.executable, "-m", "spoold", "-c", str(config), *arguments],
        env=environment, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    return ended.returncode, ended.stderr.splitlines()


@pytest.mark.parametrize("command", [("check",), ("run",), ("status",), ("run", "--once", "--dry-run")])
def test_every_mistake_of_a_configuration_is_said_at_once_with_its_place_and_its_remedy(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    code, said = run_with(
        tmp_path,
        f"""\
        state_dir: {tmp_path}/state
        s3:
          region: eu-central-1
          adressing_style: path
        spools:
          - name: uploads
            root: relative/path
            bucket: My_Bucket
            complete: {{settle: 5}}
        upload: {{concurrency: many}}
        log: {{format: xml}}
        """,
        *command,
    )

    places = [line.removeprefix(f"{tmp_path}/config.yaml:").split(": ", 2) for line in said]
    assert 78 == code
    assert [
        ("4", "s3.adressing_style"), ("7", "spools[0].root"), ("8", "spools[0].bucket"), ("9", "spools[0].complete.settle"),
        ("10", "upload.concurrency"), ("11", "log.format"),
    ] == [(place.split(":")[0], setting) for place, setting, _ in places]  # fmt: skip
    assert all(place.split(":")[1].isdigit() and ";" in text for place, _, text in places)
    assert "did you mean `addressing_style`?" in said[0]
    assert not (tmp_path / "state").exists()


def test_spools_that_overlap_are_refused(tmp_path: Path) -> None:
    (tmp_path / "spool" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "spool")

    code, said = run_with(
        tmp_path,
        f"""\
        state_dir: {tmp_path}/state
        spools:
          - {{name: outer, root: {tmp_path}/spool, bucket: outer}}
          - {{name: inner, root: {tmp_path}/link/inner, bucket: inner}}
        """,
        "run",
    )

    assert 78 == code
    assert 1 == len(said) and "config.yaml:4:" in said[0] and "spools[1].root" in said[0]


@pytest.mark.parametrize("text", ["spools: [", "- a\n- b\n", "", "\t", "spools: {a: b}\nspools: []\n"])
def test_what_is_no_configuration_is_said_in_a_line(text: str, tmp_path: Path) -> None:
    code, said = run_with(tmp_path, text, "check")

    assert 78 == code
    assert said and all(line.startswith(f"{tmp_path}/config.yaml") for line in said)


def test_a_configuration_that_is_not_there_is_said_in_a_line(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "spoold", "-c", str(tmp_path / "nowhere.yaml"), "run"],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip

    assert 78 == ended.returncode
    assert 1 == len(ended.stderr.splitlines()) and "nowhere.yaml" in ended.stderr
