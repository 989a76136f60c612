"""Why a file is still here, whether it is proven yet, what would go where: one true sentence each."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from spoold import config
from spoold.errors import BadPath, SpoolBroken, SpooldError, StoreDenied, StoreUnavailable
from spoold.explain import Explainer, Planned, find
from spoold.ledger import Ledger
from spoold.model import HOUSE, Answer, Claim, PutResult
from tests.paperclip import picture
from tests.parts import BUCKET, NAME, RECORD, Bench, in_a_world, until, walked, without_leases, without_root_powers

CAT = {"original/cat.jpg": picture(24, 18), "thumb/cat.jpg": picture(12, 9)}
KEY = f"{RECORD}/original/cat.jpg"
THUMB = f"{RECORD}/thumb/cat.jpg"
STYLES = {"styles": ["original", "thumb"]}
PATH = ":attachment/:id/:style/:basename.:extension"
LATER_S = 60.0


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with Bench(tmp_path) as bench:
        yield bench


def explainer(bench: Bench, *, ledger: Ledger | str | None = "bench", **settings: Any) -> Explainer:
    """Return what explains the bench's spool. settings: as in the configuration."""
    values = {"name": NAME, "root": str(bench.root), "bucket": BUCKET, **settings}
    chosen = bench.ledger if isinstance(ledger, str) else ledger
    return Explainer(settings=config.Spool.model_validate(values), ledger=chosen, clock=bench.clock)


def why(bench: Bench, path: str, /, **settings: Any) -> str:
    """Ask, after everything has settled."""
    bench.clock.advance(LATER_S)
    said = explainer(bench, **settings).why(path)
    assert "\n" not in said
    return said


def write(bench: Bench, files: Mapping[str, bytes] = CAT, record: str = RECORD) -> None:
    for path, content in files.items():
        bench.write(f"{record}/{path}", content)


def pending(bench: Bench, files: Mapping[str, bytes] = CAT, *, is_all: bool = True) -> Claim:
    write(bench, files)
    assert bench.offer(is_all=is_all) is not None
    return bench.claimed()


def seen(bench: Bench, reason: str = "cat: style thumb missing", state: str = "receiving") -> None:
    snapshot = bench.spool.look(RECORD)
    bench.ledger.see(NAME, snapshot, snapshot.files, state=state, reason=reason)


def let_go(bench: Bench, claim: Claim) -> None:
    """Have all local files of a stored batch let go, and its directories."""
    for file in claim.batch.files:
        (bench.root / file.file.path).unlink()
    bench.ledger.let_go(claim, claim.batch.files, deleted=True)
    bench.ledger.done(claim, None)


# What spoold never touches


def a_link(bench: Bench) -> None:
    (bench.root / KEY).symlink_to("/etc/passwd")


def a_dangling_link(bench: Bench) -> None:
    (bench.root / KEY).symlink_to("/nowhere")


def a_fifo(bench: Bench) -> None:
    os.mkfifo(bench.root / KEY)


def a_socket(bench: Bench) -> None:
    here = os.getcwd()
    os.chdir(bench.root / RECORD / "original")  # its address has at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("cat.jpg")
    finally:
        os.chdir(here)


@pytest.mark.parametrize(
    ("make", "what"),
    [(a_link, "symbolic link"), (a_dangling_link, "symbolic link"), (a_fifo, "special file"), (a_socket, "special file")],
)
def test_rule_12_links_and_special_files_stay(bench: Bench, make: Callable[[Bench], None], what: str) -> None:
    (bench.root / RECORD / "original").mkdir(parents=True)
    make(bench)

    said = why(bench, KEY)

    assert said.startswith(f"{KEY} stays: it is a {what}") and "never opens" in said


def test_rule_12_what_lies_behind_a_link_is_not_looked_at(bench: Bench) -> None:
    """The link is what is in the way, though the file is there for everybody who follows it."""
    elsewhere = bench.directory / "elsewhere" / "original"
    elsewhere.mkdir(parents=True)
    (elsewhere / "cat.jpg").write_bytes(CAT["original/cat.jpg"])
    (bench.root / "avatars").mkdir()
    (bench.root / RECORD).symlink_to(elsewhere.parent)

    said = why(bench, KEY)

    assert said.startswith(f"{KEY} stays: {RECORD} is a symbolic link")


