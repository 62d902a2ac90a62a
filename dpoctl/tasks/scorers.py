"""Scores of answers, higher is better: by words, a judge of `dpoctl eval`, a reward model, or a command."""

import json
import math
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import combinations, islice
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from dpoctl import console
from dpoctl.data.cache import Cache, cache_dir, writing_to
from dpoctl.data.records import Text
from dpoctl.errors import RunError, SetupError
from dpoctl.model.load import resolve_dtype
from dpoctl.model.source import find_source, reading_model
from dpoctl.model.tokenizer import read_tokenizer
from dpoctl.recipe.judge_section import UNDECIDED
from dpoctl.tasks.judges import PairwiseJudge, RubricJudge, hash_files, prompt_text
from dpoctl.tasks.judging import build_served_judge
from dpoctl.tasks.samples import KeywordJudge
from dpoctl.tasks.served import FOLDER, Endpoint, KeptAnswers, Reply, Request

if TYPE_CHECKING:
    from dpoctl.recipe.sampled_pairs import ScoreSection

Scores = list[list[float | None]]
Asked = dict[str, Any]
"""A prompt and one answer to it, under `prompt` and `answer`."""
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "config.json")


class AnswerScorer(Protocol):
    """Scores answers."""

    def __call__(self, prompts: Sequence[Text], answers: Sequence[Sequence[str]]) -> Scores:
        """Return a score for each answer to each prompt; None where there is none."""


def build_scorer(section: "ScoreSection") -> AnswerScorer:
    """Make the scorer of a section.

    Raises:
        UsageError: the template of a judge cannot be used.
        SetupError: the client, the command or the reward model is missing, or cannot be used.
    """
    if section.type == "keywords":
        return _Keywords(section)
    if section.type == "command":
        return _Command(section.command or ())
    if section.type == "reward_model":
        return _RewardModel(section)
    judge = build_served_judge(section)
    return _Tournament(judge) if isinstance(judge, PairwiseJudge) else _Ratings(judge)


class _Keywords:
    def __init__(self, section: "ScoreSection") -> None:
        self._judge, self._target = KeywordJudge(section.categories), section.target

    def __call__(self, prompts: Sequence[Text], answers: Sequence[Sequence[str]]) -> Scores:
        found = [[self._judge.category(text) for text in texts] for texts in answers]
        return [[None if name == UNDECIDED else float(name == self._target) for name in names] for names in found]


class _Ratings:
    def __init__(self, judge: RubricJudge) -> None:
        self._judge = judge

    def __call__(self, prompts: Sequence[Text], answers: Sequence[Sequence[str]]) -> Scores:
        flat = _flat(prompts, answers)
        return _nested(self._judge.rate([row["prompt"] for row in flat], [row["answer"] for row in flat]), answers)


class _Tournament:
    """Every two answers to a prompt are compared; the score of one is the mean of its wins, a tie being half of one."""

    def __init__(self, judge: PairwiseJudge) -> None:
        self._judge = judge

    def __call__(self, prompts: Sequence[Text], answers: Sequence[Sequence[str]]) -> Scores:
        games = [(n, a, b) for n, texts in enumerate(answers) for a, b in combinations(range(len(texts)), 2)]
        first, second = ([answers[game[0]][game[side]] for game in games] for side in (1, 2))
        votes = self._judge([prompts[number] for number, _, _ in games], first, second)
        wins: dict[tuple[int, int], list[float]] = {}
        for (number, a, b), vote in zip(games, votes, strict=True):
            if vote.win is not None:
                wins.setdefault((number, a), []).append(vote.win)
                wins.setdefault((number, b), []).append(1 - vote.win)
        return [
            [fmean(wins[n, k]) if (n, k) in wins else None for k in range(len(texts))]
            for n, texts in enumerate(answers)
        ]


