"""Ratings become pairs, and sources with ratings, labels and several answers become the records that a loss needs."""

import pytest
from data_rows import pair

from dpoctl.data import prepare as module
from dpoctl.data.pairing import Pairing, pair_up, with_pairs
from dpoctl.data.records import Record, Reject
from dpoctl.errors import DataError, UsageError


def rated(*scores, prompt="q", **fields):
    return Record(prompt, tuple(f"answer {index}" for index in range(len(scores))), scores=scores, **fields)


def pairs_of(record, **pairing):
    """The pairs by the texts of their answers."""
    record, _ = pair_up(record, Pairing(**pairing))
    return [(record.responses[winner][-1], record.responses[loser][-1]) for winner, loser in record.pairs]


def reason(record, **pairing):
    with pytest.raises(Reject) as error:
        pair_up(record, Pairing(**pairing))
    return error.value.reason


SEVEN = rated(4, 1, 7, 2, 6, 3, 5)


@pytest.mark.parametrize(
    ("mode", "number"), [("best-worst", 1), ("best-rest", 6), ("best-random", 1), ("adjacent", 6), ("all", 21)]
)
def test_seven_answers_make_as_many_pairs_as_the_mode_says(mode, number):
    assert len(pairs_of(SEVEN, mode=mode)) == number


def test_best_worst_compares_the_ends():
    assert pairs_of(SEVEN) == [("2", "1")]


def test_best_rest_compares_the_best_with_each_in_order():
    assert pairs_of(rated(2, 3, 1), mode="best-rest") == [("1", "0"), ("1", "2")]


def test_adjacent_compares_neighbours():
    assert pairs_of(rated(2, 4, 1, 3), mode="adjacent") == [("1", "3"), ("3", "0"), ("0", "2")]


def test_all_is_what_a_list_wise_loss_needs():
    assert pairs_of(rated(2, 3, 1), mode="all") == [("1", "0"), ("1", "2"), ("0", "2")]


def test_best_random_is_drawn_by_seed_and_prompt_and_by_nothing_else():
    drawn = {seed: pairs_of(SEVEN, mode="best-random", seed=seed)[0] for seed in range(40)}
    assert {winner for winner, _ in drawn.values()} == {"2"}
    assert {loser for _, loser in drawn.values()} == set("013456")
    for seed, drawn_pair in reversed(drawn.items()):
        assert pairs_of(SEVEN, mode="best-random", seed=seed) == [drawn_pair]
    prompts = {pairs_of(rated(3, 2, 1, prompt=f"q{number}"), mode="best-random")[0] for number in range(20)}
    assert prompts == {("0", "1"), ("0", "2")}


def test_best_random_never_draws_an_answer_as_good_as_the_best():
    for seed in range(10):
        assert pairs_of(rated(5, 5, 5, 1), mode="best-random", seed=seed) == [("0", "3")]


def test_answers_without_a_pair_are_dropped_and_indices_follow():
    record, _ = pair_up(rated(2, 1, 3), Pairing())
    assert record == Record("q", ("answer 1", "answer 2"), ((1, 0),), scores=(1, 3))


def test_the_target_stays_even_without_a_pair():
    record, _ = pair_up(rated(2, 1, 3, target=0), Pairing())
    assert (record.responses, record.pairs, record.target) == (("answer 0", "answer 1", "answer 2"), ((2, 1),), 0)


def test_the_target_wins_among_equals():
    assert pairs_of(rated(3, 3, 1, target=1)) == [("1", "2")]


def test_ties_are_dropped_and_counted():
    record, tied = pair_up(rated(3, 3, 1), Pairing(mode="all"))
    assert (record.pairs, tied) == (((0, 2), (1, 2)), 1)
    assert "tie" not in record.meta


def test_ties_can_be_kept_and_are_marked():
    record, tied = pair_up(rated(3, 3, 1, meta={"id": 7}), Pairing(mode="all", ties="keep", min_margin=1))
    assert (record.pairs, tied) == (((0, 1), (0, 2), (1, 2)), 0)
    assert record.meta == {"id": 7, "tie": True}
    assert "tie" not in pair_up(rated(3, 1), Pairing(ties="keep"))[0].meta


