"""An S3 that misbehaves while many records are under way, before a server that takes nothing that S3 would refuse.

tests/system/test_faults.py shows what each fault does to one record. Here it meets a whole shop at work: whose fault it is,
who pays for it with attempts, and what is told of it. Each test ends with the laws.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests import figures
from tests.paperclip import App, picture
from tests.proxy import HTML, SLOW_DOWN, Answer, Delay, Fault, FaultProxy, Flip, Hold, LoseAnswer, Request, Reset, error_body
from tests.servers import ACCESS_KEY, SECRET_KEY, RcloneServer, Server, StrictServer
from tests.system.harness import BRISK, Site, until

QUICK_TRIES = {**BRISK, "spoold.uploader._PERSISTENCE_S": 0.3}  # within one attempt; 8 s otherwise


class Code(str):
    """Python that stands for itself where a daemon's constants are set."""

    __repr__ = str.__str__


def impatient(read_timeout_s: float) -> dict[str, object]:
    """Have the daemon wait for an answer no longer than this; a minute otherwise."""
    store = f"__import__('functools').partial(spoold.daemon.Store, read_timeout_s={read_timeout_s})"
    return {"spoold.daemon.Store": Code(store)}


def photo(seed: int) -> bytes:
    return picture(40, 30, seed)


@dataclass
class Shop:
    """An app with many records, and what it wrote last to each."""

    site: Site
    written: dict[str, bytes] = field(default_factory=dict)
    versions: dict[int, int] = field(default_factory=dict)

    def save(self, *records: int) -> None:
        """Save a first or a newer version of each, in two styles."""
        for record in records:
            version = self.versions[record] = self.versions.get(record, 0) + 1
            contents = {"original": photo(1000 * record + version), "thumb": photo(1000 * record + version + 500)}
            save = App(self.site.root).save if version == 1 else self._replace
            save("avatars", record, "me.jpg", contents)
            self.written |= {f"avatars/{record}/{style}/me.jpg": content for style, content in contents.items()}

    def _replace(self, attachment: str, record: int, name: str, contents: dict[str, bytes]) -> None:
        App(self.site.root).replace(attachment, record, name, name, contents)

    def set_doubt(self, duration: str) -> None:
        """Say how long what was not answered may still land; what waits for it already learns it at the next start."""
        self.site.settings["upload"]["doubt"] = duration
        self.site.write_config()

    def until_done(self) -> None:
        for record in self.versions:
            self.site.until_state(f"avatars/{record}", "done")

    def until_nothing_goes_up(self) -> None:
        walked = "SELECT * FROM claim JOIN batch ON batch.id = batch_id WHERE state = 'pending'"
        until(lambda: not self.site.query(walked), "what cannot go up is put back")

    def is_stored(self) -> bool:
        """Say whether the bucket holds the newest version of everything."""
        objects = self.site.objects()
        return all(objects.get(path) == content for path, content in self.written.items())

    def states(self) -> dict[str, set[int]]:
        """Return which attempts were spent in which state."""
        found: dict[str, set[int]] = {}
        for row in self.site.query("SELECT state, attempts FROM record_status"):
            found.setdefault(row["state"], set()).add(row["attempts"])
        return found

    def demand_waiting_is_on_disk(self) -> None:
        """The newest version of what is not in the bucket lies where the app put it; nobody need ask the server."""
        waiting = {row["path"] for row in self.site.query("SELECT path FROM record_status WHERE processing = 1")}
        on_disk = self.site.files()
        wrong = [path for path, content in self.written.items() if on_disk.get(path) != content]
        assert not [path for path in wrong if path.rsplit("/", 2)[0] in waiting]

    def end(self, case: str, server: Server, proxy: FaultProxy | None = None) -> None:
        """Demand the laws, and tell how much of what was survived."""
        until(lambda: not self.site.query("SELECT * FROM claim"), "no walk is under way")
        objects = self.site.objects()
        faults = sum(type(seen.fault).__name__ != "Pass" for seen in proxy.seen) if proxy else 0
        figures.record(
            "store-fault", case=case, server=type(server).__name__.removesuffix("Server").lower(), faults=faults,
            records=sum(self.versions.values()), lost=sum(c not in objects.values() for c in self.written.values()),
            stale=sum(objects.get(path) != content for path, content in self.written.items()),
        )  # fmt: skip
        self.site.demand_laws(self.written)
        assert set(self.written) == set(objects), "and nothing else"


