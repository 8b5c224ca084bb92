"""A server of ``/v1/chat/completions``, in a thread, whose answers are a function of the request."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = str | int | Mapping[str, Any]
"""Text of the reply; or a status code; or the whole body."""


@dataclass
class ChatServer:
    """Requests that a server received and answered."""

    answer: Callable[[Mapping[str, Any]], Answer]
    """Gets the body of the request."""
    url: str = ""
    received: list[Mapping[str, Any]] = field(default_factory=list)
    answered: list[Mapping[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    """Values of the Authorization header."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def prompts(self) -> list[str]:
        """Text of each request that was answered."""
        return [request["messages"][0]["content"] for request in self.answered]


@contextmanager
def serving(answer: Callable[[Mapping[str, Any]], Answer]) -> Iterator[ChatServer]:
    """A server that runs until the end of the block."""
    state = ChatServer(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.received.append(request)
                state.keys.add(self.headers["Authorization"])
            reply = state.answer(request) if self.path == "/v1/chat/completions" else 404
            status = reply if isinstance(reply, int) else 200
            body = json.dumps(_body(reply)).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                self.wfile.flush()
            except OSError:  # the client is gone
                return
            if status == 200:
                with state.lock:
                    state.answered.append(request)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        state.url = f"http://127.0.0.1:{server.server_port}/v1"
        yield state
        server.shutdown()


def _body(reply: Answer) -> Mapping[str, Any]:
    if isinstance(reply, int):
        return {"error": {"message": f"status {reply} on purpose"}}
    if not isinstance(reply, str):
        return reply
    return {
        "id": "1",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": "judge",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply}}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }
