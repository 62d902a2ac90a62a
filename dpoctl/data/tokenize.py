"""Rendered text -> tokens: the Rust tokenizer in batches, boundaries that no token crosses, lengths that fit.

The prompt is tokenized alone, as at inference, and its ids are the same for all its responses. An answer's
ids are what follows them when both are tokenized together. Where a token would cross the boundary, the answer
is tokenized as a continuation of its own.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dpoctl.data.records import Message, Record, Reject
from dpoctl.data.template import BREAK, Completion, Rendered, Renderer
from dpoctl.errors import DataError, SetupError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = list[int]


@dataclass(frozen=True)
class Example:
    """The tokens of one record: what all responses share, then what each adds.

    `shared` is the longest common prefix in ids and flags, and leaves each suffix at least one token. A flag is
    true where the token is trained on; the first token of a row never is.
    """

    shared: npt.NDArray[Any]
    """`(S,)` token ids."""
    shared_scored: npt.NDArray[np.bool_]
    """`(S,)`."""
    suffixes: tuple[npt.NDArray[Any], ...]
    """K arrays of token ids."""
    suffixes_scored: tuple[npt.NDArray[np.bool_], ...]
    """K arrays."""
    pairs: npt.NDArray[np.int64]
    """`(M, 2)`: (winner, loser), as indices of the responses."""
    label: int = -1
    """Unpaired feedback on the only response: 1 is good, 0 is bad, -1 is none."""
    target: int = 0
    """The response to imitate where a loss has a supervised term; -1 is none."""
    source: int = 0
    """The number of the recipe's source that the record comes from."""


@dataclass(slots=True)
class Answer:
    """The tokens of one response after its prompt, and which of them are trained on."""

    ids: Ids
    scored: list[bool]

    def cut(self, length: int) -> bool:
        """Keep the first tokens; return whether anything was cut."""
        if len(self.ids) <= length:
            return False
        self.ids, self.scored = self.ids[:length], self.scored[:length]
        return True


@dataclass(frozen=True, slots=True)
class Limits:
    """The length that rows must fit in, in tokens, and what becomes of those that do not."""

    max_length: int
    max_prompt_length: int | None
    truncate: bool
    keep_start: bool


