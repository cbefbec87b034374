"""A Hub without a network: the real client of huggingface_hub talks to it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

REPO = "someone/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
Answer = Callable[[Any], Any]


class FakeHub:
    """The Hub's answers as the real client sees them; `fetched` lists the files whose contents were sent."""

    def __init__(self, files: Mapping[str, bytes] | None = None) -> None:
        self.files = dict(files or {})
        self.fetched: list[str] = []
        self.override: Answer | None = None
        self.refuse_files: Answer | None = None

    def __call__(self, request: Any) -> Any:
        import httpx2

        if self.override is not None:
            return self.override(request)
        path = request.url.path
        if path.startswith("/api/models/"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.files.items()]
            return httpx2.Response(200, json={"id": REPO, "sha": COMMIT, "siblings": siblings})
        if self.refuse_files is not None:
            return self.refuse_files(request)
        name = path.partition(f"/resolve/{COMMIT}/")[2]
        data = self.files[name]
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        headers = {"X-Repo-Commit": COMMIT, "ETag": etag, "Content-Length": str(len(data))}
        if request.method == "GET":
            self.fetched.append(name)
        return httpx2.Response(200, headers=headers, content=data if request.method == "GET" else b"")