def test_nothing_but_ties_is_a_tie():
    assert reason(rated(2, 2, 2), mode="all") == "tie"


@pytest.mark.parametrize("ties", ["drop", "keep"])
def test_answers_that_differ_in_white_space_only_are_a_tie_whatever_they_scored(ties):
    record = Record("q", ("a b", "a  b\n", "c"), scores=(3, 1, 0))
    paired, tied = pair_up(record, Pairing(mode="all", ties=ties))
    assert (paired.pairs, tied) == (((0, 2), (1, 2)), 1)
    assert reason(Record("q", ("a b", "a  b"), scores=(3, 1)), ties=ties) == "tie"


def test_a_margin_below_the_smallest_is_too_small_and_one_equal_to_it_is_not():
    assert pairs_of(rated(3, 2, 1), mode="all", min_margin=2) == [("0", "2")]
    assert reason(rated(3, 2.5), min_margin=1) == "margin_too_small"


def test_explicit_pairs_stay_whatever_the_mode():
    record = rated(1, 3, 2, pairs=((2, 0),))
    assert pairs_of(record, mode="all") == [("2", "0")]


def test_explicit_pairs_without_scores_stay_as_they_are():
    record = Record("q", ("a", "b", "c"), ((0, 1), (0, 2)))
    assert pair_up(record, Pairing(min_margin=5)) == (record, 0)


@pytest.mark.parametrize(
    ("scores", "expected"), [((1, 2), "scores_disagree"), ((2, 2), "tie"), ((2.5, 2), "margin_too_small")]
)
def test_explicit_pairs_go_where_scores_speak_against_them(scores, expected):
    assert reason(rated(*scores, pairs=((0, 1),)), min_margin=1) == expected


def test_of_several_explicit_pairs_only_those_that_scores_speak_against_go():
    record = rated(3, 1, 2, 3, pairs=((0, 1), (1, 2), (0, 3), (0, 2)))
    paired, tied = pair_up(record, Pairing())
    assert (paired.responses, paired.pairs, tied) == (("answer 0", "answer 1", "answer 2"), ((0, 1), (0, 2)), 1)


def test_the_widest_pairs_are_kept_in_their_order():
    # Margins of all pairs of 9, 5, 4, 0: 4, 5, 9, 1, 5, 4.
    record = rated(9, 5, 4, 0)
    assert pairs_of(record, mode="all", max_pairs=3) == [("0", "2"), ("0", "3"), ("1", "3")]


def test_the_seed_decides_among_pairs_of_equal_margin():
    kept = {tuple(pairs_of(rated(2, 1, 1, 1), mode="all", max_pairs=1, seed=seed)) for seed in range(30)}
    assert kept == {(("0", "1"),), (("0", "2"),), (("0", "3"),)}


def test_pairs_without_scores_are_capped_by_seed():
    record = Record("q", ("a", "b", "c"), ((0, 1), (0, 2), (1, 2)))
    assert len(pairs_of(record, max_pairs=2)) == 2
    kept = {tuple(pairs_of(record, max_pairs=1, seed=seed)) for seed in range(30)}
    assert kept == {(("a", "b"),), (("a", "c"),), (("b", "c"),)}


@pytest.mark.parametrize("record", [Record("q", ("a",)), rated(3), Record("q", ("a", "b"))])
def test_a_record_with_nothing_to_choose_from_is_left_alone(record):
    assert pair_up(record, Pairing()) == (record, 0)


def test_pairs_can_be_given_to_a_record():
    record = rated(1, 2, 3, target=2)
    assert with_pairs(record, [(1, 0)]) == rated(1, 2, 3, target=2, pairs=((1, 0),))
    assert with_pairs(record, [(2, 1)]).responses == ("answer 1", "answer 2")


RANKED = {"prompt": "p", "responses": ["a", "b", "c", "d"], "scores": [1, 3, 2, 3]}


@pytest.mark.parametrize(
    "change",
    [
        {"format": "ranking", "format_options": {}, "metrics": "mine"},
        {"overlong": "drop", "max_length": 1024},
        {"ties": "drop", "pairs": "best-worst"},
    ],
    ids=str,
)
def test_what_a_source_says_without_effect_leaves_the_key_alone(run, write_rows, change):
    path = write_rows([RANKED])
    assert run(train=[{"path": path} | change]).train.key == run(train=[path]).train.key


@pytest.mark.parametrize(
    "change",
    [{"pairs": "all"}, {"min_margin": 1.5}, {"max_pairs_per_prompt": 1}, {"ties": "keep"}, {"max_length": 99}],
    ids=str,
)
def test_what_a_source_says_with_effect_changes_the_key(run, write_rows, change):
    path = write_rows([RANKED])
    assert run(train=[{"path": path} | change]).train.key != run(train=[path]).train.key


def test_the_recipe_comes_back_with_the_formats_that_were_found(run, write_rows):
    hh = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
    train, heldout = write_rows([hh], "hh.jsonl"), write_rows([RANKED], "ranked.jsonl")
    prepared = run(train=[train], eval={"x": [heldout]})
    data = prepared.recipe.data
    assert (data.train[0].format, data.eval["x"][0].format) == ("hh", "ranking")
    again = run(train=[data.train[0].model_dump()], eval={"x": [heldout]})
    assert again.train.key == prepared.train.key
    assert prepared.report["train"]["sources"][0]["evidence"]
    assert not again.report["train"]["sources"][0]["evidence"]


def test_a_ranking_is_one_record_with_its_pairs(run, write_rows):
    prepared = run(train=[{"path": write_rows([RANKED]), "pairs": "all"}])
    assert prepared.train.pairs.tolist() == [[1, 2], [1, 0], [3, 2], [3, 0], [2, 0]]
    account = prepared.report["train"]
    assert (account["rows"], account["used"], account["records"], account["pairs"]) == (1, 1, 1, 5)
    assert account["tied_pairs"] == 1
    best = run(train=[write_rows([RANKED])]).train
    assert best.texts(0).responses == ("a", "b")


def test_each_source_has_its_own_lengths_and_its_own_counts(run, write_rows):
    paths = [
        write_rows([pair(0, words=30), pair(1), pair(2) | {"chosen": ""}], name) for name in ("a.jsonl", "b.jsonl")
    ]
    short = {"path": paths[1], "max_length": 48}
    account = run(train=[paths[0], short]).report["train"]
    assert [source["rows"] for source in account["sources"]] == [3, 3]
    assert [source["used"] for source in account["sources"]] == [2, 1]
    assert [source["rejected"] for source in account["sources"]] == [
        {"empty_answer": 1},
        {"empty_answer": 1, "too_long": 1},
    ]
    assert account["rejected"] == {"empty_answer": 2, "too_long": 1}
    cut = run(train=[paths[0], short | {"overlong": "truncate"}])
    lengths = [len(cut.train.example(index).shared) + len(cut.train.example(index).suffixes[0]) for index in range(4)]
    assert [length > 48 for length in lengths] == [True, False, False, False]
    assert cut.report["train"]["answers_truncated"] == 2


def test_rows_that_mean_something_only_together_are_sampled_and_counted_together(run, write_rows):
    marks = dict.fromkeys(("correctness", "coherence", "complexity", "verbosity"), 0)
    rows = [
        {"prompt": f"p{prompt}", "response": f"answer {mark}", "helpfulness": mark} | marks
        for mark in (1, 4)
        for prompt in range(10)
    ]
    path = write_rows(rows)
    account = run(train=[path]).report["train"]
    assert (account["rows"], account["used"], account["records"]) == (20, 20, 10)
    few = run(train=[{"path": path, "max_samples": 3}])
    assert len(few.train) == 3
    assert (few.report["train"]["used"], few.report["train"]["unsampled"]) == (6, 14)
    demonstrations = run("sft", train=[path])
    assert len(demonstrations.train) == 10
    assert demonstrations.train.texts(0).responses[0][0]["content"] == "answer 4"


def test_contradictory_rows_are_settled_by_majority(run, write_rows):
    one = {"prompt": "p", "chosen": " a", "rejected": " b"}
    other = {"prompt": "p", "chosen": " b", "rejected": " a"}
    prepared = run(train=[write_rows([other, one, one, pair(0)])])
    assert [prepared.train.texts(index).responses[0] for index in range(3)] == [" a", " a", pair(0)["chosen"]]
    assert prepared.report["train"]["rejected"] == {"outvoted": 1}
    assert prepared.report["train"]["used"] == 3