class Encoder:
    """Text to ids by a private copy of a fast tokenizer.

    Raises:
        SetupError: The tokenizer has no Rust backend.
        DataError: The tokenizer has no end-of-sequence token.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        from tokenizers import Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise SetupError(
                f"{type(tokenizer).__name__} is not a fast tokenizer",
                hint="save it with a tokenizer.json, by AutoTokenizer.from_pretrained(...).save_pretrained(...)",
            )
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end-of-sequence token: no answer could ever end")
        # Padding and truncation are state of the backend, which whoever else calls the tokenizer may have set.
        self._backend = Tokenizer.from_str(backend.to_str())
        self._backend.no_padding()
        self._backend.no_truncation()
        self.eos: int = tokenizer.eos_token_id
        self.bos: int | None = tokenizer.bos_token_id
        self._anchors = _anchors(tokenizer)
        self.adds_bos = self._backend.encode("a").ids[:1] == [self.bos]
        self.unk: int | None = tokenizer.unk_token_id
        largest = max(self.vocabulary().values())
        self.dtype = np.uint16 if largest < 2**16 else np.uint32

    def state(self) -> str:
        """Everything that decides which ids a text becomes."""
        return self._backend.to_str()

    def vocabulary(self) -> dict[str, int]:
        """Every token and its id."""
        vocabulary: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return vocabulary

    def encode(self, rendered: Sequence[Rendered]) -> list[tuple[Ids, list[Answer]]]:
        """Tokenize records: the ids of each prompt, and of each of its answers."""
        tails = [self._tail(item.prompt) for item in rendered]
        texts = [text for item, (at, _) in zip(rendered, tails, strict=True) for text in _texts(item, at)]
        # Offsets cost a fifth of the time, and only a row with several spans needs them.
        inner = any(len(completion.spans) > 1 for item in rendered for completion in item.completions)
        encode = self._backend.encode_batch if inner else self._backend.encode_batch_fast
        encodings = iter(encode(texts, add_special_tokens=False))
        rows = []
        for item, (at, anchor) in zip(rendered, tails, strict=True):
            prompt = next(encodings).ids
            if BREAK in item.prompt:
                prompt = self._pieces(item.prompt, (), start=True)[0]
            tail = item.prompt[at:], prompt if anchor is None else prompt[_last(prompt, anchor) :]
            answers = [self._answer(*tail, completion, next(encodings)) for completion in item.completions]
            rows.append((self._with_bos(prompt), answers))
        return rows

    def _tail(self, prompt: str) -> tuple[int, int | None]:
        """Find where the last control token of a prompt starts, and its id: what follows is tokenized by itself."""
        found = ((prompt.rfind(text), token) for text, token in self._anchors.items())
        at, anchor = max(found, default=(-1, None))
        return (0, None) if at < 0 else (at, anchor)

    def _answer(self, tail: str, tail_ids: Ids, completion: Completion, joint: Any) -> Answer:
        tokens = None
        if BREAK not in tail and BREAK not in completion.text:
            tokens = _after_prompt(tail, tail_ids, completion, joint)
        ids, scored = tokens or self._pieces(completion.text, completion.spans)
        if completion.needs_eos:
            ids, scored = [*ids, self.eos], [*scored, True]
        return Answer(ids, scored)

    def _pieces(self, text: str, spans: Sequence[tuple[int, int]], *, start: bool = False) -> tuple[Ids, list[bool]]:
        """Tokenize a text piece by piece, cut at the ends of spans and at breaks."""
        cuts = sorted({0, len(text), *(end for span in spans for end in span)})
        ids: Ids = []
        scored: list[bool] = []
        for left, right in pairwise(cuts):
            is_scored = any(begin <= left and right <= end for begin, end in spans)
            for piece in filter(None, text[left:right].split(BREAK)):
                new = self.plain(piece) if start and not ids else self._continuation(piece)
                ids += new
                scored += [is_scored] * len(new)
        return ids, scored

    def plain(self, text: str) -> Ids:
        """Tokenize a text by itself."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def _continuation(self, text: str) -> Ids:
        """Tokenize a text as it reads after another: without the blank that some put before a first word."""
        for anchor in ("\n", ":", "x"):
            head, joint = self.plain(anchor), self.plain(anchor + text)
            if joint[: len(head)] == head:
                return joint[len(head) :]
        return self.plain(text)

    def _with_bos(self, ids: Ids) -> Ids:
        if self.bos is None:
            return ids
        while ids[:2] == [self.bos, self.bos]:
            ids = ids[1:]
        return [self.bos, *ids] if self.adds_bos and ids[:1] != [self.bos] else ids


def fit(prompt: Ids, answers: list[Answer], limits: Limits, bos: int | None) -> tuple[Ids, bool, int]:
    """Make a record fit its limits, in place for the answers.

    An over-long prompt is cut to `max_prompt_length`. Where that is not set, it is cut as far as the longest
    answer needs, but not below half of `max_length`. Then each answer on its own is cut to the room that is left.

    Returns:
        The prompt, whether it was cut, and how many answers were.

    Raises:
        Reject: The record is too long and must not be cut, or nothing to train on is left.
    """
    longest = max(len(answer.ids) for answer in answers)
    room = limits.max_prompt_length or max(limits.max_length // 2, limits.max_length - longest)
    too_long = len(prompt) + longest > limits.max_length
    over = len(prompt) > room
    if (too_long or over) and not limits.truncate:
        raise Reject("too_long", f"{len(prompt)} tokens of prompt and {longest} of answer")
    if over:
        prompt = _cut_prompt(prompt, room, keep_start=limits.keep_start, bos=bos)
    cut = sum(answer.cut(limits.max_length - len(prompt)) for answer in answers)
    if not all(any(answer.scored) for answer in answers):
        raise Reject("nothing_to_learn", "no token to train on is left after truncation")
    return prompt, over, cut


def build_example(prompt: Ids, answers: list[Answer], record: Record, dtype: Any) -> Example:
    """Lay out a record: the longest shared prefix, then the suffixes.

    Raises:
        Reject: The answers of a pair are the same tokens.
    """
    rows = [np.asarray(prompt + answer.ids, dtype=dtype) for answer in answers]
    flags = [np.asarray([False] * len(prompt) + answer.scored, dtype=bool) for answer in answers]
    for row in flags:
        row[0] = False
    for winner, loser in record.pairs:
        if np.array_equal(rows[winner], rows[loser]):
            raise Reject("identical_tokens", "the answers are the same after truncation")
    shared = min(len(row) for row in rows) - 1
    for row, flag in zip(rows[1:], flags[1:], strict=True):
        differs = (row[:shared] != rows[0][:shared]) | (flag[:shared] != flags[0][:shared])
        shared = int(differs.argmax()) if differs.any() else shared
    return Example(
        shared=rows[0][:shared],
        shared_scored=flags[0][:shared],
        suffixes=tuple(row[shared:] for row in rows),
        suffixes_scored=tuple(flag[shared:] for flag in flags),
        pairs=np.asarray(record.pairs, dtype=np.int64).reshape(-1, 2),
        label=-1 if record.label is None else int(record.label),
        target=-1 if record.best is None else record.best,
    )


def render_prompts(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str | list[Message]], template_kwargs: dict[str, Any]
) -> list[Ids]:
    """Tokenize prompts exactly as training does, ready for an answer to follow.

    Args:
        tokenizer: A fast tokenizer, with a chat template where prompts are messages.
        prompts: Texts, or messages without an answer.
        template_kwargs: Further variables of the template.

    Raises:
        DataError: There is no template, or it refuses a prompt.
    """
    renderer, encoder = Renderer(tokenizer, template_kwargs), Encoder(tokenizer)
    try:
        rendered = [renderer.render(Record(prompt, ())) for prompt in prompts]
    except Reject as reject:
        raise DataError(f"the chat template refuses a prompt: {reject.detail}") from reject
    return [ids for ids, _ in encoder.encode(rendered)]


