"""Tokens of rendered text: tokenized in batches, with boundaries that no token crosses, and cut to length.

The prompt is tokenized alone, as at inference, and its ids are the same for all its responses. The ids of an answer are
those that follow when prompt and answer are tokenized together; if a token would cross the boundary, the answer is
tokenized separately, as a continuation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dpoctl.data.records import Message, Record, Reject
from dpoctl.data.rendering import BREAK, Completion, Rendered, Renderer
from dpoctl.data.word_cache import PromptEnd, PromptEnds, WordCache, word_cache
from dpoctl.errors import DataError, SetupError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

TRAINED, UNTRAINED = b"\1", b"\0"
NO_PAIRS = np.empty((0, 2))
Ids = list[int]
Joint = tuple[Ids, "Encoding | None"]
"""The ids of a text, and its encoding where tokens must be found by their characters."""
Tokens = tuple[Ids, list["Answer"]]
"""The ids of a record's prompt, and its answers."""


@dataclass(frozen=True)
class Example:
    """The tokens of one record: the prefix that all responses share, and the suffix of each.

    `shared` is the longest common prefix in ids and flags that leaves each suffix at least one token. A flag is true
    where the token is trained on, which the first token of a row never is.
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
    """The index of the response to imitate, for a loss with a supervised term; -1 is none."""
    source: int = 0
    """The number of the recipe's source that the record comes from."""


@dataclass(slots=True)
class Answer:
    """The tokens of one response after its prompt, and which of them are trained on."""

    ids: Ids
    scored: bytes
    """One a token: 1 is trained on, 0 is not."""

    def cut(self, length: int) -> bool:
        """Keep the first tokens; return whether anything was cut."""
        if len(self.ids) <= length:
            return False
        self.ids, self.scored = self.ids[:length], self.scored[:length]
        return True


@dataclass(frozen=True, slots=True)
class Limits:
    """The greatest lengths of rows in tokens, and the way to cut longer ones."""

    max_length: int
    max_prompt_length: int | None
    truncate: bool
    keep_start: bool