@pytest.fixture
def server(strict_server: StrictServer) -> Iterator[StrictServer]:
    """A strict server, to which spoold has never sent what S3 would have refused; what is set to be refused, the test names."""
    yield strict_server


@pytest.fixture
def proxy(server: StrictServer) -> Iterator[FaultProxy]:
    with FaultProxy(server.endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def site(tmp_path: Path, server: StrictServer, proxy: FaultProxy) -> Site:
    return Site(tmp_path, server, endpoint_url=proxy.endpoint_url, upload={"doubt": "1s"})


@pytest.fixture
def shop(site: Site) -> Shop:
    return Shop(site)


def always(fault: Fault, *, spares: Callable[[Request], bool] = lambda request: False) -> Callable[[Request], Fault | None]:
    return lambda request: None if spares(request) else fault


def often(share: float, fault: Fault, method: str = "PUT", seed: int = 1) -> Callable[[Request], Fault | None]:
    """Do the fault to this share of the requests of a method, "" for all, as chance will have it."""
    chance, lock = random.Random(seed), threading.Lock()

    def rule(request: Request) -> Fault | None:
        with lock:
            return fault if method in ("", request.method) and chance.random() < share else None

    return rule


# A destination that refuses everybody, in the middle of it


def by(fault: Fault) -> tuple[Callable[..., None], Callable[..., None]]:
    """Have the proxy do a fault to everything, and no more."""
    return lambda site, server, proxy: proxy.rules.insert(0, always(fault)), lambda site, server, proxy: proxy.clear()


def setting(before: dict[str, Any], after: dict[str, Any]) -> tuple[Callable[..., None], Callable[..., None]]:
    return lambda site, server, proxy: server.set(**before), lambda site, server, proxy: server.set(**after)


def has_body(request: Request) -> bool:
    return request.method == "PUT" and bool(request.body)


OUTAGES = {
    "503": (by(Answer(503, SLOW_DOWN)), "503 SlowDown", ""),
    "500 without a word": (by(Answer(500)), "500 Internal Server Error", ""),
    "reset": (by(Reset()), "ConnectionClosedError", ""),
    "refused": ((lambda site, server, proxy: proxy.go_away(), lambda site, server, proxy: proxy.come_back()), "refused", ""),
    "a login page": (by(HTML), "proves nothing", "proxy or a login page"),
    "sent to a login page": (
        by(Answer(302, b"<html>", {"Location": "http://127.0.0.1:1/login", "Content-Type": "text/html"})),
        "302", "proxy or a login page",
    ),
    "full": (
        (
            lambda site, server, proxy: proxy.rules.insert(
                0, always(Answer(403, error_body("QuotaExceeded")), spares=lambda request: not has_body(request))
            ),
            lambda site, server, proxy: proxy.clear(),
        ), "QuotaExceeded", "",
    ),
    "the bucket vanishes": (
        (lambda site, server, proxy: server.set(vanished=[site.bucket]), lambda site, server, proxy: server.set(vanished=[])),
        "NoSuchBucket", "create the bucket",
    ),
    "its clock": (setting({"clock_offset_s": 3600.0}, {"clock_offset_s": 0.0}), "RequestTimeTooSkewed", "clock is wrong"),
    "the key is revoked": (
        setting({"keys": {}}, {"keys": {ACCESS_KEY: {"secret": SECRET_KEY}}}), "InvalidAccessKeyId", "renew the credentials",
    ),
}  # fmt: skip
QUICK = {"503", "full"}  # the others take as long, and differ in the store only


@pytest.mark.parametrize("case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.soak) for case in OUTAGES])
def test_rule_11_an_outage_in_the_middle_holds_the_spool_and_costs_no_record_an_attempt(
    site: Site, server: StrictServer, proxy: FaultProxy, shop: Shop, case: str
) -> None:
    (begin, end), detail, hint = OUTAGES[case]
    site.settings["upload"]["retry"]["give_up_after"] = 1
    site.write_config()
    proxy.on("PUT", "avatars", Delay(0.05))

    with site.daemon(constants=QUICK_TRIES) as daemon:
        shop.save(*range(12))
        daemon.until_event("batch.stored", count=2)
        begin(site, server, proxy)
        shop.save(*range(6, 18))
        held = daemon.until_event("spool.held")
        until(lambda: "queued" in shop.states(), "what came meanwhile waits")
        shop.until_nothing_goes_up()
        states, status = shop.states(), site.spoold("status").stdout
        shop.demand_waiting_is_on_disk()
        end(site, server, proxy)
        daemon.until_event("spool.released")
        shop.until_done()

        assert not daemon.events("batch.deferred") and not daemon.events("batch.dead")
        assert len(daemon.events("spool.held")) == len(daemon.events("spool.released"))

    assert detail in held["detail"] and hint in held.get("hint", "")
    assert {0} == set().union(*states.values()) - {None} and "queued" in states
    assert "uploads is held since" in status and detail in status
    shop.end(case, server, proxy)


@pytest.mark.parametrize("share", [pytest.param(0.5, marks=pytest.mark.soak), 0.9])
def test_a_storm_of_503_costs_no_record_its_life(
    site: Site, server: StrictServer, proxy: FaultProxy, shop: Shop, share: float
) -> None:
    """Half of all requests are refused, or nine of ten, the probes as well: some get through all the same."""
    site.settings["upload"]["retry"]["give_up_after"] = 3
    site.write_config()
    proxy.rules.append(often(share, Answer(503, SLOW_DOWN), method=""))

    with site.daemon(constants={**QUICK_TRIES, "spoold.uploader._PERSISTENCE_S": 0.5}) as daemon:
        shop.save(*range(16))
        until(lambda: sum(seen.status == 503 for seen in proxy.seen) > 10, "it storms")
        shop.save(*range(8, 24))
        until(lambda: sum(seen.status == 503 for seen in proxy.seen) > 25, "it storms on")
        proxy.clear()
        shop.until_done()

        assert not daemon.events("batch.dead")

    assert [] == server.refused()
    shop.end(f"503 storm, {share:.0%}", server, proxy)


def test_a_setting_that_s3_refuses_holds_the_spool_and_buries_no_record(tmp_path: Path, server: StrictServer) -> None:
    """Every record would be dead by one wrong word in the configuration."""
    site = Site(tmp_path, server, spool={"object": {"storage_class": "CHEAP"}})
    shop = Shop(site)

    with site.daemon(constants=QUICK_TRIES) as daemon:
        shop.save(*range(6))
        held = daemon.until_event("spool.held")
        until(lambda: {"queued"} == set(shop.states()), "every record waits")
        states = shop.states()

        assert not daemon.events("batch.dead") and not daemon.events("batch.deferred")
    site.settings["spools"][0]["object"]["storage_class"] = "STANDARD_IA"
    site.write_config()
    with site.daemon(constants=QUICK_TRIES):
        shop.until_done()

    assert "InvalidStorageClass" in held["detail"] and "object.storage_class" in held["hint"]
    assert {"queued": {0}} == states
    shop.end("a wrong setting", server)


# One key among good ones


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        pytest.param(Answer(403, error_body("AccessDenied")), "StoreDenied", id="denied", marks=pytest.mark.soak),
        pytest.param(
            Answer(403, error_body("SignatureDoesNotMatch")), "StoreDenied", id="rewritten on its way", marks=pytest.mark.soak
        ),
        pytest.param(Answer(503, SLOW_DOWN), "StoreUnavailable", id="503", marks=pytest.mark.soak),
    ],
)
def test_one_key_that_is_refused_among_good_ones_pays_alone(
    site: Site, server: StrictServer, proxy: FaultProxy, shop: Shop, fault: Answer, error: str
) -> None:
    site.settings["upload"]["retry"]["give_up_after"] = 3
    site.write_config()
    proxy.on("PUT", "avatars/7/thumb", fault)

    with site.daemon(constants=QUICK_TRIES) as daemon:
        shop.save(*range(16))
        dead = daemon.until_event("batch.dead")
        for record in set(range(16)) - {7}:
            site.until_state(f"avatars/{record}", "done")
        shop.demand_waiting_is_on_disk()
        row = site.status("avatars/7")
        proxy.clear()
        site.spoold("retry", "avatars/7")
        shop.until_done()

        deferred = daemon.events("batch.deferred")
        assert not daemon.events("spool.held")

    assert [("avatars/7", error)] * 2 == [(line["record"], line["error"]) for line in deferred]
    assert ("GaveUp", "dead") == (dead["error"], row["state"])
    shop.end(f"one key, {error}", server, proxy)


