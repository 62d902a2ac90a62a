"""Formats of one pair a row, including votes of the Chatbot Arena and transcripts."""

import math
import re
from dataclasses import replace
from typing import Any, Literal

from dpoctl.data.formats.common import (
    add_common_columns,
    assistant,
    by_strength,
    columns,
    compare_answers,
    compare_conversations,
    number,
    preference,
    question,
    read_sharegpt,
    read_weighted,
    system_turn,
    text_columns,
    user,
    winner_index,
)
from dpoctl.data.formats.demonstrations import alpaca_prompt
from dpoctl.data.formats.trl import synonyms, trl_explicit, trl_implicit
from dpoctl.data.messages import SHAPE, read_messages, shared_turns
from dpoctl.data.readers.json_lines import read_cell
from dpoctl.data.records import Message, Record, Reject, Row

NEMO_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
STRONGEST = 3
TIES = {"tie": "tie", "tie (bothbad)": "both_bad", "both_bad": "both_bad"}
"""The votes for neither answer, and the reason with which such a row is rejected."""
MultiTurn = Literal["first", "reject"]
TURN = re.compile(r"\n\n(Human|Assistant):")


def openai_preference(row: Row) -> Record:
    """OpenAI's preference files: `input` holds messages and tools, the two outputs are messages."""
    given, preferred, other = columns(row, "input", "preferred_output", "non_preferred_output")
    if not isinstance(given, dict) or "messages" not in given:
        raise Reject(SHAPE, "input is not an object with messages")
    prompt = read_messages(given["messages"], "input.messages")
    chosen, rejected = read_messages(preferred, "preferred_output"), read_messages(other, "non_preferred_output")
    record = preference(prompt, chosen, rejected)
    return add_common_columns({"tools": given.get("tools")}, record)


def helpsteer3(row: Row) -> Record:
    """HelpSteer3-Preference: a conversation, two answers, and the preference for the second, from -3 to 3."""
    context, preferred = columns(row, "context", "overall_preference")
    first, second = text_columns(row, "response1", "response2")
    return by_strength(read_messages(context, "context"), (first, second), _strength(preferred, "overall_preference"))


def helpsteer2_preference(row: Row, *, split: Literal["train", "validation", "all"] = "train") -> Record:
    """HelpSteer2-Preference: two answers, and the preference for the second, from -3 to 3.

    Its one file holds training and validation rows; `split` chooses among them.
    """
    (strength,) = columns(row, "preference_strength")
    prompt, first, second = text_columns(row, "prompt", "response_1", "response_2")
    if split != "all" and row.get("split", split) != split:
        raise Reject("other_split", f"the row is of the split {row['split']}")
    return by_strength(nemo_turns(prompt), (first, second), _strength(strength, "preference_strength"))


def shp(row: Row, *, min_score_ratio: float = 0) -> Record:
    """Stanford Human Preferences: a post, two comments, and their votes."""
    labels, votes_a, votes_b = columns(row, "labels", "score_A", "score_B")
    prompt, a, b = text_columns(row, "history", "human_ref_A", "human_ref_B")
    ratio = number(row.get("score_ratio", 1), "score_ratio")
    if ratio < min_score_ratio:
        raise Reject("below_min_score_ratio", f"score_ratio is {ratio:g}")
    sides = [(b, number(votes_b, "score_B")), (a, number(votes_a, "score_A"))]
    label = winner_index(labels, "labels")
    (chosen, most), (rejected, least) = sides[label], sides[1 - label]
    return compare_answers(question(prompt), chosen, rejected, (most, least))


def stack_exchange_paired(row: Row) -> Record:
    """The paired StackExchange set: `response_j` has more votes than `response_k`."""
    prompt, chosen, rejected = text_columns(row, "question", "response_j", "response_k")
    return compare_answers(question(prompt), chosen, rejected)