class _Command:
    """A program that reads a prompt and an answer a line, and writes the score of each, in any order."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._program = shutil.which(command[0]) or ""
        if not self._program:
            raise SetupError(f"score.command: {command[0]} is not a program that can be started")

    def __call__(self, prompts: Sequence[Text], answers: Sequence[Sequence[str]]) -> Scores:
        name = json.dumps([*self._command, *hash_files([self._program, *self._command[1:]])])
        return _nested(_kept("score", name, _flat(prompts, answers), self._run), answers)

    def _run(self, rows: Sequence[Asked]) -> Iterator[tuple[int, float]]:
        """Send rows to the command, and yield the number and the score of each as it comes."""
        lines = [json.dumps({"id": number, **row}) + "\n" for number, row in enumerate(rows)]
        # A file, and no pipe: a program may write before it has read everything, or end without reading.
        with TemporaryFile("w+", encoding="utf-8") as asked:
            asked.writelines(lines)
            asked.seek(0)
            with subprocess.Popen(
                [self._program, *self._command[1:]], stdin=asked, stdout=subprocess.PIPE, text=True, encoding="utf-8"
            ) as child:
                for line in child.stdout or ():
                    with suppress(ValueError, LookupError, TypeError):
                        row = json.loads(line)
                        number, score = row["id"], float(row["score"])
                        if type(number) is int and 0 <= number < len(rows) and math.isfinite(score):
                            yield number, score
        if child.returncode:
            message = f"score.command: {self._command[0]} ended with exit code {child.returncode}"
            raise RunError(message, hint="its own error is above; scores so far are kept")


class _RewardModel:
    """A sequence classifier with one output."""

    def __init__(self, section: "ScoreSection") -> None:
        name = section.model_name_or_path or ""
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = accelerator or torch.device("cpu")
        source = find_source(name, revision=section.revision, trust_remote_code=section.trust_remote_code)
        self._tokenizer = read_tokenizer(source)
        dtype = resolve_dtype(section.dtype, device)
        with reading_model(source.name):
            loaded, info = AutoModelForSequenceClassification.from_pretrained(
                source.name, **source.options, dtype=dtype, output_loading_info=True
            )
        _check_reward_model(name, loaded, info)
        self._model = loaded.to(device).eval()
        if self._model.config.pad_token_id is None:
            # By it the classifier finds the last token of a row.
            self._model.config.pad_token_id = self._tokenizer.pad_token_id or self._tokenizer.eos_token_id
        self._section = section
        folder = Path(source.name)
        files = sorted(file for pattern in WEIGHTS for file in folder.glob(pattern)) if folder.is_dir() else []
        weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        self._identity = json.dumps([source.name, section.revision, str(dtype), section.max_length, weights])

    def __call__(self, prompts: Sequence[Text], answers: Sequence[Sequence[str]]) -> Scores:
        return _nested(_kept("reward model", self._identity, _flat(prompts, answers), self._run), answers)

    @torch.no_grad()
    def _run(self, rows: Sequence[Asked]) -> Iterator[tuple[int, float]]:
        """Yield the number and the score of each row that is not too long, the longest rows first."""
        ids = [_reward_ids(self._tokenizer, row) for row in rows]
        fitting = (number for number, one in enumerate(ids) if len(one) <= self._section.max_length)
        order = iter(sorted(fitting, key=lambda number: -len(ids[number])))
        while batch := list(islice(order, self._section.batch_size)):
            width = len(ids[batch[0]])
            pad = self._model.config.pad_token_id
            padded = torch.tensor([ids[number] + [pad] * (width - len(ids[number])) for number in batch])
            mask = torch.tensor([[1] * len(ids[number]) + [0] * (width - len(ids[number])) for number in batch])
            device = self._model.device
            logits = self._model(input_ids=padded.to(device), attention_mask=mask.to(device)).logits
            yield from zip(batch, logits[:, 0].float().tolist(), strict=True)


def _check_reward_model(name: str, model: Any, info: Mapping[str, Any]) -> None:
    """Refuse a model that gives no single score, or one whose head was never trained.

    Raises:
        SetupError: it is one.
    """
    hint = "name a reward model: a sequence classifier with num_labels: 1"
    if model.config.num_labels != 1:
        outputs = model.config.num_labels
        raise SetupError(f"score.model_name_or_path: {name} has {outputs} outputs, not one score", hint=hint)
    if missing := sorted(info["missing_keys"]):
        raise SetupError(f"score.model_name_or_path: {name} has no weights for {missing[0]}", hint=hint)


def _reward_ids(tokenizer: PreTrainedTokenizerBase, row: Asked) -> list[int]:
    """Tokenize a prompt and its answer as a conversation, or as text where there is no chat template."""
    prompt, answer = row["prompt"], row["answer"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    text = prompt_text(prompt) + answer
    if tokenizer.chat_template:
        text = str(tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": answer}], tokenize=False))
    return list(tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"])


def _kept(
    kind: str, name: str, rows: Sequence[Asked], run: Callable[[Sequence[Asked]], Iterable[tuple[int, float]]]
) -> list[float | None]:
    """Return the score of each row: those of earlier calls from disk, and of the others each kept as it comes."""
    endpoint = Endpoint(kind, name)
    keys = [Request([row], {}).key(endpoint) for row in rows]
    folder = Cache(cache_dir()).writable(FOLDER)
    with writing_to(folder), KeptAnswers.open(folder, endpoint) as kept:
        new = {key: row for key, row in zip(keys, rows, strict=True) if key not in kept.answers}
        found = dict(kept.answers)
        if new:
            waiting = list(new)
            with console.WorkProgress("scoring", len(new), "answers") as progress:
                for number, score in run(list(new.values())):
                    found[waiting[number]] = reply = Reply(repr(score), finished=True)
                    kept.write(waiting[number], reply)
                    progress.advance(1)
    return [float(found[key].text) if key in found else None for key in keys]


def _flat(prompts: Sequence[Text], answers: Sequence[Sequence[str]]) -> list[Asked]:
    return [
        {"prompt": prompt, "answer": text} for prompt, texts in zip(prompts, answers, strict=True) for text in texts
    ]


def _nested(scores: Sequence[float | None], answers: Sequence[Sequence[str]]) -> Scores:
    flat = iter(scores)
    return [list(islice(flat, len(texts))) for texts in answers]
