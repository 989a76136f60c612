"""Who decides that a record is complete, and who vetoes (contract, section 6, rules 1 to 4)."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spoold.completeness import Rules, judge
from spoold.model import Identity, SpooledFile, Verdict
from tests.parts import snapshot_of, spooled

STYLES = ("original", "medium", "thumb")
SETTLE_S = 1.0
OLD_S = 60.0
SECOND_NS = 10**9


def file(style: str, name: str = "cat.jpg", *, ctime_ns: int = SECOND_NS, content: bytes = b"a cat") -> SpooledFile:
    return spooled(f"avatars/42/{style}/{name}", content, ino=zlib.crc32(f"{style} {name}".encode()), ctime_ns=ctime_ns)


def marker(*, ctime_ns: int = SECOND_NS) -> SpooledFile:
    return dataclasses.replace(spooled("avatars/42/x/done", ctime_ns=ctime_ns), path="avatars/42/done", style="", basename="")


def rules(*, styles: Iterable[str] | None = None, marker: str | None = None) -> Rules:
    wanted = None if styles is None else tuple(styles)
    return Rules(lambda _: wanted, SETTLE_S, marker)


def verdicts(
    files: Iterable[SpooledFile], under: Rules, *, declared: SpooledFile | None = None, known: Iterable[SpooledFile] = (),
    has_original: bool = False, age_s: Callable[[Identity], float] = lambda _: OLD_S, as_is: bool = False,
) -> list[Verdict]:  # fmt: skip
    return judge(
        snapshot_of(*files, marker=declared), under, known={file.path: file.identity for file in known},
        has_original=has_original, age_s=age_s, as_is=as_is,
    )  # fmt: skip


def complete(*args: object, **keys: object) -> set[str]:
    return {verdict.basename for verdict in verdicts(*args, **keys) if verdict.is_complete}  # type: ignore[arg-type]


def the_one(found: list[Verdict]) -> Verdict:
    [verdict] = found
    return verdict


# Rule 1: by basenames


def test_rule_1_an_incomplete_basename_waits_without_holding_back_the_others() -> None:
    """A save that was rolled back leaves its files, and the next one gets the same id."""
    whole = [file(style, "cat.jpg") for style in STYLES]
    half = [file("original", "dog.jpg")]

    found = verdicts([*half, *whole], rules(styles=STYLES))

    assert [("cat", True), ("dog", False)] == [(verdict.basename, verdict.is_complete) for verdict in found]
    assert "medium, thumb missing" in found[1].reason


def test_rule_1_styles_of_another_extension_belong_to_their_original() -> None:
    files = [file("original", "cat.gif"), file("medium", "cat.png"), file("thumb", "cat.png")]

    assert {"cat"} == complete(files, rules(styles=STYLES))


def test_rule_1_what_the_current_batch_answers_for_is_not_judged_again() -> None:
    files = [file("original", "cat.jpg"), file("original", "dog.jpg")]

    found = verdicts(files, rules(), known=files[:1])

    assert ["dog"] == [verdict.basename for verdict in found]


def test_a_known_file_with_other_content_is_judged_again() -> None:
    before = file("original")
    rewritten = dataclasses.replace(before, identity=dataclasses.replace(before.identity, mtime_ns=5))

    assert {"cat"} == complete([rewritten], rules(), known=[before])


def test_there_is_nothing_to_say_of_a_record_without_files() -> None:
    assert [] == verdicts([], rules(styles=STYLES), declared=marker())


# Rule 2: who decides, who vetoes


@pytest.mark.parametrize(
    ("with_styles", "with_marker", "decided_by"),
    [(False, False, "quiet"), (True, False, "styles"), (False, True, "marker"), (True, True, "marker")],
)
def test_rule_2_marker_and_styles_decide_and_quiet_where_neither_is_configured(
    with_styles: bool, with_marker: bool, decided_by: str
) -> None:
    under = rules(styles=STYLES if with_styles else None, marker="done" if with_marker else None)
    declared = marker() if with_marker else None

    verdict = the_one(verdicts([file(style) for style in STYLES], under, declared=declared))

    assert (decided_by, None, True) == (verdict.decided_by, verdict.vetoed_by, verdict.is_complete)


@pytest.mark.parametrize("with_styles", [False, True])
@pytest.mark.parametrize("with_marker", [False, True])
def test_rule_2_quiet_is_a_veto_whoever_decides(with_styles: bool, with_marker: bool) -> None:
    under = rules(styles=STYLES if with_styles else None, marker="done" if with_marker else None)
    declared = marker() if with_marker else None
    files = [file(style) for style in STYLES]

    verdict = the_one(verdicts(files, under, declared=declared, age_s=lambda _: SETTLE_S - 0.01))

    assert "quiet" == verdict.vetoed_by
    assert not verdict.is_complete


@pytest.mark.parametrize("young", ["thumb", "another basename", "marker"])
def test_rule_2_quiet_is_asked_of_everything_in_the_record(young: str) -> None:
    """A save that goes on elsewhere in the directory may still come back to these files."""
    thumb, other, declared = file("thumb"), file("original", "dog.jpg"), marker()
    youngest = {"thumb": thumb, "another basename": other, "marker": declared}[young].identity
    files = [file("original"), file("medium"), thumb, other]

    found = verdicts(
        files, rules(marker="done"), declared=declared, age_s=lambda identity: 0.5 if identity is youngest else OLD_S
    )

    assert ["quiet", "quiet"] == [verdict.vetoed_by for verdict in found]


def test_rule_2_settled_means_as_old_as_settle_says() -> None:
    assert {"cat"} == complete([file("original")], rules(), age_s=lambda _: SETTLE_S)


def test_rule_2_quiet_alone_does_not_make_up_for_a_missing_style() -> None:
    assert set() == complete([file("original")], rules(styles=STYLES))


def test_rule_2_quiet_alone_does_not_make_up_for_a_missing_marker() -> None:
    verdict = the_one(verdicts([file("original")], rules(marker="done")))

    assert verdict.decided_by is None
    assert "its marker done is not there" == verdict.reason


def test_rule_2_a_marker_does_not_make_up_for_a_missing_style() -> None:
    assert set() == complete([file("original")], rules(styles=STYLES, marker="done"), declared=marker())


def test_rule_2_styles_do_not_make_up_for_a_missing_marker() -> None:
    assert set() == complete([file(style) for style in STYLES], rules(styles=STYLES, marker="done"))


@pytest.mark.parametrize(("newer_by_ns", "counts"), [(-1, True), (0, True), (1, False)])
def test_rule_2_a_marker_counts_only_if_no_file_is_newer(newer_by_ns: int, counts: bool) -> None:
    files = [file("original"), file("thumb", ctime_ns=2 * SECOND_NS + newer_by_ns)]

    verdict = the_one(verdicts(files, rules(marker="done"), declared=marker(ctime_ns=2 * SECOND_NS)))

    assert counts == verdict.is_complete
    assert counts == (verdict.reason == "")


def test_rule_2_a_marker_is_of_the_record_so_a_newer_file_of_another_basename_counts_too() -> None:
    files = [file("original", "cat.jpg"), file("original", "dog.jpg", ctime_ns=3 * SECOND_NS)]

    assert set() == complete(files, rules(marker="done"), declared=marker(ctime_ns=2 * SECOND_NS))


def test_rule_2_a_marker_that_no_longer_counts_counts_again_when_it_is_renewed() -> None:
    files = [file("original", ctime_ns=3 * SECOND_NS)]

    assert {"cat"} == complete(files, rules(marker="done"), declared=marker(ctime_ns=4 * SECOND_NS))


# Rule 3: originals and styles


@pytest.mark.parametrize("present", [(), ("medium",), ("thumb",)])
def test_rule_3_an_original_needs_every_style(present: tuple[str, ...]) -> None:
    verdict = the_one(verdicts([file("original"), *map(file, present)], rules(styles=STYLES)))

    assert not verdict.is_complete
    assert all((style in verdict.reason) == (style not in present) for style in STYLES[1:])


def test_rule_3_styles_that_nobody_asked_for_are_taken_along() -> None:
    files = [file(style) for style in (*STYLES, "retina")]

    assert {"cat"} == complete(files, rules(styles=STYLES))


def test_rule_3_an_attachment_may_have_only_an_original() -> None:
    assert {"cat"} == complete([file("original")], rules(styles=()))


def test_rule_3_a_style_made_again_later_joins_its_live_record_and_quiet_decides() -> None:
    verdict = the_one(verdicts([file("thumb")], rules(styles=STYLES), has_original=True))

    assert ("quiet", True) == (verdict.decided_by, verdict.is_complete)


def test_rule_3_a_style_without_any_original_waits_for_it() -> None:
    """Styles may be seen first in a record that is just being moved in."""
    verdict = the_one(verdicts([file("medium"), file("thumb")], rules(styles=STYLES)))

    assert not verdict.is_complete
    assert "it has no original, here or in the bucket" == verdict.reason


def test_rule_3_a_new_original_needs_its_styles_though_an_older_one_is_live() -> None:
    assert set() == complete([file("original"), file("thumb")], rules(styles=STYLES), has_original=True)


def test_rule_3_a_known_original_that_still_lies_there_is_joined_by_a_style_made_again() -> None:
    """Everything of the save is there again; what is known of it needs no second decision."""
    files = [file(style) for style in STYLES]

    assert {"cat"} == complete(files, rules(styles=STYLES), known=files[:2], has_original=True)


def test_rule_3_where_a_marker_is_configured_a_style_made_again_needs_it_too() -> None:
    under = rules(styles=STYLES, marker="done")

    assert set() == complete([file("thumb")], under, has_original=True)
    assert "marker" == the_one(verdicts([file("thumb")], under, declared=marker(), has_original=True)).decided_by


def test_rule_3_which_styles_are_needed_depends_on_the_attachment() -> None:
    by_attachment = {"avatars": ("original", "thumb"), "logos": ("original",)}
    under = Rules(lambda attachment: by_attachment[attachment], SETTLE_S)

    def is_complete(attachment: str) -> bool:
        snapshot = dataclasses.replace(snapshot_of(file("original")), attachment=attachment)
        found = judge(snapshot, under, known={}, has_original=False, age_s=lambda _: OLD_S)
        return the_one(found).is_complete

    assert (False, True) == (is_complete("avatars"), is_complete("logos"))


# Rule 4: only ctime is judged, by the age that the caller says


def test_rule_4_every_file_is_asked_for_its_age_so_that_each_is_seen_from_now_on() -> None:
    """Also of basenames that nobody judges: the first time that a file is seen makes it young, whenever that is."""
    files, declared, asked = [file("original"), file("thumb"), file("original", "dog.jpg")], marker(), []

    def age_s(identity: Identity) -> float:
        asked.append(identity)
        return OLD_S

    verdicts(files, rules(styles=STYLES, marker="done"), declared=declared, known=files[2:], age_s=age_s)

    assert {file.identity for file in (*files, declared)} == set(asked)


def test_rule_4_an_mtime_in_the_past_or_the_future_is_no_matter() -> None:
    past, future = (dataclasses.replace(file("original").identity, mtime_ns=ns) for ns in (0, 2**62))
    files = [dataclasses.replace(file(style), identity=when) for style, when in (("original", past), ("thumb", future))]

    assert {"cat"} == complete(files, rules())


# As it lies


@pytest.mark.parametrize("under", [rules(styles=STYLES), rules(marker="done"), rules(styles=STYLES, marker="done")])
def test_what_a_person_wants_as_it_lies_needs_neither_marker_nor_styles(under: Rules) -> None:
    verdict = the_one(verdicts([file("thumb")], under, as_is=True))

    assert ("as-is", True) == (verdict.decided_by, verdict.is_complete)


def test_what_a_person_wants_as_it_lies_still_waits_for_quiet() -> None:
    assert "quiet" == the_one(verdicts([file("thumb")], rules(styles=STYLES), as_is=True, age_s=lambda _: 0.0)).vetoed_by


# For all records

_names = st.sampled_from(["cat.jpg", "dog.jpg"])
_styles = st.sampled_from([*STYLES, "retina"])
_files = st.sets(st.tuples(_styles, _names), max_size=8).map(lambda pairs: [file(*pair) for pair in sorted(pairs)])
_some_rules = st.sampled_from([rules(styles=wanted, marker=name) for wanted in (None, (), STYLES) for name in (None, "done")])


@given(files=_files, under=_some_rules, has_original=st.booleans(), is_declared=st.booleans())
def test_rule_1_basenames_are_judged_each_for_itself(
    files: list[SpooledFile], under: Rules, has_original: bool, is_declared: bool
) -> None:
    declared = marker() if is_declared else None

    def of(some: list[SpooledFile]) -> list[Verdict]:
        return verdicts(some, under, declared=declared, has_original=has_original)

    alone = [verdict for name in ("cat", "dog") for verdict in of([each for each in files if each.basename == name])]
    assert alone == of(files)


@given(files=_files, extra=_files, has_original=st.booleans())
def test_rule_3_no_other_file_completes_what_a_missing_style_holds_back(
    files: list[SpooledFile], extra: list[SpooledFile], has_original: bool
) -> None:
    """Only the missing styles themselves do."""
    under = rules(styles=STYLES)
    waiting = {verdict.basename for verdict in verdicts(files, under, has_original=has_original) if not verdict.is_complete}
    paths = {each.path for each in files}
    harmless = [each for each in extra if each.style not in STYLES and each.path not in paths]

    now_complete = complete([*files, *harmless], under, has_original=has_original)

    assert not waiting & now_complete


@given(files=_files, extra=_files)
def test_rule_3_what_is_complete_stays_complete_when_more_styles_come(
    files: list[SpooledFile], extra: list[SpooledFile]
) -> None:
    under = rules(styles=STYLES)
    paths = {each.path for each in files}

    more = [*files, *(each for each in extra if each.path not in paths)]

    assert complete(files, under) <= complete(more, under)


@given(files=_files, under=_some_rules, has_original=st.booleans(), is_declared=st.booleans(), as_is=st.booleans())
def test_rule_2_nothing_is_complete_while_anything_is_young(
    files: list[SpooledFile], under: Rules, has_original: bool, is_declared: bool, as_is: bool
) -> None:
    declared = marker() if is_declared else None

    found = complete(files, under, declared=declared, has_original=has_original, as_is=as_is, age_s=lambda _: SETTLE_S * 0.99)

    assert set() == found


@given(files=_files, under=_some_rules, has_original=st.booleans())
def test_whatever_is_not_complete_says_why(files: list[SpooledFile], under: Rules, has_original: bool) -> None:
    found = verdicts(files, under, has_original=has_original, age_s=lambda identity: identity.ino % 3 * SETTLE_S)

    assert all(bool(verdict.reason) != verdict.is_complete for verdict in found)
