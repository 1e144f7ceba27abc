"""The Hub's endpoints for one repository, org/name, as huggingface_hub asks them: what is in it, and its files, whose
bytes come from another address, as they do there."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SHA = "0123456789012345678901234567890123456789"


class HubServer:
    """folder: the files; url: what HF_ENDPOINT is to say; storage: where their bytes come from, by default itself
    under another name; asked: paths of requests for a file's address; gated: none is given out."""

    def __init__(self, folder: Path, gated: bool = False):
        self.folder, self.gated = folder, gated
        self.asked: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://localhost:{self.server.server_port}"
        self.storage = self.own = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def do_GET(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        if path.startswith("/api/models/org/name"):
            revision = path.partition("/revision/")[2]
            if revision not in ("", "v1", SHA):
                return self._send(404, {"X-Error-Code": "RevisionNotFound"})
            files = sorted(p for p in hub.folder.rglob("*") if p.is_file())
            siblings = [{"rfilename": str(p.relative_to(hub.folder)), "size": p.stat().st_size} for p in files]
            data = json.dumps({"id": "org/name", "sha": SHA, "siblings": siblings}).encode()
            return self._send(200, {"Content-Type": "application/json"}, data)
        if path.startswith(f"/org/name/resolve/{SHA}/"):
            hub.asked.append(path)
            if hub.gated:
                return self._send(403, {"X-Error-Code": "GatedRepo"})
            return self._send(302, {"Location": f"{hub.storage}/storage/{path.partition(SHA)[2][1:]}"})
        file = hub.folder / path.removeprefix("/storage/")
        if not path.startswith("/storage/") or not file.is_file():
            return self._send(404, {"X-Error-Code": "RepoNotFound"})
        if self.headers.get("Authorization"):
            return self._send(400, {})  # what signed addresses answer to a token that is not theirs
        data = file.read_bytes()
        first, _, last = self.headers.get("Range", f"bytes=0-{len(data) - 1}").removeprefix("bytes=").partition("-")
        piece = data[int(first) : int(last) + 1]
        place = f"bytes {first}-{int(first) + len(piece) - 1}/{len(data)}"
        self._send(206 if "Range" in self.headers else 200, {"Content-Range": place}, piece)

    def _send(self, status: int, headers: dict[str, str], data: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass
