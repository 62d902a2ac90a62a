"""A server with the API of OpenAI, whose answers a test scripts."""

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]
Reply = str | int | bytes
"""What is said: a text, an error's status, or the raw body of an answer."""
ANSWERS = re.compile(r"\[Answer A\]\n(.*)\n\[End of answer A\].*\[Answer B\]\n(.*)\n\[End of answer B\]", re.DOTALL)


@dataclass
class Scripted:
    """A running server.

    Attributes:
        url: the base of its API.
        script: what it says to a request.
        asked: the number of requests that came, by their last message.
        answered: the number of those that were answered with a text.
        bodies: of all requests, in the order of their coming.
        most: the most requests that were open at once.
    """

    url: str
    script: Callable[[Body], Reply]
    asked: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    bodies: list[Body] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most: int = 0
    _open: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def enter(self, body: Body, headers: dict[str, str]) -> None:
        with self._lock:
            self._open += 1
            self.most = max(self.most, self._open)
            self.asked[body["messages"][-1]["content"]] += 1
            self.bodies.append(body)
            self.headers.append(headers)

    def leave(self, body: Body, reply: Reply) -> None:
        with self._lock:
            self._open -= 1
            if isinstance(reply, str):
                self.answered[body["messages"][-1]["content"]] += 1


@contextmanager
def scripted(script: Callable[[Body], Reply]) -> Iterator[Scripted]:
    """Start a server on a free port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    state = Scripted(f"http://127.0.0.1:{server.server_port}/v1", script)
    _Handler.servers[server.server_port] = state
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


def two_answers(body: Body) -> tuple[str, str]:
    """The answers that a pairwise judge is shown."""
    found = ANSWERS.search(body["messages"][-1]["content"])
    assert found
    return found[1], found[2]


def order_biased(body: Body) -> str:
    """A judge that prefers the first answer."""
    return "The first one. [[A]]"


def length_biased(body: Body) -> str:
    """A judge that prefers the longer answer."""
    first, second = map(len, two_answers(body))
    return f"[[{'C' if first == second else 'A' if first > second else 'B'}]]"


def flaky(script: Callable[[Body], Reply], *failures: int) -> Callable[[Body], Reply]:
    """Answer each request with these statuses first."""
    seen: Counter[str] = Counter()
    lock = threading.Lock()

    def reply(body: Body) -> Reply:
        with lock:
            text = body["messages"][-1]["content"]
            seen[text] += 1
            number = seen[text]
        return failures[number - 1] if number <= len(failures) else script(body)

    return reply


def steady(script: Callable[[Body], Reply], seconds: float) -> Callable[[Body], Reply]:
    """Take some seconds for each answer."""

    def reply(body: Body) -> Reply:
        time.sleep(seconds)
        return script(body)

    return reply


def slow(script: Callable[[Body], Reply], seconds: float) -> Callable[[Body], Reply]:
    """Answer the first time after some seconds, then at once."""
    seen: Counter[str] = Counter()

    def reply(body: Body) -> Reply:
        text = body["messages"][-1]["content"]
        seen[text] += 1
        if seen[text] == 1:
            time.sleep(seconds)
        return script(body)

    return reply


class Rounds:
    """Answers so many requests, and lets the others wait until the next round, in which they are refused.

    With the rounds a test can kill a client while it waits: what waited is not answered afterwards.
    """

    def __init__(self, script: Callable[[Body], Reply], answers: int) -> None:
        self._script, self._slots, self._round = script, threading.Semaphore(answers), 0

    def __call__(self, body: Body) -> Reply:
        """Reply to a request."""
        own = self._round
        while not self._slots.acquire(timeout=0.01):
            if self._round != own:
                return 500
        if self._round != own:
            self._slots.release()
            return 500
        return self._script(body)

    def next(self, answers: int) -> None:
        """Start a round with so many more answers."""
        self._round += 1
        for _ in range(answers):
            self._slots.release()


class _Handler(BaseHTTPRequestHandler):
    servers: dict[int, Scripted] = {}  # noqa: RUF012 - by port, for all handlers
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        state = self.servers[self.server.server_address[1]]
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        state.enter(body, {name.lower(): value for name, value in self.headers.items()})
        reply: Reply = 404
        try:
            if self.path == "/v1/chat/completions":
                reply = state.script(body)
        finally:
            state.leave(body, reply)
        status = reply if isinstance(reply, int) else 200
        content = reply if isinstance(reply, bytes) else json.dumps(_content(body, reply)).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(content)
        except OSError:
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


def _content(body: Body, reply: Reply) -> Body:
    if isinstance(reply, int):
        return {"error": {"message": f"scripted failure {reply}"}}
    message = {"role": "assistant", "content": reply}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": body["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 7, "completion_tokens": len(str(reply).split()), "total_tokens": 0},
    }
