"""Formats of which one row is one comparison."""

import math
import re
from dataclasses import replace
from typing import Any, Literal

from dpoctl.data.conversation import SHAPE, read_messages
from dpoctl.data.formats.parts import (
    assistant,
    by_strength,
    carry,
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
    which_of_two,
)
from dpoctl.data.formats.sft import alpaca_prompt
from dpoctl.data.formats.trl import synonyms, trl_explicit, trl_implicit
from dpoctl.data.records import Message, Record, Reject, Row

NEMO_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
STRONGEST = 3


def openai_preference(row: Row) -> Record:
    """OpenAI's preference files: `input` holds messages and tools, the two outputs are messages."""
    given, preferred, other = columns(row, "input", "preferred_output", "non_preferred_output")
    if not isinstance(given, dict) or "messages" not in given:
        raise Reject(SHAPE, "input is not an object with messages")
    prompt = read_messages(given["messages"], "input.messages")
    chosen, rejected = read_messages(preferred, "preferred_output"), read_messages(other, "non_preferred_output")
    record = preference(prompt, chosen, rejected)
    return carry({"tools": given.get("tools")}, record)


def helpsteer3(row: Row) -> Record:
    """HelpSteer3-Preference: a conversation, two answers, and how much better the second is, from -3 to 3."""
    context, preferred = columns(row, "context", "overall_preference")
    first, second = text_columns(row, "response1", "response2")
    return by_strength(read_messages(context, "context"), (first, second), _strength(preferred, "overall_preference"))


def helpsteer2_preference(row: Row, *, split: Literal["train", "validation", "all"] = "train") -> Record:
    """HelpSteer2-Preference: two answers, and how much better the second is, from -3 to 3.

    Its one file holds training and validation rows; `split` says which are read.
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
    label = which_of_two(labels, "labels")
    (chosen, most), (rejected, least) = sides[label], sides[1 - label]
    return compare_answers(question(prompt), chosen, rejected, (most, least))


def stack_exchange_paired(row: Row) -> Record:
    """The paired StackExchange set: `response_j` was voted above `response_k`."""
    prompt, chosen, rejected = text_columns(row, "question", "response_j", "response_k")
    return compare_answers(question(prompt), chosen, rejected)


def pku(row: Row, *, dimension: Literal["better", "safer"] = "better", require_chosen_safe: bool = False) -> Record:
    """PKU-SafeRLHF: two answers, one the more helpful and one, perhaps the other, the safer."""
    (winner,) = columns(row, f"{dimension}_response_id")
    prompt, *answers = text_columns(row, "prompt", "response_0", "response_1")
    best = which_of_two(winner, f"{dimension}_response_id")
    if require_chosen_safe and row.get(f"is_response_{best}_safe") not in (True, "True", "true"):
        raise Reject("chosen_not_safe", f"is_response_{best}_safe is {row.get(f'is_response_{best}_safe')}")
    return compare_answers(question(prompt), answers[best], answers[1 - best])


def summarize(row: Row) -> Record:
    """OpenAI's comparisons of summaries: a post or an article as plain text that `TL;DR:` ends."""
    info, summaries, choice = columns(row, "info", "summaries", "choice")
    if not isinstance(info, dict) or not isinstance(summaries, list) or len(summaries) != 2:
        raise Reject(SHAPE, "info is not an object, or summaries are not two")
    if not all(isinstance(summary, dict) and isinstance(summary.get("text"), str) for summary in summaries):
        raise Reject(SHAPE, "a summary without a text")
    best = which_of_two(choice, "choice")
    # One blank before an answer, as the posts have it after their TL;DR, whatever the row has.
    answers = [" " + summary["text"].strip() for summary in summaries]
    return preference(_post(info), answers[best], answers[1 - best])


