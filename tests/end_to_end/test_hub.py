"""Uploads and downloads with a hub that speaks the endpoints they need, on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pytest

import sdxl_train
from sdxl_train import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.end_to_end.conftest import CheckRun, MakeOptions, SameTensors, Trained, TrainLora

TOKEN = "hf_thisIsASecretToken"
REPO = "someone/photos"
BRANCH = "second-try"
COMMIT = "0" * 40


class Hub(ThreadingHTTPServer):
    """Takes repositories and commits, and gives files; refuses everything where ``broken``."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.given: list[str] = []
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
                    "commitOid": COMMIT,
                    "commitUrl": f"{self.server.url}/{REPO}/commit/{COMMIT}",
                },
            )

    def do_GET(self) -> None:
        files = self.server.files
        if REPO in self.path:
            self.server.tokens.add(self.headers.get("Authorization"))
        path, _, name = unquote(self.path).partition(f"/resolve/{COMMIT}/")
        if self.server.broken:
            self._answer(403, {"error": "not allowed"})
        elif name:
            if self.command == "GET":
                self.server.given.append(name)
            etag = hashlib.sha256(files[name]).hexdigest()
            self._send(200, files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        elif REPO not in path:
            self._answer(401, {"error": "Repository not found"}, "RepoNotFound")
        elif "/tree/" in path:
            self._answer(
                200,
                [
                    {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                    for name, data in files.items()
                ],
            )
        elif "/revision/" in path and not path.endswith(("/revision/main", f"/revision/{BRANCH}")):
            self._answer(404, {"error": "Invalid rev id"}, "RevisionNotFound")
        else:
            siblings = [{"rfilename": name} for name in files]
            self._answer(200, {"id": REPO, "sha": COMMIT, "siblings": siblings})

    do_HEAD = do_GET  # noqa: N815 - the base class names it

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _answer(self, code: int, content: object, error: str | None = None) -> None:
        headers = {"Content-Type": "application/json"}
        if error is not None:
            headers["X-Error-Code"] = error
        self._send(code, json.dumps(content).encode(), headers)

    def _send(self, code: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    files = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
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


@pytest.fixture(scope="session")
def half(train_lora: TrainLora) -> Trained:
    """A run of four steps that saved its state in the middle."""
    return train_lora(max_train_steps=4, save_every_n_steps=2, save_state=True)


@pytest.fixture
def stocked(hub: Hub, half: Trained) -> Hub:
    """The hub, with that state in the folder ``runs/[one]``; brackets are none of a pattern."""
    for path in (half.folder / "photo-step00000002-state").iterdir():
        hub.files[f"runs/[one]/{path.name}"] = path.read_bytes()
    hub.files["runs/README.md"] = b"not of the state"
    return hub


@pytest.mark.parametrize("address", ["runs/[one]", f"runs/[one]/:{BRANCH}:dataset"])
def test_a_run_that_resumes_from_the_hub_ends_as_one_that_never_stopped(
    address: str, stocked: Hub, half: Trained, train_lora: TrainLora, same_tensors: SameTensors
) -> None:
    resumed = train_lora(
        resume=f"{REPO}/{address}",
        resume_from_huggingface=True,
        huggingface_token=TOKEN,
        max_train_steps=4,
    )

    assert [step["step"] for step in resumed.steps] == [3, 4]
    assert same_tensors(resumed.tensors, half.tensors)
    assert stocked.tokens == {f"Bearer {TOKEN}"}
    assert "runs/README.md" not in stocked.given
    for path in resumed.folder.rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes()


def test_a_plan_downloads_no_more_than_the_manifest_and_later_nothing_is_downloaded_twice(
    stocked: Hub, options: MakeOptions, check_run: CheckRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {"resume": f"{REPO}/runs/[one]", "resume_from_huggingface": True}

    sdxl_train.plan(options(**chosen))
    planned = list(stocked.given)
    online, _ = check_run(**chosen)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    offline, _ = check_run(**chosen)

    assert planned == ["runs/[one]/state.json"]
    assert sorted(stocked.given) == [
        f"runs/[one]/{name}"
        for name in (
            "details.json",
            "optimizer.safetensors",
            "parameters.safetensors",
            "state.json",
        )
    ]
    assert online == offline == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resume": "latest"}, "'latest' is no address of a state on the hub"),
        ({"resume": f"{REPO}/a:b:c:d"}, "is no address of a state on the hub"),
        ({"resume": f"{REPO}/../x"}, "is no address of a state on the hub"),
        ({"resume": f"{REPO}/x::planet"}, "is no address of a state on the hub"),
        ({"resume": f"{REPO}/runs"}, "has no runs/state.json\n    -> states there: runs/[one]"),
        ({"resume": f"{REPO}/runs/[one]:third"}, "the repository has no such revision"),
        ({"resume": "someone/else/x"}, "the hub has no such repository, or it is private"),
        ({"resume": f"{REPO}/runs/[one]", "network_dim": 8}, "is 8 now, 4 in"),
        ({"resume": None}, "--resume_from_huggingface: does nothing without --resume"),
    ],
)
def test_a_state_that_the_hub_does_not_have_or_that_does_not_fit_is_refused(
    stocked: Hub, check_run: CheckRun, changes: dict[str, Any], message: str
) -> None:
    problems, _ = check_run(resume_from_huggingface=True, **changes)

    assert len(problems) == 1
    assert message in problems[0].replace("option ", "--")


def test_a_state_that_cannot_be_had_is_refused(
    stocked: Hub, check_run: CheckRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {"resume": f"{REPO}/runs/[one]", "resume_from_huggingface": True}

    stocked.broken = True
    refused, _ = check_run(**chosen)
    stocked.broken = False
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    offline, _ = check_run(**chosen)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in [name for name in stocked.files if name.endswith("details.json")]:
        stocked.files[name] = stocked.files[name][:1]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    unreachable, _ = check_run(**chosen)

    assert "403" in refused[0]
    assert "HF_HUB_OFFLINE forbids downloads" in offline[0]
    assert len(refused) == len(offline) == len(unreachable) == 1


def test_a_state_of_the_hub_is_verified_as_one_that_lies_here(
    stocked: Hub, train_lora: TrainLora
) -> None:
    stocked.files["runs/[one]/parameters.safetensors"] = b"torn"

    with pytest.raises(UserError, match=r"parameters\.safetensors: is corrupt"):
        train_lora(resume=f"{REPO}/runs/[one]", resume_from_huggingface=True)