@pytest.mark.parametrize("path", ["README", "avatars/README", f"{RECORD}/notes.txt", f"{RECORD}/original/deep/er.jpg"])
def test_a_stranger_s_file_is_none_of_our_business(bench: Bench, path: str) -> None:
    bench.write(path)

    said = why(bench, path)

    assert said == f"{path} stays: it does not fit the layout `{PATH}` of spool uploads, so it is none of spoold's business."


def test_a_stranger_s_file_beside_uploaded_ones_is_none_of_our_business(bench: Bench) -> None:
    bench.batch_stored(CAT)
    bench.write(f"{RECORD}/notes.txt")

    assert "none of spoold's business" in why(bench, f"{RECORD}/notes.txt")


def test_what_does_not_fit_and_is_not_there_never_went_anywhere(bench: Bench) -> None:
    assert why(bench, "README").startswith("README is not there, and never went anywhere: it does not fit the layout")


def test_a_name_that_never_was_in_an_uploaded_record_went_nowhere(bench: Bench) -> None:
    let_go(bench, bench.batch_stored(CAT))

    said = why(bench, f"{RECORD}/notes.txt")

    assert "s3://" not in said
    assert said.startswith(f"{RECORD}/notes.txt is not ")


@pytest.mark.parametrize("path", ["avatars", "admin"])
def test_a_directory_above_records_stays(bench: Bench, path: str) -> None:
    (bench.root / path).mkdir()

    assert why(bench, path) == f"{path} is a directory that records lie in: it stays; ask about one of them."


def test_the_root_always_stays(bench: Bench) -> None:
    assert why(bench, "") == (f"{bench.root} is the root of spool uploads: it always stays; ask about what lies in it.")


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (HOUSE, f"{HOUSE} is spoold's own."),
        (f"{HOUSE}/owner", f"{HOUSE}/owner is spoold's own."),
        (f"{HOUSE}/aside", f"{HOUSE}/aside is spoold's own."),
        (f"{HOUSE}/aside/1.1.abc", f"{HOUSE}/aside/1.1.abc is set aside and waits for its last look (cleanup.grace)"),
        (f"{HOUSE}/kept/1.1.abc", f"{HOUSE}/kept/1.1.abc came back to a name that a newer file had taken"),
        (f"{HOUSE}2", f"{HOUSE}2 is not there, and never went anywhere"),
    ],
)
def test_what_lies_in_our_house_is_ours(bench: Bench, path: str, says: str) -> None:
    assert why(bench, path).startswith(says)
    assert why(bench, explainer(bench).relative(str(bench.root / path)) or "?").startswith(says), "by its absolute path too"


# Refused


def test_a_file_that_can_have_no_key_stays_and_says_why(bench: Bench) -> None:
    write(bench)

    said = why(bench, KEY, key=f"{'x' * 1000}/{PATH}")

    assert said.startswith(f"{KEY} stays: {KEY}: the key has 10") and "over 1024" in said
    assert said.endswith("rename it, or mend `key` of spool uploads.")


def test_a_record_with_a_file_that_can_have_no_key_says_so(bench: Bench) -> None:
    write(bench)

    said = why(bench, RECORD, key=f"{'x' * 1000}/{PATH}")

    assert said.startswith(f"{RECORD} stays: ") and "over 1024" in said


# Not accepted yet


def test_what_changed_a_moment_ago_waits_for_quiet(bench: Bench) -> None:
    write(bench)

    said = explainer(bench, complete={"settle": "10s"}).why(KEY)

    assert said.startswith(f"{KEY} waits because record {RECORD} is not complete (cat: something in it changed ")


@pytest.mark.parametrize("path", [KEY, f"{RECORD}/original", RECORD])
def test_an_incomplete_record_says_what_is_missing(bench: Bench, path: str) -> None:
    write(bench, {"original/cat.jpg": CAT["original/cat.jpg"]})

    assert why(bench, path, complete=STYLES) == (
        f"{path} waits because record {RECORD} is not complete (cat: style thumb missing); it goes up as soon as "
        f"that changes, or as it lies with: spoold retry --as-is {RECORD}"
    )


def test_a_record_without_its_marker_says_so_and_so_does_one_with_a_newer_file(bench: Bench) -> None:
    write(bench)
    without = why(bench, KEY, complete={"marker": ".done"})
    bench.write(f"{RECORD}/.done", b"")
    with_marker = why(bench, KEY, complete={"marker": ".done"})
    until(lambda: is_newer_than_marker(bench), "the disk's clock ticks")
    newer = why(bench, KEY, complete={"marker": ".done"})

    assert "its marker .done is not there" in without
    assert f"{KEY} is complete and not accepted yet" in with_marker
    assert "a file is newer than its marker .done" in newer