# Answers that are lost, or late


def test_answers_that_are_lost_do_no_harm_to_newer_versions(
    site: Site, server: StrictServer, proxy: FaultProxy, shop: Shop
) -> None:
    proxy.rules.append(often(0.4, LoseAnswer()))

    with site.daemon(constants=BRISK) as daemon:
        for _ in range(3):
            shop.save(*range(8))
            daemon.until_event("batch.stored", count=len(daemon.events("batch.stored")) + 4)
        shop.until_done()

        assert not daemon.events("batch.deferred") and not daemon.events("spool.held")

    assert [] == server.refused()
    shop.end("lost answers", server, proxy)


def test_what_stalls_past_the_timeout_lands_late_and_is_undone(
    site: Site, server: StrictServer, proxy: FaultProxy, shop: Shop
) -> None:
    """Every first PUT of an original goes nowhere; all of them land when newer versions are long there."""
    shop.set_doubt("1h")
    gate = threading.Event()
    stalled: set[str] = set()

    def stall(request: Request) -> Fault | None:
        if request.method != "PUT" or "original" not in request.key or request.key in stalled:
            return None
        stalled.add(request.key)
        return Hold(gate)

    proxy.rules.append(stall)

    with site.daemon(constants={**BRISK, **impatient(0.5)}) as daemon:
        shop.save(*range(6))
        until(lambda: len(stalled) == 6, "all stall")
        shop.save(*range(6))
        until(lambda: shop.is_stored(), "the newer versions are there")
        gate.set()
        until(lambda: all(seen.ended_at for seen in proxy.seen), "the older land")
        is_overwritten = not shop.is_stored()

        assert not daemon.events("batch.dead") and not daemon.events("spool.held")
    site.demand_nothing_lost(shop.written)
    shop.set_doubt("100ms")
    with site.daemon(constants=BRISK):
        shop.until_done()

    assert is_overwritten, "else nothing was put to the test"
    assert [] == server.refused()
    shop.end("stalls", server, proxy)