def render_prompt(
    tokenizer: "PreTrainedTokenizerBase", prompt: str | list[Message], template_kwargs: dict[str, Any]
) -> Ids:
    """Tokenize one prompt; see `render_prompts`."""
    return render_prompts(tokenizer, [prompt], template_kwargs)[0]


def _anchors(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """Control tokens that split every text: what follows one is tokenized as if the text began with it.

    A token whose characters may be part of another's is none, nor is one that depends on what stands around it.
    """
    added = {token.content: (number, token) for number, token in tokenizer.added_tokens_decoder.items()}
    used = str(tokenizer.chat_template) + "".join(str(token) for token in tokenizer.special_tokens_map.values())
    return {
        text: number
        for text, (number, token) in added.items()
        if text in used and token.special and not (token.single_word or token.normalized)
        if not _overlaps(text, added.keys() - {text})
    }


def _overlaps(text: str, others: Set[str]) -> bool:
    heads = tuple(text[:end] for end in range(1, len(text)))
    tails = tuple(text[start:] for start in range(1, len(text)))
    return any(text in other or other.endswith(heads) or other.startswith(tails) for other in others)


def _last(ids: Ids, token: int) -> int:
    return len(ids) - 1 - ids[::-1].index(token)


def _texts(item: Rendered, at: int) -> list[str]:
    return [item.prompt, *(item.prompt[at:] + completion.text for completion in item.completions)]


def _after_prompt(prompt: str, prompt_ids: Ids, completion: Completion, joint: Any) -> tuple[Ids, list[bool]] | None:
    """Take an answer's tokens from prompt + answer, or None where a token crosses a boundary."""
    ids = joint.ids
    if ids[: len(prompt_ids)] != prompt_ids:
        return None
    if completion.spans == ((0, len(completion.text)),):
        answer = ids[len(prompt_ids) :]
        return answer, [True] * len(answer)
    scored = [False] * len(ids)
    for span in completion.spans:
        begin, end = (_token_at(joint, len(prompt), len(prompt_ids), completion.text, at) for at in span)
        if begin is None or end is None:
            return None
        scored[begin:end] = [True] * (end - begin)
    return ids[len(prompt_ids) :], scored[len(prompt_ids) :]


def _token_at(joint: Any, prompt_chars: int, prompt_tokens: int, text: str, at: int) -> int | None:
    """Find the token that starts at a character of the answer, or None where none does."""
    if at == 0:
        return prompt_tokens
    if at == len(text):
        return len(joint.ids)
    token = joint.char_to_token(prompt_chars + at)
    if token is None or joint.token_to_chars(token)[0] != prompt_chars + at:
        return None
    return int(token)


def _cut_prompt(ids: Ids, room: int, *, keep_start: bool, bos: int | None) -> Ids:
    if keep_start:
        return ids[:room]
    if ids[0] == bos and room > 1:
        return [ids[0], *ids[-(room - 1) :]]
    return ids[-room:]
