"""A real HTTP server in a thread, whose answers a test decides, and the judge ``http`` on it."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from dpo_ray.config import Component
from dpo_ray.rollout.judges import JudgeContext, bind_judge, check_scores
from dpo_ray.types import CompletionGroup, Judgement

Reply = tuple[int, Any] | tuple[int, Any, Mapping[str, str]]
"""Status, body (JSON, or a text as it is), and headers."""


@dataclass(slots=True)
class RewardServer:
    """A server and what it was asked.

    Attributes:
        answer: called with the number of the request, from 0, and its JSON.
    """

    answer: Callable[[int, Any], Reply]
    url: str = ""
    paths: list[str] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    in_flight: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def receive(self, path: str, headers: Mapping[str, str], body: bytes) -> Reply:
        """Note a request and answer it."""
        with self.lock:
            number = len(self.bodies)
            self.paths.append(path)
            self.headers.append({name.lower(): value for name, value in headers.items()})
            self.bodies.append(body)
            self.times.append(time.monotonic())
            self.in_flight += 1
            self.most = max(self.most, self.in_flight)
        try:
            return self.answer(number, json.loads(body))
        finally:
            with self.lock:
                self.in_flight -= 1


@contextmanager
def serve(answer: Callable[[int, Any], Reply]) -> Iterator[RewardServer]:
    """Serve on a free port of this machine."""
    state = RewardServer(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status, payload, *more = state.receive(self.path, dict(self.headers.items()), body)
            content = payload.encode() if isinstance(payload, str) else json.dumps(payload).encode()
            try:
                self.send_response(status)
                for name, value in (dict(more[0]) if more else {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except (BrokenPipeError, ConnectionResetError):  # the client has given the answer up
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    server = Server(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def judge_groups(
    groups: Sequence[CompletionGroup], context: JudgeContext | None = None, *, calls: int = 1, **args: Any
) -> list[Judgement]:
    """Judge groups by ``calls`` calls, one after the other; ``format`` is vllm unless it is given."""

    async def main() -> list[Judgement]:
        judge: Any = bind_judge(Component(use="http", args={"format": "vllm", **args}), context)()
        size, judgements = len(groups) // calls, []
        try:
            for call in range(calls):
                part = groups[call * size : (call + 1) * size]
                judgements += check_scores(part, await judge(part))
        finally:
            await judge.close()
        return judgements

    return asyncio.run(main())


def classified(*numbers: float) -> Any:
    """An answer of vLLM's ``/classify``."""
    data = [{"index": i, "label": "LABEL_0", "probs": [n], "num_classes": 1} for i, n in enumerate(numbers)]
    return {"id": "classify-1", "object": "list", "created": 1, "model": "rm", "data": data, "usage": {}}


def length(number: int, body: Any) -> Reply:
    """The score is the length of the answer in characters."""
    return 200, classified(float(len(body["messages"][-1]["content"])))
