"""The threads of a daemon: who works, and who sleeps."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from spoold import config, daemon
from tests.parts import NOWHERE
from tests.system.harness import until


@pytest.fixture
def settings(tmp_path: Path) -> config.Settings:
    root = tmp_path / "spool"
    root.mkdir()
    text = {
        "state_dir": str(tmp_path / "state"), "s3": {"endpoint_url": NOWHERE, "region": "us-east-1"},
        "spools": [{"name": "uploads", "root": str(root), "bucket": "bucket"}],
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(text))
    return config.load(str(tmp_path / "config.yaml"))


def test_of_all_idle_workers_one_asks_the_ledger(settings: config.Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """When all did, an idle daemon spent most of its time on that."""
    monkeypatch.setattr(daemon, "_IDLE_S", 0.01)
    asked: list[str] = []
    running = daemon.Daemon(settings)
    claim = running._ledger.claim

    def noted(*arguments: Any, **more: Any) -> Any:
        asked.append(threading.current_thread().name)
        return claim(*arguments, **more)

    monkeypatch.setattr(running._ledger, "claim", noted)
    main = threading.Thread(target=running.run)

    main.start()
    try:
        until(lambda: len(asked) > 100, "they have asked often")
    finally:
        running.stop()
        main.join()

    assert daemon._MOST_WORKERS == len(set(asked)), "all have asked at the start"
    assert 1 == len(set(asked[-50:]))
