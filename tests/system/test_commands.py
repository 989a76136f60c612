"""Every command, as a user meets it: what it says, how it exits, and that looking touches nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.paperclip import App, picture
from tests.proxy import SLOW_DOWN, Answer, Delay, FaultProxy, error_body
from tests.servers import RcloneServer
from tests.system.harness import Site, until

RECORD = "avatars/1"
KEY = "avatars/1/original/me.jpg"
COMPLETE = {"complete": {"styles": ["original", "thumb"]}}
FEW_TRIES = {"spoold.uploader._PERSISTENCE_S": 0.3}  # within one attempt; 8 s otherwise
NOT_EVER = Answer(400, error_body("InvalidStorageClass", "no such class"))


def photos(seed: int, *styles: str) -> dict[str, bytes]:
    return {style: picture(80, 60, seed) for style in styles or ("original", "thumb")}


@pytest.fixture
def proxy(rclone_server: RcloneServer) -> Iterator[FaultProxy]:
    with FaultProxy(rclone_server.endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def site(tmp_path: Path, rclone_server: RcloneServer, proxy: FaultProxy) -> Site:
    return Site(tmp_path, rclone_server, endpoint_url=proxy.endpoint_url, spool=COMPLETE)


@pytest.fixture
def paperclip(site: Site) -> App:
    return App(site.root)


def set_up(site: Site, **cleanup: object) -> None:
    """Change settings below `cleanup` of the site's spool."""
    site.settings["spools"][0]["cleanup"] |= cleanup
    site.write_config()


def everything(directory: Path) -> dict[str, tuple[int, int, int]]:
    """Return all that is below a directory, with what changes when it is touched."""
    found = {}
    for path in [directory, *directory.rglob("*")]:
        status = path.lstat()
        found[str(path)] = status.st_mtime_ns, status.st_ctime_ns, status.st_size
    return found


# run --once


def test_run_once_takes_everything_to_the_end_and_exits_0(site: Site, paperclip: App) -> None:
    paperclip.save("avatars", 1, "me.jpg", photos(1))

    run = site.spoold("run", "--once")

    assert 0 == run.returncode
    assert "done" == site.status(RECORD)["state"]
    assert {"avatars"} == site.directories(), "it waits for the directories too"
    site.demand_laws({f"avatars/1/{style}/me.jpg": content for style, content in photos(1).items()})


def test_run_once_with_nothing_to_do_exits_0(site: Site) -> None:
    assert 0 == site.spoold("run", "--once").returncode


def test_run_once_exits_75_if_a_record_is_left_incomplete_and_takes_the_others(site: Site, paperclip: App) -> None:
    paperclip.save("avatars", 1, "me.jpg", photos(1))
    paperclip.save("avatars", 2, "me.jpg", photos(2, "original"))

    run = site.spoold("run", "--once")

    assert 75 == run.returncode
    assert "done" == site.status(RECORD)["state"]
    assert {"avatars/2/original/me.jpg": photos(2)["original"]} == site.files()


def test_run_once_exits_75_if_a_record_is_dead(site: Site, paperclip: App, proxy: FaultProxy) -> None:
    proxy.on("PUT", KEY, NOT_EVER)
    paperclip.save("avatars", 1, "me.jpg", photos(1))

    assert 75 == site.spoold("run", "--once").returncode
    assert "dead" == site.status(RECORD)["state"]


def test_run_once_exits_69_if_the_destination_is_away_and_leaves_everything(
    site: Site, paperclip: App, proxy: FaultProxy
) -> None:
    proxy.go_away()
    paperclip.save("avatars", 1, "me.jpg", photos(1))

    run = site.spoold("run", "--once")

    assert 69 == run.returncode
    assert "Connection refused" in run.stdout
    assert 2 == len(site.files())
    assert 0 == site.status(RECORD)["attempts"]


def test_run_once_exits_75_if_another_daemon_is_at_what_is_left(site: Site, paperclip: App, proxy: FaultProxy) -> None:
    gate = threading.Event()
    proxy.on("PUT", KEY, Delay(gate))

    with site.daemon():
        paperclip.save("avatars", 1, "me.jpg", photos(1))
        proxy.await_seen("PUT", KEY)
        run = site.spoold("run", "--once")
        puts = len(proxy.requests("PUT", "avatars"))
        gate.set()
        site.until_state(RECORD, "done")

    assert 75 == run.returncode
    assert 1 == puts, "it kept out of the other's way"