def test_a_source_is_read_once_where_nothing_contradicts(run, write_rows, monkeypatch):
    built = []
    monkeypatch.setattr(module, "build", lambda *args, build=module.build: built.append(args) or build(*args))
    run(train=[write_rows([pair(0), pair(0), pair(1)])])
    assert len(built) == 1


def test_prompts_of_an_eval_set_that_are_trained_on_are_counted(run, write_rows, capsys):
    train = write_rows([pair(number) for number in range(5)], "train.jsonl")
    spaced = pair(4) | {"prompt": f" {pair(4)['prompt']}\n"}
    leaky = write_rows([pair(3) | {"chosen": " other"}, pair(3), spaced, pair(9)], "leaky.jsonl")
    clean = write_rows([pair(8)], "clean.jsonl")
    report = run(train=[train], eval={"leaky": [leaky], "clean": [clean]}).report
    assert report["evals"]["leaky"]["leaked"] == {"prompts": 2, "records": 3}
    assert report["evals"]["clean"]["leaked"] == {"prompts": 0, "records": 0}
    said = " ".join(capsys.readouterr().err.split())
    assert "leaky: 3 of 4 records have a prompt that the training set holds too, so their results" in said
    assert "clean: 1 of 1 records" not in said


def test_the_gap_of_lengths_is_reported(run, write_rows):
    tokens = run(train=[write_rows([pair(number) for number in range(10)])]).report["train"]["tokens"]
    assert tokens.keys() == {"total", "scored", "prompt", "chosen", "rejected", "gap"}
    assert tokens["gap"]["max"] == tokens["chosen"]["p50"] - tokens["rejected"]["p50"]
    assert tokens["gap"].keys() == {"mean", "p5", "p50", "p95", "max"}


def test_a_list_wise_loss_gets_rankings(run, write_rows):
    ranked = RANKED | {"scores": [1, 3, 2, 4]}
    rows = [ranked, RANKED | {"prompt": "tied"}, {"prompt": "q", "chosen": "a", "rejected": "b"}]
    path = write_rows([{"prompt": "q", "responses": ["a", "b", "c"], "pairs": [[0, 1], [1, 2]]}, *rows[:2]])
    prepared = run(train=[{"path": path, "format": "ranking"}], wants="rankings")
    assert [len(prepared.train.texts(index).responses) for index in range(2)] == [3, 4]
    assert prepared.report["train"]["rejected"] == {"not_a_ranking": 1}
    assert prepared.train.pairs[prepared.train.pair_start[1] :].tolist() == [
        [3, 1],
        [3, 2],
        [3, 0],
        [1, 2],
        [1, 0],
        [2, 0],
    ]
    with pytest.raises(DataError, match="holds pairs; a list-wise loss needs rankings"):
        run(train=[write_rows(rows[2:], "pairs.jsonl")], wants="rankings")


def test_a_loss_of_labels_gets_labelled_answers(run, write_rows):
    rows = [{"prompt": "q", "completion": answer, "label": answer == "a"} for answer in "ab"]
    prepared = run(train=[write_rows(rows)], wants="labels")
    assert prepared.train.label.tolist() == [1, 0]
    with pytest.raises(DataError, match="2 no_label") as error:
        run(train=[write_rows([pair(0), pair(1)])], wants="labels")
    assert "--to unpaired" in error.value.hint


@pytest.mark.parametrize("change", [{"pairs": "all"}, {"min_margin": 1.0}, {"ties": "keep"}])
def test_a_key_that_no_row_has_a_use_for_is_refused(run, write_rows, change):
    (key,) = change
    with pytest.raises(DataError, match=rf"rows\.jsonl: {key} would do nothing: no row of format trl-explicit"):
        run(train=[{"path": write_rows([pair(0)])} | change])


