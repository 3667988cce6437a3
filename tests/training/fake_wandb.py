"""A W&B server for one test: it takes runs, keeps the rows that it is sent, and may go away at any time."""

from __future__ import annotations

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

_RUN = {"id": "b", "name": "n", "displayName": "n", "config": "{}", "historyLineCount": 0, "sweepName": None}
_RUN |= {"project": {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}}
_ANSWERS: dict[str, Any] = {
    "upsertBucket": {"upsertBucket": {"bucket": _RUN, "inserted": True}},
    "RunResumeStatus": {
        "model": {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}, "bucket": None}
    },
    "createRunFiles": {"createRunFiles": {"runID": "n", "uploadHeaders": [], "files": []}},
}


class FakeWandb:
    """`history` holds the rows received; use it as a context."""

    def __init__(self) -> None:
        self.history: list[dict[str, Any]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                packed = self.headers.get("Content-Encoding") == "gzip"
                answer = server.answer(self.path, json.loads(gzip.decompress(body) if packed else body))
                content = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def answer(self, path: str, request: dict[str, Any]) -> dict[str, Any]:
        if path.endswith("/file_stream"):
            rows = request.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.history += map(json.loads, rows)
            return {"exitcode": None, "limits": {}}
        asked = request.get("query", "")
        return {"data": next((answer for name, answer in _ANSWERS.items() if name in asked), {})}

    def go_away(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> FakeWandb:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.go_away()
