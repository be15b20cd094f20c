"""Uploading to the hub: to a small server of our own, which answers as the hub does."""

import base64
import http.server
import json
import threading

import pytest

from diffusion_t5x.convert import convert
from diffusion_t5x.errors import UserError

FILES = {"config.json": b'{"model_type": "sdar"}', "model.safetensors": b"weights", "README.md": b"# A model\n"}


class Hub(http.server.BaseHTTPRequestHandler):
    """Takes repositories and commits whose files come along with them, of whoever has the right token."""

    def do_POST(self):
        said = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self._answer({"error": "Invalid credentials"}, 401)
        if self.path == "/api/repos/create":
            self.server.made.append(json.loads(said))
            return self._answer({"url": f"{self.server.url}/org/name", "id": "org/name"})
        if self.path == "/api/validate-yaml":
            return self._answer({"warnings": [], "errors": []})
        if self.path == "/api/models/org/name/preupload/main":
            paths = [file["path"] for file in json.loads(said)["files"]]
            files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            return self._answer({"files": files})
        if self.path.startswith("/api/models/org/name/commit/main"):
            for line in map(json.loads, said.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.url}/org/name/commit/{'a' * 40}"
            return self._answer({"success": True, "commitOid": "a" * 40, "commitUrl": url})
        return self._answer({"error": f"no {self.path}"}, 404)

    def do_GET(self):
        self._answer({"id": "org/name", "sha": "b" * 40, "siblings": []})

    def _answer(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Says nothing."""


@pytest.fixture
def hub(monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.made, server.files = f"http://127.0.0.1:{server.server_port}", [], {}
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    return str(tmp_path)


@pytest.mark.parametrize("flags", [[], ["--public"]])
def test_all_files_arrive_in_a_repository_that_is_private_unless_told(flags, hub, folder, capsys):
    convert(["push", folder, "org/name", *flags])
    assert hub.files == FILES
    (made,) = hub.made
    assert (made["name"], made["organization"]) == ("name", "org")
    assert made.get("private", made.get("visibility") == "private") is (not flags)
    assert f"Wrote {hub.url}/org/name/commit/" in capsys.readouterr().out


def test_mistakes(hub, folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"has no config\.json with safetensors"):
        convert(["push", str(tmp_path / "empty"), "org/name"])
    with pytest.raises(UserError, match="is not a model name"):
        convert(["push", folder, "name"])
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match=r"could not be uploaded as org/name: .*HF_TOKEN"):
        convert(["push", folder, "org/name"])
    assert not hub.files