def is_newer_than_marker(bench: Bench) -> bool:
    """Touch the file, and say whether the disk's clock has ticked since the marker was written."""
    os.utime(bench.root / KEY)
    return (bench.root / KEY).stat().st_ctime_ns > (bench.root / RECORD / ".done").stat().st_ctime_ns


def test_the_marker_is_one_of_the_record_s_files(bench: Bench) -> None:
    write(bench, {"original/cat.jpg": CAT["original/cat.jpg"]})
    bench.write(f"{RECORD}/.done", b"")

    said = why(bench, f"{RECORD}/.done", complete={"marker": ".done", **STYLES})

    assert "none of spoold's business" not in said
    assert f"{RECORD}/.done waits because record {RECORD} is not complete (cat: style thumb missing)" in said


def test_an_image_that_is_cut_off_says_so(bench: Bench) -> None:
    write(bench, {"original/cat.jpg": CAT["original/cat.jpg"][:-50]})

    said = why(bench, KEY)

    assert f"record {RECORD} is not complete (cat: original/cat.jpg: " in said


def test_a_file_that_is_open_for_writing_says_so(bench: Bench) -> None:
    write(bench)

    with open(bench.root / KEY, "ab"):
        said = why(bench, KEY)

    assert "not complete (cat: original/cat.jpg is open for writing)" in said


def test_what_is_complete_is_accepted_soon(bench: Bench) -> None:
    write(bench)

    for ledger in ("bench", None):
        said = why(bench, KEY, ledger=ledger, sweep_every="90s", complete=STYLES)
        assert said == (
            f"{KEY} is complete and not accepted yet: a running daemon does so within moments, "
            "at the latest at its next sweep (every 90 s)."
        )


def test_what_did_not_decode_says_so_without_being_decoded_again(bench: Bench) -> None:
    from spoold.errors import Unfinished

    claim = pending(bench)
    bench.ledger.withdraw(claim, Unfinished("decode: broken", ["cat"]), vetoed=["cat"])

    assert "not complete (cat: an image in it does not decode)" in why(bench, KEY)


def test_a_file_that_the_daemon_may_not_read_does_not_stop_the_answer(bench: Bench) -> None:
    write(bench)
    (bench.root / KEY).chmod(0)

    said = in_a_world(lambda: why(bench, KEY), without_root_powers)

    assert "Permission denied" in said


# On its way


def test_a_batch_that_waits_for_its_turn_says_so(bench: Bench) -> None:
    write(bench)
    bench.offer()

    assert why(bench, KEY) == f"{KEY} is complete and waits for its turn."


def test_what_waits_for_its_turn_is_not_incomplete_because_another_basename_is(bench: Bench) -> None:
    write(bench)
    bench.offer(is_all=False)
    write(bench, {"original/dog.jpg": picture(24, 18)})
    seen(bench, "dog: style thumb missing")
    bench.ledger.see(NAME, bench.spool.look(RECORD), [], state="receiving", reason="dog: style thumb missing")

    cat, dog, record = (why(bench, path, complete=STYLES) for path in (KEY, f"{RECORD}/original/dog.jpg", RECORD))

    assert cat == f"{KEY} is complete and waits for its turn."
    for said in (dog, record):
        assert "not complete (dog: style thumb missing)" in said and "cat:" not in said


@pytest.mark.parametrize("how", ["deferred", "dead"])
def test_what_failed_is_not_incomplete_because_another_basename_is(bench: Bench, how: str) -> None:
    claim = pending(bench, is_all=False)
    if how == "deferred":
        bench.ledger.defer(claim, StoreUnavailable("put: 503"), 600.0)
    else:
        bench.ledger.bury(claim, BadPath("put: no", hint="rename it"))
    write(bench, {"original/dog.jpg": picture(24, 18)})
    seen(bench, "dog: style thumb missing")

    said = why(bench, KEY, complete=STYLES)

    assert {"deferred": "waits for another attempt at 20", "dead": "stays because its upload was given up"}[how] in said
    assert "None" not in said


def test_a_held_spool_says_since_when_and_what_would_mend_it(bench: Bench) -> None:
    write(bench)
    bench.offer()
    bench.ledger.hold(NAME, StoreDenied("put: 403 AccessDenied", hint="renew the credentials"))

    said = why(bench, KEY)

    assert re.fullmatch(
        rf"{KEY} waits because spool uploads is held since 20\S+Z \(put: 403 AccessDenied\); it goes on by itself when "
        r"that is mended: renew the credentials\.", said,
    )  # fmt: skip


def test_a_retrying_record_says_when_and_why(bench: Bench) -> None:
    bench.ledger.defer(pending(bench), StoreUnavailable("put: 503 SlowDown"), 600.0)

    assert re.fullmatch(
        rf"{KEY} waits for another attempt at 20\S+Z, because the last of 1 did not succeed \(put: 503 SlowDown\); "
        rf"to try now: spoold retry {RECORD}", why(bench, KEY),
    )  # fmt: skip


@pytest.mark.parametrize("hint", ["", "rename it"])
def test_a_dead_record_says_why_and_how_it_lives_again(bench: Bench, hint: str) -> None:
    bench.ledger.bury(pending(bench), BadPath("put: no key", hint=hint))

    said = why(bench, KEY)

    assert said == (
        f"{KEY} stays because its upload was given up (put: no key); {hint + '; ' if hint else ''}then: spoold retry {RECORD}"
    )


def test_a_record_that_is_being_uploaded_says_so(bench: Bench) -> None:
    pending(bench)

    assert explainer(bench).why(KEY) == f"{KEY} is being uploaded right now."


# In the bucket


def test_what_was_let_go_says_where_it_went(bench: Bench) -> None:
    claim = bench.batch_stored(CAT)
    let_go(bench, claim)

    file, record, style = (why(bench, path) for path in (KEY, RECORD, f"{RECORD}/original"))

    assert re.fullmatch(rf"{KEY} went to s3://{BUCKET}/{KEY}, proven at 20\S+Z, and its local file was let go\.", file)
    assert record.startswith(f"{RECORD} went to s3://{BUCKET}/ (2 objects), proven at 20")
    assert style.startswith(f"{RECORD}/original of record {RECORD} went to s3://{BUCKET}/ (2 objects)")


def waits(bench: Bench, for_what: str, **settings: Any) -> str:
    """Return why a file is still here whose batch is stored and waits for this."""
    bench.ledger.come_back(bench.batch_stored(CAT), bench.clock.now() + 3600, for_what)
    return why(bench, KEY, **settings)


@pytest.mark.parametrize(
    ("for_what", "says"),
    [
        ("min_age", "is too young to be set aside (cleanup.min_age)"),
        ("keep_for", "is kept for a while after its upload (cleanup.keep_for)"),
        ("open", "is open for writing by some process (find it with: fuser -v)"),
        ("doubt", "is kept because an older PUT of the same key was never answered and may still land (upload.doubt)"),
    ],
)
def test_what_is_uploaded_says_what_its_local_file_waits_for(bench: Bench, for_what: str, says: str) -> None:
    said = waits(bench, for_what)

    assert said.startswith(f"{KEY} is in s3://{BUCKET}/{KEY}, proven at 20")
    assert f", and {says}; the next look is at 20" in said


def test_what_is_due_says_no_time(bench: Bench) -> None:
    bench.batch_stored(CAT)

    assert why(bench, KEY).endswith(", and is about to be let go.")


def test_what_could_not_be_let_go_says_why(bench: Bench) -> None:
    bench.ledger.defer(bench.batch_stored(CAT), StoreUnavailable("head: 503"), 600.0)

    said = why(bench, KEY)

    assert ", and could not be let go yet (head: 503); the next look is at 20" in said


def test_a_file_that_lies_aside_says_so_by_the_name_it_had(bench: Bench) -> None:
    claim = bench.batch_stored(CAT)
    walked(bench.pipeline(cleaner=bench.cleaner(grace_s=600.0)), claim)

    said = why(bench, KEY)

    assert not (bench.root / KEY).exists()
    assert f"{KEY} is in s3://{BUCKET}/{KEY}" in said and "is set aside and waits for its last look" in said


def test_a_copy_stays_by_choice(bench: Bench) -> None:
    bench.ledger.done(bench.batch_stored(CAT), None)

    file, record = (why(bench, path, cleanup={"delete": False}) for path in (KEY, RECORD))

    assert file.endswith(", and stays here because cleanup.delete is false.")
    assert record.endswith("its local files stay because cleanup.delete is false.")


def test_a_file_stays_where_the_kernel_cannot_tell_about_writers(bench: Bench) -> None:
    claim = bench.batch_stored(CAT)

    def walk_and_ask() -> str:
        walked(bench.pipeline(), claim)
        return why(bench, KEY)

    said = in_a_world(walk_and_ask, without_leases())

    assert said.endswith("because the kernel cannot tell here who has it open for writing (cleanup.without_leases: keep).")


def test_what_stayed_by_choice_does_not_blame_the_kernel_when_the_choice_is_another_now(bench: Bench) -> None:
    """Uploaded under cleanup.delete: false, which was changed since."""
    bench.ledger.done(bench.batch_stored(CAT), None)

    said = why(bench, KEY)

    assert "kernel" not in said and "cleanup.delete" in said


def test_a_directory_waits_to_be_old_or_holds_something_else(bench: Bench) -> None:
    claim = bench.batch_stored(CAT)
    pipeline = bench.pipeline(cleaner=bench.cleaner(keep_empty_dirs_for_s=600.0))
    walked(pipeline, claim)
    walked(pipeline, bench.claimed())
    young = why(bench, RECORD)
    bench.write(f"{RECORD}/notes.txt")
    for _ in range(3):
        bench.clock.advance(601)
        if (again := bench.claim()) is not None:
            walked(pipeline, again)
    foreign = why(bench, RECORD)

    assert "its directory goes once it is empty and 30 s old (cleanup.keep_empty_dirs_for)" in young
    assert "its directory stays because something lies in it that spoold did not upload" in foreign


def test_a_newer_version_is_judged_by_itself(bench: Bench) -> None:
    bench.batch_stored(CAT)
    bench.write(KEY, picture(24, 18, seed=1))

    assert why(bench, KEY).startswith(f"{KEY} is complete and not accepted yet")
    assert why(bench, THUMB).startswith(f"{THUMB} is in s3://")


def test_a_record_that_the_app_removed_is_gone(bench: Bench) -> None:
    write(bench)
    seen(bench)
    for path in CAT:
        (bench.root / RECORD / path).unlink()
    bench.ledger.nothing_waits(NAME, RECORD, is_empty=True)

    assert why(bench, RECORD) == f"{RECORD} is gone: the app removed it before it was uploaded."


@pytest.mark.parametrize("path", ["avatars/9", "avatars/9/original/cat.jpg"])
def test_a_record_that_nobody_heard_of_says_so(bench: Bench, path: str) -> None:
    said = why(bench, path)

    assert said == f"{path} is not in spool uploads, and its ledger has never heard of record avatars/9."


def test_partitioned_ids_are_records_too(bench: Bench) -> None:
    layout = ":class/:attachment/:id_partition/:style/:filename"
    bench.write("users/avatars/000/000/042/original/cat.jpg", CAT["original/cat.jpg"])

    def ask(path: str) -> str:
        return why(bench, path, ledger=None, path=layout, key=layout, complete={"styles": ["thumb"]})

    record = "users/avatars/000/000/042"
    for path in (record, f"{record}/original", f"{record}/original/cat.jpg"):
        assert ask(path).startswith(f"{path} waits because record {record} is not complete (cat: style thumb missing)")
    for path in ("users", "users/avatars", "users/avatars/000", "users/avatars/000/000"):
        assert "directory that records lie in" in ask(path)


# wait


def standing(bench: Bench, record: str = RECORD) -> str:
    return explainer(bench, complete=STYLES).standing(record)


def test_a_file_stands_as_its_record_does(bench: Bench) -> None:
    bench.batch_stored({"original/me.jpg": b"a cat"})

    assert "proven" == standing(bench, f"{RECORD}/original/me.jpg")


def test_a_record_stands_where_its_least_advanced_file_does(bench: Bench) -> None:
    stands = [standing(bench)]
    write(bench, {"original/cat.jpg": CAT["original/cat.jpg"]})
    stands.append(standing(bench))
    seen(bench)
    stands.append(standing(bench))
    write(bench)
    bench.offer()
    stands.append(standing(bench))
    claim = bench.claimed()
    stands.append(standing(bench))
    bench.ledger.defer(claim, StoreUnavailable("put: 503 SlowDown"), 0.0)
    stands.append(standing(bench))
    claim = bench.stored(bench.claimed())
    stands.append(standing(bench))
    let_go(bench, claim)
    stands.append(standing(bench))

    assert [
        "nobody has seen it yet",
        "files lie there that the daemon has not accepted yet",
        "it is not complete (cat: style thumb missing)",
        "it is queued",
        "it is uploading",
        "it is retrying (put: 503 SlowDown)",
        "proven",
        "proven",
    ] == stands


