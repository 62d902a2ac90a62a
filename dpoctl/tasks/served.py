"""Models behind an OpenAI-compatible endpoint: requests go out concurrently, and every answer is kept on disk.

An answer is written the moment it arrives, in one append to a file of the cache folder: a killed command asks again
only what was under way. The key of an answer holds all that it depends on.
"""

import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Self

from dpoctl import console
from dpoctl.data.cache import Cache, cache_dir, checksum_of, writing_to
from dpoctl.errors import RunError, SetupError, UsageError, UserError
from dpoctl.redact import redact_text

if TYPE_CHECKING:
    from openai import OpenAI

API_KEY = "OPENAI_API_KEY"
FOLDER = "answers"
AGAIN = "then run the same command again: the answers so far are kept"
RETRIES = 5
_CUT = 200


@dataclass(frozen=True)
class Endpoint:
    """A model that a server has.

    Attributes:
        url: the base of the API, such as `http://localhost:8000/v1`.
        model: the name of the model there.
        api_key_env: the environment variable with the key; a server of one's own needs none.
        concurrency: the most requests under way.
        timeout: the seconds to wait for an answer.
        retries: the number of further tries after a time-out, a rate limit (429) or an error of the server (5xx).
    """

    url: str
    model: str
    api_key_env: str = API_KEY
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = RETRIES

    @property
    def name(self) -> str:
        """The model and its address, for messages."""
        return f"{self.model} at {self.url}"