def pku(row: Row, *, dimension: Literal["better", "safer"] = "better", require_chosen_safe: bool = False) -> Record:
    """PKU-SafeRLHF: two answers, and the indices of the more helpful and of the safer one."""
    (winner,) = columns(row, f"{dimension}_response_id")
    prompt, *answers = text_columns(row, "prompt", "response_0", "response_1")
    best = winner_index(winner, f"{dimension}_response_id")
    if require_chosen_safe and row.get(f"is_response_{best}_safe") not in (True, "True", "true"):
        raise Reject("chosen_not_safe", f"is_response_{best}_safe is {row.get(f'is_response_{best}_safe')}")
    return compare_answers(question(prompt), answers[best], answers[1 - best])


def summarize(row: Row) -> Record:
    """OpenAI's comparisons of summaries: a post or an article as plain text that ends with `TL;DR:`."""
    info, summaries, choice = columns(row, "info", "summaries", "choice")
    if not isinstance(info, dict) or not isinstance(summaries, list) or len(summaries) != 2:
        raise Reject(SHAPE, "info is not an object, or summaries are not two")
    if not all(isinstance(summary, dict) and isinstance(summary.get("text"), str) for summary in summaries):
        raise Reject(SHAPE, "a summary without a text")
    best = winner_index(choice, "choice")
    # An answer starts with one blank, as in the posts, whatever white space the row has.
    answers = [" " + summary["text"].strip() for summary in summaries]
    return preference(_post(info), answers[best], answers[1 - best])


def capybara(row: Row) -> Record:
    """Capybara, binarized: two conversations with a rating each; `prompt` repeats their start as one string."""
    return _rated(row, "rating_chosen", "rating_rejected", implicit=True)


def ultrafeedback_binarized(row: Row) -> Record:
    """UltraFeedback, binarized: two conversations with a score each; `messages` repeats the chosen one."""
    return _rated(row, "score_chosen", "score_rejected")


def argilla_cleaned(row: Row) -> Record:
    """Argilla's cleaned UltraFeedback: two conversations with a rating each."""
    return _rated(row, "chosen-rating", "rejected-rating")


def dpo_mix(row: Row) -> Record:
    """Argilla's mixes: two conversations with a rating each."""
    return _rated(row, "chosen_rating", "rejected_rating")


def distilabel_orca(row: Row, *, drop_gsm8k: bool = False, min_chosen_score: float = 0) -> Record:
    """Argilla's rated Intel Orca pairs: `chosen` has the higher rating already."""
    (status,) = columns(row, "status")
    prompt, chosen, rejected = text_columns(row, "input", "chosen", "rejected")
    if status == "tie":
        raise Reject("tie")
    if drop_gsm8k and row.get("in_gsm8k_train") in (True, "True", "true"):
        raise Reject("in_gsm8k_train")
    if number(row.get("chosen_score", math.inf), "chosen_score") < min_chosen_score:
        raise Reject("below_min_chosen_score", f"chosen_score is {row['chosen_score']}")
    scores = _ratings(row.get("rating"))
    return compare_answers(question(prompt.strip(), row.get("system")), chosen.strip(), rejected.strip(), scores)


def orca(row: Row) -> Record:
    """Intel's Orca pairs, and sets like them: a question, two texts, and optionally a system message."""
    prompts = synonyms(row)["prompt"]
    if prompts not in (["question"], ["input"]) and not (prompts == ["prompt"] and "system" in row):
        columns(row, "question", "chosen", "rejected")
        raise Reject(SHAPE, "more than one column can be the question")
    prompt, chosen, rejected = text_columns(row, prompts[0], "chosen", "rejected")
    return compare_answers(question(prompt.strip(), row.get("system")), chosen.strip(), rejected.strip())


def axolotl(row: Row) -> Record:
    """Axolotl's pairs: `chosen_response` and `rejected_response`, and an instruction under any of its names."""
    chosen, rejected = text_columns(row, "chosen_response", "rejected_response")
    prompts = synonyms(row)["prompt"]
    if len(prompts) != 1:
        raise Reject(SHAPE, "not one column that can be the prompt")
    (prompt,) = text_columns(row, prompts[0])
    return compare_answers(question(prompt, row.get("system")), chosen, rejected)


def sharegpt_ranking(row: Row) -> Record:
    """LLaMA-Factory's ShareGPT pairs: a conversation of `from` and `value`, and two possible next turns."""
    turns, chosen, rejected = columns(row, "conversations", "chosen", "rejected")
    prompt = read_sharegpt(turns, "conversations")
    if not (prompt and prompt[0]["role"] == "system"):
        prompt = [*system_turn(row.get("system")), *prompt]
    return preference(prompt, read_sharegpt([chosen], "chosen"), read_sharegpt([rejected], "rejected"))