@pytest.mark.soak
def test_what_lands_after_two_restarts_and_in_reverse_is_undone(
    site: Site, server: StrictServer, proxy: FaultProxy, shop: Shop
) -> None:
    """Two daemons are killed with PUTs under way. The third stores a third version; then theirs land, the older last."""
    shop.set_doubt("1h")
    gates = [threading.Event(), threading.Event()]

    for gate in gates:
        proxy.clear()
        proxy.on("PUT", "avatars", Hold(gate))
        before = len(proxy.seen)
        shop.save(*range(4))
        with site.daemon(constants=BRISK) as daemon:
            until(lambda: len(proxy.seen) > before, "PUTs are under way")  # noqa: B023
            daemon.kill()
        site.demand_nothing_lost(shop.written)
    proxy.clear()
    shop.save(*range(4))
    with site.daemon(constants=BRISK) as daemon:
        until(lambda: shop.is_stored(), "the newest versions are there")
        gates[1].set()
        until(lambda: all(seen.ended_at for seen in proxy.seen[before:]), "the second's land")
        gates[0].set()
        until(lambda: all(seen.ended_at for seen in proxy.seen), "the first's land")
        is_overwritten = not shop.is_stored()

        assert not daemon.events("batch.dead")
    site.demand_nothing_lost(shop.written)
    shop.set_doubt("100ms")
    with site.daemon(constants=BRISK):
        shop.until_done()

    assert is_overwritten, "else nothing was put to the test"
    assert [] == server.refused()
    shop.end("late answers after restarts", server, proxy)


