"""The configuration: what is read from it, and what is said about its mistakes."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path
from textwrap import indent

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from spoold import config, yaml_places
from spoold.errors import ConfigError

PROJECT = Path(__file__).parent.parent
SPOOL = """\
spools:
  - name: uploads
    root: /srv/app/spool
    bucket: my-bucket
"""
RECIPES = re.findall(r"```yaml\n(# complete: .*?)```", (PROJECT / "docs/configuration.md").read_text("utf-8"), re.DOTALL)


def a_spool(more: str) -> str:
    """Return a configuration of one spool with more settings; they begin in line 5, column 5."""
    return SPOOL + indent(more, "    ")


def said(text: str) -> list[str]:
    """Return what is said about a text, as `LINE:COLUMN: setting: …`."""
    with pytest.raises(ConfigError) as raised:
        config.parse(text)
    return [str(problem).removeprefix("config.yaml:") for problem in raised.value.problems]


def warned(text: str) -> list[str]:
    return [str(warning).removeprefix("config.yaml:") for warning in config.parse(text).warnings]


# What is read -------------------------------------------------------------------------------------------------------


def test_the_least_configuration_gets_the_defaults_of_the_contract():
    whole = config.parse(SPOOL)

    assert (Path("/var/lib/spoold"), None, None) == (whole.state_dir, whole.ledger, whole.ledger_file)
    assert (None, None, None) == (whole.s3.endpoint_url, whole.s3.region, whole.s3.profile)
    assert ("auto", "crc32") == (whole.s3.addressing_style, whole.s3.checksum)
    assert ("auto", 900.0, None) == (whole.upload.concurrency, whole.upload.doubt, whole.upload.bandwidth)
    assert (16_000_000, "boto3") == (whole.upload.multipart_threshold, whole.upload.client)
    retry = whole.upload.retry
    assert (1.0, 300.0, 0, 3) == (retry.initial, retry.max, retry.give_up_after, retry.crashes)
    assert ("json", "info", 60.0) == (whole.log.format, whole.log.level, whole.drain_timeout)
    assert () == whole.warnings


def test_a_spool_gets_the_defaults_of_the_contract():
    [spool] = config.parse(SPOOL).spools

    template = ":attachment/:id/:style/:basename.:extension"
    assert ("uploads", Path("/srv/app/spool"), "my-bucket") == (spool.name, spool.root, spool.bucket)
    assert (template, template, None, 300.0) == (spool.path, spool.key, spool.url, spool.sweep_every)
    assert ("delete", 86400.0, 1000) == (spool.replaced, spool.replaced_after, spool.max_deletes_per_hour)
    complete, cleanup = spool.complete, spool.cleanup
    assert (1.0, None, "ends", 600.0) == (complete.settle, complete.marker, complete.images, complete.within)
    assert (True, 0.0, 5.0, 10.0) == (cleanup.delete, cleanup.keep_for, cleanup.min_age, cleanup.grace)
    assert (30.0, "keep") == (cleanup.keep_empty_dirs_for, cleanup.without_leases)
    stored = spool.object.headers_for("avatars", "thumb")
    assert (None, None, "sniff", None, None) == (
        stored.acl,
        stored.cache_control,
        stored.content_type,
        stored.storage_class,
        stored.server_side_encryption,
    )
    assert ({}, {}) == (stored.tags, stored.metadata)


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("250ms", 0.25), ("1s", 1), ("10m", 600), ("2h", 7200), ("7d", 604800), ("1.5h", 5400), ("0", 0), ("'0'", 0)],
)
def test_a_duration_is_a_number_with_a_unit_or_a_bare_zero(written, seconds):
    assert seconds == config.parse(a_spool(f"replaced_after: {written}")).spools[0].replaced_after


@pytest.mark.parametrize(
    ("written", "size"),
    [("5KB", 5000), ("16MB", 16_000_000), ("1GB", 10**9), ("8KiB", 8192), ("5MiB", 5 * 2**20), ("1GiB", 2**30)],
)
def test_a_size_is_a_number_with_a_unit_of_10_or_of_2(written, size):
    assert size == config.parse(f"{SPOOL}upload: {{multipart_threshold: {written}}}").upload.multipart_threshold


def test_a_bandwidth_is_a_size_per_second():
    assert 20_000_000 == config.parse(f"{SPOOL}upload: {{bandwidth: 20MB/s}}").upload.bandwidth


def test_a_section_in_which_all_is_commented_out_has_its_defaults():
    text = f"{SPOOL}    cleanup:\n      # delete: false\ns3:\n  # region: eu-central-1\nlog:\n"

    assert config.parse(SPOOL) == config.parse(text)


def test_settings_cannot_be_changed():
    spool = config.parse(SPOOL).spools[0]

    with pytest.raises(ValidationError):
        spool.name = "other"


def test_settings_can_be_copied():
    whole = config.parse(a_spool("object: {tags: {a: b}, per_style: {thumb: {acl: private}}}"))

    assert whole == copy.deepcopy(whole)


def test_an_alias_stands_for_what_its_anchor_names():
    text = a_spool("object: &all {acl: private}\n") + ("  - {name: more, root: /srv/more, bucket: more-bucket, object: *all}\n")

    one, two = config.parse(text).spools

    assert "private" == one.object.acl == two.object.acl


# Styles, objects, layout ----------------------------------------------------------------------------------------------


def test_a_list_of_styles_holds_for_all_attachments_and_the_original_is_implied():
    complete = config.parse(a_spool("complete: {styles: [medium, original, thumb, thumb]}")).spools[0].complete

    assert ("original", "medium", "thumb") == complete.styles_for("avatars") == complete.styles_for("banners")


def test_styles_may_differ_from_attachment_to_attachment():
    complete = config.parse(a_spool("complete: {styles: {avatars: [thumb], default: []}}")).spools[0].complete

    assert ("original", "thumb") == complete.styles_for("avatars")
    assert ("original",) == complete.styles_for("banners")


def test_an_attachment_without_styles_of_its_own_or_a_default_is_decided_by_quiet():
    complete = config.parse(a_spool("complete: {styles: {avatars: [thumb]}}")).spools[0].complete

    assert None is complete.styles_for("banners")
    assert None is config.parse(SPOOL).spools[0].complete.styles_for("avatars")


def test_a_styles_headers_are_stronger_than_an_attachments_and_those_than_what_holds_for_all():
    objects = (
        config.parse(
            a_spool(
                """\