def comparison_gpt4(row: Row, *, input_role: Literal["user", "system"] = "user") -> Record:
    """GPT-4-LLM comparisons: `output` is the better answer, then the worse; `input` is the context of the task."""
    (output,) = columns(row, "output")
    (instruction,) = text_columns(row, "instruction")
    if not isinstance(output, list) or not all(isinstance(answer, str) for answer in output):
        raise Reject(SHAPE, "output is not a list of texts")
    if len(output) != 2:
        raise Reject("missing_answer", f"output holds {len(output)} answers, not two")
    instruction, context = instruction.strip(), str(row.get("input") or "")
    if input_role == "system":
        prompt = question(instruction, context.strip())
    else:
        prompt = alpaca_prompt({"instruction": instruction, "input": context})
    return compare_answers(prompt, output[0].strip(), output[1].strip())


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
    """Argilla's rated Intel Orca pairs: `chosen` and `rejected` are already in the order of the ratings."""
    (status,) = columns(row, "status")
    prompt, chosen, rejected = text_columns(row, "input", "chosen", "rejected")
    if status == "tie":
        raise Reject("tie")
    if drop_gsm8k and row.get("in_gsm8k_train") in (True, "True", "true"):
        raise Reject("in_gsm8k_train")
    if number(row.get("chosen_score", math.inf), "chosen_score") < min_chosen_score:
        raise Reject("below_min_chosen_score", f"chosen_score is {row['chosen_score']}")
    scores = _both(row.get("rating"))
    return compare_answers(question(prompt.strip(), row.get("system")), chosen.strip(), rejected.strip(), scores)


def orca(row: Row) -> Record:
    """Intel's Orca pairs, and what axolotl reads like them: a question, two texts, perhaps a system message."""
    prompts = synonyms(row)["prompt"]
    if prompts not in (["question"], ["input"]) and not (prompts == ["prompt"] and "system" in row):
        columns(row, "question", "chosen", "rejected")
        raise Reject(SHAPE, "more than one column can be the question")
    prompt, chosen, rejected = text_columns(row, prompts[0], "chosen", "rejected")
    return compare_answers(question(prompt.strip(), row.get("system")), chosen.strip(), rejected.strip())


def axolotl(row: Row) -> Record:
    """Pairs named `chosen_response` and `rejected_response`, after an instruction or another word for it."""
    chosen, rejected = text_columns(row, "chosen_response", "rejected_response")
    prompts = synonyms(row)["prompt"]
    if len(prompts) != 1:
        raise Reject(SHAPE, "not one column that can be the prompt")
    (prompt,) = text_columns(row, prompts[0])
    return compare_answers(question(prompt, row.get("system")), chosen, rejected)


def sharegpt_ranking(row: Row) -> Record:
    """LLaMA-Factory's ShareGPT pairs: a conversation of `from` and `value`, and two turns that could follow."""
    turns, chosen, rejected = columns(row, "conversations", "chosen", "rejected")
    prompt = read_sharegpt(turns, "conversations")
    if not (prompt and prompt[0]["role"] == "system"):
        prompt = [*system_turn(row.get("system")), *prompt]
    return preference(prompt, read_sharegpt([chosen], "chosen"), read_sharegpt([rejected], "rejected"))


def alpaca_ranking(row: Row) -> Record:
    """LLaMA-Factory's alpaca pairs: an instruction, perhaps with input, system and history, and two texts."""
    if "prompt" in row:
        raise Reject(SHAPE, "a prompt of its own")
    _, chosen, rejected = text_columns(row, "instruction", "chosen", "rejected")
    return compare_answers(alpaca_prompt(row), chosen, rejected)


def llamafactory_v1(row: Row) -> Record:
    """LLaMA-Factory's pairs of whole conversations, whose shared leading messages are the prompt."""
    chosen, rejected = columns(row, "chosen_messages", "rejected_messages")
    return compare_conversations(read_weighted(chosen, "chosen_messages"), read_weighted(rejected, "rejected_messages"))


def ms_swift(row: Row) -> Record:
    """ms-swift's pairs: `messages` ends with the chosen answer; the rejected one is a text or a conversation."""
    (turns,) = columns(row, "messages")
    chosen = read_messages(turns, "messages")
    if "rejected_messages" in row:
        return compare_conversations(chosen, read_messages(row["rejected_messages"], "rejected_messages"))
    (rejected,) = text_columns(row, "rejected_response")
    if not chosen or chosen[-1]["role"] != "assistant":
        raise Reject("no_final_answer", "messages does not end with the assistant's turn")
    return preference(chosen[:-1], chosen[-1:], [assistant(rejected)])


def nemo_turns(prompt: str) -> list[Message]:
    """Split a HelpSteer prompt, in which turns after the first start with `<extra_id_1>` and who speaks."""
    first, *rest = NEMO_TURN.split(prompt)
    turns = question(first)
    for speaker, text in zip(rest[::2], rest[1::2], strict=True):
        turns.append(user(text) if speaker == "User" else assistant(text))
    return turns


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


def _both(ratings: Any) -> tuple[float, ...]:
    """The ratings of the chosen and the rejected answer, or nothing where there are not both."""
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