def alpaca_ranking(row: Row) -> Record:
    """LLaMA-Factory's alpaca pairs: an instruction, optionally with input, system and history, and two texts."""
    if "prompt" in row:
        raise Reject(SHAPE, "a prompt of its own")
    _, chosen, rejected = text_columns(row, "instruction", "chosen", "rejected")
    return compare_answers(alpaca_prompt(row), chosen, rejected)


def llamafactory_v1(row: Row) -> Record:
    """LLaMA-Factory's pairs of conversations, whose common first messages are the prompt."""
    chosen, rejected = columns(row, "chosen_messages", "rejected_messages")
    return compare_conversations(read_weighted(chosen, "chosen_messages"), read_weighted(rejected, "rejected_messages"))


def ms_swift(row: Row) -> Record:
    """ms-swift's pairs: `messages` ends with the chosen answer; the rejected one is a text or a conversation."""
    other = "rejected_messages" if "rejected_messages" in row else "rejected_response"
    turns, rejected = columns(row, "messages", other)
    chosen = read_messages(turns, "messages")
    if other == "rejected_messages":
        return compare_conversations(chosen, read_messages(rejected, other))
    (rejected,) = text_columns(row, other)
    if not chosen or chosen[-1]["role"] != "assistant":
        raise Reject("no_final_answer", "messages does not end with the assistant's turn")
    return preference(chosen[:-1], chosen[-1:], [assistant(rejected)])


def nemo_turns(prompt: str) -> list[Message]:
    """Split a HelpSteer prompt, in which each turn after the first starts with `<extra_id_1>` and its speaker."""
    first, *rest = NEMO_TURN.split(prompt)
    turns = question(first)
    for speaker, text in zip(rest[::2], rest[1::2], strict=True):
        turns.append(user(text) if speaker == "User" else assistant(text))
    return turns


def arena_55k(row: Row, *, multi_turn: MultiTurn = "first") -> Record:
    """The Arena's 55k set: prompts and responses as JSON lists of turns, and three columns of which one is 1.

    The vote compares two conversations that differ from the first answer on. Of those with several turns, `first`
    compares the first answers that differ, and `reject` rejects the row.
    """
    votes = columns(row, "winner_model_a", "winner_model_b", "winner_tie")
    prompts, *answers = (_arena_turns(row, name) for name in ("prompt", "response_a", "response_b"))
    flags = [_flag(vote) for vote in votes]
    if sum(flags) != 1:
        raise Reject("bad_winner", f"not one of the three winner columns is 1, but {sum(flags)}")
    a, b = (_conversation(prompts, side) for side in answers)
    return _vote(a, b, ("model_a", "model_b", "tie")[flags.index(True)], multi_turn)


def arena_100k(row: Row, *, multi_turn: MultiTurn = "first") -> Record:
    """The Arena's 100k and 33k sets: two lists of messages, and `winner`.

    `multi_turn` is as for `arena_55k`.
    """
    winner, *sides = columns(row, "winner", "conversation_a", "conversation_b")
    a, b = (_bare(read_messages(side, f"conversation_{name}")) for name, side in zip("ab", sides, strict=True))
    return _vote(a, b, winner, multi_turn)


def arena_140k(row: Row, *, multi_turn: MultiTurn = "first") -> Record:
    """The Arena's 140k set: as the 100k one, with a session and contents in parts; images are rejected."""
    columns(row, "evaluation_session_id", "winner", "conversation_a", "conversation_b")
    return arena_100k(row, multi_turn=multi_turn)


