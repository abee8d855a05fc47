"""A user without a browser: the requests that the page makes."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

import httpx
from serving import Server


class Client:
    """One open page. Close it at the end."""

    def __init__(self, server: Server) -> None:
        self.http = httpx.Client(base_url=server.base, timeout=60)
        welcome = self.http.get(f"/?token={server.token}")
        assert welcome.status_code == 200, welcome.text
        self._session = secrets.token_hex(5)
        self._config = self.http.get("/config").json()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def get(self, path: str) -> httpx.Response:
        return self.http.get(path)

    def upload(self, path: Path, name: str | None = None) -> dict[str, Any]:
        """The upload, as the page then names it."""
        with path.open("rb") as file:
            answer = self.http.post("/gradio_api/upload", files={"files": (name or path.name, file)})
        assert answer.status_code == 200, answer.text
        meta = {"_type": "gradio.FileData"}
        return {"path": answer.json()[0], "orig_name": name or path.name, "size": path.stat().st_size, "meta": meta}

    def ask(
        self, path: Path, caption: str = "a wall", question: str = "Is there an anomaly?", name: str | None = None
    ) -> str:
        """What the page shows as the result of an image."""
        return str(self.answered([self.upload(path, name), caption, question, 0.5], "answer")[0])

    def join(self, data: list[Any], name: str = "answer", door: str = "queue/join") -> httpx.Response:
        """Put a question into the queue."""
        index = next(each["id"] for each in self._config["dependencies"] if each["api_name"] == name)
        body = {"data": data, "fn_index": index, "session_hash": self._session, "trigger_id": None, "event_data": None}
        return self.http.post(f"/gradio_api/{door}", json=body)

    def answered(self, data: list[Any], name: str) -> list[Any]:
        """What the page shows when a question has been through the queue."""
        joined = self.join(data, name)
        assert joined.status_code == 200, joined.text
        return self._result(joined.json()["event_id"])

    def quick(self, data: list[Any], name: str) -> list[Any]:
        """The same of what goes past the queue."""
        answer = self.join(data, name, "run/predict")
        assert answer.status_code == 200, answer.text
        return list(answer.json()["data"])

    def _result(self, event: str) -> list[Any]:
        with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": self._session}) as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
                if message.get("msg") == "process_completed" and message.get("event_id") == event:
                    assert message["success"], message
                    return list(message["output"]["data"])
        raise AssertionError("the stream ended without a result")
