"""The reference is tests/cases/interpolation_cases.json: what Paperclip itself made of templates."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spoold.errors import BadPath
from spoold.layout import BadTemplate, Layout, Place, id_partition, interpolate, split_filename

PAPERCLIP = ":class/:attachment/:id_partition/:style/:filename"
SIMPLE = ":attachment/:id/:style/:basename.:extension"

CASES: list[dict[str, Any]] = json.loads((Path(__file__).parent / "cases/interpolation_cases.json").read_text())

# Names are made plural by the app's inflections: a path only ever shows the outcome, so the cases themselves tell it.
PLURALS = {"Dummy": "dummies", "FakeModel": "fake_models", "User": "users", "avatar": "avatars"} | {
    case["context"][case["template"][1:]]: case["expected"] for case in CASES if case["template"] in (":attachment", ":class")
}

# Templates of the cases, each in a path that spoold can read.
FRAMES = {
    ":": "files/:/:id/:style/:filename",
    "::id": "files/::id/:style/:filename",
    ":attachment": ":attachment/:id/:style/:filename",
    ":attachments/:class": ":attachments/:class/:id/:style/:filename",
    ":basename": "files/:id/:style/:basename",
    ":basename.:extension": "files/:id/:style/:basename.:extension",
    ":class": ":class/:id/:style/:filename",
    ":dotextension": "files/:id/:style/name:dotextension",
    ":extension": "files/:id/:style/name.:extension",
    ":filename": "files/:id/:style/:filename",
    ":id": "files/:id/:style/:filename",
    ":id_partition": "files/:id_partition/:style/:filename",
    ":idx": "files/:idx/:style/:filename",
    ":param": "files/:param/:style/:filename",
    ":style": "files/:id/:style/:filename",
    ":style/:style_name": "files/:id/:style/:style_name",
    ":style_:basename.:extension": "files/:id/:style_:basename.:extension",
    ":updated_at": "files/:id/:updated_at/:style/:filename",
    SIMPLE: SIMPLE,
    "/srv/app/tmp/:id/:attachments/:style.:extension": "/srv/app/tmp/:id/:attachments/:style.:extension",
}

# What cannot be known from a path, or cannot be read back: (path, key) that are refused for it, and the reason given.
REFUSED = {
    ":content_type": (f":content_type/{SIMPLE}", SIMPLE, ":content_type is no token that spoold knows"),
    ":content_type_extension": (SIMPLE, f"{SIMPLE}.:content_type_extension", "what the app's database says"),
    ":timestamp": (SIMPLE, f":timestamp/{SIMPLE}", "time zone and locale"),
    ":url": (":url", SIMPLE, ":url is itself a template"),
    ":rails_root/public:url": (":rails_root/public:url", SIMPLE, ":url is itself a template"),
    ":hash": (SIMPLE, f":hash/{SIMPLE}", ":hash is made with the app's secret"),
    ":hashtag": (SIMPLE, f":hashtag/{SIMPLE}", ":hash is made with the app's secret"),
    "a/:attachment//:id/../:style": ("a/:attachment//:id/../:style", SIMPLE, "a segment is . or .."),
    ":class/:attachment/:style/:filename": (
        ":class/:attachment/:style/:filename",
        ":class/:attachment/:style/:filename",
        "no directory tells one record from another",
    ),
}


def values_of(context: Mapping[str, Any]) -> dict[str, str]:
    """Return the values of the tokens, as far as a path can show them."""
    basename, extension = split_filename(context["file_name"])
    extension = context.get("style_format", extension)
    dotextension = f".{extension}" if extension else ""
    values = {
        "attachment": PLURALS[context["attachment"]],
        "basename": basename,
        "class": PLURALS[context["class"]],
        "dotextension": dotextension,
        "extension": extension,
        "filename": basename + dotextension,
        "fingerprint": context["fingerprint"],
        "rails_env": context["rails_env"],
        "rails_root": context["rails_root"],
        "style": context["style"],
        "updated_at": str(context["updated_at"]),
    }
    if context["id"] is not None:
        values |= {"id": str(context["id"]), "id_partition": id_partition(context["id"]), "param": str(context["id"])}
    return values


def is_beyond_a_path(template: str) -> bool:
    return re.search(":(content_type_extension|timestamp|url|hash)", template) is not None


def names_of(cases: list[dict[str, Any]]) -> list[str]:
    return [f"{index}-{case['template']}" for index, case in enumerate(cases)]


INTERPOLATED = [case for case in CASES if not is_beyond_a_path(case["template"])]
FRAMED = [case for case in CASES if case["template"] in FRAMES]


def refusal_of(path: str, key: str = SIMPLE, **settings: Any) -> BadTemplate:
    with pytest.raises(BadTemplate) as caught:
        Layout(path, key, **settings)
    assert caught.value.message and caught.value.remedy
    return caught.value


def placed(layout: Layout, path: str) -> Place:
    place = layout.parse(path)
    assert place is not None, path
    return place


def key_of(layout: Layout, path: str, **more: Any) -> str:
    return layout.key(placed(layout, path), **more)


# What Paperclip does


def test_each_case_is_read_back_or_refused_for_a_reason() -> None:
    assert {case["template"] for case in CASES} == {*FRAMES, *REFUSED}


@pytest.mark.parametrize("case", INTERPOLATED, ids=names_of(INTERPOLATED))
def test_a_template_is_filled_in_as_paperclip_does(case: dict[str, Any]) -> None:
    assert case["expected"] == interpolate(case["template"], values_of(case["context"]))


@pytest.mark.parametrize("case", FRAMED, ids=names_of(FRAMED))
def test_what_paperclip_wrote_is_read_back(case: dict[str, Any]) -> None:
    values = values_of(case["context"])
    template = FRAMES[case["template"]]
    layout = Layout(template, template.removeprefix("/srv/app/tmp"), root="/srv/app/tmp", styles=["thumb", "medium", "large"])
    path = interpolate(template, values)
    if case["context"]["file_name"] == ":class.jpg":
        values["filename"] = "users.jpg"  # that the name was once a token is no longer to be seen

    below_root = path.removeprefix("/srv/app/tmp/")
    place = placed(layout, below_root)

    assert case["expected"] in path
    tokens = re.findall(":(id_partition|attachment|[a-z]+_at|[a-z]+)", template.replace(":style_", ":style/"))
    for token in {"id" if token == "idx" else token.replace("attachments", "attachment") for token in tokens}:
        assert values[token] == place.values[token]
    assert below_root == layout.key(place)


@pytest.mark.parametrize("case", [case for case in CASES if case["template"] == ":id_partition"])
def test_a_partition_is_made_as_paperclip_makes_it(case: dict[str, Any]) -> None:
    assert case["expected"] == id_partition(case["context"]["id"])


@pytest.mark.parametrize("case", [case for case in CASES if case["template"] == ":id_partition"])
def test_an_integer_is_computed_from_its_partition_and_a_string_is_not(case: dict[str, Any]) -> None:
    layout = Layout("files/:id_partition/:style/:filename", "files/:id/:style/:filename")
    path = f"files/{case['expected']}/original/photo.jpg"

    if re.fullmatch(r"\d{3}(/\d{3}){2,3}", case["expected"]):
        number = int(case["context"]["id"])
        assert f"files/{number}/original/photo.jpg" == key_of(layout, path)
    else:
        with pytest.raises(BadPath, match=":id cannot be known"):
            key_of(layout, path)


@pytest.mark.parametrize("template", REFUSED)
def test_what_cannot_be_known_from_a_path_is_refused(template: str) -> None:
    path, key, reason = REFUSED[template]

    assert reason in refusal_of(path, key, rails_root="/srv/app").message


def test_paperclip_itself_refuses_a_hash_without_a_secret() -> None:
    (case,) = (case for case in CASES if "error" in case)

    assert ":hash" == case["template"]
    with pytest.raises(KeyError):
        interpolate(case["template"], values_of(case["context"]))


@pytest.mark.parametrize("case", [case for case in CASES if case["template"] == ":hash" and "expected" in case])
def test_a_hash_that_stands_in_the_path_is_captured(case: dict[str, Any]) -> None:
    layout = Layout("files/:id/:style/:hash.:extension", ":hash/:id/:style.:extension")

    assert f"{case['expected']}/5/thumb.jpg" == key_of(layout, f"files/5/thumb/{case['expected']}.jpg")


@pytest.mark.parametrize(
    ("name", "parts"),
    [("photo..", ("photo.", "")), ("...", ("...", "")), ("a.\n", ("a", "\n")), ("", ("", "")), ("a.b.", ("a.b", ""))],
)
def test_odd_names_are_split_as_ruby_splits_them(name: str, parts: tuple[str, str]) -> None:
    assert parts == split_filename(name)


# What a path says


def test_a_path_says_who_it_is() -> None:
    place = placed(Layout(SIMPLE, SIMPLE), "avatars/42/medium/me.at.beach.JPG")

    assert ("avatars/42", "avatars", "42") == (place.record, place.attachment, place.record_id)
    assert ("medium", "me.at.beach", "me.at.beach.JPG") == (place.style, place.basename, place.filename)
    assert "000/000/042" == place.values["id_partition"]


@pytest.mark.parametrize(
    ("record", "owner", "attachment", "record_id"),
    [
        ("users/avatars/000/000/042", "users", "avatars", "42"),
        ("admin/users/avatars/001/000/000/000", "admin/users", "avatars", "1000000000"),
        ("users/pdfs/abc/def/ghi", "users", "pdfs", "abc/def/ghi"),
        ("foo/bar/123/456/789", "foo", "bar", "123456789"),
        ("a/b/c/123/456/789/012", "a/b", "c", "123456789012"),
    ],
)
def test_paperclips_default_path_is_read_in_one_way(record: str, owner: str, attachment: str, record_id: str) -> None:
    place = placed(Layout(PAPERCLIP, PAPERCLIP), f"{record}/original/cat.jpg")

    assert (record, attachment, record_id) == (place.record, place.attachment, place.record_id)
    assert owner == place.values["class"]


@pytest.mark.parametrize(
    "path",
    [
        "users/avatars/000/000/000/042/original/cat.jpg",  # no integer is written so: it would be 42 a second time
        "users/avatars/abc/def/original/cat.jpg",  # or is it attachment abc of class users/avatars?
        "users/avatars/42/original/cat.jpg",
        "my-users/avatars/000/000/042/original/cat.jpg",
        "users/avatars/000/000/042/original/sub/cat.jpg",
        "users/avatars/000/000/042/cat.jpg",
        "users/avatars/000/000/042/original/",
        "users/avatars/000/000/042/../cat.jpg",
        ".spoold/avatars/000/000/042/original/cat.jpg",
        "",
    ],
)
def test_what_does_not_fit_is_not_guessed_at(path: str) -> None:
    assert Layout(PAPERCLIP, PAPERCLIP).parse(path) is None


def test_the_extension_may_be_empty_but_its_dot_must_be_there() -> None:
    """`noext` becomes `noext.` by :basename.:extension, and a dot file gets a dot at its end too."""
    layout = Layout(SIMPLE, SIMPLE)

    assert ("noext", "") == itemgetter(placed(layout, "a/1/original/noext."), "basename", "extension")
    assert (".jpg", "") == itemgetter(placed(layout, "a/1/original/.jpg."), "basename", "extension")
    assert layout.parse("a/1/original/noext") is None
    assert layout.parse("a/1/original/.jpg") is None


def itemgetter(place: Place, *tokens: str) -> tuple[str, ...]:
    return tuple(place.values[token] for token in tokens)


def test_without_a_style_every_file_is_an_original() -> None:
    layout = Layout("docs/:id/:filename", "docs/:id/:style/:filename")
    place = placed(layout, "docs/7/report.pdf")

    assert ("docs/7", "docs", "7", "original") == (place.record, place.attachment, place.record_id, place.style)
    assert "docs/7/original/report.pdf" == layout.key(place)
    assert 1 == layout.tail


def test_without_a_name_the_record_groups_its_files() -> None:
    layout = Layout("files/:id/:style.:extension", "files/:id/:style.:extension")
    place = placed(layout, "files/7/thumb.jpg")

    assert ("7", "thumb.jpg") == (place.basename, place.filename)
    assert "basename" not in place.values
    assert "the path does not have what :basename is made of" in refusal_of(
        "files/:id/:style.:extension", "files/:id/:style/:basename.:extension"
    ).message  # fmt: skip


def test_without_a_name_the_fingerprint_tells_two_contents_of_a_record_apart() -> None:
    layout = Layout("files/:id/:style/:fingerprint.:extension", ":id/:style/:fingerprint.:extension")

    assert "d29" == placed(layout, "files/7/thumb/d29.jpg").basename
    assert not layout.needs_fingerprint


@pytest.mark.parametrize(
    ("template", "path", "attachment", "record_id"),
    [
        ("users/:class/:id/:style/:filename", "users/admin/users/7/o/a.jpg", "admin/users", "7"),
        ("users/photos/:param/:style/:filename", "users/photos/7-me/o/a.jpg", "photos", "7-me"),
        (":id/photos/:style/:filename", "7/photos/o/a.jpg", "", "7"),
        ("a/:updated_at/photos/:id/:style/:filename", "a/99/photos/7/o/a.jpg", "photos", "7"),
        (":hash/:style/:filename", "abc/o/a.jpg", "", "abc"),
        (":id/:id_partition/:style/:filename", "7/000/000/007/o/a.jpg", "", "7"),
        (":id/:id_partition/:style/:filename", "1234/123/o/a.jpg", "", "1234"),
        (":id/:basename/:style.:extension", "7/me/o.jpg", "", "7"),
    ],
)
def test_who_it_is_is_taken_from_what_there_is(template: str, path: str, attachment: str, record_id: str) -> None:
    place = placed(Layout(template, template), path)

    assert (attachment, record_id) == (place.attachment, place.record_id)


@pytest.mark.parametrize(
    ("template", "path"),
    [
        (":id/:id_partition/:style/:filename", "7/000/000/008/o/a.jpg"),
        (":id/:style/:id_:basename.:extension", "7/o/8_a.jpg"),
        (":id/:basename/:style/:filename", "7/me/o/you.jpg"),
        (":id/:style/:filename.:extension", "7/o/a.png.jpg"),
    ],
)
def test_a_path_that_contradicts_itself_does_not_fit(template: str, path: str) -> None:
    assert Layout(template, template).parse(path) is None


def test_known_styles_make_a_shared_segment_readable() -> None:
    template = "files/:id/:basename_:style.:extension"
    layout = Layout(template, template, styles=["thumb", "tiny"])
    place = placed(layout, "files/7/a_thumb_tiny.jpg")

    assert ("a_thumb", "tiny") == (place.basename, place.style)
    assert layout.parse("files/7/a_large.jpg") is None
    assert "files/7/a_thumb_tiny.jpg" == layout.key(place)
    assert "list all styles in complete.styles" in refusal_of(template, template).remedy


@pytest.mark.parametrize(
    ("segment", "styles"),
    [
        (":style_:basename.:extension", ["thumb", "thumb_2"]),
        (":basename_:style.:extension", ["thumb", "2_thumb"]),
        (":style:basename.:extension", ["thumb"]),
    ],
)
def test_styles_that_could_be_part_of_a_name_are_refused(segment: str, styles: list[str]) -> None:
    refused = refusal_of(f"files/:id/{segment}", "x", styles=styles)

    assert "can be read in two ways" in refused.message
    assert "complete.styles" not in refused.remedy


@pytest.mark.parametrize(
    "root_and_path",
    [
        ("/srv/app/spool", "/srv/app/spool/:id/:style/:filename"),
        ("/srv/app/spool/", "/srv//app/spool//:id/:style/:filename"),
        ("/srv/app/public/production", ":rails_root/public/:rails_env/:id/:style/:filename"),
        ("/anywhere", ":id//:style/:filename"),
    ],
)
def test_the_path_is_taken_below_the_root(root_and_path: tuple[str, str]) -> None:
    root, path = root_and_path
    layout = Layout(path, ":id/:style/:filename", root=root, rails_root="/srv/app", rails_env="production")

    assert "7/original/cat.jpg" == key_of(layout, "7/original/cat.jpg")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/elsewhere/:id/:style/:filename", "does not begin with the root '/srv/app/spool'"),
        ("/srv/app/spool", "is empty"),
        ("/srv/app/spoolers/:id/:style/:filename", "does not begin with the root"),
        (":rails_root/spool/:id/:style/:filename", "only the app knows its :rails_root"),
        (":rails_env/:id/:style/:filename", "only the app knows its :rails_env"),
        ("", "is empty"),
        ("files/../:id/:style/:filename", "a segment is . or .."),
        (":id/:style/:flename", ":flename is no token that spoold knows"),
        (":style/:id/:filename", ":id does not stand above :style"),
        (":attachment/:id_:style/:filename", "can be read in two ways"),
        ("files/:id/:style/:attachment/:filename", ":attachment does not stand above :style"),
        ("files/:style/:filename", "no directory tells one record from another"),
        ("files/:updated_at/:style/:filename", "no directory tells one record from another"),
        (":hash.:extension", "no directory tells one record from another"),
        (":id/:style/:basename:extension", "can be read in two ways"),
        (":id/:style/:basename-:hash", "can be read in two ways"),
        (":attachment-:id/:style/:filename", "can be read in two ways"),
        (":id/:style:dotextension", "can be read in two ways"),
        (":id/:style.:extension:dotextension", "can be read in two ways"),
        (":id/:basename-:style:dotextension", "can be read in two ways"),
        (":class/x:id_partition/:style/:filename", ":id_partition spans several segments"),
        (":class/:id/:class/:style/:filename", ":class spans several segments"),
        (":class/:param/:id_partition/:style/:filename", ":param stands between :class and :id_partition"),
    ],
)
def test_a_path_that_cannot_be_read_is_refused(path: str, message: str) -> None:
    refused = refusal_of(path, ":id/:style/:filename", root="/srv/app/spool")

    assert "path" == refused.field
    assert message in refused.message


def test_a_mistyped_token_gets_a_suggestion() -> None:
    assert "did you mean :filename?" == refusal_of(":id/:style/:flename").remedy


# What becomes of it in the bucket


@pytest.mark.parametrize(
    ("path", "key", "found", "expected"),
    [
        (SIMPLE, "/:attachment/:id_partition/:style/:filename", "a/42/o/c.jpg", "a/000/000/042/o/c.jpg"),
        (SIMPLE, "v1/:attachment/:id/:basename/:style:dotextension", "a/42/o/c.jpg", "v1/a/42/c/o.jpg"),
        (SIMPLE, "x/:attachment/:id/:style/:fingerprint/:filename", "a/42/o/c.jpg", f"x/a/42/o/{'0f' * 16}/c.jpg"),
        (SIMPLE, ":fingerprint-:attachment/:id/:style/:filename", "a/42/o/c.jpg", f"{'0f' * 16}-a/42/o/c.jpg"),
        (PAPERCLIP, ":class/:attachment/:id/:style/:filename", "u/a/000/000/042/o/c.jpg", "u/a/42/o/c.jpg"),
        (PAPERCLIP, ":class/:attachment/:id-:style/:filename", "u/a/000/000/042/o/c.jpg", "u/a/42-o/c.jpg"),
        ("a/:id/:style/:filename", "a/:id/:style/:basename.:extension", "a/1/o/noext", "a/1/o/noext."),
        ("a/:id/:updated_at/:style/:filename", ":updated_at/:id/:style/:filename", "a/1/99/o/c.jpg", "99/1/o/c.jpg"),
    ],
)  # fmt: skip
def test_a_key_is_made_of_what_the_path_says(path: str, key: str, found: str, expected: str) -> None:
    layout = Layout(path, key.replace(":style:dotextension", ":style.:extension"))

    assert expected == key_of(layout, found, fingerprint="0f" * 16)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (":attachment/:id/:basename.:extension", "lacks :style"),
        (":attachment/:style/:basename.:extension", "lacks :id"),
        (":id/:style/:basename.:extension", "lacks :attachment"),
        (":attachment/:id/:style/:basename", "lacks :extension"),
        (":attachment/:id/:style.:extension", "lacks :basename"),
        (":attachment/:id/:style", "lacks :basename :extension"),
        (":class/:attachment/:id/:style/:filename", "the path does not have the class's name"),
        (":attachment/:param/:style/:filename", ":param is made by the app"),
        (":attachment/:id/:style/:updated_at/:filename", "the app's database"),
        (":attachment/:id/:style:filename", "can be read in two ways"),
        (":attachment/:id-:style/:filename", "can be read in two ways"),
        (":attachment//:id/:style/:filename", "a segment is empty"),
        (":attachment/../:id/:style/:filename", "a segment is empty, . or .."),
        ("", "a segment is empty"),
        (":attachment/:id/:style/:filename/", "a segment is empty"),
        (":key", ":key is no token"),
    ],
)
def test_a_key_that_loses_something_or_needs_too_much_is_refused(key: str, message: str) -> None:
    refused = refusal_of(SIMPLE, key)

    assert "key" == refused.field
    assert message in refused.message


def test_all_that_the_key_lacks_is_said_at_once() -> None:
    assert "add :attachment :id :style :basename :extension" == refusal_of(SIMPLE, "constant").remedy


@pytest.mark.parametrize("name", ["tab\there", "new\nline", "quote'\"", "-dash", ".hidden", "a..b", "Ünï日本", "a:id", "%2F"])
def test_odd_names_are_legal(name: str) -> None:
    layout = Layout(SIMPLE, SIMPLE)

    assert f"a/1/original/{name}.jpg" == key_of(layout, f"a/1/original/{name}.jpg")


def test_a_token_in_a_name_is_not_filled_in() -> None:
    """Paperclip would, and two files would share a key."""
    assert "a/7/original/:id.jpg" == key_of(Layout(SIMPLE, ":attachment/:id/:style/:filename"), "a/7/original/:id.jpg")


@pytest.mark.parametrize(
    ("key", "found", "message"),
    [
        (SIMPLE, os.fsdecode(b"a/1/original/\xff.jpg"), r"a/1/original/\\udcff.jpg: the name is not UTF-8"),
        (SIMPLE, f"a/1/original/{'ü' * 510}.jpg", "the key has 1037 bytes, over 1024"),
        (":attachment/:id/:basename/:style.:extension", "a/1/original/..jpg", r"a segment that is empty, \. or \.\."),
        (":attachment/:id_partition/:style/:filename", "a/x/original/a.jpg", "a segment that is empty"),
        (":attachment/:id_partition/:style/:filename", "a/042/original/a.jpg", "could be another file's too"),
        (":attachment/:id_partition/:style/:filename", "a/abcdefghij/original/a.jpg", "could be another file's too"),
        (":attachment/:id_partition/:style/:filename", "a/1234567890123/original/a.jpg", "could be another file's too"),
        (":attachment/:id/:style/:filename", "a/1/original/a.b.", "could be another file's too"),
        (":attachment/:id/:style_:filename", "a/1/large/a.jpg", "could be another file's too"),
        (":attachment/:id/:style/:fingerprint/:filename", "a/1/original/a.jpg", ":fingerprint cannot be known"),
    ],
)
def test_where_no_key_can_be_made_the_path_is_refused(key: str, found: str, message: str) -> None:
    layout = Layout(SIMPLE, key, styles=["thumb"])

    with pytest.raises(BadPath, match=message) as caught:
        key_of(layout, found)

    assert caught.value.hint
    str(caught.value).encode("utf-8")


def test_a_key_may_be_as_long_as_s3_takes_it() -> None:
    name = "x" * (1024 - len("a/1/original/.jpg"))

    assert 1024 == len(key_of(Layout(SIMPLE, SIMPLE), f"a/1/original/{name}.jpg"))


def test_a_name_that_ends_in_a_dot_does_not_share_the_key_of_the_name_without() -> None:
    layout = Layout("a/:id/:style/:filename", "a/:id/:style/:basename.:extension")

    assert "a/1/original/photo." == key_of(layout, "a/1/original/photo")
    with pytest.raises(BadPath, match="could be another file's too"):
        key_of(layout, "a/1/original/photo.")


def test_the_fingerprint_is_asked_for_only_where_the_path_has_none() -> None:
    assert Layout(SIMPLE, f":fingerprint/{SIMPLE}").needs_fingerprint
    assert Layout(SIMPLE, SIMPLE, url="https://cdn/:key?:fingerprint").needs_fingerprint
    assert not Layout(SIMPLE, SIMPLE).needs_fingerprint


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, None),
        ("https://cdn.example.com/:key", "https://cdn.example.com/a/1/original/me%20%26%20%C3%BC%3F.jpg"),
        ("http://localhost:9000/:bucket/:key", "http://localhost:9000/media/a/1/original/me%20%26%20%C3%BC%3F.jpg"),
        ("/system/:attachment/:id_partition/:filename", "/system/a/000/000/001/me%20%26%20%C3%BC%3F.jpg"),
        ("/:id?:fingerprint", f"/1?{'0f' * 16}"),
    ],
)
def test_the_url_is_percent_encoded(template: str | None, expected: str | None) -> None:
    layout = Layout(SIMPLE, SIMPLE, url=template)
    place = placed(layout, "a/1/original/me & ü?.jpg")

    assert expected == layout.url(place, layout.key(place), bucket="media", fingerprint="0f" * 16)


def test_a_url_that_cannot_be_known_is_refused() -> None:
    refused = refusal_of(SIMPLE, SIMPLE, url="https://cdn/:class/:key")

    assert ("url", "the path does not have the class's name") == (refused.field, refused.message)

    layout = Layout(PAPERCLIP, PAPERCLIP, url="https://cdn/:id")
    place = placed(layout, "u/a/abc/def/ghi/original/a.jpg")
    with pytest.raises(BadPath, match="its URL cannot be known"):
        layout.url(place, layout.key(place))


# Directories


@pytest.mark.parametrize(
    ("template", "record", "floor"),
    [
        (SIMPLE, "avatars/42", 1),
        (PAPERCLIP, "users/avatars/000/000/042", 2),
        (PAPERCLIP, "admin/users/avatars/000/000/042", 3),
        ("system/files/:id/:style/:filename", "system/files/42", 2),
        (":id/:attachment/:style/:filename", "42/avatars", 1),
        (":hash/x/:style/:filename", "abc/x", 1),
        ("a/:updated_at/photos/:id/:style/:filename", "a/99/photos/7", 1),
        (SIMPLE, "does/not/fit", 3),
    ],
)
def test_the_directories_above_the_id_are_never_removed(template: str, record: str, floor: int) -> None:
    assert floor == Layout(template, template).floor_of(record)


@pytest.mark.parametrize(
    ("template", "leads", "strays"),
    [
        (
            SIMPLE,
            ["", "avatars", "avatars/42", "avatars/42/original"],
            ["avatars/42/original/x", ".spoold", ".spoold/aside"],
        ),
        ("files/:id/:style/:filename", ["files", "files/42"], ["fil", "filesx", "other", "other/42"]),
        (
            PAPERCLIP,
            [
                "users",
                "admin/users",
                "admin/users/avatars",
                "u/avatars/000",
                "u/avatars/000/000/042/original",
                "u/avatars/001/000/000/000",
                "u/avatars/001/000/000/000/original",
                "u/avatars/abc/def",
            ],
            ["my-users", "users/42/x", "u/avatars/000/000/042/original/x", "u/avatars/0001"],
        ),
        ("a/:id_partition/:style/:filename", ["a/000", "a/abc/def/ghi/original"], ["a/ab", "a/abc/def/ghi/original/x"]),
        (":id/:style/:id_x/:filename", ["7/o", "7/o/7_x"], ["7/o/7_x/y"]),
    ],
)
def test_a_sweep_is_led_to_records_and_not_astray(template: str, leads: list[str], strays: list[str]) -> None:
    layout = Layout(template, template)

    assert leads == [directory for directory in leads + strays if layout.may_lead_to_record(directory)]


@pytest.mark.parametrize(
    ("path", "is_directory", "records"),
    [
        ("avatars/42/original/cat.jpg", False, ["avatars/42"]),
        ("avatars/42/.done", False, ["avatars/42"]),
        ("avatars/42/original/noext", False, ["avatars/42"]),
        ("avatars/42/original", True, ["avatars/42"]),
        ("avatars/42", True, ["avatars/42"]),
        ("avatars/42/original/deeper/still", True, ["avatars/42"]),
        ("avatars", True, []),
        ("avatars/42", False, []),
        ("", True, []),
        (".spoold/canary", False, []),
        (".spoold/aside", True, []),
    ],
)
def test_an_event_concerns_the_record_it_is_in(path: str, is_directory: bool, records: list[str]) -> None:
    assert records == Layout(SIMPLE, SIMPLE).records_touched_by(path, is_directory=is_directory)


def test_an_event_concerns_each_directory_that_may_be_a_record() -> None:
    """How many segments :class has is certain for a file only; looking at one record too many does no harm."""
    layout = Layout(":class/:attachment/:id/:style/:filename", ":class/:attachment/:id/:style/:filename")

    assert ["u/a/42"] == layout.records_touched_by("u/a/42/original/c.jpg", is_directory=False)
    assert ["u/a/42"] == layout.records_touched_by("u/a/42/original", is_directory=True)
    assert ["u/a/x", "u/a/x/original"] == layout.records_touched_by("u/a/x/original", is_directory=True)


def test_a_tree_without_end_is_not_taken_for_as_many_records() -> None:
    """Each of them would be looked at for each event below it."""
    layout = Layout(CLASSY, CLASSY)
    deep = "/d" * 1200

    assert [] == layout.records_touched_by(f"users{deep}", is_directory=True)
    assert [] == layout.records_touched_by(f"users{deep}/original/cat.jpg", is_directory=False)
    assert not layout.may_lead_to_record(f"users{deep}")
    assert layout.records_touched_by("users" + "/d" * 60 + "/42/original/cat.jpg", is_directory=False)


CLASSY = ":class/:attachment/:id/:style/:basename.:extension"


@pytest.mark.parametrize("path", ["avatars/\udcff", "\udcff/42", "avatars/42/\udcff", "avatars/42/original/\udcff.jpg"])
@pytest.mark.parametrize("is_directory", [False, True])
def test_an_event_of_a_name_that_is_no_utf_8_touches_no_record(path: str, is_directory: bool) -> None:
    """The kernel tells of it; a sweep never finds it, and the ledger could not write it down."""
    layout = Layout(SIMPLE, SIMPLE)

    assert [] == layout.records_touched_by(path, is_directory=is_directory)
    assert not layout.may_lead_to_record(path)


def test_the_record_of_a_file_is_told_by_its_path() -> None:
    layout = Layout(SIMPLE, SIMPLE)

    assert "avatars/42" == layout.record_of("avatars/42/original/cat.jpg")
    assert layout.record_of("avatars/42/.done") is None


# For all templates, values and paths

STYLES = ["thumb", "really-tiny"]
LEGAL = [
    SIMPLE,
    PAPERCLIP,
    "users/:attachment/:id_partition/:style/:basename:dotextension",
    ":class/:id/:style/:basename.:extension",
    "files/:param/:style/:filename",
    "files/:id/:style_:basename.:extension",
    "files/:id/:basename/:style:dotextension",
    "files/:ids/:basename/:style.:extension",
    ":attachment/:id/:filename",
    ":attachment/:id/:updated_at/:style/:hash.:extension",
    ":attachment/:id/:style/:id_:basename.:extension",
    ":id_partition/files/:class/:style/:filename",
]

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/"), min_size=1, max_size=8).filter(
    lambda text: text not in (".", "..")
)
# Paperclip drops a dot at the end: what is left of `a.b.` cannot be told from `a.b`.
names = st.text("ab._-é日\n", min_size=1, max_size=8).filter(
    lambda name: name.strip(".") and not (name.endswith(".") and "." in split_filename(name)[0].lstrip("."))
)
words = st.from_regex("[a-z_]{1,5}", fullmatch=True)
ids = st.one_of(
    st.integers(0, 10**12 - 1), st.text("abc-123é", min_size=9, max_size=12).filter(lambda text: not text.isdigit())
)


@st.composite
def assignments(draw: st.DrawFn) -> dict[str, str]:
    record_id = draw(ids)
    basename, extension = split_filename(draw(names))
    dotextension = f".{extension}" if extension else ""
    return {
        "attachment": draw(words),
        "class": "/".join(draw(st.lists(words, min_size=1, max_size=3))),
        "id": str(record_id),
        "id_partition": id_partition(record_id),
        "param": draw(texts),
        "style": draw(st.sampled_from(["original", *STYLES])),
        "hash": draw(texts),
        "updated_at": draw(texts),
        "basename": basename,
        "extension": extension,
        "dotextension": dotextension,
        "filename": basename + dotextension,
    }


@settings(deadline=None)
@given(template=st.sampled_from(LEGAL), values=assignments())
def test_what_is_written_is_read_back(template: str, values: dict[str, str]) -> None:
    layout = Layout(template, template, styles=STYLES)
    path = interpolate(template, values)

    place = placed(layout, path)

    tokens = [token for token in values if re.search(f":{token}(?!_partition|_at)", template)]
    assert {token: values[token] for token in tokens} == {token: place.values[token] for token in tokens}
    assert path == layout.key(place)
    assert layout.may_lead_to_record(os.path.dirname(path))
    assert [place.record] == layout.records_touched_by(path, is_directory=False)
    assert place.record in layout.records_touched_by(os.path.dirname(path), is_directory=True)
    assert 1 <= layout.floor_of(place.record) <= place.record.count("/") + 1


KEYS = {
    "files/:id/:style/:filename": [
        ":id/:style/:basename.:extension",
        ":id/:style/:basename:dotextension",
        ":id_partition/:style/:filename",
        ":id/:style_:filename",
    ],
    "files/:id/:style/:basename.:extension": [
        ":id/:style/:filename",
        ":id/:basename:dotextension/:style",
        ":extension.:id/:basename/:style",
        ":style/:id/:style-:basename:dotextension",
    ],
    "files/:id_partition/:style/:filename": [":id/:style/:filename", ":id-:style/:filename"],
    ":class/:id/:style/:filename": [":id/:style/:class/:filename", ":class/:id_partition/:style/:filename"],
}


@settings(max_examples=300, deadline=None)
@given(
    path=st.sampled_from(sorted(KEYS)),
    segments=st.tuples(*[st.lists(st.text("a0._-", min_size=1, max_size=3), min_size=3, max_size=5)] * 2),
    index=st.integers(0, 3),
)
def test_two_paths_never_share_a_key(path: str, segments: tuple[list[str], list[str]], index: int) -> None:
    layout = Layout(path, KEYS[path][index % len(KEYS[path])], styles=["a", "0"])
    keys = {}
    for found in ("/".join(["files", *each]) for each in segments):
        if place := layout.parse(found):
            try:
                keys[found] = layout.key(place)
            except BadPath:
                continue

    assert len(keys) == len(set(keys.values()))


@pytest.mark.parametrize(("path", "key"), [(path, key) for path, keys in KEYS.items() for key in keys])
def test_no_two_short_names_share_a_key(path: str, key: str) -> None:
    layout = Layout(path, key, styles=["a", "a-a"])
    above = "files/000/000/042" if "partition" in path else "files/42"
    found = [
        f"{above}/{style}/{''.join(name)}"
        for style in ("a", "a-a", "-", "b")
        for size in range(1, 6)
        for name in itertools.product("a.-", repeat=size)
    ]
    keys = {}
    for place in filter(None, map(layout.parse, found)):
        try:
            keys[place.style, place.filename, place.values["extension"], place.basename] = layout.key(place)
        except BadPath:
            continue

    assert len(keys) > 50
    assert len(keys) == len(set(keys.values()))


pieces = st.sampled_from(["style", "basename", "extension", "dotextension", "hash", "id", "_", ".", "-", "_a", "a"])


@settings(max_examples=500, deadline=None)
@given(segment=st.lists(pieces, min_size=2, max_size=5), knows_styles=st.booleans(), more=st.data())
def test_a_segment_that_is_accepted_is_read_in_one_way(segment: list[str], knows_styles: bool, more: st.DataObject) -> None:
    """The other way round it is tested by name: what could be read in two ways is refused."""
    template = "".join(f":{piece}" if piece.isalpha() and piece != "a" else piece for piece in segment)
    try:
        layout = Layout(f":id/{template}", f":id/{template}", styles=["a", "a_a", "b"] if knows_styles else None)
    except BadTemplate:
        assume(False)
    text = st.sampled_from(["a", "a_a", "b", "a.a", "a-a", "_", "a_"])
    values = {token: more.draw(text) for token in ("style", "basename", "hash", "id")}
    if knows_styles:
        values["style"] = more.draw(st.sampled_from(["original", "a", "a_a", "b"]))
    values["extension"] = more.draw(st.sampled_from(["", "a", "a_a", "-", "_a"]))
    values["dotextension"] = f".{values['extension']}" if values["extension"] else ""
    if ":basename:dotextension" in template:
        assume((values["basename"], values["extension"]) == split_filename(values["basename"] + values["dotextension"]))

    path = interpolate(f":id/{template}", values)
    place = layout.parse(path)

    tokens = {piece for piece in segment if piece in values}
    if place is None:
        assert os.path.basename(path) in ("", ".", "..")
    else:
        assert {token: values[token] for token in tokens} == {token: place.values[token] for token in tokens}