def test_a_state_dir_that_cannot_be_is_said_in_one_line(site: Site) -> None:
    site.settings["state_dir"] = str(site.config / "state")
    site.write_config()

    run = site.spoold("run", "--once")

    assert (69, "") == (run.returncode, run.stdout)
    assert 1 == len(run.stderr.splitlines()) and "Not a directory; set state_dir" in run.stderr


def test_run_once_does_not_wait_for_keep_for(site: Site, paperclip: App) -> None:
    set_up(site, keep_for="1h")
    paperclip.save("avatars", 1, "me.jpg", photos(1))

    assert 0 == site.spoold("run", "--once").returncode
    assert "uploaded" == site.status(RECORD)["state"] and 2 == len(site.files())


# run --once --dry-run


def test_a_dry_run_says_what_would_go_where_and_what_would_stay_and_why_and_touches_nothing(
    site: Site, paperclip: App, tmp_path: Path
) -> None:
    paperclip.save("avatars", 1, "me.jpg", photos(1))
    paperclip.save("avatars", 2, "me.jpg", photos(2, "original"))
    (site.root / "README").write_text("not a record's")
    (site.root / "avatars" / "link").symlink_to("/etc/passwd")
    until(lambda: "3 would stay" in site.spoold("run", "--once", "--dry-run").stdout, "it has settled")
    before = everything(tmp_path)

    run = site.spoold("run", "--once", "--dry-run")

    assert 0 == run.returncode
    assert before == everything(tmp_path), "no .spoold, no state_dir, no ledger"
    assert f"uploads: {KEY} -> s3://{site.bucket}/{KEY}" in run.stdout.splitlines()
    assert "uploads: avatars/2/original/me.jpg stays: style thumb missing" in run.stdout.splitlines()
    assert "uploads: README stays: it does not fit the spool's layout" in run.stdout.splitlines()
    assert "uploads: avatars/link stays: it is a symbolic link" in run.stdout.splitlines()
    assert "2 would go up, 3 would stay; nothing was touched" == run.stdout.splitlines()[-1]
    assert not site.objects()


def test_a_dry_run_beside_a_ledger_leaves_out_what_is_uploaded(site: Site, paperclip: App) -> None:
    set_up(site, keep_for="1h")
    paperclip.save("avatars", 1, "me.jpg", photos(1))
    site.spoold("run", "--once")

    run = site.spoold("run", "--once", "--dry-run")

    assert f"uploads: {KEY} stays: the ledger has it: stored" in run.stdout
    assert "0 would go up, 2 would stay" in run.stdout


# check


def test_check_of_a_good_configuration_exits_0_says_what_it_is_about_and_touches_nothing(site: Site, tmp_path: Path) -> None:
    before = everything(tmp_path)

    check = site.spoold("check")

    assert 0 == check.returncode
    assert "no mistakes" in check.stdout and f"{site.root} -> s3://{site.bucket}" in check.stdout
    assert "min_age" in check.stderr and "below 5s" in check.stderr, "the harness is in a hurry"
    assert before == everything(tmp_path)


def test_check_names_every_mistake_with_its_place_and_exits_78(site: Site) -> None:
    site.settings["colour"] = "red"
    site.settings["upload"]["retry"]["initial"] = "soon"
    site.settings["spools"][0]["bucket"] = ""
    site.write_config()

    check = site.spoold("check")
    run = site.spoold("run")

    mistakes = check.stderr.splitlines()
    assert (78, 78) == (check.returncode, run.returncode)
    assert 3 == len(mistakes) and run.stderr == check.stderr
    assert all(re.fullmatch(rf"{re.escape(str(site.config))}:\d+:\d+: [\w\[\].]+: .+; .+", line) for line in mistakes)
    assert {"colour", "upload.retry.initial", "spools[0].bucket"} == {line.split(": ")[1] for line in mistakes}


def test_a_configuration_that_is_not_there_is_a_mistake_too(site: Site) -> None:
    site.config.unlink()

    check = site.spoold("check")

    assert 78 == check.returncode
    assert "No such file" in check.stderr and 1 == len(check.stderr.splitlines())


# status