class Encoder:
    """Tokenizes text, with a private copy of a fast tokenizer.

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
            raise DataError("the tokenizer has no end-of-sequence token, with which answers end; set its eos_token")
        self._tokenizer = tokenizer
        self._backend = _private_copy(backend)
        self.eos: int = tokenizer.eos_token_id
        self.bos: int | None = tokenizer.bos_token_id
        self.adds_bos = self._backend.encode("a").ids[:1] == [self.bos]
        self.unk: int | None = tokenizer.unk_token_id
        added = self._backend.get_added_tokens_decoder()
        self._greedy = frozenset(number for number, token in added.items() if token.rstrip)
        """Control tokens that take the white space behind them."""

    @cached_property
    def dtype(self) -> "np.dtype[Any]":
        """The smallest type of number that holds every id."""
        return np.dtype(np.uint16 if max(self.vocabulary.values()) < 2**16 else np.uint32)

    @cached_property
    def state(self) -> str:
        """The tokenizer as text, with everything on which ids depend."""
        return self._backend.to_str()

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Every token and its id."""
        vocabulary: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return vocabulary

    @cached_property
    def prompt_ends(self) -> PromptEnds:
        """The ends of prompts with which answers are tokenized."""
        return PromptEnds(self._tokenizer, self._words)

    @cached_property
    def _words(self) -> WordCache | None:
        return word_cache(self._backend, self.vocabulary)

    def encode(self, rendered: Sequence[Rendered]) -> list[Tokens]:
        """Tokenize records: the ids of each prompt, and of each of its answers."""
        # For each record its prompt, and the end of that with each answer.
        ends = [self.prompt_ends.of(item.prompt) for item in rendered]
        texts: list[str] = []
        for item, end in zip(rendered, ends, strict=True):
            texts += item.prompt, *(end.text + completion.text for completion in item.completions)
        return self._rows(rendered, ends, self._encode(texts, rendered))

    def _encode(self, texts: list[str], rendered: Sequence[Rendered]) -> "list[Joint]":
        # Offsets take a fifth of the time, and only answers that are trained on in part need them.
        if any(text.spans != ((0, len(text.text)),) for item in rendered for text in item.completions):
            return [
                (encoding.ids, encoding) for encoding in self._backend.encode_batch(texts, add_special_tokens=False)
            ]
        if self._words is not None:
            return [(ids, None) for ids in self._words.encode(texts)]
        return [(encoding.ids, None) for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _rows(self, rendered: Sequence[Rendered], ends: list[PromptEnd], encoded: "list[Joint]") -> list[Tokens]:
        encodings = iter(encoded)
        rows = []
        for item, end in zip(rendered, ends, strict=True):
            prompt, _ = next(encodings)
            if BREAK in item.prompt:
                prompt = self._pieces(item.prompt, (), start=True)[0]
            end_ids = self.prompt_ends.ids(end, prompt)
            answers = [self._answer(end.text, end_ids, text, *next(encodings)) for text in item.completions]
            rows.append((self._with_bos(prompt), answers))
        return rows

    def _answer(self, end: str, end_ids: Ids, completion: Completion, joint: Ids, encoding: Any) -> Answer:
        tokens = None
        if BREAK not in end and BREAK not in completion.text:
            tokens = _after_prompt(end, end_ids, completion, joint, encoding, self._greedy)
        ids, scored = tokens or self._pieces(completion.text, completion.spans)
        if completion.needs_eos:
            ids, scored = [*ids, self.eos], scored + TRAINED
        return Answer(ids, scored)

    def _pieces(self, text: str, spans: Sequence[tuple[int, int]], *, start: bool = False) -> tuple[Ids, bytes]:
        """Tokenize a text in pieces, cut at the ends of spans and at breaks."""
        cuts = sorted({0, len(text), *(end for span in spans for end in span)})
        ids: Ids = []
        scored = bytearray()
        known: dict[str, Ids] = {}
        for left, right in pairwise(cuts):
            is_scored = any(begin <= left and right <= end for begin, end in spans)
            for piece in filter(None, text[left:right].split(BREAK)):
                if start and not ids:
                    new = self.plain(piece)
                elif (new := known.get(piece, [])) == []:
                    new = known[piece] = self._continuation(piece)
                ids += new
                scored += bytes([is_scored]) * len(new)
        return ids, bytes(scored)

    def plain(self, text: str) -> Ids:
        """Tokenize a text by itself."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def _continuation(self, text: str) -> Ids:
        """Tokenize a text that follows another, without the blank that some tokenizers put before a first word."""
        for anchor in ("\n", ":", "x"):
            head, joint = self.plain(anchor), self.plain(anchor + text)
            if joint[: len(head)] == head:
                return joint[len(head) :]
        return self.plain(text)

    def _with_bos(self, ids: Ids) -> Ids:
        if self.bos is None:
            return ids
        repeated = len(list(takewhile(self.bos.__eq__, ids))) - 1
        ids = ids[max(repeated, 0) :]
        return [self.bos, *ids] if self.adds_bos and ids[:1] != [self.bos] else ids


def fit(prompt: Ids, answers: list[Answer], limits: Limits, bos: int | None) -> tuple[Ids, bool, int]:
    """Cut a record to its limits; the answers are changed in place.

    A prompt that is too long is cut to `max_prompt_length`, or, where that is not set, as far as the longest answer
    needs, but not below half of `max_length`. Then each answer is cut to the room that is left.

    Returns:
        The prompt, whether it was cut, and the number of answers that were.

    Raises:
        Reject: The record is too long and may not be cut, or nothing to train on is left.
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
    """Build the example of a record: the longest shared prefix, and the suffixes.

    Raises:
        Reject: The answers of a pair are the same tokens.
    """
    for winner, loser in record.pairs:
        if answers[winner].ids == answers[loser].ids:
            raise Reject("identical_tokens", "the answers are the same after truncation")
    ids, flags = [answer.ids for answer in answers], [answer.scored for answer in answers]
    if not prompt:
        flags = [UNTRAINED + flag[1:] for flag in flags]
    shared = min(min(map(len, ids)) - 1, _shared(ids), _shared(flags))
    return Example(
        shared=np.array(prompt + ids[0][:shared], dtype=dtype),
        shared_scored=np.frombuffer(UNTRAINED * len(prompt) + flags[0][:shared], bool),
        suffixes=tuple(np.array(row[shared:], dtype=dtype) for row in ids),
        suffixes_scored=tuple(np.frombuffer(flag, bool, offset=shared) for flag in flags),
        pairs=np.array(record.pairs or NO_PAIRS, dtype=np.int64),
        label=-1 if record.label is None else int(record.label),
        target=-1 if record.best is None else record.best,
    )


def _shared(rows: Sequence[Any]) -> int:
    """Return the length of the common prefix of rows, which is that of the least and the greatest."""
    least, greatest = min(rows), max(rows)
    if greatest[: len(least)] == least:
        return len(least)
    return next(at for at, (one, other) in enumerate(zip(least, greatest, strict=False)) if one != other)


def render_prompts(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str | list[Message]], template_kwargs: dict[str, Any]
) -> list[Ids]:
    """Tokenize prompts exactly as training does, ready for an answer to follow.

    Args:
        tokenizer: A fast tokenizer, with a chat template where prompts are messages.
        prompts: Texts, or messages without an answer.
        template_kwargs: Further variables of the template.

    Raises:
        DataError: There is no template, or it rejects a prompt.
    """
    renderer, encoder = Renderer(tokenizer, template_kwargs), Encoder(tokenizer)
    try:
        rendered = [renderer.render(Record(prompt, ())) for prompt in prompts]
    except Reject as reject:
        raise DataError(f"the chat template rejects a prompt: {reject.detail}") from reject
    return [ids for ids, _ in encoder.encode(rendered)]