def test_a_record_is_not_proven_while_a_newer_file_lies_there(bench: Bench) -> None:
    """`wait` may be called right after writing: the ledger alone would say proven."""
    let_go(bench, bench.batch_stored(CAT))

    bench.write(KEY, picture(24, 18, seed=1))

    assert "files lie there that the daemon has not accepted yet" == standing(bench)


def test_a_record_whose_files_lie_aside_is_proven(bench: Bench) -> None:
    walked(bench.pipeline(cleaner=bench.cleaner(grace_s=600.0)), bench.batch_stored(CAT))

    assert "proven" == standing(bench)


def test_what_lies_in_another_directory_that_was_the_root_is_not_called_gone(bench: Bench) -> None:
    bench.ledger.enter(NAME, "a house")
    write(bench)
    seen(bench)
    bench.ledger.enter(NAME, "another house")
    (bench.root / RECORD).rename(bench.directory / "away")

    said = why(bench, RECORD)

    assert "last seen in another directory" in said and "is a filesystem not mounted" in said


def test_dead_and_gone_records_say_so(bench: Bench) -> None:
    bench.ledger.bury(pending(bench), BadPath("put: no"))
    dead = standing(bench)
    for path in CAT:
        (bench.root / RECORD / path).unlink()
    bench.ledger.nothing_waits(NAME, RECORD, is_empty=True)

    assert ("dead", "gone") == (dead, standing(bench))


def test_a_stranger_s_file_does_not_keep_a_record_from_being_proven(bench: Bench) -> None:
    let_go(bench, bench.batch_stored(CAT))
    bench.write(f"{RECORD}/notes.txt")

    assert "proven" == standing(bench)


def test_without_a_ledger_nothing_is_proven(bench: Bench) -> None:
    write(bench)

    here = explainer(bench, ledger=None)

    assert here.has_no_ledger
    assert "no daemon has run with this configuration yet" == here.standing(RECORD)


# The dry run


def planned(bench: Bench, **settings: Any) -> dict[str, str]:
    """Return path → where it would go, or why it would stay."""
    bench.clock.advance(LATER_S)
    lines = list(explainer(bench, **settings).plan())
    assert len(lines) == len({line.path for line in lines}), "each path once"
    assert {(NAME, BUCKET)} >= {(line.spool, line.bucket) for line in lines}
    return {line.path: f"-> {line.key}" if line.key is not None else line.reason for line in lines}


def test_a_plan_says_of_each_file_where_it_would_go_or_why_not(bench: Bench) -> None:
    write(bench)
    write(bench, {"original/dog.jpg": CAT["original/cat.jpg"]}, "avatars/43")
    write(bench, {"original/cow.jpg": CAT["original/cat.jpg"][:-50], "thumb/cow.jpg": b"\xff\xd8"}, "avatars/44")

    plan = planned(bench, ledger=None, key=f"up/{PATH}", complete=STYLES)

    assert {KEY: f"-> up/{KEY}", THUMB: f"-> up/{THUMB}"} == {path: plan[path] for path in (KEY, THUMB)}
    assert "style thumb missing" == plan["avatars/43/original/dog.jpg"]
    assert plan["avatars/44/original/cow.jpg"].startswith("original/cow.jpg: ")
    assert plan["avatars/44/original/cow.jpg"] == plan["avatars/44/thumb/cow.jpg"]
    assert 5 == len(plan)


def test_a_plan_names_what_is_odd_and_leaves_out_our_house(bench: Bench) -> None:
    write(bench)
    bench.write("README")
    bench.write(f"{RECORD}/notes.txt")
    bench.write(f"{RECORD}/original/deep/er.jpg")
    (bench.root / RECORD / "original/link.jpg").symlink_to("cat.jpg")
    (bench.root / "avatars/linked").symlink_to(bench.root / RECORD)
    os.mkfifo(bench.root / RECORD / "thumb/fifo.jpg")
    strange = os.fsdecode(os.fsencode(bench.root / RECORD / "original") + b"/\xff.jpg")
    Path(strange).write_bytes(b"")

    plan = planned(bench)

    assert "spool's layout" in plan.pop(f"{RECORD}/original/deep")
    assert {
        KEY: f"-> {KEY}",
        THUMB: f"-> {THUMB}",
        "README": "it does not fit the spool's layout",
        f"{RECORD}/notes.txt": "it does not fit the spool's layout",
        f"{RECORD}/original/link.jpg": "it is a symbolic link",
        "avatars/linked": "it is a symbolic link",
        f"{RECORD}/thumb/fifo.jpg": "it is a FIFO",
        os.path.relpath(strange, bench.root): "its name is no UTF-8",
    } == plan


