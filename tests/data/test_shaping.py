"""Sources with ratings, labels and several answers, prepared for whatever a loss learns from."""

import pytest
from data_rows import pair

from dpoctl.data import prepare as module
from dpoctl.errors import DataError, UsageError

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
    monkeypatch.setattr(module, "build", lambda *args, build=module.build, **kw: built.append(kw) or build(*args, **kw))
    run(train=[write_rows([pair(0), pair(0), pair(1)])])
    assert [call["settle"] for call in built] == [False]


def test_prompts_of_an_eval_set_that_are_trained_on_are_counted(run, write_rows, capsys):
    train = write_rows([pair(number) for number in range(5)], "train.jsonl")
    spaced = pair(4) | {"prompt": f" {pair(4)['prompt']}\n"}
    leaky = write_rows([pair(3) | {"chosen": " other"}, pair(3), spaced, pair(9)], "leaky.jsonl")
    clean = write_rows([pair(8)], "clean.jsonl")
    report = run(train=[train], eval={"leaky": [leaky], "clean": [clean]}).report
    assert report["evals"]["leaky"]["leaked"] == {"prompts": 2, "records": 3}
    assert report["evals"]["clean"]["leaked"] == {"prompts": 0, "records": 0}
    said = " ".join(capsys.readouterr().err.split())
    assert "leaky: 3 of 4 records have a prompt that is trained on" in said
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
