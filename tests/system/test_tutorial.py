"""The tutorial: an original and five styles, from the app's save to `done`."""

from __future__ import annotations

from pathlib import Path

from tests.paperclip import App, picture, styles_of
from tests.servers import MotoServer
from tests.system.harness import Site, until

ORDER = ["record.seen", "batch.settled", "batch.claimed", "batch.stored", "record.cleared"]


def test_six_files_go_up_are_proven_and_leave_no_trace_in_the_spool(moto_server: MotoServer, tmp_path: Path) -> None:
    styles = ["large", "medium", "thumb", "tiny", "really_tiny"]
    site = Site(tmp_path, moto_server, spool={"complete": {"styles": ["original", *styles]}, "object": {"acl": "public-read"}})
    original = picture(1200, 900, 1, "JPEG")
    files = {"original": original, **styles_of(original)}
    written = {f"avatars/42/{style}/me.jpg": content for style, content in files.items()}

    with site.daemon() as daemon:
        App(site.root).save("avatars", 42, "me.jpg", files)
        row = site.until_state("avatars/42", "done")
        until(lambda: site.directories() == {"avatars"}, "the record's directories are gone")

        assert ORDER == daemon.demand_legal_path("avatars/42")

    assert 0 == row["processing"] and 6 == row["files"] and 1 == row["version"]
    assert set(written) == set(site.objects())
    site.demand_laws(written)
    client = moto_server.client()
    for key in written:
        grants = client.get_object_acl(Bucket=site.bucket, Key=key)["Grants"]
        assert any(grant["Grantee"].get("URI", "").endswith("AllUsers") and grant["Permission"] == "READ" for grant in grants)
        assert "image/jpeg" == client.head_object(Bucket=site.bucket, Key=key)["ContentType"]
    rows = site.query("SELECT * FROM record_object ORDER BY style")
    assert sorted(files) == [row["style"] for row in rows]
