"""A stand-in for the W&B server on 127.0.0.1: it answers what the client asks, keeps what arrives, and can misbehave.

It shows how we use the real client; of the service it proves nothing.
"""

import contextlib
import gzip
import http.server
import itertools
import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Run:
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None


class WandbServer(http.server.ThreadingHTTPServer):
    """Set `fail_every`, `delay_s` or `down` while it runs."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lock = threading.Lock()
        self.runs: dict[str, Run] = {}
        self.files: dict[str, bytes] = {}
        self.views: dict[str, dict[str, Any]] = {}
        self.unknown: list[str] = []
        self.operations: Counter[str] = Counter()
        self.requests = itertools.count(1)
        self.failed = 0
        self.fail_every = 0
        self.delay_s = 0.0
        self.down = False
        self.closing = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(error := sys.exception(), ConnectionError):  # clients drop connections
            self.unknown.append(repr(error))


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def log_message(self, *args: Any) -> None:
        pass

    def handle_request(self) -> None:
        body = self.body()
        server = self.server
        if server.down:
            server.closing.wait()  # it took the request and never answers
            self.close_connection = True
            return
        time.sleep(server.delay_s)
        with server.lock:
            if server.fail_every and next(server.requests) % server.fail_every == 0:
                server.failed += 1
                return self.reply({"error": "made to fail"}, 500)
            path = self.path.split("?")[0]
            if path.startswith("/storage/"):
                if self.command == "PUT":
                    server.files[path] = body
                return self.reply(None, raw=server.files.get(path, b""))
            if path.endswith("/file_stream"):
                server.operations["file_stream"] += 1
                self.stream(server.runs[path.split("/")[-2]], json.loads(body))
                return self.reply({"exitcode": None, "limits": {}})
            if path == "/graphql":
                query = json.loads(body)
                return self.reply({"data": self.answer(query)})
            if self.command == "POST" and "/otel/" not in path:
                server.unknown.append(path)
            return self.reply({})

    do_GET = do_POST = do_PUT = handle_request

    def body(self) -> bytes:
        if "chunked" in self.headers.get("transfer-encoding", ""):
            data = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            data = self.rfile.read(int(self.headers.get("content-length") or 0))
        return gzip.decompress(data) if self.headers.get("content-encoding") == "gzip" else data

    def reply(self, answer: Any, code: int = 200, raw: bytes | None = None) -> None:
        data = json.dumps(answer).encode() if raw is None else raw
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def stream(self, run: Run, sent: dict[str, Any]) -> None:
        for name, chunk in (sent.get("files") or {}).items():
            lines = [json.loads(line) for line in chunk["content"]] if name.endswith(("jsonl", "json")) else []
            if name == "wandb-history.jsonl":
                run.history[chunk["offset"] :] = lines  # a retry sends the same offset again
            elif name == "wandb-summary.json":
                run.summary.update(lines[-1])
        if sent.get("complete"):
            run.exit_code = sent["exitcode"]

    def answer(self, query: dict[str, Any]) -> dict[str, Any]:
        (name,) = re.findall(r"^\s*(?:query|mutation)\s+(\w+)", query["query"])
        variables = query.get("variables") or {}
        given = {**variables, **(variables["input"] if isinstance(variables.get("input"), dict) else {})}
        self.server.operations[name] += 1
        method = getattr(self, f"on_{name}", None)
        if method is None:
            self.server.unknown.append(f"{name} {query['query']}")
            return {}
        return method(given)

    # What follows is named like the client's operations.

    def on_ServerFeaturesQuery(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def on_Viewer(self, given: dict[str, Any]) -> dict[str, Any]:
        names = dict.fromkeys(("entity", "username", "name"), "us")
        rest = {"id": "u", "email": "us@localhost", "admin": False, "flags": "{}", "teams": {"edges": []}}
        return {"viewer": {**names, **rest}}

    def on_OrganizationCoreWeaveOrganizationID(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}

    def on_RunStoppedStatus(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"run": {"stopped": False}}}

    def bucket(self, name: str, project: str) -> dict[str, Any]:
        run = self.server.runs[name]
        return {
            "id": f"storage-{name}",
            "name": name,
            "displayName": run.meta.get("displayName"),
            "description": None,
            "config": json.dumps({key: {"value": value} for key, value in run.config.items()}),
            "summaryMetrics": json.dumps(run.summary),
            "sweepName": None,
            "project": {"id": "p", "name": project, "entity": {"id": "e", "name": "us"}},
            "historyLineCount": len(run.history),
            "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "logLineCount": 0,
            "tags": run.meta.get("tags") or [],
            "notes": None,
            "wandbConfig": json.dumps({"t": 1}),
        }

    def on_RunResumeStatus(self, given: dict[str, Any]) -> dict[str, Any]:
        bucket = self.bucket(given["name"], given["project"]) if given["name"] in self.server.runs else None
        return {"model": {"id": "p", "name": given["project"], "entity": {"id": "e", "name": "us"}, "bucket": bucket}}

    def on_UpsertBucket(self, given: dict[str, Any]) -> dict[str, Any]:
        inserted = given["name"] not in self.server.runs
        run = self.server.runs.setdefault(given["name"], Run())
        if given.get("config"):
            run.config.update({key: value["value"] for key, value in json.loads(given["config"]).items()})
        kept = ("project", "displayName", "groupName", "jobType", "tags")
        run.meta.update({key: given[key] for key in kept if given.get(key) is not None})
        return {"upsertBucket": {"bucket": self.bucket(given["name"], given["project"]), "inserted": inserted}}

    def on_CreateRunFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        files = [
            {"name": name, "uploadUrl": f"{self.server.url}/storage/run/{given['run']}/{name}"}
            for name in given["files"]
        ]
        return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}

    def on_GetDefaultEntity(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "u", "entity": "us"}}

    def on_ProjectInternalId(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"id": "p", "internalId": "p"}}

    def on_GetProjects(self, given: dict[str, Any]) -> dict[str, Any]:
        project = {"__typename": "Project", "id": "p", "name": "ours", "entityName": given["entity"]}
        edges = [{"node": {**project, "createdAt": "2026-01-01T00:00:00", "isBenchmark": False, "user": None}}]
        return {
            "models": {"pageInfo": {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}, "edges": edges}
        }

    def view(self, given: dict[str, Any]) -> dict[str, Any]:
        number = given.get("id") or f"view{len(self.server.views)}"
        inserted = number not in self.server.views
        self.server.views[number] = given
        project = {"id": "p", "name": given["projectName"], "entityName": given["entityName"]}
        view = {key: given.get(key) for key in ("type", "name", "displayName", "description", "spec")}
        return {"upsertView": {"view": {**view, "id": number, "project": project}, "inserted": inserted}}

    on_UpsertView2 = on_upsertView = view

    def on_View(self, given: dict[str, Any]) -> dict[str, Any]:
        nodes = [
            {"node": {"id": key, "displayName": view["displayName"], "spec": view["spec"]}}
            for key, view in self.server.views.items()
            if view["name"] == given["viewName"]
        ]
        return {"project": {"allViews": {"edges": nodes}}}


@contextlib.contextmanager
def serving(port: int = 0) -> Iterator[WandbServer]:
    """A server in a thread of this process."""
    server = WandbServer(port)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def wandb_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A server that the client of this process is logged in to; the client and its service end with the test."""
    import wandb

    from peerscale.train import tracking

    for name in ("GRAPHQL", "FILE_STREAM", "FILE_TRANSFER"):
        monkeypatch.setenv(f"WANDB__{name}_RETRY_WAIT_MIN_SECONDS", "1")  # whole ones only
        monkeypatch.setenv(f"WANDB__{name}_RETRY_WAIT_MAX_SECONDS", "1")
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "client"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(tracking, "_server_failed", False)
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        wandb.teardown()
        try:
            yield server
        finally:
            server.down, server.delay_s, server.fail_every = False, 0.0, 0
            wandb.teardown()
