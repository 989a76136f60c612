"""Two daemons on one spool and one ledger: never both at one record, whatever becomes of one of them."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.paperclip import App, picture
from tests.proxy import Delay, DelayAnswer, FaultProxy, Hold
from tests.servers import RcloneServer
from tests.system.harness import Daemon, Site, until

KEY = "avatars/1/original/me.jpg"
SHORT_LEASE = {"spoold.owner.LEASE_S": 2.0, "spoold.daemon.LEASE_S": 2.0}  # 30 s otherwise


def photo(seed: int) -> bytes:
    return picture(80, 60, seed)


@pytest.fixture
def proxy(rclone_server: RcloneServer) -> Iterator[FaultProxy]:
    with FaultProxy(rclone_server.endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def site(tmp_path: Path, rclone_server: RcloneServer, proxy: FaultProxy) -> Site:
    return Site(tmp_path, rclone_server, endpoint_url=proxy.endpoint_url, upload={"doubt": "1s"})


def freeze(site: Site, daemon: Daemon) -> None:
    """Freeze a daemon at a moment when it does not keep the ledger from everybody."""
    while True:
        daemon.freeze()
        until(lambda: ") T " in Path(f"/proc/{daemon.process.pid}/stat").read_text(), "it is frozen")
        try:
            with contextlib.closing(sqlite3.connect(site.database, timeout=0.5)) as ledger:
                ledger.execute("BEGIN IMMEDIATE")
            return
        except sqlite3.OperationalError:
            daemon.thaw()


def test_two_daemons_share_the_work_and_put_each_file_once(site: Site, proxy: FaultProxy) -> None:
    proxy.on("PUT", "", Delay(0.02))  # so that neither has done it all before the other looks up
    records = range(60)
    written = {f"avatars/{number}/original/me.jpg": photo(number) for number in records}
    app = App(site.root)

    with site.daemon(name="one") as one, site.daemon(name="other") as other:
        for number in records:
            app.save("avatars", number, "me.jpg", {"original": photo(number)})
        for number in records:
            site.until_state(f"avatars/{number}", "done")
        until(lambda: site.directories() == {"avatars"}, "the records' directories are gone")
        claimed = [line["batch"] for daemon in (one, other) for line in daemon.events("batch.claimed")]
        stored = [line["batch"] for daemon in (one, other) for line in daemon.events("batch.stored")]
        shares = [len(daemon.events("batch.stored")) for daemon in (one, other)]
        lost = [line for daemon in (one, other) for line in daemon.events("claim.lost")]

    puts = Counter(seen.key.partition("/")[2] for seen in proxy.requests("PUT", "avatars"))
    assert dict.fromkeys(written, 1) == puts
    assert sorted(claimed) == sorted(stored) == sorted(set(stored)), "one walk for each batch"
    assert min(shares) > 0 and not lost
    site.demand_laws(written)


def test_a_daemon_that_is_frozen_past_its_claim_does_no_harm_when_it_thaws(site: Site, proxy: FaultProxy) -> None:
    """Its PUT is on its way when the other takes over; a newer version is stored meanwhile; then the old one lands."""
    site.settings["upload"]["doubt"] = "6s"
    site.write_config()
    gate = threading.Event()
    proxy.on("PUT", KEY, Hold(gate), times=1)
    app = App(site.root)

    with site.daemon(name="frozen", constants=SHORT_LEASE) as frozen:
        app.save("avatars", 1, "me.jpg", {"original": photo(1)})
        proxy.await_seen("PUT", KEY)
        freeze(site, frozen)
        with site.daemon(name="other", constants=SHORT_LEASE) as other:
            app.replace("avatars", 1, "me.jpg", "me.jpg", {"original": photo(2)})
            other.until_event("batch.stored")
            waiting = site.files()
            gate.set()
            proxy.await_ended("PUT", KEY)
            frozen.thaw()
            site.until_state("avatars/1", "done")

            deferred = [line for daemon in (frozen, other) for line in daemon.events("batch.deferred")]
        assert ["Missing"] == [line["error"] for line in deferred]
        assert not frozen.events("batch.stored", batch=1) and frozen.process.poll() is None

    assert {KEY: photo(2)} == waiting
    site.demand_laws({KEY: photo(2)})


def test_a_daemon_that_was_frozen_past_its_claim_sends_nothing_more(site: Site, proxy: FaultProxy) -> None:
    """The other has stored a newer version and let its files go: nothing would put right what is sent now."""
    gate = threading.Event()
    proxy.on("PUT", KEY, DelayAnswer(gate), times=1)
    app = App(site.root)
    old, new = ({"original": photo(seed), "thumb": photo(10 + seed)} for seed in (1, 2))
    written = {f"avatars/1/{style}/me.jpg": content for style, content in new.items()}

    with site.daemon(name="frozen", constants=SHORT_LEASE) as frozen:
        app.save("avatars", 1, "me.jpg", old)
        proxy.await_seen("PUT", KEY)
        freeze(site, frozen)
        with site.daemon(name="other", constants=SHORT_LEASE) as other:
            app.replace("avatars", 1, "me.jpg", "me.jpg", new)
            other.until_event("record.cleared")
            sent_before = len(proxy.requests("PUT", "avatars"))
            frozen.thaw()
            gate.set()
            ended = "SELECT * FROM intent WHERE batch_id = 1 AND key LIKE '%thumb%' AND answer <> 'doubt'"
            until(lambda: site.query(ended), "its walk is over")
            sent = len(proxy.requests("PUT", "avatars"))
            site.until_state("avatars/1", "done")

    assert sent_before == sent
    site.demand_laws(written)


def test_a_delete_of_a_frozen_daemon_that_lands_after_the_other_put_the_key_again_is_undone(
    site: Site, proxy: FaultProxy
) -> None:
    """The frozen one is told 204, and cannot know what that did."""
    site.settings["upload"]["doubt"] = "6s"
    site.settings["spools"][0]["replaced_after"] = "0s"
    site.write_config()
    gate = threading.Event()
    proxy.on("DELETE", KEY, Delay(gate), times=1)
    app = App(site.root)

    with site.daemon(name="frozen", constants={**SHORT_LEASE, "spoold.daemon._REMOVE_EVERY_S": 0.1}) as frozen:
        app.save("avatars", 1, "me.jpg", {"original": photo(1)})
        site.until_state("avatars/1", "done")
        app.replace("avatars", 1, "me.jpg", "other.jpg", {"original": photo(2)})
        proxy.await_seen("DELETE", KEY)
        freeze(site, frozen)
        with site.daemon(name="other", constants=SHORT_LEASE) as other:
            app.replace("avatars", 1, "other.jpg", "me.jpg", {"original": photo(3)})
            other.until_event("batch.stored", batch=3)
            gate.set()
            proxy.await_ended("DELETE", KEY)
            frozen.thaw()
            site.until_state("avatars/1", "done")

    site.demand_laws({KEY: photo(3)})


def test_a_daemon_that_is_frozen_while_it_clears_leaves_it_to_the_other(site: Site) -> None:
    site.settings["spools"][0]["cleanup"]["grace"] = "1s"
    site.write_config()

    with site.daemon(name="frozen", constants=SHORT_LEASE) as frozen:
        App(site.root).save("avatars", 1, "me.jpg", {"original": photo(1)})
        until(site.aside, "it lies aside")
        freeze(site, frozen)
        with site.daemon(name="other", constants=SHORT_LEASE) as other:
            site.until_state("avatars/1", "done")
            frozen.thaw()
            until(lambda: site.directories() == {"avatars"}, "the record's directories are gone")
            App(site.root).save("avatars", 1, "me.jpg", {"original": photo(2)})
            until(lambda: site.objects() == {KEY: photo(2)}, "the next version goes up")
            site.until_state("avatars/1", "done")

            assert other.events("file.deleted")

    site.demand_laws({KEY: photo(2)})


def test_the_claims_of_a_killed_daemon_are_free_long_before_they_run_out(site: Site, proxy: FaultProxy) -> None:
    """They last 30 s; but its lock is free at once, and the other looks every five seconds."""
    proxy.on("PUT", KEY, Hold(threading.Event()), times=1)

    with site.daemon(name="one") as one, site.daemon(name="other") as other:
        App(site.root).save("avatars", 1, "me.jpg", {"original": photo(1)})
        proxy.await_seen("PUT", KEY)
        killed, lives = (one, other) if one.events("batch.claimed") else (other, one)
        killed.kill()
        lives.until_event("claim.lost", timeout_s=15)
        site.until_state("avatars/1", "done", timeout_s=5)

    assert not (site.directory / "state" / "owners").is_dir() or not any((site.directory / "state" / "owners").iterdir())
    site.demand_laws({KEY: photo(1)})


def test_rule_9_a_daemon_with_another_ledger_keeps_its_hands_off_the_spool(site: Site, tmp_path: Path) -> None:
    with site.daemon():
        App(site.root).save("avatars", 1, "me.jpg", {"original": photo(1)})
        site.until_state("avatars/1", "done")
    site.settings["state_dir"] = str(tmp_path / "another-state")
    site.write_config()
    App(site.root).save("avatars", 2, "me.jpg", {"original": photo(2)})

    with site.daemon(name="stranger") as stranger:
        held = stranger.until_event("spool.held")
        code = stranger.drain()

    assert "SpoolBroken" == held["error"] and "belongs to ledger" in held["detail"]
    assert "state_dir" in held["hint"]
    assert 0 == code and {"avatars/2/original/me.jpg": photo(2)} == site.files()
    assert {KEY: photo(1)} == site.objects()