@dataclass(frozen=True)
class Request:
    """A conversation or a text to continue.

    Attributes:
        messages: mappings with `role` and `content`, for `chat/completions`; or a plain text, for `completions`.
        sampling: further fields of the request's body, such as `max_tokens` and `temperature`.
        template: a hash of the template that the messages were made with; empty if there is none.
        repeat: the number of the draw: each is a request of its own.
    """

    messages: Sequence[Mapping[str, Any]] | str
    sampling: Mapping[str, Any]
    template: str = ""
    repeat: int = 0

    def key(self, endpoint: Endpoint) -> str:
        """Hash all that an answer depends on."""
        shown = self.messages if isinstance(self.messages, str) else list(map(dict, self.messages))
        parts = [_base(endpoint.url), endpoint.model, shown, dict(self.sampling)]
        text = json.dumps([*parts, self.template, self.repeat], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Reply:
    """An answer of a served model.

    Attributes:
        text: its text; empty if there is none.
        finished: True if the model ended its turn, false if a limit cut it off; None if the server does not say.
        prompt_tokens: the tokens read, as the server counts them; 0 if it does not.
        completion_tokens: the tokens written.
        problem: the reason why there is no text; None if there is one.
    """

    text: str
    finished: bool | None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    problem: str | None = None


@dataclass
class Usage:
    """The requests of a client, and their tokens; kept answers count too, so that a resumed command says the same.

    Attributes:
        requests: the number of different requests.
        tokens: the tokens read and written.
        completion_tokens: those written.
        sent: the number of requests that were sent now.
    """

    requests: int = 0
    tokens: int = 0
    completion_tokens: int = 0
    sent: int = 0


@dataclass
class Client:
    """Asks a served model, and keeps its answers.

    Attributes:
        endpoint: the model.
        max_requests: the most requests to send.
        folder: the folder of kept answers; None takes the one in the cache folder.
        usage: the requests so far.
    """

    endpoint: Endpoint
    max_requests: int = 1_000_000
    folder: Path | None = None
    usage: Usage = field(default_factory=Usage)

    def __post_init__(self) -> None:
        require_openai("a served model")

    def ask(self, requests: Sequence[Request], what: str = "asking") -> list[Reply]:
        """Return an answer to each request, in their order; equal requests are sent once.

        Args:
            requests: the requests.
            what: the work in words, for the progress.

        Raises:
            UsageError: there are more new requests than `max_requests`, or the server has no such model.
            SetupError: the server cannot be reached, or refuses the key.
            RunError: the server fails again and again, or refuses every request.
        """
        keys = [request.key(self.endpoint) for request in requests]
        folder = self.folder or Cache(cache_dir()).writable(FOLDER)
        with writing_to(folder), KeptAnswers.open(folder, self.endpoint) as kept:
            new = {key: request for key, request in zip(keys, requests, strict=True) if key not in kept.answers}
            self._check_bound(len(new), len(kept.answers.keys() & set(keys)))
            found = kept.answers | (self._send(new, kept, what) if new else {})
        self._count([found[key] for key in dict.fromkeys(keys)], len(new))
        return [found[key] for key in keys]

    def _check_bound(self, new: int, known: int) -> None:
        left = self.max_requests - self.usage.sent
        if new > left:
            kept = f", and {known:,} answers are kept" if known else ""
            raise UsageError(
                f"{self.endpoint.name}: {new:,} requests are needed{kept}, but {left:,} are allowed",
                hint="raise max_requests, or take fewer prompts",
            )

    def _count(self, answers: Sequence[Reply], sent: int) -> None:
        usage = self.usage
        usage.requests += len(answers)
        usage.tokens += sum(one.prompt_tokens + one.completion_tokens for one in answers)
        usage.completion_tokens += sum(one.completion_tokens for one in answers)
        usage.sent += sent

    def _send(self, new: Mapping[str, Request], kept: "KeptAnswers", what: str) -> dict[str, Reply]:
        """Send requests from several threads; the first error ends all of them."""
        waiting, arrived = SimpleQueue[tuple[str, Request]](), SimpleQueue[tuple[str, Reply] | BaseException]()
        for item in new.items():
            waiting.put(item)
        client = _client(self.endpoint)
        stop = threading.Event()

        def work() -> None:
            with suppress(Empty):
                while not stop.is_set():
                    key, request = waiting.get_nowait()
                    try:
                        answer = _ask(client, self.endpoint, request)
                        kept.write(key, answer)
                    except BaseException as error:  # raised again in the caller's thread
                        arrived.put(error)
                        return
                    arrived.put((key, answer))

        # Daemons: an interrupted command does not wait for the answers under way.
        workers = [threading.Thread(target=work, daemon=True) for _ in range(min(self.endpoint.concurrency, len(new)))]
        for worker in workers:
            worker.start()
        found: dict[str, Reply] = {}
        try:
            with console.WorkProgress(f"{what} {self.endpoint.model}", len(new), "requests") as progress:
                while len(found) < len(new):
                    outcome = arrived.get()
                    if isinstance(outcome, BaseException):
                        raise outcome
                    found[outcome[0]] = outcome[1]
                    progress.advance(1)
        except UserError:
            stop.set()
            for worker in workers:  # what is under way is paid for
                worker.join(self.endpoint.timeout)
            raise
        finally:
            stop.set()
            client.close()
        self._require_some(list(found.values()))
        return found

    def _require_some(self, answers: Sequence[Reply]) -> None:
        """Refuse an endpoint that answers nothing at all."""
        if all(one.problem is not None for one in answers):
            raise RunError(
                f"{self.endpoint.name}: it has no usable answer to any of {len(answers):,} requests: "
                f"{answers[0].problem}"
            )


@dataclass
class KeptAnswers:
    """The kept answers of an endpoint: a file with a JSON line for each, after its checksum.

    Attributes:
        answers: by key.
        descriptor: the open file; -1 once it is closed.
        lock: held while the file is written or closed.
    """

    answers: dict[str, Reply]
    descriptor: int
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, folder: Path, endpoint: Endpoint) -> Self:
        """Read the answers of an endpoint, and open the file to add more."""
        digest = hashlib.sha256(f"{_base(endpoint.url)}\n{endpoint.model}".encode()).hexdigest()[:16]
        path = folder / f"{digest}.jsonl"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            os.write(descriptor, b"\n")  # a killed process may leave half a line
        return cls(dict(filter(None, map(_read_line, content.splitlines()))), descriptor)

    def write(self, key: str, answer: Reply) -> None:
        """Keep an answer that has a text; one write, which nothing can divide."""
        if answer.problem is not None:
            return
        row = [key, answer.text, answer.finished, answer.prompt_tokens, answer.completion_tokens]
        line = json.dumps(row).encode()
        with self.lock:
            # The threads of an interrupted command may outlive the file.
            if self.descriptor >= 0:
                os.write(self.descriptor, checksum_of(line).hex().encode() + b" " + line + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self.lock:
            os.fsync(self.descriptor)
            os.close(self.descriptor)
            self.descriptor = -1


def require_openai(what: str) -> None:
    """Check that the client is installed.

    Raises:
        SetupError: it is not.
    """
    if find_spec("openai") is None:
        raise SetupError(f"{what} needs the package openai", hint="pip install 'dpoctl[served]'")


def _client(endpoint: Endpoint) -> "OpenAI":
    from openai import OpenAI  # noqa: PLC0415 - half a second, for served models only

    key = os.environ.get(endpoint.api_key_env) or "none"
    return OpenAI(base_url=_base(endpoint.url), api_key=key, timeout=endpoint.timeout, max_retries=endpoint.retries)


def _ask(client: "OpenAI", endpoint: Endpoint, request: Request) -> Reply:
    """Send a request, and again if it fails for a while.

    Raises:
        UserError: the endpoint cannot be used.
    """
    import openai  # noqa: PLC0415

    model, fields, shown = endpoint.model, dict(request.sampling), request.messages
    reply: Any
    try:
        if isinstance(shown, str):
            reply = client.completions.create(model=model, prompt=shown, extra_body=fields)
        else:
            messages: Any = [dict(message) for message in shown]
            reply = client.chat.completions.create(model=model, messages=messages, extra_body=fields)
    except (openai.BadRequestError, openai.UnprocessableEntityError, openai.ConflictError) as error:
        return Reply("", False, problem=f"refused: {_short(error)}")
    except openai.OpenAIError as error:
        raise _in_words(error, endpoint) from error
    except ValueError:  # the body is no JSON, although its header says so
        return Reply("", False, problem="malformed: its answer is no JSON")
    return _read(reply)


def _read(reply: Any) -> Reply:
    choices: Any = getattr(reply, "choices", None)
    choice = choices[0] if isinstance(choices, list) and choices else None
    text = getattr(getattr(choice, "message", None), "content", getattr(choice, "text", None))
    if not isinstance(text, str):
        return Reply("", False, problem="malformed: its answer has no text")
    counts = [getattr(getattr(reply, "usage", None), name, 0) for name in ("prompt_tokens", "completion_tokens")]
    read, written = (count if isinstance(count, int) else 0 for count in counts)
    reason = getattr(choice, "finish_reason", None)
    return Reply(text, None if reason is None else reason == "stop", read, written)


def _in_words(error: Exception, endpoint: Endpoint) -> UserError:
    """Return the line that says why an endpoint cannot be used."""
    import openai  # noqa: PLC0415

    if isinstance(error, openai.APITimeoutError):
        message = f"{endpoint.name}: no answer within {endpoint.timeout:g} s, {endpoint.retries + 1} times"
        return RunError(message, hint=f"raise the time-out or lower the concurrency, {AGAIN}")
    if isinstance(error, openai.APIConnectionError):
        return SetupError(
            f"{endpoint.url} cannot be reached: {_short(error.__cause__ or error)}", hint=f"start it, {AGAIN}"
        )
    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        return SetupError(f"{endpoint.url} refuses the key: {_short(error)}", hint=f"set {endpoint.api_key_env}")
    if isinstance(error, openai.NotFoundError):
        hint = "check the name of the model, and the address, which mostly ends in /v1"
        return UsageError(f"{endpoint.name}: not found: {_short(error)}", hint=hint)
    if isinstance(error, openai.RateLimitError):
        message = f"{endpoint.name}: the rate limit holds after {endpoint.retries + 1} tries: {_short(error)}"
        return RunError(message, hint=f"lower the concurrency, {AGAIN}")
    message = f"{endpoint.name}: it failed {endpoint.retries + 1} times: {_short(error)}"
    return RunError(message, hint=f"see its log, {AGAIN}")


def _short(error: BaseException) -> str:
    """Return the first line of an error without what may be secret: servers repeat the key that they refuse."""
    line = next(iter(redact_text(str(error)).splitlines()), "") or type(error).__name__
    return line if len(line) <= _CUT else f"{line[:_CUT]}..."


def _base(url: str) -> str:
    return url.rstrip("/")


def _read_line(line: bytes) -> tuple[str, Reply] | None:
    """Return a kept answer; None for a torn or damaged line."""
    checksum, _, content = line.partition(b" ")
    if checksum != checksum_of(content).hex().encode():
        return None
    key, *values = json.loads(content)
    return key, Reply(*values)
