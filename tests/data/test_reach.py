"""Hubs that cannot be reached, on this machine: one refuses, one never answers, one says no."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from aiether.data import DataConfig, _reach, prepare
from aiether.data._reach import no_answer

REFUSING = "http://127.0.0.1:9"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """With an empty cache and little patience."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(_reach, "TIMEOUT_S", 0.5)
    return monkeypatch


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"dataset_path": "hub:some/name"}, "dataset_path 'hub:some/name:train' cannot be read from the Hub"),
        ({"tokenizer": "some/name"}, "tokenizer 'some/name' does not exist here, and as a name on the Hub"),
    ],
)
@pytest.mark.parametrize("kind", ["refusing", "silent"])
def test_a_name_is_refused_within_seconds(
    hub: pytest.MonkeyPatch, silent: str, tmp_path: Path, settings: dict[str, Any], named: str, kind: str
) -> None:
    hub.setattr("huggingface_hub.constants.ENDPOINT", REFUSING if kind == "refusing" else silent)
    text = tmp_path / "text.txt"
    text.write_text("some text")
    started = time.monotonic()
    with pytest.raises(ValueError, match=named) as caught:
        prepare(replace(DataConfig(dataset_path=str(text), cache_dir=str(tmp_path / "cache")), **settings))
    assert time.monotonic() - started < 10
    assert ("refused" if kind == "refusing" else "timed out") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hub_that_says_no_has_answered(hub: pytest.MonkeyPatch) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        assert no_answer("some/name", "dataset") is None
        server.shutdown()