def test_a_plan_leaves_out_what_the_ledger_has(bench: Bench) -> None:
    bench.batch_stored(CAT)
    write(bench, {"original/dog.jpg": CAT["original/cat.jpg"]})

    plan = planned(bench)

    assert {
        KEY: "the ledger has it: stored",
        THUMB: "the ledger has it: stored",
        f"{RECORD}/original/dog.jpg": f"-> {RECORD}/original/dog.jpg",
    } == plan


def test_a_plan_says_what_can_have_no_key(bench: Bench) -> None:
    write(bench)

    plan = planned(bench, key=f"{'x' * 1000}/{PATH}")

    assert {KEY, THUMB} == set(plan) and all("over 1024" in reason for reason in plan.values())


def test_a_plan_shows_where_a_fingerprint_will_stand(bench: Bench) -> None:
    """It is the MD5 of the original, and a plan reads no file."""
    write(bench)

    plan = planned(bench, key=":attachment/:id/:style/:fingerprint/:basename.:extension")

    assert f"-> {RECORD}/thumb/:fingerprint/cat.jpg" == plan[THUMB]


def test_a_plan_does_not_name_the_marker(bench: Bench) -> None:
    write(bench)
    bench.write(f"{RECORD}/.done", b"")

    assert {KEY, THUMB} == set(planned(bench, complete={"marker": ".done"}))


def test_a_plan_touches_nothing(bench: Bench) -> None:
    write(bench)
    before = {path: path.lstat() for path in [bench.root, *bench.root.rglob("*")]}

    planned(bench, ledger=None)

    after = {path: path.lstat() for path in [bench.root, *bench.root.rglob("*")]}
    assert {path: (s.st_mtime_ns, s.st_ctime_ns) for path, s in before.items()} == {
        path: (s.st_mtime_ns, s.st_ctime_ns) for path, s in after.items()
    }


def test_there_is_no_plan_of_a_root_that_is_gone(bench: Bench) -> None:
    bench.root.rename(bench.root.with_name("away"))

    with pytest.raises(SpoolBroken):
        list(explainer(bench).plan())


def test_the_plan_is_a_value(bench: Bench) -> None:
    write(bench, {"original/cat.jpg": CAT["original/cat.jpg"]})
    bench.clock.advance(LATER_S)

    assert [Planned(NAME, KEY, BUCKET, KEY, "")] == list(explainer(bench).plan())


# Which path is meant


def test_a_path_is_meant_below_the_root_or_absolute(bench: Bench) -> None:
    here = explainer(bench)

    for given in (RECORD, f"{RECORD}/", f"./{RECORD}", "avatars/./42//", f"{bench.root}/{RECORD}", f"{bench.root}//{RECORD}/"):
        assert RECORD == here.relative(given), given
    for given in (str(bench.root), f"{bench.root}/", f"{bench.root}/avatars/.."):
        assert "" == here.relative(given), given


def test_a_path_elsewhere_is_not_ours(bench: Bench) -> None:
    here = explainer(bench)

    assert here.relative("/etc/passwd") is None
    assert here.relative(f"{bench.root}-2/{RECORD}") is None, "the root's name is only how it begins"
    assert here.relative(f"{bench.root}/../{RECORD}") is None


def test_a_path_that_leads_out_of_the_root_is_not_ours(bench: Bench) -> None:
    (bench.directory / "secret").write_bytes(b"")

    with pytest.raises(SpooldError, match="no spool has it"):
        find([explainer(bench)], "../secret")


def test_our_house_and_hidden_files_keep_their_dot(bench: Bench) -> None:
    here = explainer(bench)

    assert f"{HOUSE}/owner" == here.relative(str(bench.root / HOUSE / "owner"))
    assert ".hidden" == here.relative(str(bench.root / ".hidden"))


