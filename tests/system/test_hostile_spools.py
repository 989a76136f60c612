"""Spools made by somebody who means harm: nothing outside the root is read, nobody's is deleted, nothing is lost.

Each test has a real daemon, the laws at its end, and a witness beside the spool by whom the kernel tells who touched what.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import struct
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.figures import record
from tests.hostile import FOREIGN, NAMES, Swapper, Witness, deep_tree, sparse
from tests.paperclip import App, picture
from tests.servers import MotoServer, RcloneServer
from tests.system.harness import BRISK, Daemon, Site, until

RECORD = "avatars/42"
ME = f"{RECORD}/original/me.jpg"
OFTEN = {"sweep_every": "200ms"}
NOBODY = 65534
POWERLESS = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
"""Root without capabilities: an ordinary user, as far as files are concerned, who can read our Python."""
AT_ONCE = {  # so that thousands of files come and go while somebody swaps
    "complete": {"settle": "1ms"},
    "cleanup": {"min_age": "0s", "grace": "0s", "keep_empty_dirs_for": "2s"},
}
FILENAME = ":attachment/:id/:style/:filename"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to other users")
needs_mounts = pytest.mark.skipif(
    os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode != 0,
    reason="nobody may mount here",
)


def photo(seed: int) -> bytes:
    return picture(40, 30, seed)


def jpeg(content: bytes) -> bytes:
    """Return a picture with these bytes in it."""
    whole = picture(12, 9, 1)
    return whole[:2] + b"\xff\xfe" + struct.pack(">H", len(content) + 2) + content + whole[2:]


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A tree beside the spool that looks just like one, and is nobody's business."""
    tree = tmp_path / "outside"
    for number in (41, 42, 43):
        App(tree).save("avatars", number, "me.jpg", {"original": jpeg(FOREIGN), "thumb": jpeg(FOREIGN + b" too")})
    return tree


def tree_of(root: Path) -> dict[str, bytes | str]:
    """Return everything below a directory: what files hold, where links point to, and what else is there."""
    found: dict[str, bytes | str] = {}
    for path in sorted(root.rglob("*")):
        is_file = path.is_file() and not path.is_symlink()
        kind = stat.S_IFMT(path.lstat().st_mode)
        found[str(path.relative_to(root))] = (
            path.read_bytes() if is_file else os.readlink(path) if path.is_symlink() else f"{kind:o}"
        )
    return found


def lying(root: Path) -> list[Path]:
    """Return the regular files in a spool outside our house: looked at, never read, for a witness sees us too."""
    found = [Path(directory, name) for directory, _, names in os.walk(root) for name in names]
    return [path for path in found if ".spoold" not in path.parts and stat.S_ISREG(mode_of(path))]


def mode_of(path: Path) -> int:
    try:
        return path.lstat().st_mode
    except FileNotFoundError:
        return 0


def swept(daemon: Daemon, times: int = 2) -> None:
    """Wait until everything was looked at a few more times."""
    sweeps = len(daemon.events("sweep.finished"))
    daemon.until_event("sweep.finished", count=sweeps + times)


def ignored(daemon: Daemon) -> dict[str, str]:
    """Return why each path was ignored; said twice is once too often."""
    lines = [(line["path"], line["detail"]) for line in daemon.events("path.ignored")]
    assert len(lines) == len(dict(lines)), lines
    return dict(lines)


def demand_nothing_foreign(site: Site) -> int:
    """No object holds what lay outside. Return how many were looked at."""
    objects = site.objects()
    foreign = [key for key, content in objects.items() if FOREIGN in content]
    assert not foreign, f"read from outside the spool: {foreign}"
    return len(objects)


def tell(case: str, *, files: int, swaps: int = 0) -> None:
    """Keep the figures of a run that came through: whatever was read, deleted or lost has failed it before."""
    record("hostile-spool", case=case, files=files, swaps=swaps, read_outside=0, deleted_outside=0, lost=0)


# Links


def test_the_witness_sees_who_reads_lists_and_deletes(outside: Path) -> None:
    """A witness that cannot see anything would be content with everything."""
    with Witness(outside) as witness:
        quiet = witness.seen()
        (outside / "avatars/41/original/me.jpg").read_bytes()
        os.listdir(outside / "avatars")
        (outside / "avatars/43/thumb/me.jpg").unlink()

        assert [] == quiet
        assert {"opened", "accessed"} <= {what for what, path in witness.seen() if path.endswith("41/original/me.jpg")}
        assert ("listed", str(outside / "avatars")) in witness.seen()
        assert ("deleted", str(outside / "avatars/43/thumb/me.jpg")) in witness.seen()
        with pytest.raises(AssertionError):
            witness.demand_untouched()


def test_rule_12_links_at_every_level_are_not_followed_nor_what_is_behind_them_touched(
    rclone_server: RcloneServer, tmp_path: Path, outside: Path
) -> None:
    site = Site(tmp_path, rclone_server, spool=OFTEN)
    behind = {
        "logos": "avatars", "avatars/41": "avatars/41", "avatars/42": ".", "avatars/43/original": "avatars/43/original",
        "avatars/44/original/me.jpg": "avatars/43/original/me.jpg", "avatars/45": "../spool", "a/b": "avatars/41",
    }  # fmt: skip
    before = tree_of(outside)

    with Witness(outside) as witness:
        for place, target in behind.items():
            (site.root / place).parent.mkdir(parents=True, exist_ok=True)
            (site.root / place).symlink_to(outside / target)
        with site.daemon(constants=BRISK) as daemon:
            App(site.root).save("covers", 42, "me.jpg", {"original": photo(1)})
            site.until_state("covers/42", "done")
            for place, target in behind.items():  # and some that come while we watch
                (site.root / f"{place}.later").symlink_to(outside / target)
            swept(daemon)
            why = site.spoold("why", "avatars/41").stdout

            said = ignored(daemon)
        witness.demand_untouched()

    assert all("symbolic link" in said[place] and "symbolic link" in said[f"{place}.later"] for place in behind)
    assert "symbolic link" in why
    assert before == tree_of(outside)
    assert all((site.root / place).is_symlink() for place in behind)
    assert {"covers/42/original/me.jpg": photo(1)} == site.objects()
    tell("links", files=1)


def test_rule_9_a_link_planted_for_our_house_holds_the_spool_until_it_is_moved_away(
    rclone_server: RcloneServer, tmp_path: Path, outside: Path
) -> None:
    """Before the first start, by whoever may write into the root; the daemon may be root."""
    site = Site(tmp_path, rclone_server)
    for victim in ("canary", "owner"):
        (outside / victim).write_bytes(FOREIGN)
    path = site.root / ".spoold"
    path.symlink_to(outside)
    App(site.root).save("avatars", 42, "me.jpg", {"original": photo(1)})
    before = tree_of(outside)

    with Witness(outside) as witness, site.daemon(constants=BRISK) as daemon:
        held = daemon.until_event("spool.held")
        status, files = site.spoold("status").stdout, site.files()
        witness.demand_untouched()
        path.unlink()
        daemon.until_event("spool.released")
        site.until_state(RECORD, "done")

        assert [held] == daemon.events("spool.held")
        witness.demand_untouched()

    assert str(path) in held["detail"] and "move it away" in held["hint"]
    assert "FOREIGN" not in held["detail"] and str(path) in status
    assert {ME: photo(1)} == files and before == tree_of(outside)
    site.demand_laws({ME: photo(1)})
    tell("planted house", files=1)


def test_a_house_that_is_swapped_for_a_link_while_we_live_in_it_holds_the_spool(
    rclone_server: RcloneServer, tmp_path: Path, outside: Path
) -> None:
    site = Site(tmp_path, rclone_server)
    house = site.root / ".spoold"
    for name in ("aside", "kept"):
        (outside / name).mkdir()
    (outside / "canary").write_bytes(FOREIGN)
    before = tree_of(outside)

    with Witness(outside) as witness, site.daemon(constants=BRISK) as daemon:
        house.rename(tmp_path / "house")
        house.symlink_to(outside)
        App(site.root).save("avatars", 42, "me.jpg", {"original": photo(1)})
        daemon.until_event("spool.held")
        house.unlink()
        (tmp_path / "house").rename(house)
        site.until_state(RECORD, "done")

        witness.demand_untouched()
    assert before == tree_of(outside)
    site.demand_laws({ME: photo(1)})


