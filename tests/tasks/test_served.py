"""The client of served models: retries, bounds, kept answers, and errors that say what to do."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from scripted_server import Body, Rounds, Scripted, flaky, scripted, slow

from dpoctl.errors import UserError
from dpoctl.tasks.served import Client, Endpoint, KeptAnswers, Request

pytest.importorskip("openai")


def echo(body: Body) -> str:
    return f"echo {body['messages'][-1]['content']}"


def requests(count: int, **sampling: Any) -> list[Request]:
    return [Request([{"role": "user", "content": f"number {index}"}], sampling) for index in range(count)]


@pytest.fixture
def client(tmp_path: Path) -> Any:
    def make(server: Scripted, max_requests: int = 1000, **options: Any) -> Client:
        return Client(Endpoint(server.url, "tiny", **options), max_requests, tmp_path)

    return make


def test_answers_come_in_order_concurrently_and_are_asked_once(client: Any) -> None:
    with scripted(slow(echo, 0.05)) as server:
        first = client(server, concurrency=4)
        texts = [answer.text for answer in first.ask([*requests(9), *requests(3)])]
        assert texts == [f"echo number {index}" for index in [*range(9), *range(3)]]
        assert 1 < server.most <= 4
        # "echo number 3" is three words; the server counts seven tokens for each prompt.
        assert (first.usage.requests, first.usage.sent, first.usage.tokens, first.usage.completion_tokens) == (
            9,
            9,
            90,
            27,
        )
        again = client(server)
        assert [answer.text for answer in again.ask(requests(9))] == texts[:9]
        assert (again.usage.requests, again.usage.sent, again.usage.tokens) == (9, 0, 90)
        assert server.asked.total() == 9


def test_whatever_an_answer_depends_on_makes_another_request(client: Any) -> None:
    with scripted(echo) as server:
        message = [{"role": "user", "content": "hi"}]
        plain = Request(message, {"temperature": 0})
        others = [
            Request(message, {"temperature": 1}),
            Request(message, {"temperature": 0}, template="x"),
            Request(message, {"temperature": 0}, repeat=1),
            Request([{"role": "system", "content": "be brief"}, *message], {"temperature": 0}),
        ]
        client(server).ask([plain, *others])
        assert server.asked.total() == 5
        # They come in any order.
        assert {"model": "tiny", "messages": message, "temperature": 0} in [
            {key: body[key] for key in ("model", "messages", "temperature")} for body in server.bodies
        ]
        asker = client(server)
        asker.endpoint = Endpoint(server.url, "other")
        asker.ask([plain])
        assert server.asked.total() == 6


@pytest.mark.parametrize("failures", [(429, 429), (500, 503), (408,)])
def test_what_fails_for_a_while_is_asked_again(failures: tuple[int, ...], client: Any) -> None:
    with scripted(flaky(echo, *failures)) as server:
        assert [one.text for one in client(server).ask(requests(3))] == [f"echo number {index}" for index in range(3)]
        assert server.asked.total() == 3 * (len(failures) + 1)
        assert server.answered.total() == 3


def test_a_slow_answer_is_asked_for_again(client: Any) -> None:
    with scripted(slow(echo, 0.6)) as server:
        assert client(server, timeout=0.3).ask(requests(1))[0].text == "echo number 0"


@pytest.mark.parametrize(
    ("reply", "kind", "words"),
    [
        (401, "SetupError", r"refuses the key: .*; set MY_KEY$"),
        (404, "UsageError", r"tiny at http.*: not found: .*ends in /v1$"),
        (429, "RunError", r"the rate limit holds after 2 tries: .*the answers so far are kept$"),
        (500, "RunError", r"it failed 2 times: .*the answers so far are kept$"),
        (400, "RunError", r"no usable answer to any of 2 requests: refused: .*scripted failure 400"),
        (b"<html>", "RunError", r"no usable answer to any of 2 requests: malformed"),
        (b"{}", "RunError", r"no usable answer to any of 2 requests: malformed"),
    ],
)
def test_an_endpoint_that_cannot_be_used_ends_in_one_line(reply: Any, kind: str, words: str, client: Any) -> None:
    with scripted(lambda body: reply) as server, pytest.raises(UserError, match=words) as failure:
        client(server, retries=1, api_key_env="MY_KEY").ask(requests(2))
    assert type(failure.value).__name__ == kind
    assert "\n" not in str(failure.value)


def test_a_server_that_is_not_there_is_named(client: Any) -> None:
    with scripted(echo) as server:
        pass
    with pytest.raises(UserError, match=r"^http.*/v1 cannot be reached: .*; start it, then"):
        client(server, retries=0).ask(requests(1))


def test_a_single_answer_that_is_of_no_use_has_its_reason_and_is_not_kept(client: Any) -> None:
    replies = {"number 0": 400, "number 1": b"{}", "number 2": b"no json"}
    with scripted(lambda body: replies.get(body["messages"][-1]["content"], "fine")) as server:
        answers = client(server).ask(requests(4))
        assert [one.text for one in answers] == ["", "", "", "fine"]
        assert [str(one.problem).partition(":")[0] for one in answers] == ["refused", "malformed", "malformed", "None"]
        client(server).ask(requests(4)[3:])
        assert server.asked["number 3"] == 1


def test_more_requests_than_are_allowed_are_refused_before_the_first(client: Any) -> None:
    with scripted(echo) as server:
        client(server).ask(requests(2))
        with pytest.raises(UserError, match="5 requests are needed, and 2 answers are kept, but 4 are allowed"):
            client(server, max_requests=4).ask(requests(7))
        assert server.asked.total() == 2
        client(server, max_requests=5).ask(requests(7))


def test_the_key_comes_from_the_environment_and_is_written_nowhere(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-proj-abcdefghij0123456789")
    with scripted(lambda body: "fine") as server:
        client(server, api_key_env="MY_KEY").ask(requests(1))
        assert server.headers[0]["authorization"] == "Bearer sk-proj-abcdefghij0123456789"
        client(server, api_key_env="ABSENT").ask(requests(2))
        assert server.headers[1]["authorization"] == "Bearer none"
    assert all(b"abcdefghij" not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_torn_and_damaged_lines_are_left_out_and_harm_no_other(tmp_path: Path, client: Any) -> None:
    with scripted(echo) as server:
        client(server).ask(requests(3))
        (file,) = tmp_path.glob("*.jsonl")
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(lines[0].replace(b"echo", b"ECHO") + lines[1] + lines[2][:-9])
        texts = [answer.text for answer in client(server).ask(requests(3))]
        assert texts == [f"echo number {index}" for index in range(3)]
        assert server.asked.total() == 5
        with KeptAnswers.open(tmp_path, Endpoint(server.url, "tiny")) as kept:
            assert len(kept.answers) == 3


def test_a_client_that_is_killed_twice_pays_for_no_answer_twice(client: Any, tmp_path: Path) -> None:
    """In each round the server answers four requests, and lets the others wait until the client is dead."""
    rounds = Rounds(echo, answers=4)
    with scripted(rounds) as server:
        for number in (1, 2):
            pid = os.fork()
            if not pid:
                client(server, concurrency=2).ask(requests(12))
                os._exit(1)
            while sum(file.read_bytes().count(b"\n") for file in tmp_path.glob("*.jsonl")) < 4 * number:
                time.sleep(0.01)
            os.kill(pid, signal.SIGKILL)
            assert os.waitpid(pid, 0)[1] == signal.SIGKILL
            rounds.next(4)
        texts = [answer.text for answer in client(server, concurrency=2).ask(requests(12))]
        assert server.answered == dict.fromkeys((f"number {index}" for index in range(12)), 1)
    assert texts == [f"echo number {index}" for index in range(12)]