def test_status_counts_the_records_of_each_state_and_names_those_in_trouble(
    site: Site, paperclip: App, proxy: FaultProxy
) -> None:
    proxy.on("PUT", "avatars/3", NOT_EVER)
    paperclip.save("avatars", 1, "me.jpg", photos(1))
    paperclip.save("avatars", 2, "me.jpg", photos(2, "original"))
    paperclip.save("avatars", 3, "me.jpg", photos(3))
    site.spoold("run", "--once")

    status = site.spoold("status")
    overview = json.loads(site.spoold("status", "--json").stdout)

    lines = [line.split() for line in status.stdout.splitlines()]
    assert 0 == status.returncode
    assert ["spool", "receiving", "queued", "dead", "uploaded", "done", "objects", "size"] == lines[0]
    assert ["uploads", "1", "0", "1", "0", "1", "2"] == lines[1][:7]
    assert any(["dead", "avatars/3", "put"] == line[:3] for line in lines)
    assert "no daemon is running" in status.stdout
    assert all(line == line.rstrip() for line in status.stdout.splitlines())
    assert {"receiving": 1, "dead": 1, "done": 1} == overview["spools"][0]["states"]
    assert ["avatars/3"] == [row["path"] for row in overview["troubled"]]
    assert 0 == overview["daemons"] and overview["spools"][0]["held"] is None


def test_status_says_nothing_of_a_daemon_that_runs(site: Site) -> None:
    with site.daemon():
        status = site.spoold("status")
        overview = json.loads(site.spoold("status", "--json").stdout)

    assert "no daemon" not in status.stdout and 1 == overview["daemons"]


def test_status_of_a_record_is_its_row_its_objects_and_its_history(site: Site, paperclip: App) -> None:
    paperclip.save("avatars", 1, "me.jpg", photos(1))
    site.spoold("run", "--once")

    shown = [site.spoold("status", name) for name in (RECORD, f"{RECORD}/", str(site.root / RECORD))]
    card = json.loads(site.spoold("status", RECORD, "--json").stdout)

    assert [0] * 3 == [status.returncode for status in shown] and 1 == len({status.stdout for status in shown})
    assert re.search(r"^state +done$", shown[0].stdout, re.MULTILINE)
    assert re.search(rf"^original +{KEY} +\d+ +image/jpeg$", shown[0].stdout, re.MULTILINE)
    assert "record.cleared" in shown[0].stdout
    assert site.status(RECORD).items() <= card.items()
    assert ["original", "thumb"] == [item["style"] for item in card["objects"]]
    events = ["record.seen", "batch.settled", "batch.claimed", "batch.stored", "record.cleared"]
    assert events == [line["event"] for line in card["history"]]


def test_status_of_a_record_that_nobody_knows_exits_69(site: Site) -> None:
    site.spoold("run", "--once")

    status = site.spoold("status", "avatars/77")

    assert (69, "") == (status.returncode, status.stdout)
    assert "avatars/77 is not known" in status.stderr


def test_status_in_a_terminal_fits_into_80_columns(site: Site, paperclip: App, proxy: FaultProxy) -> None:
    proxy.on("PUT", "avatars/3", NOT_EVER)
    paperclip.save("avatars", 1, "me.jpg", photos(1))
    paperclip.save("avatars", 3, "me.jpg", photos(3))
    site.spoold("run", "--once")

    for arguments in (("status",), ("status", RECORD), ("status", "avatars/3")):
        lines = in_terminal(site, *arguments)
        assert lines and max(map(len, lines)) <= 80
        assert not any("…" in line for line in lines), "nothing is cut off"