def hh(row: Row) -> Record:
    """Anthropic HH: `chosen` and `rejected` are transcripts, split at the two markers and nowhere else.

    The record is plain text: the prompt is the transcript through the last `Assistant:`, the answers are the rest.
    Where the histories differ, the pair ends with the first turn that does.
    """
    if "prompt" in row:
        raise Reject(SHAPE, "a prompt of its own")
    chosen, rejected = text_columns(row, "chosen", "rejected")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not side.startswith("\n\nHuman:"):
            raise Reject(SHAPE, rf"{name} is no transcript that starts with \n\nHuman:")
    sides = [_transcript_turns(side) for side in (chosen, rejected)]
    for name, turns in zip(("chosen", "rejected"), sides, strict=True):
        if turns[-1][0] != "Assistant":
            raise Reject("no_final_answer", f"{name} ends with a Human turn")
    histories = [turns[:-1] for turns in sides]
    index = len(histories[0]) if histories[0] == histories[1] else shared_turns(*sides)
    if any(len(turns) <= index or turns[index][0] != "Assistant" for turns in sides):
        raise Reject("prompts_differ", f"turn {index + 1} is not the Assistant's on both sides")
    history = "".join(f"\n\n{role}:{text}" for role, text in sides[0][:index])
    return preference(f"{history}\n\nAssistant:", sides[0][index][1], sides[1][index][1])


def _rated(row: Row, chosen: str, rejected: str, *, implicit: bool = False) -> Record:
    columns(row, "chosen", "rejected", chosen, rejected)
    sides = {name: value for name, value in row.items() if name != "prompt" or not implicit}
    record = (trl_explicit if "prompt" in sides else trl_implicit)(sides)
    return replace(record, scores=(number(row[chosen], chosen), number(row[rejected], rejected)))


def _strength(value: Any, name: str) -> float:
    strength = number(value, name)
    if abs(strength) > STRONGEST:
        raise Reject("bad_score", f"{name} is {strength:g}, not from -{STRONGEST} to {STRONGEST}")
    return strength


def _ratings(ratings: Any) -> tuple[float, ...]:
    """Read the ratings of the chosen and the rejected answer; empty unless there are both."""
    if not isinstance(ratings, list) or len(ratings) != 2 or None in ratings:
        return ()
    return tuple(sorted((number(rating, "rating") for rating in ratings), reverse=True))


def _post(info: dict[str, Any]) -> str:
    if isinstance(article := info.get("article"), str):
        return f"{article.strip()}\n\nTL;DR:"
    subreddit, title, post = (str(info.get(name) or "").strip() for name in ("subreddit", "title", "post"))
    if not post:
        raise Reject("empty_prompt")
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"


def _vote(a: list[Message], b: list[Message], winner: Any, multi_turn: MultiTurn) -> Record:
    if isinstance(winner, str) and winner in TIES:
        raise Reject(TIES[winner])
    if winner not in ("model_a", "model_b"):
        raise Reject("bad_winner", f"winner is {winner!r}")
    turns = max(sum(message["role"] == "user" for message in side) for side in (a, b))
    if turns > 1 and multi_turn == "reject":
        raise Reject("multi_turn", f"{turns} turns")
    chosen, rejected = (a, b) if winner == "model_a" else (b, a)
    return compare_conversations(chosen, rejected, first_only=True)


def _bare(messages: list[Message]) -> list[Message]:
    """Leave out the token counts of the arena, which would make equal messages differ."""
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _arena_turns(row: Row, name: str) -> list[str]:
    (text,) = text_columns(row, name)
    turns = read_cell(text, name, SHAPE)
    if not isinstance(turns, list) or not all(turn is None or isinstance(turn, str) for turn in turns):
        raise Reject(SHAPE, f"{name} is not a JSON list of turns")
    return [turn or "" for turn in turns]


def _conversation(prompts: list[str], answers: list[str]) -> list[Message]:
    if len(prompts) != len(answers):
        raise Reject("roles_out_of_order", f"{len(answers)} answers to {len(prompts)} prompts")
    return [turn for asked, answer in zip(prompts, answers, strict=True) for turn in (user(asked), assistant(answer))]


def _flag(value: Any) -> bool:
    if value not in (0, 1, "0", "1", "True", "False"):
        raise Reject("bad_winner", f"a winner column is {value!r}, not 0 or 1")
    return value in (1, "1", "True")


def _transcript_turns(transcript: str) -> list[tuple[str, str]]:
    pieces = TURN.split(transcript)[1:]
    return list(zip(pieces[::2], pieces[1::2], strict=True))