# Bytes that flip on their way to a server that does not check


@pytest.mark.soak
@pytest.mark.parametrize("checksum", ["none", "crc32"])
def test_flipped_bytes_are_found_where_the_server_does_not_look(
    tmp_path: Path, rclone_server: RcloneServer, checksum: str
) -> None:
    with FaultProxy(rclone_server.endpoint_url) as proxy:
        site = Site(tmp_path, rclone_server, endpoint_url=proxy.endpoint_url, s3={"checksum": checksum})
        shop = Shop(site)
        proxy.rules.append(often(0.3, Flip(500)))

        with site.daemon(constants=BRISK) as daemon:
            shop.save(*range(12))
            shop.until_done()

            assert not daemon.events("batch.dead")

        shop.end(f"flipped bytes, {checksum}", rclone_server, proxy)


def test_a_wire_that_flips_a_byte_of_everything_holds_the_spool(tmp_path: Path, rclone_server: RcloneServer) -> None:
    """An empty probe would pass it, and every record would pay."""
    with FaultProxy(rclone_server.endpoint_url) as proxy:
        site = Site(tmp_path, rclone_server, endpoint_url=proxy.endpoint_url)
        shop = Shop(site)
        proxy.on("PUT", "", Flip(500))

        with site.daemon(constants=QUICK_TRIES) as daemon:
            shop.save(*range(6))
            held = daemon.until_event("spool.held")
            until(lambda: {"queued"} == set(shop.states()), "every record waits")
            states, on_disk = shop.states(), site.files()
            proxy.clear()
            shop.until_done()

            assert not daemon.events("batch.deferred")

        assert "Unproven" == held["error"]
        assert {"queued": {0}} == states and shop.written == on_disk
        shop.end("a wire that flips", rclone_server, proxy)


# Credentials


class Keys:
    """Sessions that a server knows, and the credentials file in which boto3 looks for one."""

    def __init__(self, directory: Path, server: StrictServer) -> None:
        self._file = directory / "credentials"
        self._server = server
        self._known: dict[str, dict[str, Any]] = {ACCESS_KEY: {"secret": SECRET_KEY}}
        self.environment = {
            "AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_SHARED_CREDENTIALS_FILE": str(self._file),
        }  # fmt: skip

    def make(self) -> None:
        """Have the server know one more session, which is told nobody yet."""
        number = len(self._known)
        self._known[f"SESSION{number}"] = {"secret": f"secret {number}", "token": f"token-{number}"}
        self._server.set(keys=self._known)

    def give(self) -> None:
        """Write the newest session into the file."""
        name, session = list(self._known.items())[-1]
        draft = self._file.with_suffix(".new")
        draft.write_text(
            f"[default]\naws_access_key_id = {name}\naws_secret_access_key = {session['secret']}\n"
            f"aws_session_token = {session['token']}\n"
        )
        draft.replace(self._file)

    def expire(self) -> None:
        """Let every session but the newest expire."""
        for name in list(self._known)[1:-1]:
            self._known[name]["expires_at"] = 1.0
        self._server.set(keys=self._known)


@pytest.fixture
def keys(tmp_path: Path, server: StrictServer) -> Keys:
    keys = Keys(tmp_path, server)
    keys.make()
    keys.give()
    return keys


def test_credentials_that_are_rotated_in_time_are_not_even_noticed(
    tmp_path: Path, server: StrictServer, proxy: FaultProxy, keys: Keys
) -> None:
    """boto3 keeps those it has read; when they expire, the file has long had others."""
    site = Site(tmp_path, server, endpoint_url=proxy.endpoint_url, environment=keys.environment)
    site.settings["upload"]["retry"]["give_up_after"] = 1
    site.write_config()
    shop = Shop(site)
    proxy.on("PUT", "avatars", Delay(0.02))

    with site.daemon(constants=BRISK) as daemon:
        for turn in range(3):
            shop.save(*range(8 * turn, 8 * turn + 8))
            daemon.until_event("batch.stored", count=8 * turn + 2)
            keys.make()
            keys.give()
            keys.expire()
        shop.until_done()

        assert not daemon.events("spool.held") and not daemon.events("batch.deferred") and not daemon.events("batch.dead")

    assert any("ExpiredToken" in line for line in server.refused()), "they did expire"
    shop.end("rotated credentials", server, proxy)


def test_credentials_that_expire_before_there_are_others_hold_the_spool_until_there_are(
    tmp_path: Path, server: StrictServer, proxy: FaultProxy, keys: Keys
) -> None:
    site = Site(tmp_path, server, endpoint_url=proxy.endpoint_url, environment=keys.environment)
    shop = Shop(site)
    proxy.on("PUT", "avatars", Delay(0.02))

    with site.daemon(constants=QUICK_TRIES) as daemon:
        shop.save(*range(8))
        daemon.until_event("batch.stored", count=2)
        keys.make()
        keys.expire()
        shop.save(*range(6, 12))
        held = daemon.until_event("spool.held")
        shop.until_nothing_goes_up()
        states = shop.states()
        shop.demand_waiting_is_on_disk()
        keys.give()
        daemon.until_event("spool.released")
        shop.until_done()

        assert not daemon.events("batch.deferred")

    assert "ExpiredToken" in held["detail"] and "renew the credentials" in held["hint"]
    assert {0} == set().union(*states.values()) - {None}
    shop.end("expired credentials", server, proxy)


# What kills the daemon


KILLER = b"kills whoever reads it"


def test_a_record_that_kills_its_daemon_is_dead_after_three_times_and_takes_no_other_with_it(
    site: Site, server: StrictServer, proxy: FaultProxy, shop: Shop
) -> None:
    """Eight records are under way whenever it dies, one of them guilty; systemd starts it again."""
    proxy.on("PUT", "avatars", Delay(0.3))
    kill = f"__import__('os').kill(__import__('os').getpid(), 9) if head == {KILLER!r} else 'image/jpeg'"
    constants = {**BRISK, "spoold.uploader.sniff": Code(f"lambda head, name: {kill}")}
    guilty = App(site.root).save("guilty", 1, "me.jpg", {"original": KILLER})["original"]
    shop.save(*range(7))
    lives = 0

    while set(shop.states()) != {"dead", "done"}:
        lives += 1
        assert lives < 12, shop.states()
        with site.daemon(ready=False, constants=constants) as daemon:
            until(lambda: daemon.process.poll() or set(shop.states()) == {"dead", "done"}, "it dies, or has done all")
    row = site.status("guilty/1")

    assert ("dead", "Crashed") == (row["state"], row["error_code"])
    assert 4 == lives, "three of them died"
    assert [guilty] == list(site.root.rglob("me.jpg"))
    guilty.unlink()
    guilty.parent.rmdir()
    guilty.parent.parent.rmdir()
    shop.end("a record that kills", server, proxy)