def in_terminal(site: Site, *arguments: str) -> list[str]:
    """Run a command in a terminal of 80 columns and return what it shows, without colours."""
    command = f"stty cols 80; exec {sys.executable} -m spoold -c {site.config} {' '.join(arguments)}"
    shown = subprocess.run(
        ["script", "-qec", command, "/dev/null"], env=site.environment | {"TERM": "xterm"}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    return re.sub(r"\x1b\[[0-9;]*m", "", shown.stdout).splitlines()


@pytest.mark.parametrize("command", [("status",), ("status", RECORD), ("retry", "--all")])
def test_what_needs_a_ledger_says_so_where_there_is_none_and_makes_none(
    site: Site, tmp_path: Path, command: tuple[str, ...]
) -> None:
    before = everything(tmp_path)

    done = site.spoold(*command)

    assert (69, "") == (done.returncode, done.stdout)
    assert "there is none yet" in done.stderr and "spoold run" in done.stderr and 1 == len(done.stderr.splitlines())
    assert before == everything(tmp_path)


# why

Scene = Callable[[Site, App, FaultProxy], str]
"""Brings something about and returns what `why` says of it."""


def asked(site: Site, path: str) -> str:
    why = site.spoold("why", path)
    assert (0, "") == (why.returncode, why.stderr)
    return why.stdout


def unseen(site: Site, paperclip: App, proxy: FaultProxy) -> str:
    paperclip.save("avatars", 1, "me.jpg", photos(1))
    until(lambda: "complete and not accepted yet" in asked(site, KEY), "it has settled")
    return asked(site, str(site.root / KEY))


def incomplete(site: Site, paperclip: App, proxy: FaultProxy) -> str:
    paperclip.save("avatars", 1, "me.jpg", photos(1, "original"))
    site.spoold("run", "--once")
    return asked(site, KEY)


def stalled(site: Site, paperclip: App, proxy: FaultProxy) -> str:
    site.settings["spools"][0]["complete"]["within"] = "400ms"
    site.write_config()
    paperclip.save("avatars", 1, "me.jpg", photos(1, "original"))
    with site.daemon():
        site.until_state(RECORD, "stalled")
    return asked(site, RECORD)


def gone(site: Site, paperclip: App, proxy: FaultProxy) -> str:
    with site.daemon():
        paperclip.save("avatars", 1, "me.jpg", photos(1, "original"))
        site.until_state(RECORD, "receiving")
        paperclip.destroy("avatars", 1, "me.jpg")
        site.until_state(RECORD, "gone")
    return asked(site, KEY)


def uploading(site: Site, paperclip: App, proxy: FaultProxy) -> str:
    gate = threading.Event()
    proxy.on("PUT", KEY, Delay(gate))
    with site.daemon():
        paperclip.save("avatars", 1, "me.jpg", photos(1))
        proxy.await_seen("PUT", KEY)
        said = asked(site, KEY)
        gate.set()
    return said


def held(site: Site, paperclip: App, proxy: FaultProxy) -> str:
    proxy.go_away()
    with site.daemon(constants=FEW_TRIES) as daemon:
        paperclip.save("avatars", 1, "me.jpg", photos(1))
        daemon.until_event("spool.held")
        until(lambda: not site.query("SELECT * FROM claim"), "the record is put back")
    return asked(site, KEY)


def retrying(site: Site, paperclip: App, proxy: FaultProxy) -> str:
    site.settings["upload"]["retry"] = {"initial": "1h", "max": "1h"}
    site.write_config()
    proxy.on("PUT", KEY, Answer(503, SLOW_DOWN))
    with site.daemon(constants=FEW_TRIES):
        paperclip.save("avatars", 1, "me.jpg", photos(1))
        site.until_state(RECORD, "retrying")
    return asked(site, KEY)


def dead(site: Site, paperclip: App, proxy: FaultProxy) -> str:
    proxy.on("PUT", KEY, NOT_EVER)
    paperclip.save("avatars", 1, "me.jpg", photos(1))
    site.spoold("run", "--once")
    return asked(site, KEY)


def too_young(site: Site, paperclip: App, proxy: FaultProxy) -> str:
    set_up(site, min_age="1h")
    with site.daemon():
        paperclip.save("avatars", 1, "me.jpg", photos(1))
        until(lambda: site.query("SELECT * FROM batch WHERE waiting_for = 'min_age'"), "it waits for its age")
    return asked(site, KEY)


def in_grace(site: Site, paperclip: App, proxy: FaultProxy) -> str:
    set_up(site, grace="1h")
    with site.daemon():
        paperclip.save("avatars", 1, "me.jpg", photos(1))
        until(lambda: site.query("SELECT * FROM batch WHERE waiting_for = 'grace'"), "it waits for its last look")
    return asked(site, KEY)


def in_the_aside(site: Site, paperclip: App, proxy: FaultProxy) -> str:
    in_grace(site, paperclip, proxy)
    return asked(site, str(site.aside()[0]))


def kept_for(site: Site, paperclip: App, proxy: FaultProxy) -> str:
    set_up(site, keep_for="1h")
    paperclip.save("avatars", 1, "me.jpg", photos(1))
    site.spoold("run", "--once")
    return asked(site, KEY)


def open_for_writing(site: Site, paperclip: App, proxy: FaultProxy) -> str:
    set_up(site, keep_for="600ms")
    with site.daemon():
        paperclip.save("avatars", 1, "me.jpg", photos(1))
        site.until_state(RECORD, "uploaded")
        with paperclip.hold_open(site.root / KEY):
            until(lambda: site.query("SELECT * FROM batch WHERE waiting_for = 'open'"), "it is found open")
            return asked(site, KEY)


def done(site: Site, paperclip: App, proxy: FaultProxy) -> str:
    paperclip.save("avatars", 1, "me.jpg", photos(1))
    site.spoold("run", "--once")
    return asked(site, KEY)


def done_record(site: Site, paperclip: App, proxy: FaultProxy) -> str:
    done(site, paperclip, proxy)
    return asked(site, RECORD)


def empty_directory(site: Site, paperclip: App, proxy: FaultProxy) -> str:
    set_up(site, keep_empty_dirs_for="1h")
    with site.daemon():
        paperclip.save("avatars", 1, "me.jpg", photos(1))
        site.until_state(RECORD, "done")
    return asked(site, RECORD)


def copied(site: Site, paperclip: App, proxy: FaultProxy) -> str:
    set_up(site, delete=False)
    paperclip.save("avatars", 1, "me.jpg", photos(1))
    site.spoold("run", "--once")
    return asked(site, KEY)


def never_heard_of(site: Site, paperclip: App, proxy: FaultProxy) -> str:
    done(site, paperclip, proxy)
    return asked(site, "avatars/1/original/another.jpg")


def strangers_file(site: Site, paperclip: App, proxy: FaultProxy) -> str:
    (site.root / "README").write_text("not a record's")
    return asked(site, "README")


def strange_name(site: Site, paperclip: App, proxy: FaultProxy) -> str:
    (site.root / "avatars/1/original").mkdir(parents=True)
    path = os.fsencode(site.root) + b"/avatars/1/original/\xff.jpg"
    with open(path, "wb") as file:
        file.write(photos(1)["original"])
    return asked(site, os.fsdecode(path))


def symlink(site: Site, paperclip: App, proxy: FaultProxy) -> str:
    (site.root / "avatars/1/original").mkdir(parents=True)
    (site.root / KEY).symlink_to("/etc/passwd")
    return asked(site, KEY)


def special_file(site: Site, paperclip: App, proxy: FaultProxy) -> str:
    (site.root / "avatars/1/original").mkdir(parents=True)
    os.mkfifo(site.root / KEY)
    return asked(site, KEY)


def kept(site: Site, paperclip: App, proxy: FaultProxy) -> str:
    done(site, paperclip, proxy)
    (site.root / ".spoold/kept/1.1.abc").write_bytes(b"what came back")
    return asked(site, ".spoold/kept/1.1.abc")


def house(site: Site, paperclip: App, proxy: FaultProxy) -> str:
    site.spoold("run", "--once")
    return asked(site, ".spoold/canary")


def root(site: Site, paperclip: App, proxy: FaultProxy) -> str:
    return asked(site, str(site.root))


def attachment(site: Site, paperclip: App, proxy: FaultProxy) -> str:
    (site.root / "avatars").mkdir()
    return asked(site, "avatars")


def nothing_there(site: Site, paperclip: App, proxy: FaultProxy) -> str:
    return asked(site, "avatars/9")


WENT = rf"^{KEY} went to s3://bucket-\d+/{KEY}, proven at 20\S+Z, and its local file was let go"
IS_IN = rf"^{KEY} is in s3://bucket-\d+/{KEY}, proven at 20\S+Z, and "


@pytest.mark.parametrize(
    ("scene", "says"),
    [
        (unseen, rf"^{KEY} is complete and not accepted yet: a running daemon does so within moments"),
        (incomplete, rf"^{KEY} waits because .* not complete \(me: style thumb missing\).* retry --as-is {RECORD}"),
        (stalled, rf"^{RECORD} waits because .* not complete \(me: style thumb missing\).* retry --as-is {RECORD}"),
        (gone, rf"^{KEY} is gone: the app removed it before it was uploaded"),
        (uploading, rf"^{KEY} is being uploaded right now"),
        (held, rf"^{KEY} waits because spool uploads is held since 20\S+Z \(.*Connection refused.*\); it goes on by itself"),
        (retrying, rf"^{KEY} waits for another attempt at 20\S+Z.*503 SlowDown.*: spoold retry {RECORD}"),
        (dead, rf"^{KEY} stays because its upload was given up \(.*no such class\); .*storage_class.*spoold retry {RECORD}"),
        (too_young, rf"{IS_IN}is too young to be set aside \(cleanup.min_age\); the next look is at 20\S+Z"),
        (in_grace, rf"{IS_IN}is set aside and waits for its last look \(cleanup.grace\); the next look is at 20\S+Z"),
        (in_the_aside, r"^\.spoold/aside/\S+ is set aside .* let go or given back"),
        (kept_for, rf"{IS_IN}is kept for a while .*\(cleanup.keep_for\); the next look is at 20\S+Z"),
        (open_for_writing, rf"{IS_IN}is open for writing by some process \(.*fuser"),
        (done, WENT),
        (done_record, rf"^{RECORD} went to s3://bucket-\d+/ \(2 objects\), proven at 20\S+Z, and its local files were let go"),
        (empty_directory, rf"^{RECORD} went to .* its directory goes once it is empty and 3600 s old"),
        (copied, rf"{IS_IN}stays here because cleanup.delete is false"),
        (never_heard_of, r"^avatars/1/original/another.jpg is not in spool uploads, and its ledger has never heard of it"),
        (strangers_file, r"^README stays: it does not fit the layout `:attachment/.*none of spoold's business"),
        (strange_name, r"^avatars/1/original/\\udcff.jpg stays: .*UTF-8"),
        (symlink, rf"^{KEY} stays: it is a symbolic link; spoold never opens"),
        (special_file, rf"^{KEY} stays: it is a special file \(FIFO"),
        (kept, r"^\.spoold/kept/1\.1\.abc came back to a name .* taken: compare the two"),
        (house, r"^\.spoold/canary is spoold's own"),
        (root, r"^/\S+ is the root of spool uploads: it always stays"),
        (attachment, r"^avatars is a directory that records lie in: it stays"),
        (nothing_there, r"^avatars/9 is not in spool uploads, and its ledger has never heard of record avatars/9"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)  # fmt: skip
def test_why_says_in_one_line_what_is_true_and_what_would_change_it(
    site: Site, paperclip: App, proxy: FaultProxy, scene: Scene, says: str
) -> None:
    said = scene(site, paperclip, proxy)

    assert re.search(says, said), said
    assert 1 == said.count("\n") == len(said.splitlines()) and said.endswith("\n")


def test_why_of_a_path_outside_any_spool_says_so_and_names_the_spools(site: Site) -> None:
    why = site.spoold("why", "/etc/passwd")

    assert 0 == why.returncode
    assert f"uploads at {site.root}" in why.stdout


def test_why_of_a_queued_record_says_that_it_waits_for_its_turn(site: Site, paperclip: App, proxy: FaultProxy) -> None:
    """The only worker is at another record."""
    site.settings["upload"]["concurrency"] = 1
    site.write_config()
    gate = threading.Event()
    proxy.on("PUT", KEY, Delay(gate))

    with site.daemon():
        paperclip.save("avatars", 1, "me.jpg", photos(1))
        proxy.await_seen("PUT", KEY)
        paperclip.save("avatars", 2, "me.jpg", photos(2))
        site.until_state("avatars/2", "queued")
        said = asked(site, "avatars/2")
        gate.set()

    assert said == "avatars/2 is complete and waits for its turn.\n"


def test_why_finds_a_path_below_the_current_directory(site: Site) -> None:
    (site.root / "avatars/1/original").mkdir(parents=True)
    (site.root / KEY).symlink_to("/etc/passwd")

    why = subprocess.run(
        [sys.executable, "-m", "spoold", "-c", str(site.config), "why", "original/me.jpg"], cwd=site.root / RECORD,
        env=site.environment | {"PYTHONPATH": str(Path(__file__).parents[2])}, capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert why.stdout.startswith(f"{KEY} stays: it is a symbolic link")


def test_a_record_that_two_spools_have_is_told_apart_by_the_spools_name(site: Site, paperclip: App, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    key = "other/:attachment/:id/:style/:basename.:extension"
    site.settings["spools"].append(site.settings["spools"][0] | {"name": "other", "root": str(other), "key": key})
    site.write_config()
    paperclip.save("avatars", 1, "me.jpg", photos(1))
    App(other).save("avatars", 1, "me.jpg", photos(2))
    site.spoold("run", "--once")

    ambiguous = site.spoold("why", KEY)
    by_name = site.spoold("why", "--spool", "other", KEY)
    by_path = site.spoold("why", str(other / KEY))
    cards = site.spoold("status", RECORD)
    one_card = site.spoold("status", "--spool", "other", RECORD)

    assert 69 == ambiguous.returncode and "uploads, other have it; say which with --spool" in ambiguous.stderr
    assert f"s3://{site.bucket}/other/{KEY}" in by_name.stdout and by_name.stdout == by_path.stdout
    assert (2, 1) == tuple(len(re.findall("^spool ", shown.stdout, re.MULTILINE)) for shown in (cards, one_card))


# wait


def test_wait_returns_0_once_everything_is_proven_though_called_right_after_writing(site: Site, paperclip: App) -> None:
    with site.daemon():
        paperclip.save("avatars", 1, "me.jpg", photos(1))
        first = site.spoold("wait", RECORD)
        after_first = site.objects()
        paperclip.replace("avatars", 1, "me.jpg", "me.jpg", photos(2))
        second = site.spoold("wait", RECORD)
        after_second = site.objects()

    assert (0, "", "") == (first.returncode, first.stdout, first.stderr)
    assert 0 == second.returncode
    assert set(photos(1).values()) == set(after_first.values())
    assert set(photos(2).values()) == set(after_second.values()), "it looked at the disk, not only into the ledger"


def test_wait_may_be_called_before_the_first_daemon_runs(site: Site, paperclip: App) -> None:
    paperclip.save("avatars", 1, "me.jpg", photos(1))
    command = [sys.executable, "-m", "spoold", "-c", str(site.config), "wait", RECORD]

    with subprocess.Popen(command, env=site.environment) as waiting, site.daemon():
        assert 0 == waiting.wait(30)


def test_wait_exits_75_at_its_timeout_and_says_what_is_missing(site: Site, paperclip: App) -> None:
    paperclip.save("avatars", 1, "me.jpg", photos(1, "original"))
    site.spoold("run", "--once")

    waited = site.spoold("wait", RECORD, "--timeout", "200ms")

    assert (75, "") == (waited.returncode, waited.stdout)
    assert f"{RECORD} is not proven after 0.2 s: it is not complete (me: style thumb missing)\n" == waited.stderr


def test_wait_exits_69_if_the_record_is_dead_and_says_why(site: Site, paperclip: App, proxy: FaultProxy) -> None:
    dead(site, paperclip, proxy)

    waited = site.spoold("wait", RECORD)

    assert 69 == waited.returncode
    assert "no such class" in waited.stderr and f"spoold retry {RECORD}" in waited.stderr


# retry


def test_retry_makes_what_waits_due_now_and_a_running_daemon_takes_it(site: Site, paperclip: App, proxy: FaultProxy) -> None:
    site.settings["upload"]["retry"] = {"initial": "1h", "max": "1h"}
    site.write_config()
    proxy.on("PUT", "avatars/1/", Answer(503, SLOW_DOWN))
    proxy.on("PUT", "avatars/2/", NOT_EVER)

    with site.daemon(constants=FEW_TRIES):
        for record in (1, 2):
            paperclip.save("avatars", record, "me.jpg", photos(record))
        site.until_state("avatars/1", "retrying")
        site.until_state("avatars/2", "dead")
        proxy.clear()
        retried = site.spoold("retry", "--all")
        for record in (1, 2):
            site.until_state(f"avatars/{record}", "done")
        again = site.spoold("retry", "--all")

    assert (0, "") == (retried.returncode, retried.stderr)
    assert ["avatars/1 is due now", "avatars/2 is due now"] == sorted(retried.stdout.splitlines())
    assert (0, "nothing is waiting\n") == (again.returncode, again.stdout)


def test_retry_as_is_takes_an_incomplete_record_as_it_lies(site: Site, paperclip: App) -> None:
    paperclip.save("avatars", 1, "me.jpg", photos(1, "original"))
    before = site.spoold("run", "--once")
    plain = site.spoold("retry", RECORD)

    as_is = site.spoold("retry", "--as-is", RECORD)
    after = site.spoold("run", "--once")

    assert (75, 0) == (before.returncode, after.returncode)
    assert f"{RECORD} is not complete yet; to take it as it lies: spoold retry --as-is {RECORD}\n" == plain.stdout
    assert (f"{RECORD} is due now\n", "") == (as_is.stdout, as_is.stderr)
    site.demand_laws({KEY: photos(1)["original"]})


def test_retry_of_a_record_that_waits_for_nothing_says_so(site: Site, paperclip: App) -> None:
    done(site, paperclip, FaultProxy(site.server.endpoint_url))

    retried = site.spoold("retry", RECORD)

    assert (0, "") == (retried.returncode, retried.stdout)
    assert "nothing of it is waiting" in retried.stderr


# The rest


def test_version_names_what_a_bug_report_needs(site: Site) -> None:
    version = site.spoold("version")

    assert 0 == version.returncode
    assert re.match(r"spoold \d+\.\d+\.\d+\nPython 3\.\d+\.\d+ on Linux.*\n.*boto3 .*SQLAlchemy", version.stdout)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "Missing command"),
        (("nonsense",), "No such command 'nonsense'"),
        (("status", "--nonsense"), "No such option '--nonsense'"),
        (("why",), "Missing argument 'PATH'"),
        (("wait", RECORD, "--timeout", "soon"), "'soon' is no duration: write a number and ms, s, m, h or d"),
        (("run", "--dry-run"), "spoold run --once --dry-run"),
        (("retry",), "name the records, or say --all"),
        (("retry", "--all", RECORD), "name the records, or say --all"),
        (("why", "--spool", "nonsense", KEY), "there is no spool nonsense; the spools are uploads"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_in_the_usage_exits_64_and_says_what_to_write(site: Site, arguments: tuple[str, ...], says: str) -> None:
    done = site.spoold(*arguments)

    assert (64, "") == (done.returncode, done.stdout)
    assert says in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["", "run", "check", "status", "why", "wait", "retry", "demo", "version"])
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_every_command_has_a_help_text_that_fits_into_80_columns(site: Site, command: str, option: str) -> None:
    shown = site.spoold(*command.split(), option)

    assert (0, "") == (shown.returncode, shown.stderr)
    assert shown.stdout.startswith(f"Usage: spoold {command}".rstrip()) and len(shown.stdout.splitlines()) > 5
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert "..." not in shown.stdout.replace("]...", ""), "no sentence is cut off"


def test_the_configuration_may_be_named_by_a_variable_before_the_command_or_behind_it(site: Site) -> None:
    spoold = [sys.executable, "-m", "spoold"]
    by_variable = site.environment | {"SPOOLD_CONFIG": str(site.config)}

    outputs = [
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        for command, environment in [
            ([*spoold, "check"], by_variable),
            ([*spoold, "-c", str(site.config), "check"], site.environment),
            ([*spoold, "check", "-c", str(site.config)], site.environment),
            ([str(Path(sys.executable).with_name("spoold")), "check"], by_variable),
        ]
    ]

    assert 1 == len(set(outputs)) and "no mistakes" in outputs[0]


def test_a_reader_that_leaves_early_is_no_error(site: Site) -> None:
    """As in `spoold status | head -1`."""
    site.spoold("run", "--once")
    command = f"{sys.executable} -m spoold -c {site.config} status --json | true; exit ${{PIPESTATUS[0]}}"

    piped = subprocess.run(["bash", "-c", command], env=site.environment, capture_output=True, text=True, check=False)

    assert (0, "") == (piped.returncode, piped.stderr)


def test_ctrl_c_ends_a_command_without_a_traceback(site: Site) -> None:
    command = [sys.executable, "-m", "spoold", "-c", str(site.config), "status", "--watch"]
    site.spoold("run", "--once")

    with subprocess.Popen(command, env=site.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as watching:
        until(lambda: has_open(watching.pid, site.database), "it reads the ledger")
        watching.send_signal(signal.SIGINT)
        _, errors = watching.communicate(timeout=10)

    assert 130 == watching.returncode
    assert b"Traceback" not in errors


def has_open(pid: int, file: Path) -> bool:
    names = list(Path(f"/proc/{pid}/fd").iterdir())
    return any(name.is_symlink() and os.readlink(name) == str(file) for name in names)