object:
  acl: private
  cache_control: all
  content_type: image/png
  per_attachment: {avatars: {cache_control: attachment, content_type: image/webp}}
  per_style: {thumb: {content_type: image/avif}, original: {acl: null}}
"""
            )
        )
        .spools[0]
        .object
    )

    def headers(attachment, style):
        found = objects.headers_for(attachment, style)
        return found.acl, found.cache_control, found.content_type

    assert ("private", "attachment", "image/avif") == headers("avatars", "thumb")
    assert ("private", "all", "image/avif") == headers("banners", "thumb")
    assert ("private", "all", "image/png") == headers("banners", "medium")
    assert (None, "attachment", "image/webp") == headers("avatars", "original")


def test_tags_and_metadata_are_merged_key_by_key():
    text = "object: {tags: {a: all, b: all}, per_attachment: {avatars: {tags: {b: own}}}, %s}"
    text %= "per_style: {thumb: {tags: {c: style}}}"
    objects = config.parse(a_spool(text)).spools[0].object

    assert {"a": "all", "b": "own", "c": "style"} == objects.headers_for("avatars", "thumb").tags
    assert {"a": "all", "b": "all"} == objects.headers_for("banners", "medium").tags


def test_a_spools_layout_leads_from_a_path_to_a_key():
    [spool] = config.parse(a_spool("key: up/:attachment/:id/:style/:basename.:extension")).spools
    layout = spool.layout()

    place = layout.parse("avatars/42/thumb/cat.jpg")

    assert place is not None
    assert "up/avatars/42/thumb/cat.jpg" == layout.key(place)


def test_rails_root_and_rails_env_stand_for_themselves_in_the_path():
    text = """\