# Swapped in while we walk


def swapping(site: Site, outside: Path, *, seconds: float) -> None:
    """Have records saved again and again while what they are made of is swapped for links; then demand the laws."""
    links, lock, app = site.directory / "links", threading.Lock(), App(site.root)
    links.mkdir()
    pairs = []
    for number, below in ((41, ""), (42, "original"), (43, "original/me.jpg")):  # a record, a style, a file
        link = links / str(number)
        link.symlink_to(outside / "avatars" / str(number) / below)
        pairs.append((site.root / "avatars" / str(number) / below, link))
    before = tree_of(outside)
    written: dict[str, bytes] = {}
    rounds = 0
    with Witness(outside) as witness, site.daemon(constants=BRISK) as daemon:
        with Swapper(pairs, lock=lock) as swapper:
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline or swapper.swaps < 1000:
                rounds += 1
                for number in (41, 42, 43):
                    styles = {style: jpeg(f"{number} {rounds} {style}".encode()) for style in ("original", "thumb")}
                    with lock:
                        app.save("avatars", number, "me.jpg", styles)
                    written |= {f"avatars/{number}/{style}/me.jpg": content for style, content in styles.items()}
                round_ends = min(deadline, time.monotonic() + 1.0)  # let them go up now and then, or be overtaken
                while lying(site.root) and time.monotonic() < round_ends:
                    time.sleep(0.005)
                witness.seen()  # before the kernel has too much to tell
        until(lambda: not lying(site.root), "all is let go once nobody swaps")
        for number in (41, 42, 43):
            site.until_state(f"avatars/{number}", "done")
        touched = witness.seen("opened", "accessed", "modified", "deleted", "moved out", "deleted itself", "attributes")

        assert daemon.process.poll() is None
    assert not touched, touched[:10]
    assert before == tree_of(outside)
    demand_only_kept(site, stat.S_IFLNK)
    demand_nothing_foreign(site)
    site.demand_laws(written)
    tell("swapped links", files=rounds * 6, swaps=swapper.swaps)


def demand_only_kept(site: Site, *kinds: int) -> None:
    """A decoy that came back to a name that was taken again is kept for whoever made it; a version of the app's never is."""
    kept = list((site.root / ".spoold/kept").iterdir())
    assert all(stat.S_IFMT(path.lstat().st_mode) in kinds for path in kept), kept
    for path in kept:
        path.unlink()


def test_links_swapped_in_while_records_go_up_and_are_let_go_are_never_followed(
    rclone_server: RcloneServer, tmp_path: Path, outside: Path
) -> None:
    site = Site(tmp_path, rclone_server, spool={**OFTEN, **AT_ONCE})

    swapping(site, outside, seconds=2)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_links_swapped_in_for_minutes_are_never_followed(rclone_server: RcloneServer, tmp_path: Path, outside: Path) -> None:
    site = Site(tmp_path, rclone_server, spool={**OFTEN, **AT_ONCE})

    swapping(site, outside, seconds=240)


# Hard links


@needs_root
def test_a_hard_link_of_a_foreign_file_loses_our_name_only(rclone_server: RcloneServer, tmp_path: Path, outside: Path) -> None:
    """It lies in the spool as a regular file, so it goes up; the other name and its bytes are its owner's (FACTS 8)."""
    site = Site(tmp_path, rclone_server, spool=OFTEN)
    theirs = outside / "avatars/43/original/me.jpg"
    mine = site.root / ME
    mine.parent.mkdir(parents=True)

    with site.daemon(constants=BRISK) as daemon:
        with open(theirs, "r+b") as writer:  # its owner writes by the other name
            os.link(theirs, mine)
            swept(daemon, 4)
            while_open = site.status(RECORD)
            writer.write(jpeg(FOREIGN)[:10])
        site.until_state(RECORD, "done")

        daemon.demand_legal_path(RECORD)

    assert "receiving" == while_open["state"]
    assert jpeg(FOREIGN) == theirs.read_bytes() and 1 == theirs.stat().st_nlink
    assert {ME: jpeg(FOREIGN)} == site.objects()