def render_prompt(
    tokenizer: "PreTrainedTokenizerBase", prompt: str | list[Message], template_kwargs: dict[str, Any]
) -> Ids:
    """Tokenize one prompt; see `render_prompts`."""
    return render_prompts(tokenizer, [prompt], template_kwargs)[0]


def _private_copy(backend: "Tokenizer") -> "Tokenizer":
    """Copy a tokenizer, without the padding and truncation that its other users may have set.

    The copy shares the vocabulary, which would take a tenth of a second to build again.
    """
    from tokenizers import Tokenizer

    copy = Tokenizer(backend.model)
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (part := getattr(backend, name)) is not None:
            setattr(copy, name, part)
    copy.encode_special_tokens = backend.encode_special_tokens
    added = backend.get_added_tokens_decoder()
    copy.add_tokens([added[number] for number in sorted(added)])
    if copy.get_added_tokens_decoder() != added:
        copy = Tokenizer.from_str(backend.to_str())
        copy.no_padding()
        copy.no_truncation()
    return copy


def _after_prompt(
    prompt: str, prompt_ids: Ids, completion: Completion, ids: Ids, encoding: Any, greedy: frozenset[int]
) -> tuple[Ids, bytes] | None:
    """Return an answer's tokens among those of prompt and answer; None if a token crosses a boundary."""
    if ids[: len(prompt_ids)] != prompt_ids:
        return None
    if completion.spans == ((0, len(completion.text)),):
        answer = ids[len(prompt_ids) :]
        return answer, TRAINED * len(answer)
    scored = bytearray(len(ids))
    for span in completion.spans:
        begin, end = (_token_at(encoding, len(prompt), len(prompt_ids), completion.text, at, greedy) for at in span)
        if begin is None or end is None:
            return None
        scored[begin:end] = TRAINED * (end - begin)
    return ids[len(prompt_ids) :], bytes(scored[len(prompt_ids) :])


def _token_at(
    joint: Any, prompt_chars: int, prompt_tokens: int, text: str, at: int, greedy: frozenset[int]
) -> int | None:
    """Find the token that starts at a character of the answer, or at the end of blanks that a greedy one takes.

    None if none does.
    """
    if at == 0:
        return prompt_tokens
    if at == len(text):
        return len(joint.ids)
    token = joint.char_to_token(prompt_chars + at)
    if token is None:
        return None
    start, end = joint.token_to_chars(token)
    if start != prompt_chars + at:
        takes_blanks = joint.ids[token] in greedy and text[at : end - prompt_chars].isspace()
        return int(token) + 1 if takes_blanks else None
    return int(token)


def _cut_prompt(ids: Ids, room: int, *, keep_start: bool, bos: int | None) -> Ids:
    if keep_start:
        return ids[:room]
    if ids[0] == bos and room > 1:
        return [ids[0], *ids[-(room - 1) :]]
    return ids[-room:]
