"""Uploads against a hub that speaks the endpoints an upload needs, on this machine."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

import sdxl_train
from sdxl_train import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.end_to_end.conftest import MakeOptions, TrainLora

TOKEN = "hf_thisIsASecretToken"
REPO = "someone/photos"


class Hub(ThreadingHTTPServer):
    """Takes repositories and commits; refuses everything where ``broken``."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.broken = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.server.broken:
            self._answer(403, {"error": "not allowed"})
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self._answer(200, {"url": f"{self.server.url}/{REPO}"})
        elif self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            self._answer(
                200,
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for f in files
                    ]
                },
            )
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files[line["value"]["path"]] = content
            self._answer(
                200,
                {
                    "success": True,
                    "commitOid": "0" * 40,
                    "commitUrl": f"{self.server.url}/{REPO}/commit/{0:040}",
                },
            )

    def do_GET(self) -> None:
        self._answer(200, {"id": REPO, "sha": "0" * 40, "siblings": []})

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _answer(self, code: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("async_upload", [False, True])
def test_networks_and_states_arrive_and_the_token_is_nowhere(
    async_upload: bool, hub: Hub, train_lora: TrainLora
) -> None:
    trained = train_lora(
        huggingface_repo_id=REPO,
        huggingface_token=TOKEN,
        huggingface_path_in_repo="runs/one",
        save_state_to_huggingface=True,
        async_upload=async_upload,
        max_train_steps=2,
        save_every_n_steps=1,
        save_state=True,
    )

    for path in trained.result.files:
        assert hub.files[f"runs/one/{path.name}"] == path.read_bytes()
    state = {path.name for path in (trained.folder / "photo-state").iterdir()}
    assert state == {
        name.removeprefix("runs/one/photo-state/")
        for name in hub.files
        if name.startswith("runs/one/photo-state/")
    }
    (made,) = hub.created
    assert (made["organization"], made["name"]) == ("someone", "photos")
    assert made["visibility"] == "private"
    assert hub.tokens == {f"Bearer {TOKEN}"}
    for path in trained.folder.rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes()
    assert trained.result.observer_failures == {}


def test_a_hub_that_refuses_is_a_warning_and_the_run_goes_on(
    hub: Hub, train_lora: TrainLora, caplog: pytest.LogCaptureFixture
) -> None:
    hub.broken = True

    trained = train_lora(
        huggingface_repo_id=REPO,
        huggingface_token=TOKEN,
        max_train_steps=2,
        save_every_n_steps=1,
    )

    told = [r.getMessage() for r in caplog.records if "was not uploaded" in r.getMessage()]
    assert len(told) == len(trained.result.files)
    assert all("403" in text and TOKEN not in text for text in told)
    assert trained.result.observer_failures == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"huggingface_token": TOKEN}, "does nothing without --huggingface_repo_id"),
        ({"huggingface_repo_id": "a/b/c"}, "is no name of a repository"),
    ],
)
def test_upload_to_nowhere_is_refused(
    options: MakeOptions, changes: dict[str, Any], message: str, hub: Hub
) -> None:
    with pytest.raises(UserError) as caught:
        sdxl_train.plan(options(**changes))

    (problem,) = caught.value.problems
    assert message in problem.message
    assert TOKEN not in str(caught.value)
    assert hub.tokens == set()