# What is no file


def test_rule_12_special_files_that_take_a_files_name_are_never_opened_and_stay(
    rclone_server: RcloneServer, tmp_path: Path
) -> None:
    """A FIFO that is opened blocks, or wakes who waits at its other end; a device may do anything."""
    site = Site(tmp_path, rclone_server, spool={**OFTEN, **AT_ONCE})
    decoys = [tmp_path / name for name in ("fifo", "socket", "device")]
    os.mkfifo(decoys[0])
    os.mknod(decoys[1], stat.S_IFSOCK | 0o600)
    try:
        os.mknod(decoys[2], stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero: reading it would never end
    except PermissionError:
        decoys.pop()
    app, lock, written, rounds = App(site.root), threading.Lock(), {}, 0
    paths = [site.root / f"avatars/{number}/original/me.jpg" for number in range(len(decoys))]

    with Witness(*decoys) as witness, site.daemon(constants=BRISK) as daemon:
        with Swapper(list(zip(paths, decoys, strict=True)), lock=lock) as swapper:
            deadline = time.monotonic() + 1.5
            while time.monotonic() < deadline or swapper.swaps < 1000:
                rounds += 1
                for number, path in enumerate(paths):
                    with lock:
                        app.save("avatars", number, "me.jpg", {"original": jpeg(b"%d %d" % (number, rounds))})
                    written[str(path.relative_to(site.root))] = jpeg(b"%d %d" % (number, rounds))
        until(lambda: not site.files(), "the newest goes up once nobody swaps")
        for number in range(len(decoys)):
            site.until_state(f"avatars/{number}", "done")

        assert daemon.process.poll() is None
        assert not witness.seen("opened", "accessed", "modified")
    demand_only_kept(site, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR)
    site.demand_laws(written)
    tell("swapped special files", files=rounds * len(decoys), swaps=swapper.swaps)


# Mounts


@needs_mounts
def test_rule_12_what_is_mounted_there_of_the_same_filesystem_is_reported_once_and_not_read(
    rclone_server: RcloneServer, tmp_path: Path, outside: Path
) -> None:
    """It has the device's number of the spool, would go up like any other, and could then never be set aside."""
    site = Site(tmp_path, rclone_server, spool=OFTEN)
    mounted = {
        "logos": "avatars", "avatars/41": "avatars/41", "avatars/42/original": "avatars/42/original",
        "avatars/43/original/me.jpg": "avatars/43/original/me.jpg",
    }  # fmt: skip
    for place in mounted:
        path = site.root / place
        (path.parent if path.suffix else path).mkdir(parents=True)
        if path.suffix:
            path.write_bytes(b"")
    binds = " && ".join(f"mount --bind '{outside / source}' '{site.root / place}'" for place, source in mounted.items())

    with Witness(outside) as witness, site.daemon(constants=BRISK, within=within_own_mounts(f"{binds} &&")) as daemon:
        App(site.root).save("covers", 42, "me.jpg", {"original": photo(1)})
        site.until_state("covers/42", "done")
        swept(daemon)

        assert dict.fromkeys(mounted, "something else is mounted there") == ignored(daemon)
        assert not witness.seen("opened", "accessed", "deleted", "moved out", "modified")
        assert {"covers/42"} == {line["record"] for line in daemon.events("batch.settled")}

    assert {"covers/42/original/me.jpg": photo(1)} == site.objects()
    tell("bind mounts", files=1)


@needs_mounts
@pytest.mark.soak
def test_rule_12_mounts_that_come_and_go_while_we_walk_are_not_read_and_what_they_hide_is_not_lost(
    rclone_server: RcloneServer, tmp_path: Path, outside: Path
) -> None:
    site = Site(tmp_path, rclone_server, spool={**OFTEN, "complete": {"settle": "50ms"}})
    written = {f"avatars/{number}/original/me.jpg": photo(number) for number in range(4)}
    for number in range(4):
        App(site.root).save("avatars", number, "me.jpg", {"original": photo(number)})
    source, over = outside / "avatars/43/original", tmp_path / "over"
    turns = 40
    paths = [site.root / path for path in written]
    mounts = "; ".join(f"mount --bind '{source}' '{path.parent}'; mount --bind '{source}/me.jpg' '{path}'" for path in paths)
    unmounts = "; ".join(f"umount -l '{path}'; umount -l '{path.parent}'" for path in paths)
    script = f"(for i in $(seq {turns}); do {mounts}; {unmounts}; done; touch '{over}') >/dev/null 2>&1 &"

    with Witness(outside) as witness, site.daemon(constants=BRISK, within=within_own_mounts(script)) as daemon:
        until(over.exists, "the last one is unmounted")
        until(lambda: not site.files(), "all is let go once nothing is mounted")
        for number in range(4):
            site.until_state(f"avatars/{number}", "done")

        assert daemon.process.poll() is None
        assert not witness.seen("opened", "accessed", "deleted", "moved out", "modified")
    demand_nothing_foreign(site)
    site.demand_laws(written)
    tell("mounts that come and go", files=4, swaps=turns * 8)


def within_own_mounts(script: str) -> list[str]:
    """Return the command that runs this, and then us, where nobody else sees what is mounted."""
    return ["unshare", "--mount", "sh", "-c", f'{script} exec "$@"', "sh"]


# Names


def test_every_legal_name_arrives_with_its_own_bytes_and_none_is_in_the_way(moto_server: MotoServer, tmp_path: Path) -> None:
    """As a file's name and as a style's, among some that are no UTF-8, all of them coming while we watch.

    To moto, since rclone's server gives some of them other names on its disk; but moto knows no key with a line feed.
    """
    site = Site(tmp_path, moto_server, spool={**OFTEN, "path": FILENAME, "key": FILENAME})
    names = {label: name for label, name in NAMES.items() if "\n" not in name}
    written = {f"{RECORD}/original/{name}": f"{label} file".encode() for label, name in names.items()}
    written |= {f"avatars/43/{name}/me.txt": f"{label} style".encode() for label, name in names.items()}
    root = os.fsencode(site.root)
    odd = [b"avatars/42/original/\xff\xfe.jpg", b"avatars/\xe9t\xe9/original/me.jpg", b"\xff/42/original/me.jpg",
           b"avatars/42/\xc3/me.jpg"]  # fmt: skip

    with site.daemon(constants=BRISK) as daemon:
        for path in odd:
            os.makedirs(os.path.join(root, os.path.dirname(path)), exist_ok=True)
            with open(os.path.join(root, path), "wb") as file:
                file.write(FOREIGN)
        for path, content in written.items():
            (site.root / path).parent.mkdir(parents=True, exist_ok=True)
            (site.root / path).write_bytes(content)
        until(lambda: set(site.files()) == {os.fsdecode(path) for path in odd}, "all others are let go")
        for record_ in (RECORD, "avatars/43"):
            site.until_state(record_, "done")
        swept(daemon)
        card = site.spoold("status", RECORD).stdout

        assert {"its name is no UTF-8"} == set(ignored(daemon).values())
        assert {"\\udcff", "avatars/\\udce9t\\udce9", "avatars/42/\\udcc3"} <= set(ignored(daemon))
        log = daemon.log_file.read_text()
    assert written == site.objects()
    assert {FOREIGN} == {Path(os.fsdecode(os.path.join(root, path))).read_bytes() for path in odd}
    for character in "\x1b\x07\x7f\x85\x9b\u2028\u202e\r":
        assert character not in log and character not in card, f"{character!r} is shown as it is"
    tell("names", files=len(written))


def test_a_name_with_a_line_feed_arrives(rclone_server: RcloneServer, tmp_path: Path) -> None:
    site = Site(tmp_path, rclone_server, spool={"path": FILENAME, "key": FILENAME})
    written = {f"{RECORD}/original/a\nb.jpg": photo(1), "avatars/a\n/original/.spoold": b"ours? no", "..a/1/original/b": b"b"}

    with site.daemon(constants=BRISK):
        for path, content in written.items():
            (site.root / path).parent.mkdir(parents=True, exist_ok=True)
            (site.root / path).write_bytes(content)
        until(lambda: len(site.objects()) == 3, "all go up")
        for record_ in (RECORD, "avatars/a\n", "..a/1"):
            site.until_state(record_, "done")

    site.demand_laws(written)


# Very many, very deep, very large


def test_a_tree_deeper_than_python_can_call_holds_up_nothing(rclone_server: RcloneServer, tmp_path: Path) -> None:
    """With :class a record may lie at any depth; os.walk, which watchdog uses, calls itself for each level."""
    layout = ":class/:attachment/:id/:style/:basename.:extension"
    site = Site(tmp_path, rclone_server, spool={**OFTEN, "path": layout, "key": layout})
    files = {"users/avatars/42/original/me.jpg": photo(1), "users/avatars/43/original/me.jpg": photo(2)}
    (site.root / "users").mkdir()

    with deep_tree(site.root / "deep", 1200), site.daemon(constants=BRISK) as daemon:
        for number, (path, content) in enumerate(files.items()):
            (site.root / path).parent.mkdir(parents=True)
            (site.root / path).write_bytes(content)
            site.until_state(f"users/avatars/{42 + number}", "done")
            if number == 0:
                with deep_tree(site.root / "users/deeper", 1200):
                    swept(daemon)
        said = ignored(daemon)

        assert not daemon.events("watch.restarted")
    assert files == site.objects()
    assert "it lies more than 64 directories deep" in said.values()
    assert len(said) < 200, "not each of its directories is told of"
    tell("deep tree", files=2)


def many_files(site: Site, count: int) -> None:
    """Have a record of so many files uploaded and let go, and a small one besides, which must not wait for it."""
    written = {}
    for number in range(count // 2):
        for style in ("original", "thumb"):
            written[f"{RECORD}/{style}/{number}.txt"] = f"{number} {style}".encode()
    for path, content in written.items():
        (site.root / path).parent.mkdir(parents=True, exist_ok=True)
        (site.root / path).write_bytes(content)
    began = time.monotonic()
    with site.daemon() as daemon:
        site.until_state(RECORD, "uploading", timeout_s=400)
        App(site.root).save("avatars", 7, "me.jpg", {"original": photo(7)})
        site.until_state("avatars/7", "uploaded", "done", timeout_s=400)
        small_s = time.monotonic() - began
        site.until_state(RECORD, "done", timeout_s=1500)
        site.until_state("avatars/7", "done")
        peak = peak_memory_bytes(daemon.process.pid)
        elapsed_s = time.monotonic() - began
    assert peak < 400_000_000
    site.demand_laws(written | {"avatars/7/original/me.jpg": photo(7)})
    record(
        "hostile-many", files=count, elapsed_s=round(elapsed_s, 1), small_one_after_s=round(small_s, 1), peak_mb=peak // 10**6
    )


def test_a_hundred_files_in_one_record_go_up_as_one(rclone_server: RcloneServer, tmp_path: Path) -> None:
    many_files(Site(tmp_path, rclone_server), 120)


@pytest.mark.soak
@pytest.mark.timeout(2400)
def test_ten_thousand_files_in_one_record_go_up_as_one(rclone_server: RcloneServer, tmp_path: Path) -> None:
    many_files(Site(tmp_path, rclone_server), 10_000)


def sparse_file(site: Site, size_bytes: int) -> None:
    """Have a file that is nearly all hole go up in parts; what is held of it in memory is bounded."""
    path = sparse(site.root / "videos/1/original/clip.bin", size_bytes)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with site.daemon() as daemon:
        site.until_state("videos/1", "done", timeout_s=900)
        peak = peak_memory_bytes(daemon.process.pid)
    body = site.server.client().get_object(Bucket=site.bucket, Key="videos/1/original/clip.bin")["Body"]
    got = hashlib.sha256()
    for chunk in body.iter_chunks(1 << 20):
        got.update(chunk)
    assert digest == got.hexdigest()
    assert peak < 300_000_000, f"{peak / 1e6:.0f} MB at its peak"
    site.demand_nothing_left()
    record("hostile-sparse", size_mb=size_bytes // 10**6, peak_mb=peak // 10**6)


def test_a_sparse_file_goes_up_in_bounded_memory(rclone_server: RcloneServer, tmp_path: Path) -> None:
    sparse_file(Site(tmp_path, rclone_server), 64_000_000)


@pytest.mark.soak
@pytest.mark.timeout(2400)
def test_a_sparse_file_beyond_what_one_put_may_have_goes_up_in_bounded_memory(
    rclone_server: RcloneServer, tmp_path: Path
) -> None:
    available = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvail" in line)
    if available < 12_000_000:
        pytest.skip("rclone's server keeps the parts of an upload in memory: 12 GB must be free")
    sparse_file(Site(tmp_path, rclone_server), 5 * 1024**3 + 1)


def peak_memory_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])


# Permissions that flip


@needs_root
def test_permissions_that_flip_all_the_time_lose_nothing_and_heal_by_themselves(
    rclone_server: RcloneServer, tmp_path: Path
) -> None:
    """Of files, styles and records, while they are looked at, read and let go; no grave is dug that nobody empties."""
    site = Site(tmp_path, rclone_server, spool={**OFTEN, **AT_ONCE})
    app, written, flips = App(site.root), {}, 0

    with site.daemon(constants=BRISK, within=POWERLESS) as daemon:
        for round_ in range(12):
            for number in range(4):
                styles = {"original": photo(round_), "thumb": photo(100 + round_)}
                app.save("avatars", number, "me.jpg", styles)
                written |= {f"avatars/{number}/{style}/me.jpg": content for style, content in styles.items()}
            for below in ("", "original", "original/me.jpg", "thumb", ""):
                for number in range(4):
                    path = site.root / "avatars" / str(number) / below
                    for mode in (0, 0o111, 0o444, 0o755):
                        with suppress(FileNotFoundError):
                            path.chmod(mode)
                            flips += 1
        until(lambda: not site.files(), "all is let go by itself")
        for number in range(4):
            site.until_state(f"avatars/{number}", "done")

        assert not daemon.events("batch.dead") and not daemon.events("spool.held")
    site.demand_laws(written)
    tell("permissions that flip", files=len(written) * 12, swaps=flips)


@needs_root
@pytest.mark.parametrize("how", ["immutable", "directory"])
def test_what_is_proven_but_may_not_be_moved_stays_uploaded_with_the_remedy_and_holds_up_nothing_else(
    how: str, rclone_server: RcloneServer, tmp_path: Path
) -> None:
    site = Site(tmp_path, rclone_server, spool=OFTEN)
    App(site.root).save("avatars", 42, "me.jpg", {"original": photo(1), "thumb": photo(2)})
    path = site.root / ME
    if how == "immutable":
        set_immutable(path, True)
    else:
        path.parent.chmod(0o555)

    try:
        with site.daemon(constants=BRISK, within=[] if how == "immutable" else POWERLESS) as daemon:
            deferred = daemon.until_event("clear.deferred", count=3, record=RECORD)
            row, why, files = site.status(RECORD), site.spoold("why", ME).stdout, site.files()
            if how == "immutable":
                set_immutable(path, False)
            else:
                path.parent.chmod(0o755)
            site.until_state(RECORD, "done")

            assert len(daemon.events("clear.deferred")) < 40, "it waits longer and longer"
    finally:
        if how == "immutable" and path.exists():
            set_immutable(path, False)
    assert f"set aside {ME}: " in deferred["detail"] and "access" in deferred["hint"]
    assert ("lsattr" in deferred["hint"]) == (how == "immutable")
    assert "uploaded" == row["state"] and 0 == row["processing"] and ME in row["error"]
    assert ME in why and "could not be let go yet" in why
    assert {ME: photo(1)} == files, "the other style is let go"
    site.demand_laws({ME: photo(1), f"{RECORD}/thumb/me.jpg": photo(2)})
    tell(f"cannot be moved: {how}", files=2)


def set_immutable(path: Path, on: bool) -> None:
    """As chattr does it. Skips where the filesystem has no such flag."""
    get, set_, immutable = 0x80086601, 0x40086602, 0x10
    with open(path, "rb") as file:
        try:
            (flags,) = struct.unpack("l", fcntl.ioctl(file, get, struct.pack("l", 0)))
            fcntl.ioctl(file, set_, struct.pack("l", flags | immutable if on else flags & ~immutable))
        except OSError as error:
            pytest.skip(f"no file is immutable here: {error.strerror}")
