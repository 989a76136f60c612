"""A daemon that is killed, again and again, or asked to stop at a bad moment: the next one finds everything as it was."""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs

import pytest

from tests.paperclip import App, picture, styles_of
from tests.proxy import Delay, DelayAnswer, FaultProxy, Hold
from tests.servers import RcloneServer
from tests.system.harness import Daemon, Site, until

STYLES = {"original", "medium", "thumb"}
KEY = "avatars/1/original/me.jpg"


def photos(seed: int) -> dict[str, bytes]:
    """Return an original and two styles."""
    return {style: content for style, content in styles_of(picture(400, 300, seed)).items() if style in STYLES}


def written_by(record: int, seed: int, name: str = "me.jpg") -> dict[str, bytes]:
    return {f"avatars/{record}/{style}/{name}": content for style, content in photos(seed).items()}


@pytest.fixture
def proxy(rclone_server: RcloneServer) -> Iterator[FaultProxy]:
    with FaultProxy(rclone_server.endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def site(tmp_path: Path, rclone_server: RcloneServer, proxy: FaultProxy) -> Site:
    """A spool whose daemon talks to its server through the proxy; a grace in which one can be killed."""
    complete = {"styles": sorted(STYLES)}
    return Site(
        tmp_path, rclone_server, endpoint_url=proxy.endpoint_url, spool={"complete": complete, "cleanup": {"grace": "500ms"}},
        upload={"doubt": "1s"},
    )  # fmt: skip


# Moments


def on_its_way(site: Site, daemon: Daemon, proxy: FaultProxy) -> None:
    proxy.await_seen("PUT", KEY)


def carried_out(site: Site, daemon: Daemon, proxy: FaultProxy) -> None:
    until(lambda: proxy.await_seen("PUT", KEY).upstream_status, "the server has carried it out")


def half_of_it_stored(site: Site, daemon: Daemon, proxy: FaultProxy) -> None:
    proxy.await_seen("PUT", "avatars/1/thumb")


def stored(site: Site, daemon: Daemon, proxy: FaultProxy) -> None:
    daemon.until_event("batch.stored")


def set_aside(site: Site, daemon: Daemon, proxy: FaultProxy) -> None:
    daemon.until_event("file.set_aside")


def half_of_it_unlinked(site: Site, daemon: Daemon, proxy: FaultProxy) -> None:
    until(lambda: len(site.aside()) == len(STYLES), "all lies aside")
    until(lambda: len(site.aside()) < len(STYLES), "the first is unlinked")


def cleared(site: Site, daemon: Daemon, proxy: FaultProxy) -> None:
    daemon.until_event("record.cleared")


@pytest.mark.parametrize(
    "moment", [on_its_way, carried_out, half_of_it_stored, stored, set_aside, half_of_it_unlinked, cleared]
)
def test_killed_at_a_bad_moment_nothing_is_lost_and_the_next_daemon_finishes_it(
    site: Site, proxy: FaultProxy, moment: Callable[[Site, Daemon, FaultProxy], None]
) -> None:
    gate = threading.Event()
    if moment is on_its_way:
        proxy.on("PUT", KEY, Hold(gate), times=1)
    if moment is carried_out:
        proxy.on("PUT", KEY, DelayAnswer(gate), times=1)
    if moment is half_of_it_stored:
        proxy.on("PUT", "avatars/1/thumb", Delay(gate), times=1)

    with site.daemon() as daemon:
        App(site.root).save("avatars", 1, "me.jpg", photos(1))
        moment(site, daemon, proxy)
        daemon.kill()
    site.demand_nothing_lost(written_by(1, 1))
    gate.set()
    with site.daemon() as daemon:
        site.until_state("avatars/1", "done")
        until(lambda: site.directories() == {"avatars"}, "the record's directories are gone")

        assert not daemon.events("file.given_back") and not daemon.events("batch.dead")

    site.demand_laws(written_by(1, 1))


def test_killed_again_and_again_while_the_app_saves_and_replaces_nothing_is_lost_stale_or_left(site: Site) -> None:
    """Each daemon dies one line of its log later than the one before; each time the app has written something."""
    site.settings["upload"]["retry"]["crashes"] = 1000
    site.settings["spools"][0]["cleanup"]["grace"] = "50ms"
    site.write_config()
    app = App(site.root)
    written: dict[str, bytes] = {}

    for turn in range(10):
        record = turn % 3
        with site.daemon(ready=False) as daemon:
            app.replace("avatars", record, "me.jpg", "me.jpg", photos(turn))
            written |= written_by(record, turn)
            until(functools.partial(has_come_far, site, daemon, 3 + 4 * turn), "its last line")
            daemon.kill()
    with site.daemon() as daemon:
        for record in range(3):
            site.until_state(f"avatars/{record}", "done")
        until(lambda: site.directories() == {"avatars"}, "the records' directories are gone")

    site.demand_laws(written)


def has_come_far(site: Site, daemon: Daemon, lines: int) -> bool:
    return len(daemon.lines()) >= lines or site.directories() == {"avatars"}


def test_killed_while_another_version_is_written_the_newer_one_wins(site: Site, proxy: FaultProxy) -> None:
    """The first version's PUT lands when the next daemon has stored the second version: rule 6, across a crash."""
    site.settings["upload"]["doubt"] = "4s"
    site.write_config()
    gate = threading.Event()
    proxy.on("PUT", KEY, Hold(gate), times=1)
    app = App(site.root)

    with site.daemon() as daemon:
        app.save("avatars", 1, "me.jpg", photos(1))
        proxy.await_seen("PUT", KEY)
        daemon.kill()
    app.replace("avatars", 1, "me.jpg", "me.jpg", photos(2))
    with site.daemon() as daemon:
        site.until_state("avatars/1", "uploaded")
        held_back = site.files()
        gate.set()
        proxy.await_ended("PUT", KEY)
        site.until_state("avatars/1", "done")

        assert "Missing" in {line["error"] for line in daemon.events("batch.deferred")}

    assert written_by(1, 2) == held_back
    site.demand_laws(written_by(1, 2))


def test_a_multipart_upload_that_a_killed_daemon_left_open_is_aborted(site: Site, proxy: FaultProxy) -> None:
    """Its parts would cost money until somebody looked for them."""
    site.settings["upload"]["multipart_threshold"] = "5MB"
    site.settings["spools"][0]["complete"] = {"settle": "200ms"}
    site.write_config()
    key, content = "videos/1/original/clip.bin", b"\x07" * 12_000_000
    proxy.on("PUT", key, Hold(threading.Event()), times=1)

    with site.daemon() as daemon:
        App(site.root).save("videos", 1, "clip.bin", {"original": content})
        left = parse_qs(proxy.await_seen("PUT", key).path.partition("?")[2])["uploadId"][0]
        daemon.kill()
    with site.daemon():
        site.until_state("videos/1", "done")

    assert any(left in delete.path for delete in proxy.requests("DELETE", key))
    site.demand_laws({key: content})


# What lies aside


@pytest.fixture
def aside(site: Site) -> list[Path]:
    """Have a daemon set a record's files aside and kill it; return where they lie."""
    site.settings["spools"][0]["cleanup"]["grace"] = "1h"
    site.write_config()
    with site.daemon() as daemon:
        App(site.root).save("avatars", 1, "me.jpg", photos(1))
        until(lambda: len(site.aside()) == len(STYLES), "all lies aside")
        daemon.until_event("file.set_aside", count=len(STYLES))
        daemon.kill()
    site.settings["spools"][0]["cleanup"]["grace"] = "200ms"
    site.write_config()
    assert not site.files()
    return site.aside()


def of(style: str, aside: list[Path]) -> Path:
    return next(path for path in aside if style in path.name)


def test_rule_9_what_lies_aside_unchanged_is_let_go_by_the_next_daemon(site: Site, aside: list[Path]) -> None:
    with site.daemon() as daemon:
        site.until_state("avatars/1", "done")

        assert not daemon.events("file.given_back")

    site.demand_laws(written_by(1, 1))


def test_rule_9_what_was_written_while_it_lay_aside_is_given_back_before_the_first_sweep(site: Site, aside: list[Path]) -> None:
    """A writer who had opened it by its old name, and the daemon was not there to see it."""
    changed = picture(100, 100, 99)
    key = "avatars/1/thumb/me.jpg"
    of("thumb", aside).write_bytes(changed)

    with site.daemon() as daemon:
        given_back = daemon.until_event("file.given_back")
        until(lambda: site.objects()[key] == changed, "what was written goes up")
        site.until_state("avatars/1", "done")
        events = [line["event"] for line in daemon.lines()]

    assert key == given_back["path"] and "not what was stored" in given_back["detail"]
    assert events.index("file.given_back") < events.index("sweep.started")
    site.demand_laws({**written_by(1, 1), key: changed})


def test_rule_9_what_changed_aside_goes_to_kept_if_its_name_is_taken_and_status_shows_it(site: Site, aside: list[Path]) -> None:
    changed = picture(400, 300, 99)
    name = of("original", aside).name
    of("original", aside).write_bytes(changed)
    App(site.root).save("avatars", 1, "me.jpg", photos(2))

    with site.daemon() as daemon:
        daemon.until_event("file.given_back")
        site.until_state("avatars/1", "done")
        status = site.spoold("status")
        why = site.spoold("why", f".spoold/kept/{name}")

    kept = site.root / ".spoold" / "kept" / name
    assert changed == kept.read_bytes()
    assert ".spoold/kept/" in status.stdout
    assert "compare the two" in why.stdout
    kept.unlink()
    site.demand_laws(written_by(1, 2))


def test_rule_9_what_lies_aside_is_let_go_even_if_a_newer_version_has_its_name(site: Site, aside: list[Path]) -> None:
    """It was stored once, so it may go; an unsynced unlink comes back like this after a power cut (FACTS 19)."""
    App(site.root).save("avatars", 1, "me.jpg", photos(2))

    with site.daemon() as daemon:
        until(lambda: site.objects() == written_by(1, 2), "the newer version is in the bucket")
        site.until_state("avatars/1", "done")
        until(lambda: not site.aside(), "nothing lies aside")

        assert not daemon.events("file.given_back")

    site.demand_laws(written_by(1, 2))


def test_rule_9_names_aside_are_never_used_again(site: Site, aside: list[Path], rclone_server: RcloneServer) -> None:
    """The same files of the same batch come back and are set aside once more."""
    site.change("UPDATE object SET proven_at = proven_at - 7200")
    rclone_server.client().delete_object(Bucket=site.bucket, Key=KEY)
    site.settings["spools"][0]["cleanup"]["grace"] = "1h"
    site.write_config()

    with site.daemon() as daemon:
        daemon.until_event("file.given_back", count=len(STYLES))
        daemon.until_event("file.set_aside", count=len(STYLES))
        again = site.aside()
        daemon.kill()

    assert len(STYLES) == len(again)
    assert not {path.name for path in aside} & {path.name for path in again}


# What kills its daemon


def test_a_record_that_kills_its_daemon_three_times_is_dead_and_retry_revives_it(site: Site, proxy: FaultProxy) -> None:
    gate = threading.Event()
    poison = "avatars/1/original"
    proxy.on("PUT", poison, Hold(gate))
    App(site.root).save("avatars", 1, "me.jpg", photos(1))

    for turn in range(3):
        with site.daemon() as daemon:
            proxy.await_seen("PUT", poison, count=turn + 1)
            daemon.kill()
    App(site.root).save("avatars", 2, "me.jpg", photos(2))
    with site.daemon() as daemon:
        dead = daemon.until_event("batch.dead")
        site.until_state("avatars/2", "done")
        row = site.status("avatars/1")
        on_disk = site.files()
        proxy.clear()
        retried = site.spoold("retry", "avatars/1")
        site.until_state("avatars/1", "done")

    assert "avatars/1" == dead["record"] and "Crashed" == dead["error"] and "3 walks" in dead["detail"]
    assert ("dead", 1) == (row["state"], row["processing"])
    assert written_by(1, 1) == on_disk
    assert 4 == len(proxy.requests("PUT", poison)), "it was not tried a fourth time before the retry"
    assert 0 == retried.returncode and "avatars/1" in retried.stdout
    site.demand_laws(written_by(1, 1) | written_by(2, 2))


# Asked to stop


def test_sigterm_under_load_ends_what_is_in_flight_starts_nothing_new_and_loses_nothing(site: Site, proxy: FaultProxy) -> None:
    proxy.on("PUT", "", Delay(0.05))
    app = App(site.root)
    written: dict[str, bytes] = {}
    for record in range(30):
        app.save("avatars", record, "me.jpg", photos(record % 5))
        written |= written_by(record, record % 5)

    with site.daemon() as daemon:
        proxy.await_seen("PUT", "avatars", count=15)
        code = daemon.drain()
        last = daemon.lines()[-1]["event"]
    answered = [seen.status for seen in proxy.requests("PUT", "avatars")]
    claims = site.query("SELECT * FROM claim")
    site.demand_nothing_lost(written)
    proxy.clear()
    with site.daemon() as daemon:
        for record in range(30):
            site.until_state(f"avatars/{record}", "done")
        until(lambda: site.directories() == {"avatars"}, "the records' directories are gone")

    assert (0, "daemon.drained") == (code, last)
    assert len(answered) < len(written) and {200} == set(answered), "in flight means: until it is answered"
    assert not claims
    puts = [seen.key for seen in proxy.requests("PUT", "avatars")]
    assert len(written) == len(puts) == len(set(puts)), "nothing that was proven went up twice"
    site.demand_laws(written)


def test_a_second_sigterm_ends_the_daemon_at_once(site: Site, proxy: FaultProxy) -> None:
    gate = threading.Event()
    proxy.on("PUT", KEY, Hold(gate), times=1)

    with site.daemon() as daemon:
        App(site.root).save("avatars", 1, "me.jpg", photos(1))
        proxy.await_seen("PUT", KEY)
        daemon.process.terminate()
        until(lambda: signal_is_handled(daemon.process.pid), "it drains")
        daemon.process.terminate()
        code = daemon.process.wait(3)
    gate.set()
    with site.daemon() as daemon:
        site.until_state("avatars/1", "done", timeout_s=10)

    assert 75 == code
    site.demand_laws(written_by(1, 1))


def signal_is_handled(pid: int) -> bool:
    """Say whether no SIGTERM is pending any more: two that are sent at once are one."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    pending = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd:", "ShdPnd:"))]
    return not any(mask & (1 << (signal.SIGTERM - 1)) for mask in pending)


def test_a_drain_that_takes_too_long_ends_with_75_and_the_next_daemon_goes_on_at_once(site: Site, proxy: FaultProxy) -> None:
    site.settings["drain_timeout"] = "500ms"
    site.write_config()
    proxy.on("PUT", KEY, Hold(threading.Event()), times=1)

    with site.daemon() as daemon:
        App(site.root).save("avatars", 1, "me.jpg", photos(1))
        proxy.await_seen("PUT", KEY)
        code = daemon.drain()
        timed_out = daemon.events("drain.timed_out")
    with site.daemon():
        site.until_state("avatars/1", "done", timeout_s=10)

    assert 75 == code and timed_out
    site.demand_laws(written_by(1, 1))