def test_an_unknown_option_of_a_format_is_refused(run, write_rows):
    with pytest.raises(UsageError, match=r"rows\.jsonl: format trl-explicit has no option 'x'"):
        run(train=[{"path": write_rows([pair(0)]), "format_options": {"x": 1}}])


def test_the_pairs_of_one_prompt_are_limited_over_all_rows(run, write_rows):
    rows = [pair(0) | {"rejected": f" {number}"} for number in range(5)] + [pair(1)]
    account = run(train=[{"path": write_rows(rows), "max_pairs_per_prompt": 2}]).report["train"]
    assert (account["used"], account["rejected"]) == (3, {"enough_pairs": 3})


def test_an_answer_of_several_turns_is_judged_by_its_last_or_by_all(run, write_rows, tokenizer):
    def side(*texts):
        turns = [{"role": "assistant", "content": text} for text in texts]
        return [turns[0], {"role": "user", "content": "go on"}, turns[1]]

    row = {"prompt": [{"role": "user", "content": "q"}], "chosen": side("a", "b"), "rejected": side("c", "d")}
    path = write_rows([row])
    last, every = ["b<|im_end|>", "d<|im_end|>"], ["a<|im_end|>b<|im_end|>", "c<|im_end|>d<|im_end|>"]
    for loss_on, texts in (("last", last), ("assistant", every)):
        store = run(train=[path], dpo={"loss_on": loss_on}).train
        assert store.num_tokens.tolist() == [len(tokenizer(text)["input_ids"]) for text in texts]
    assert run(train=[path]).train.num_tokens.tolist() == [len(tokenizer(text)["input_ids"]) for text in last]


def conversation(*texts):
    return [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 3, texts, strict=False)]


def test_pairs_that_part_before_their_last_turns_are_counted_in_a_warning(run, write_rows, capsys):
    rows = [
        {"chosen": conversation("q", "a", "more", "b"), "rejected": conversation("q", "no")},
        {"chosen": conversation("q", "a"), "rejected": conversation("q", "no", "why", "so")},
        {"chosen": conversation("q", "a", "more", "b"), "rejected": conversation("q", "no", "more", "d")},
        {"chosen": conversation("q", "a", "more", "b"), "rejected": conversation("q", "a", "more", "d")},
        {"chosen": conversation("q", "a"), "rejected": conversation("q", "b")},
    ]
    path = write_rows(rows)
    assert run(train=[path]).report["train"]["template"] == {"parts_early": 3}
    said = capsys.readouterr().err
    assert "warning: train: the answers part before their last turns" in said
    assert "set dpo.loss_on: assistant to compare every turn from where they part (3 rows)" in said
    assert run(train=[path], dpo={"loss_on": "assistant"}).report["train"]["template"] == {}
    assert "part before" not in capsys.readouterr().err


def test_turns_that_explicit_answers_share_do_not_part_them(run, write_rows):
    prompt, shared = conversation("q"), conversation("", "a", "more")[1:]
    row = {
        "prompt": prompt,
        "chosen": [*shared, conversation("", "b")[1]],
        "rejected": [*shared, conversation("", "c")[1]],
    }
    call = {"role": "assistant", "content": "look", "tool_calls": []}
    tools = {"prompt": prompt, "chosen": [call, conversation("", "b")[1]], "rejected": conversation("", "c")[1:]}
    assert run(train=[write_rows([row])]).report["train"]["template"] == {}
    assert run(train=[write_rows([tools], "tools.jsonl")]).report["train"]["template"] == {"parts_early": 1}


def test_comparisons_of_two_and_more_answers_stay_whole_for_a_list_wise_loss(run, write_rows):
    rows = [
        {"instruction": f"Name bird {number}.", "input": "", "output": ["wren", "bird", "no", "none"][:number]}
        for number in (2, 3, 4)
    ]
    whole = run(train=[write_rows(rows)], wants="rankings")
    assert whole.recipe.data.train[0].format == "comparison-gpt4"
    assert [len(whole.train.texts(index).responses) for index in range(3)] == [2, 3, 4]
    assert whole.report["train"]["pairs"] == 1 + 3 + 6
    best = run(train=[{"path": write_rows(rows), "pairs": "best-rest"}])
    assert best.report["train"]["pairs"] == 1 + 2 + 3