def test_a_root_may_be_a_link_and_a_path_go_through_it_or_not(bench: Bench) -> None:
    """Capistrano's current/…"""
    link = bench.directory / "current"
    link.symlink_to(bench.root)
    write(bench)
    here = explainer(bench, root=str(link))

    for given in (RECORD, f"{link}/{RECORD}", f"{bench.root}/{RECORD}"):
        assert (here, RECORD) == find([here], given)
    bench.clock.advance(LATER_S)
    assert here.why(KEY).startswith(f"{KEY} is complete and not accepted yet")


@pytest.fixture
def two(bench: Bench) -> list[Explainer]:
    """Two spools with one ledger: the bench's, and one beside it."""
    (bench.directory / "other").mkdir()
    other = explainer(bench, name="other", root=str(bench.directory / "other"))
    return [explainer(bench), other]


def test_the_spool_is_found_that_has_the_path(bench: Bench, two: list[Explainer]) -> None:
    write(bench)
    (bench.directory / "other" / "banners").mkdir()

    assert (two[0], KEY) == find(two, KEY)
    assert (two[1], "banners") == find(two, "banners")
    assert (two[1], "") == find(two, str(bench.directory / "other"))
    assert (two[1], "avatars/9") == find(two, str(bench.directory / "other/avatars/9")), "though nothing is there"


def test_a_path_is_found_by_the_ledger_when_its_files_have_gone(bench: Bench, two: list[Explainer]) -> None:
    let_go(bench, bench.batch_stored(CAT))
    for style in ("original", "thumb", ""):
        (bench.root / RECORD / style).rmdir()
    (bench.root / "avatars").rmdir()

    for path in (RECORD, KEY, f"{RECORD}/original"):
        assert (two[0], path) == find(two, path)


def test_a_path_that_two_spools_have_must_be_told_apart(bench: Bench, two: list[Explainer]) -> None:
    write(bench)
    (bench.directory / "other" / RECORD).mkdir(parents=True)

    with pytest.raises(SpooldError, match=f"{RECORD}: spools uploads, other have it") as raised:
        find(two, RECORD)

    assert "say which with --spool NAME" == raised.value.hint
    assert (two[1], RECORD) == find(two[1:], RECORD)
    assert (two[1], RECORD) == find(two, str(bench.directory / "other" / RECORD)), "an absolute path tells which"


def test_a_path_that_no_spool_has_names_the_spools(bench: Bench, two: list[Explainer]) -> None:
    for path in ("avatars/9", "/etc/passwd"):
        with pytest.raises(SpooldError, match="no spool has it") as raised:
            find(two, path)
        assert f"uploads at {bench.root}" in raised.value.hint and "other at " in raised.value.hint


def test_with_one_spool_a_path_that_nobody_has_is_meant_there(bench: Bench) -> None:
    here = explainer(bench)

    assert (here, "avatars/9") == find([here], "avatars/9")


@pytest.mark.parametrize(
    ("below", "given", "meant"),
    [
        (f"{RECORD}/original", "cat.jpg", KEY),
        (f"{RECORD}/original", "./cat.jpg", KEY),
        (f"{RECORD}/original", "../thumb/cat.jpg", THUMB),
        (RECORD, ".", RECORD),
        (RECORD, "original", f"{RECORD}/original"),
        ("avatars", "42", RECORD),
        ("avatars", "..", ""),
        ("", KEY, KEY),
        ("", ".", ""),
    ],
)
def test_a_path_may_be_given_as_seen_from_the_current_directory(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, below: str, given: str, meant: str
) -> None:
    write(bench)
    monkeypatch.chdir(bench.root / below)
    here = explainer(bench)

    assert (here, meant) == find([here], given)


def test_a_doubt_is_a_reason_of_its_own(bench: Bench) -> None:
    """An older PUT of other content was never answered: the real cleaner waits, and `why` says so."""
    claim = pending(bench)
    bench.ledger.answered(
        [PutResult(put, Answer.DOUBT, doubt_at=bench.clock.now(), error=StoreUnavailable("put: timeout"))
         for put in bench.intended(claim)]
    )  # fmt: skip
    bench.ledger.put_back(claim)
    newer = bench.batch_stored({"original/cat.jpg": picture(24, 18, seed=1)})
    walked(bench.pipeline(), newer)

    assert "an older PUT of the same key was never answered" in why(bench, KEY)