path: ":rails_root/spool/:rails_env/:attachment/:id/:style/:filename"
key: ":attachment/:id/:style/:filename"
rails_root: /srv/app
rails_env: production
"""
    layout = config.parse(a_spool(text)).spools[0].layout()

    place = layout.parse("production/avatars/42/thumb/cat.jpg")

    assert place is not None
    assert "avatars/42" == place.record.removeprefix("production/")


def test_the_layout_knows_the_styles_of_all_attachments_only_if_there_is_a_default():
    listed = config.parse(a_spool("complete: {styles: {avatars: [thumb], default: [wide]}}")).spools[0]
    partly = config.parse(a_spool("complete: {styles: {avatars: [thumb]}}")).spools[0]

    assert {"original", "thumb", "wide"} == listed.complete.all_styles()
    assert None is partly.complete.all_styles()


def test_a_template_that_the_layout_refuses_is_a_problem_of_that_setting():
    [problem] = said(a_spool('key: ":attachment/:style/:basename.:extension"'))

    assert problem.startswith("5:10: spools[0].key: ")


def test_a_template_that_is_not_in_the_file_is_a_problem_of_its_spool():
    [problem] = said(a_spool('path: ":class/:id/:style/:filename"'))

    assert problem.startswith("2:5: spools[0].key: ")


# The ledger -----------------------------------------------------------------------------------------------------------


def test_the_ledger_lies_in_the_state_directory_unless_it_is_put_elsewhere():
    assert "sqlite:////var/lib/spoold/spoold.db" == config.parse(SPOOL).ledger_url
    assert "sqlite:////data/state/spoold.db" == config.parse(f"{SPOOL}state_dir: /data/state").ledger_url
    assert "sqlite:////data/l.db" == config.parse(f"{SPOOL}ledger: sqlite:////data/l.db").ledger_url


def test_a_ledger_file_holds_the_ledgers_url(tmp_path):
    (tmp_path / "url").write_text("sqlite:////data/l.db\n")

    assert "sqlite:////data/l.db" == config.parse(f"{SPOOL}ledger_file: {tmp_path}/url").ledger_url


def test_a_ledger_file_that_cannot_be_read_is_a_problem(tmp_path):
    [problem] = said(f"{SPOOL}ledger_file: {tmp_path}/url")

    assert problem == (
        f"5:14: ledger_file: cannot be read: {tmp_path}/url: No such file or directory; let the daemon's user read it"
    )


def test_a_password_in_the_ledgers_url_is_refused_and_not_repeated():
    [problem] = said(f"{SPOOL}ledger: postgresql://spoold:hunter2@db/spoold")

    assert problem == (
        "5:9: ledger: has a password in it, and secrets never stand in this file; "
        "put the URL into a file of mode 0600 and write `ledger_file: FILE`"
    )


def test_ledger_and_ledger_file_exclude_each_other(tmp_path):
    (tmp_path / "url").write_text("sqlite:////data/l.db")

    [problem] = said(f"{SPOOL}ledger: sqlite:////data/l.db\nledger_file: {tmp_path}/url")

    assert "6:14: ledger_file: stands beside `ledger`; keep one of the two" == problem


@pytest.mark.parametrize("url", ["postgresql://db/spoold", "mysql://db/spoold"])
def test_other_ledgers_than_sqlite_are_not_built_yet(url, tmp_path):
    (tmp_path / "url").write_text(url)

    assert ["5:9: ledger: is not built yet, only sqlite is so far; leave it out"] == said(f"{SPOOL}ledger: {url}")
    assert ["5:14: ledger_file: is not built yet, only sqlite is so far; leave it out"] == said(
        f"{SPOOL}ledger_file: {tmp_path}/url"
    )


@pytest.mark.parametrize("url", ["sqlite:///relative.db", '"sqlite://"', '"sqlite:///:memory:"'])
def test_a_ledger_that_is_relative_or_in_memory_is_refused(url):
    [problem] = said(f"{SPOOL}ledger: {url}")

    assert problem.startswith("5:9: ledger: is no sqlite URL of an absolute path; write sqlite:////var/lib/")


def test_a_ledger_inside_a_spool_is_refused():
    [problem] = said(f"{SPOOL}ledger: sqlite:////srv/app/spool/l.db")

    assert problem.startswith("5:9: ledger: lies in the root of spools[0], /srv/app/spool; put the ledger below")


# What is said about mistakes ------------------------------------------------------------------------------------------


def test_every_mistake_is_told_at_once_with_its_place():
    text = """\
state_dir: var
s3:
  checksum: crc
spools:
  - name: uploads
    root: /srv/spool
    buket: my-bucket
  - name: uploads
    root: /srv/spool/more
    bucket: my-bucket
    cleanup: {delete: "no", grace: -1s}
drain_timeout: 60
"""

    assert [
        "1:12: state_dir: is relative: var; write an absolute path, one that begins with /",
        '3:13: s3.checksum: must be one of crc32, crc32c, crc64nvme, sha256, none, not "crc"; did you mean `crc32`?',
        "5:5: spools[0].bucket: is missing; write the bucket that its files go to, such as `bucket: my-app-uploads`",
        "7:5: spools[0].buket: is unknown here; did you mean `bucket`?",
        "8:11: spools[1].name: is the name of spools[0] too: uploads; name each differently",
        "9:11: spools[1].root: lies in the root of spools[0], /srv/spool; give each spool a tree of its own",
        '11:23: spools[1].cleanup.delete: must be true or false, not "no"; write true or false, without quotes',
        "11:36: spools[1].cleanup.grace: is negative: -1s; write 0 or more, such as 10s",
        "12:16: drain_timeout: has no unit: 60; write it with one, such as 10s",
    ] == said(text)


def test_a_mistake_does_not_make_others_up():
    """What is compared with other settings is left alone while one of them is wrong."""
    text = f"{SPOOL}    path: 5\n    key: 'x/:class/:id/:filename'\ns3: {{endpoint_url: minio}}\nstate_dir: ~/state\n"

    assert ["5:11", "7:20", "8:12"] == [problem.split(": ")[0] for problem in said(text.replace("my-bucket", "My"))]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (a_spool("compleet: {}"), "5:5: spools[0].compleet: is unknown here; did you mean `complete`?"),
        (a_spool("settle: 5s"), "5:5: spools[0].settle: is unknown here; did you mean `complete.settle`?"),
        (a_spool("log: {}"), "5:5: spools[0].log: is unknown here; did you mean `log`?"),
        (f"{SPOOL}zzz: 1", "5:1: zzz: is unknown here; leave it out; known are state_dir, ledger, ledger_file, s3, "),
        (
            a_spool("object: {per_style: {thumb: {akl: null}}}"),
            "5:34: spools[0].object.per_style.thumb.akl: is unknown ",
        ),
    ],
)
def test_an_unknown_setting_gets_a_suggestion(text, problem):
    assert said(text)[0].startswith(problem)


@pytest.mark.parametrize(
    "key", ["access_key", "secret_key", "aws_secret_access_key", "aws_access_key_id", "password", "session_token"]
)
def test_a_secret_is_refused_and_not_repeated(key):
    [problem] = said(f"{SPOOL}s3: {{{key}: hunter2}}")

    assert problem == (
        f"5:6: s3.{key}: is a secret, and secrets never stand in this file; "
        "leave it to boto3: AWS_* in the environment, ~/.aws/credentials, or the machine's role"
    )


def test_a_password_in_the_endpoint_is_refused_and_not_repeated():
    [problem] = said(f"{SPOOL}s3: {{endpoint_url: 'https://me:hunter2@minio'}}")

    assert problem.startswith("5:20: s3.endpoint_url: has a user or password in it")
    assert "hunter2" not in problem


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ("url: 5", 'url: must be text, not 5; write it in quotes: "5"'),
        ("url: yes", 'url: must be text, not yes; write it in quotes: "yes"'),
        ("url: 2024-01-01", None),
        ("url: []", "url: must be text, not a list; write a text"),
        ("key:", "key: has no value; write a text, or leave the setting out"),
        ("key: ''", 'key: is empty: ""; write a text, or leave it out'),
        (
            "complete: 5",
            "complete: must be a section, not 5; write its settings as `name: value`, one a line, indented",
        ),
        ("object: {tags: [a]}", "object.tags: must be a mapping, not a list; write its entries as `name: value`, "),
        ("object: {tags: {a: 1}}", 'object.tags.a: must be text, not 1; write it in quotes: "1"'),
        ("complete: {styles: thumb}", 'complete.styles: must be a list, not "thumb"; write [medium, thumb], or '),
        ("complete: {styles: {a: thumb}}", 'complete.styles.a: must be a list, not "thumb"; write a list: '),
        ("complete: {styles: [thumb, 100]}", 'complete.styles[1]: must be text, not 100; write it in quotes: "100"'),
        ("cleanup: {delete: 1}", "cleanup.delete: must be true or false, not 1; write true or false, without quotes"),
        (
            "max_deletes_per_hour: many",
            'max_deletes_per_hour: must be a whole number, not "many"; write a whole number',
        ),
        ("max_deletes_per_hour: -1", "max_deletes_per_hour: is too small: -1; write 0 or more"),
        ("replaced: keeep", 'replaced: must be one of delete, keep, not "keeep"; did you mean `keep`?'),
        ("replaced: off", "replaced: must be one of delete, keep, not off; write delete, for instance"),
    ],
)
def test_a_wrong_type_is_told_with_what_to_write(more, problem):
    if problem is None:
        assert "2024-01-01" == config.parse(a_spool(more)).spools[0].url
    else:
        assert re.sub(r"^5:\d+: spools\[0\]\.", "", said(a_spool(more))[0]).startswith(problem)


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("5", "has no unit: 5; write it with one, such as 10s"),
        ("-5s", "is negative: -5s; write 0 or more, such as 10s"),
        ("5sec", 'is no duration: "5sec"; write a number and one of ms s m h d, such as 10s'),
        ("[]", "is no duration: a list; write a number and one of ms s m h d, such as 10s"),
        ("null", "is no duration: nothing; write a number and one of ms s m h d, such as 10s"),
        ("4000d", "is too long: 4000d; write 3650d or less"),
        ("0s", "must be more than 0s; write a duration such as 10s"),
    ],
)
def test_a_wrong_duration_is_told_with_what_to_write(written, problem):
    assert [f"5:18: spools[0].sweep_every: {problem}"] == said(a_spool(f"sweep_every: {written}"))


@pytest.mark.parametrize(
    ("setting", "written", "problem"),
    [
        ("multipart_threshold", "16", "has no unit: 16; write it with one, such as 16MB"),
        (
            "multipart_threshold",
            "16mb",
            'is no size: "16mb"; write a number and one of KB MB GB KiB MiB GiB, such as 16MB',
        ),
        ("multipart_threshold", "0", "is out of range: 0; write more than 0 and at most 5GiB, such as 16MB"),
        ("multipart_threshold", "6GB", "is out of range: 6GB; write more than 0 and at most 5GiB, such as 16MB"),
        ("bandwidth", "20MB", 'is no rate: "20MB"; write a number and one of KB/s MB/s GB/s KiB/s MiB/s GiB/s, such '),
        ("bandwidth", "0", "would send nothing at all; write a rate such as 20MB/s, or null for no limit"),
        ("concurrency", "0", "is out of range: 0; write auto, or a whole number from 1 to 1024"),
        ("concurrency", "1025", "is out of range: 1025; write auto, or a whole number from 1 to 1024"),
        ("concurrency", "many", 'is out of range: "many"; write auto, or a whole number from 1 to 1024'),
        ("concurrency", "yes", "is out of range: True; write auto, or a whole number from 1 to 1024"),
        ("client", "rclone", 'must be one of boto3, fast, not "rclone"; write boto3, for instance'),
        ("retry", "{crashes: 0}", "is too small: 0; write 1 or more"),
        ("retry", "{initial: 2s, max: 1s}", "is less than `initial`; write the longest wait between two attempts"),
    ],
)
def test_a_wrong_setting_of_upload_is_told_with_what_to_write(setting, written, problem):
    [found] = said(f"{SPOOL}upload:\n  {setting}: {written}")

    assert re.sub(r"^6:\d+: upload\.[\w.]+: ", "", found).startswith(problem)


@pytest.mark.parametrize(
    "setting", ["http: {listen: '127.0.0.1:9533'}", "http: {token_file: /t}", "app: {a: b}", "ingest: [a]"]
)
def test_what_comes_later_is_not_built_yet(setting):
    [problem] = said(SPOOL + setting)

    assert problem.endswith(": is not built yet; leave it out")


def test_styles_that_spoold_makes_itself_are_not_built_yet():
    assert ["5:13: spools[0].styles: is not built yet; leave it out"] == said(a_spool("styles: {avatars: {thumb: 100x100}}"))


# Rules of the trade ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["spools: []", "log: {level: debug}"])
def test_a_configuration_without_spools_is_refused(text):
    [problem] = said(text)

    assert problem.endswith("spools: is missing; write at least one spool; config.example.yaml is a start")


@pytest.mark.parametrize("setting", ["name", "root", "bucket"])
def test_what_has_no_default_must_be_written(setting):
    [problem] = said(
        "\n".join(line for line in SPOOL.splitlines() if f"{setting}:" not in line).replace(
            "    root", "  - root", "name" == setting
        )
    )

    assert problem.startswith(f"2:5: spools[0].{setting}: is missing; write ")


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            "uploads",
            "my uploads",
            '2:11: spools[0].name: is no name for a spool: "my uploads"; write letters, digits, . _ - ',
        ),
        ("/srv/app/spool", "spool", "3:11: spools[0].root: is relative: spool; write an absolute path"),
        ("/srv/app/spool", "~deploy/spool", "3:11: spools[0].root: `~` is not expanded; write the home directory out"),
        ("/srv/app/spool", "/srv/$APP/spool", "3:11: spools[0].root: environment variables are not expanded; write "),
        (
            "my-bucket",
            "My_Bucket",
            '4:13: spools[0].bucket: is no legal name of a bucket: "My_Bucket"; write 3 to 63 '
            "of a-z 0-9 . -, such as my-bucket",
        ),
        ("my-bucket", "my", '4:13: spools[0].bucket: is no legal name of a bucket: "my"; write 3 to 63 of a-z 0-9 . -'),
        ("my-bucket", "my-bucket/app", '4:13: spools[0].bucket: is no legal name of a bucket: "my-bucket/app"; '),
        ("my-bucket", "10.0.0.1", '4:13: spools[0].bucket: is no legal name of a bucket: "10.0.0.1"; write 3 to 63 '),
        (
            "my-bucket",
            "my..bucket",
            '4:13: spools[0].bucket: is no legal name of a bucket: "my..bucket"; write 3 to 63 ',
        ),
        ("my-bucket", "''", '4:13: spools[0].bucket: is empty: ""; write a text'),
    ],
)
def test_a_spools_name_root_and_bucket_must_be_usable(old, new, problem):
    assert said(SPOOL.replace(old, new))[0].startswith(problem)


def test_another_server_may_call_its_buckets_what_it_likes():
    text = SPOOL + "s3: {endpoint_url: 'http://minio:9000'}"

    assert "My_Bucket" == config.parse(text.replace("my-bucket", "My_Bucket")).spools[0].bucket
    assert ["4:13: spools[0].bucket: has a / in it: a/b; put what follows the bucket's name into `key`"] == said(
        text.replace("my-bucket", "a/b")
    )


@pytest.mark.parametrize("url", ["minio:9000", "ftp://minio", "'http://'", "'https://minio?x=y'"])
def test_an_endpoint_must_be_an_address(url):
    [problem] = said(f"{SPOOL}s3:\n  endpoint_url: {url}")

    assert problem.startswith("6:17: s3.endpoint_url: is no address: ")


@pytest.mark.parametrize(
    ("one", "other", "how"),
    [
        ("/srv/a", "/srv/a", "is the same as"),
        ("/srv/a", "/srv/x/../a/b", "lies in"),
        ("/srv/a/b", "/srv/a", "contains"),
    ],
)
def test_a_spool_must_not_lie_in_another_one(one, other, how):
    text = f"spools:\n  - {{name: a, root: {one}, bucket: my-a}}\n  - {{name: b, bucket: my-b, root: {other}}}"

    assert [f"3:35: spools[1].root: {how} the root of spools[0], {one}; give each spool a tree of its own"] == said(text)


def test_a_spool_is_found_in_another_one_behind_a_link(tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "current").symlink_to("shared")
    text = f"spools:\n  - {{name: a, root: {tmp_path}/shared, bucket: my-a}}\n"
    text += f"  - {{name: b, root: {tmp_path}/current/spool, bucket: my-b}}"

    [problem] = said(text)

    assert problem.startswith("3:21: spools[1].root: lies in the root of spools[0]")


@pytest.mark.parametrize(
    ("state", "how"), [("/srv/app/spool", "is the same as"), ("/srv/app/spool/state", "lies in"), ("/srv", "contains")]
)
def test_state_and_spools_must_not_lie_in_one_another(state, how):
    [problem] = said(f"{SPOOL}state_dir: {state}")

    assert problem.startswith(f"5:12: state_dir: {how} the root of spools[0], /srv/app/spool; name a directory outside")


def test_a_spool_must_not_lie_in_the_default_state_directory():
    [problem] = said(SPOOL.replace("/srv/app/spool", "/var/lib/spoold/spool"))

    assert problem == ("3:11: spools[0].root: lies in state_dir, /var/lib/spoold; name a `state_dir` outside of all spools")


@pytest.mark.parametrize(("setting", "path"), [("state_dir", "state"), ("ledger_file", "url"), ("state_dir", "~/state")])
def test_a_path_that_depends_on_who_reads_it_is_refused(setting, path):
    [problem] = said(f"{SPOOL}{setting}: {path}")

    assert problem.startswith(f"5:{len(setting) + 3}: {setting}: ")


def test_a_question_mark_in_the_state_directory_is_refused():
    """SQLAlchemy would take what stands behind it for options, and open another file."""
    [problem] = said(f"{SPOOL}state_dir: /var/what?/state")

    assert problem.startswith("5:12: state_dir: has a ? in it")


@pytest.mark.parametrize("name", ["a/b", "''", ".", "..", ".spoold"])
def test_a_marker_must_be_a_plain_file_name(name):
    [problem] = said(a_spool(f"complete: {{marker: {name}}}"))

    assert problem.startswith("5:24: spools[0].complete.marker: is no plain name: ")


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        (
            "acl: public",
            "acl: must be one of private, public-read, public-read-write, authenticated-read, "
            'aws-exec-read, bucket-owner-read, bucket-owner-full-control, not "public"; did you mean `public-read`?',
        ),
        ("storage_class: standard", 'storage_class: is unknown: "standard"; did you mean `STANDARD`?'),
        ("storage_class: cheap", 'storage_class: is unknown: "cheap"; write one of STANDARD, STANDARD_IA, '),
        (
            "per_style: {thumb: {storage_class: GLACER}}",
            'per_style.thumb.storage_class: is unknown: "GLACER"; did you ',
        ),
        ("server_side_encryption: kms", "server_side_encryption: must be one of AES256, aws:kms, aws:kms:dsse, not "),
        ("content_type: image", 'content_type: is no media type: "image"; write sniff, or one such as image/webp'),
        ("cache_control: für immer", 'cache_control: cannot stand in a header: "für immer"; write ASCII only'),
        ("metadata: {a b: c}", 'metadata.a b: is no HTTP token: "a b"; write ASCII letters, digits and dashes'),
        ("metadata: {größe: c}", 'metadata.größe: is no HTTP token: "größe"; write ASCII letters, digits and dashes'),
        ("metadata: {a: ü}", 'metadata.a: cannot stand in a header: "ü"; write ASCII only'),
        ("tags: {'a#b': c}", 'tags.a#b: is no key of a tag: "a#b"; write letters, digits, spaces, + - = . _ : / @'),
        ("tags: {'aws:a': c}", 'tags.aws:a: is no key of a tag: "aws:a"; write letters, digits, '),
        ("tags: {a: 'b#c'}", 'tags.a: is no value of a tag: "b#c"; write letters, digits, spaces, + - = . _ : / @'),
        ("per_style: {a/b: {}}", 'per_style.a/b: is no plain name: "a/b"; write one without /, and not .spoold'),
    ],
)
def test_what_s3_would_refuse_of_an_object_is_told_before(setting, problem):
    found = said(a_spool(f"object: {{{setting}}}"))[0]

    assert re.sub(r"^5:\d+: spools\[0\]\.object\.", "", found).startswith(problem)


def test_another_server_may_have_storage_classes_of_its_own():
    text = a_spool("object: {storage_class: COLD}\n") + "s3: {endpoint_url: 'http://ceph'}"

    assert "COLD" == config.parse(text).spools[0].object.storage_class


def test_an_object_has_at_most_10_tags():
    tags = ", ".join(f"t{number}: v" for number in range(11))

    assert ["5:20: spools[0].object.tags: makes 11 tags for one object; keep to 10 with all that are merged"] == said(
        a_spool(f"object: {{tags: {{{tags}}}, per_style: {{thumb: {{acl: null}}}}}}")
    )


def test_tags_are_counted_where_they_are_merged():
    tags = ", ".join(f"t{number}: v" for number in range(9))
    text = f"object:\n  tags: {{{tags}}}\n  per_attachment: {{avatars: {{tags: {{a: v}}}}}}\n"

    assert 10 == len(config.parse(a_spool(text)).spools[0].object.headers_for("avatars", "thumb").tags)
    [problem] = said(a_spool(f"{text}  per_style: {{thumb: {{tags: {{b: v}}}}}}\n"))
    assert problem.startswith("8:33: spools[0].object.per_style.thumb.tags: makes 11 tags for one object")


def test_an_objects_metadata_have_at_most_2048_bytes():
    [problem] = said(a_spool(f"object: {{metadata: {{a: {'x' * 2048}}}}}"))

    assert problem.startswith("5:24: spools[0].object.metadata: makes 2049 bytes of metadata for one object; keep to 2048")


@pytest.mark.parametrize(
    ("setting", "warning"),
    [
        ("min_age: 4s", "5:25: spools[0].cleanup.min_age: is below 5s: the app may still be saving the file; write 5s"),
        (
            "grace: 0s",
            "5:23: spools[0].cleanup.grace: looks at once: a writer that was just opening the file can lose ",
        ),
        (
            "keep_empty_dirs_for: 500ms",
            "5:37: spools[0].cleanup.keep_empty_dirs_for: is below 1s: the app's save fails",
        ),
    ],
)
def test_a_risk_is_warned_of_but_allowed(setting, warning):
    [found] = warned(a_spool(f"cleanup: {{ {setting} }}"))

    assert found.startswith(warning)


def test_nothing_is_warned_of_cleanup_where_nothing_is_deleted():
    assert [] == warned(a_spool("cleanup: {delete: false, min_age: 0, grace: 0, keep_empty_dirs_for: 0}"))


def test_two_spools_that_could_write_the_same_keys_are_warned_of():
    text = SPOOL + "  - {name: more, root: /srv/more, bucket: my-bucket%s}"

    [found] = warned(text % "")

    assert found.startswith("5:5: spools[1].key: and `bucket` are those of spools[0]: where keys meet, one record is dead")
    assert [] == warned(text % ", key: 'more/:attachment/:id/:style/:basename.:extension'")


# YAML -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def as_deep_as_a_command():
    """Allow calls within calls as a command does: Hypothesis allows more, and what comes of that takes ten times as long."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "1:1: file: is empty; write at least one spool; config.example.yaml is a start"),
        ("# nothing\n", "1:1: file: is empty; write at least one spool; config.example.yaml is a start"),
        ("- a\n", "1:1: file: is a list, not settings; begin with a line such as `spools:`"),
        ("a\n", "1:1: file: is a single value, not settings; begin with a line such as `spools:`"),
        ("log:\n\tlevel: info\n", "2:1: file: has a tab where YAML wants spaces; indent with spaces"),
        ("log: {level: info\n", "2:1: file: is no YAML: while parsing a flow mapping, expected ',' or '}', but got "),
        ("log: @info\n", "1:6: file: is no YAML: while scanning for the next token, found character '@' that cannot "),
        ("a: b\n---\nc: d\n", "2:1: file: is no YAML: expected a single document in the stream, but found another "),
        ("log: \x00\n", "1:6: file: has the character U+0000, which YAML does not allow; remove it"),
        ('log: "\\UFFFFFFFF"\n', "1:9: file: is no YAML: "),
        ("[" * 1500, "1:1: file: is nested too deeply; write it with less nesting"),
        (
            f"{SPOOL}log: {{level: info}}\nlog: {{}}\n",
            "6:1: log: stands here a second time; keep one; the other is in line 5",
        ),
        (f"{SPOOL}<<: {{log: {{}}}}\n", "5:1: <<: merging is not supported; write the settings out, or use an alias "),
        (f"{SPOOL}? [a]\n: b\n", "5:3: ?: a list or a mapping cannot be the name of a setting"),
        (
            f"{SPOOL}log: {{level: !!python/name:os.system x}}\n",
            "5:14: log.level: has the tag !!python/name:os.system; ",
        ),
        (f"{SPOOL}drain_timeout: 0b_\n", "5:16: drain_timeout: is no int: 0b_; put it in quotes"),
        (
            f'{SPOOL}s3: {{region: "a\\nb"}}\n',
            "5:14: s3.region: has line breaks or characters that cannot be printed; ",
        ),
        (f"{SPOOL}s3: &s {{region: *s}}\n", "5:5: s3.region: contains itself; write the value out instead of an alias"),
    ],
)
def test_what_is_no_usable_yaml_is_told_with_its_place(text, problem, as_deep_as_a_command):
    assert said(text)[0].startswith(problem)


def test_aliases_of_aliases_do_not_fill_the_memory():
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 20)]

    [problem] = said("a0: &a0 x\n" + "\n".join(levels))

    assert "has more than 10000 values" in problem


def test_a_value_that_yaml_refuses_is_told_once():
    assert 1 == len(said(f"{SPOOL}drain_timeout: !!set {{a}}\n"))


def test_a_missing_file_is_told_with_what_to_do(tmp_path):
    with pytest.raises(ConfigError) as raised:
        config.load(tmp_path / "none.yaml")

    assert str(raised.value) == (
        f"{tmp_path}/none.yaml:1:1: file: cannot be read: No such file or directory; "
        "name a file of UTF-8 text that this user may read; config.example.yaml is a start"
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "1:1: file: cannot be read: Is a directory"),
        (b"a: b\nc: \xff\n", "2:1: file: cannot be read: a byte there is no UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_with_its_place(content, problem, tmp_path):
    file = tmp_path / "config.yaml"
    file.mkdir() if content is None else file.write_bytes(content)

    with pytest.raises(ConfigError) as raised:
        config.load(file)

    assert str(raised.value).removeprefix(f"{file}:").startswith(problem)


def test_a_file_is_loaded_with_its_name_in_each_problem(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("log: 5")

    with pytest.raises(ConfigError) as raised:
        config.load(file)

    assert {str(file)} == {problem.file for problem in raised.value.problems}


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
SETTINGS = st.sampled_from(sorted({part for name in config.setting_names() for part in name.split(".")}))
LIKELY = st.sampled_from(["5s", "10MB", "auto", "none", "/srv/a", "a/b", "~", ":id", ":attachment/:id/:style/:filename"])
ANYTHING = st.recursive(
    PLAIN | LIKELY,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SETTINGS | st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
A_SPOOL = st.dictionaries(SETTINGS, ANYTHING, max_size=5).map(
    lambda more: {"name": "a", "root": "/srv/a", "bucket": "my-bucket"} | more
)
LIKE_A_CONFIGURATION = st.dictionaries(SETTINGS, ANYTHING, max_size=4).flatmap(
    lambda more: st.lists(A_SPOOL | ANYTHING, max_size=3).map(lambda spools: {"spools": spools} | more)
)


@settings(max_examples=400, deadline=None)
@given(LIKE_A_CONFIGURATION | ANYTHING)
def test_whatever_stands_in_the_file_nothing_is_raised_but_a_config_error(data):
    text = yaml.safe_dump(data, allow_unicode=True)

    try:
        config.parse(text)
    except ConfigError as error:
        assert error.problems
        assert all(problem.line >= 1 and problem.column >= 1 and problem.message for problem in error.problems)


@settings(max_examples=400, deadline=None)
@given(st.text(st.sampled_from("ab:-[]{}&*!|>'\"%@#,?<=. \n\t\\~019_x"), max_size=60) | st.text(max_size=30))
@example("%YAML 1" + "1" * 5000 + ".1\n---\na: b")
@example("a: !!int ''")
@example("a: !!bool b")
@example("a: !<> b")
@example('a: "\\ud800"')
def test_whatever_text_the_file_has_nothing_is_raised_but_a_config_error(text):
    with pytest.raises(ConfigError):
        config.parse(text)


# The example and the reference ----------------------------------------------------------------------------------------


def written(data: object, within: str = "") -> dict[str, object]:
    """Return what stands in YAML data by its dotted name, lists taken apart."""
    if isinstance(data, list):
        return {name: value for item in data for name, value in written(item, within).items()}
    if not isinstance(data, dict):
        return {}
    found: dict[str, object] = {}
    for key, value in data.items():
        found |= {f"{within}{key}": value} | written(value, f"{within}{key}.")
    return found


def test_the_example_has_every_setting():
    text = (PROJECT / "config.example.yaml").read_text("utf-8")

    names = {name for name in config.setting_names() if not re.search(r"per_(style|attachment)\.", name)}

    assert names == set(written(yaml_places.read(text, "").data))


def test_the_example_is_loaded_as_it_stands_and_has_the_defaults():
    example = config.load(PROJECT / "config.example.yaml")
    least = "{name: uploads, root: /srv/app/shared/spool, bucket: my-app-uploads}"

    assert config.parse(f"spools: [{least}]") == example
    assert () == example.warnings


def test_the_example_says_something_about_every_setting():
    lines = (PROJECT / "config.example.yaml").read_text("utf-8").splitlines()

    bare = [line for line in lines if line and not line.startswith("#") and " # " not in line]

    assert ["  retry:"] == bare


def test_the_reference_has_every_setting():
    text = (PROJECT / "docs/configuration.md").read_text("utf-8")
    named = {name for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for name in re.findall(r"`([\w.]+)`", row)}
    sections = {"s3", "spools", "complete", "object", "cleanup", "upload", "retry", "log"}

    missing = (
        {name.rpartition(".")[2] for name in config.setting_names()} - sections - {name.rpartition(".")[2] for name in named}
    )

    assert {"listen", "token_file"} == missing


@pytest.mark.parametrize("text", RECIPES, ids=[text.partition("\n")[0] for text in RECIPES])
def test_each_recipe_of_the_reference_is_loaded(text):
    assert () == config.parse(text).warnings


def test_the_reference_shows_what_check_really_says():
    text = """\
s3:
  checksum: crc
spools:
  - name: uploads
    root: /srv/app/shared/spool
    buket: my-app-uploads
    bucket: my-app-uploads
    cleanup: {delete: false,
    keep_for: 60}
"""
    document = (PROJECT / "docs/configuration.md").read_text("utf-8")

    for problem in said(text):
        assert problem.partition(": ")[2] in document
