import copy
import json
import random

import pytest
from data_rows import pair

from dpoctl.data import prepare as module
from dpoctl.data.build import RecordEncoder
from dpoctl.data.cache import cache_dir
from dpoctl.data.prepare import iter_texts
from dpoctl.errors import DataError, UsageError


def prompts(store):
    return [store.texts(index).prompt for index in range(len(store))]


def test_every_row_is_used_or_rejected_with_its_place(run, write_rows, tmp_path):
    rows = [pair(0), pair(1) | {"rejected": ""}, pair(2), pair(3) | {"chosen": "x" * 3000}, {"prompt": "?"}]
    path = write_rows(rows + [pair(number) for number in range(10, 60)])
    prepared = run(train=[path])
    account = prepared.report["train"]
    assert account["rows"] == 55
    assert account["used"] == len(prepared.train) == 52
    assert account["rejected"] == {"empty_answer": 1, "too_long": 1, "wrong_shape": 1}
    prepared.write_rejects(tmp_path / "rejects.jsonl")
    rejects = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [(row["file"], row["line"], row["reason"]) for row in rejects] == [
        (path, 2, "empty_answer"),
        (path, 4, "too_long"),
        (path, 5, "wrong_shape"),
    ]


def test_a_store_is_found_again_and_not_built_twice(run, write_rows, monkeypatch):
    first = run(train=[write_rows([pair(0)], "one.jsonl")])
    monkeypatch.setattr(module, "build", None)
    moved = run(train=[write_rows([pair(0)], "two.jsonl")])
    assert moved.train.key == first.train.key
    assert moved.train.texts(0).source.endswith("two.jsonl")


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 100},
        {"max_prompt_length": 100},
        {"overlong": "truncate"},
        {"duplicates": "drop"},
        {"chat_template_kwargs": {"a": 1}},
        {"eval_size": 0.5},
        {"method": "sft"},
        {"dpo": {"loss_on": "assistant"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_tokens_changes_the_key(run, write_rows, change):
    path = write_rows([pair(number) for number in range(20)])
    assert run(**({"train": [path]} | change)).train.key != run(train=[path]).train.key


def test_the_tokenizer_is_part_of_the_key(run, write_rows, tokenizer):
    path = write_rows([pair(0)])
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["question"])
    assert run(train=[path], using=other).train.key != run(train=[path]).train.key
    other = copy.deepcopy(tokenizer)
    other.chat_template += " "
    assert run(train=[path], using=other).train.key != run(train=[path]).train.key


def test_the_seed_is_part_of_the_key_only_where_it_is_used(run, write_rows):
    path = write_rows([pair(number) for number in range(20)])
    assert run(train=[path], seed=1).train.key == run(train=[path], seed=2).train.key
    assert run(train=[path], seed=1, prompt_truncation="keep_start").train.key == run(train=[path]).train.key
    sampled = [{"path": path, "max_samples": 5}]
    assert run(train=sampled, seed=1).train.key != run(train=sampled, seed=2).train.key


def test_a_damaged_store_is_built_again(run, write_rows):
    path = write_rows([pair(0)])
    store = run(train=[path]).train
    shared = store.example(0).shared.tolist()
    # Truncating a mapped file kills whoever looks at it, so a damaged one takes its place.
    (store.folder / "ids.bin").unlink()
    (store.folder / "ids.bin").write_bytes(b"")
    assert run(train=[path]).train.example(0).shared.tolist() == shared


def test_the_split_depends_on_seed_and_prompt_alone(run, write_rows):
    rows = [pair(number) for number in range(60)]
    rows += [row | {"chosen": " another"} for row in rows[:20]]
    held = set(prompts(run(train=[write_rows(rows)], eval_size=0.3).evals["eval"]))
    random.Random(0).shuffle(rows)
    fewer = rows[:50]
    again = run(train=[write_rows(fewer)], eval_size=0.3)
    assert set(prompts(again.evals["eval"])) == held & {row["prompt"] for row in fewer}
    assert not set(prompts(again.train)) & held
    assert len(again.train) + len(again.evals["eval"]) == 50
    assert again.report["train"]["held_out"] == again.report["evals"]["eval"]["used"]
    other = run(train=[write_rows(rows)], eval_size=0.3, seed=1)
    assert set(prompts(other.evals["eval"])) != held


@pytest.mark.parametrize("size", [1, 7, 25])
def test_a_number_of_rows_can_be_held_out(run, write_rows, size):
    prepared = run(train=[write_rows([pair(number) for number in range(50)])], eval_size=size)
    assert len(prepared.evals["eval"]) == size
    assert len(prepared.train) == 50 - size


def test_pairs_that_share_a_prompt_are_held_out_together(run, write_rows):
    rows = [pair(number) | {"prompt": f"group {number // 5}"} for number in range(50)]
    prepared = run(train=[write_rows(rows)], eval_size=7)
    assert not set(prompts(prepared.train)) & set(prompts(prepared.evals["eval"]))
    assert len(prepared.evals["eval"]) == 10


def test_texts_without_a_prompt_are_held_out_one_by_one(run, write_rows):
    rows = [{"text": f"text {number}"} for number in range(50)]
    prepared = run(train=[write_rows(rows)], eval_size=7, method="sft")
    assert len(prepared.evals["eval"]) == 7
    assert len(prepared.train) == 43
    assert prepared.report["evals"]["eval"]["leaked"]["records"] == 0


def test_a_split_that_holds_out_everything_is_refused(run, write_rows):
    with pytest.raises(DataError, match=r"3 held_out; data.eval_size holds out all rows: lower it"):
        run(train=[write_rows([pair(number) for number in range(3)])], eval_size=5)


def test_a_share_that_holds_out_nothing_is_refused(run, write_rows):
    with pytest.raises(DataError, match=r"data.eval_size: 0.001 holds out no rows: .* few; give a number of rows"):
        run(train=[write_rows([pair(number) for number in range(3)])], eval_size=0.001)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], r"^train: \S+: no rows$"),
        ([{"prompt": "a", "chosen": "", "rejected": "b"}] * 9, "none of 9 rows can be used"),
    ],
)
def test_a_split_is_not_to_blame_for_rows_that_cannot_be_used(run, write_rows, rows, said):
    with pytest.raises(DataError, match=said):
        run(train=[{"path": write_rows(rows), "format": "trl-explicit"}], eval_size=1)


def test_a_weight_is_how_often_a_row_is_seen(run, write_rows):
    path = write_rows([pair(number) for number in range(20)])
    seen = prompts(run(train=[{"path": path, "weight": 2.5}]).train)
    assert len(seen) == 50
    assert sorted({seen.count(prompt) for prompt in seen}) == [2, 3]
    half = run(train=[{"path": path, "weight": 0.5}])
    assert len(half.train) == 10
    assert half.report["train"]["unsampled"] == 10
    assert prompts(half.train) == prompts(run(train=[{"path": path, "weight": 0.5}]).train)
    assert prompts(half.train) != prompts(run(train=[{"path": path, "weight": 0.5}], seed=1).train)


def test_held_out_rows_are_seen_once_whatever_their_weight(run, write_rows):
    path = write_rows([pair(number) for number in range(20)])
    prepared = run(train=[{"path": path, "weight": 3}], eval_size=5)
    assert (len(prepared.train), len(prepared.evals["eval"])) == (45, 5)


def test_max_samples_takes_a_seeded_sample(run, write_rows):
    path = write_rows([pair(number) for number in range(50)])
    first = prompts(run(train=[{"path": path, "max_samples": 10}]).train)
    assert len(set(first)) == 10
    assert first != [f"question {number}?" for number in range(10)]
    assert first == prompts(run(train=[{"path": path, "max_samples": 10}]).train)
    assert len(run(train=[{"path": path, "max_samples": 99}]).train) == 50


def mixed_rows(count):
    """Rows of which two thirds cannot be used: too long, or with two equal answers."""
    kinds = (pair, lambda n: pair(n, words=200), lambda n: pair(n) | {"chosen": "same", "rejected": "same"})
    return [kinds[number % 3](number) for number in range(count)]


def test_max_samples_counts_rows_that_can_be_used(run, write_rows):
    path = write_rows(mixed_rows(90))
    some = run(train=[{"path": path, "max_samples": 12}], max_length=100).report["train"]
    assert (some["used"], some["records"]) == (12, 12)
    assert sum(some["rejected"].values()) + some["unsampled"] == 78
    assert some["unsampled"] > 0
    first, more = (prompts(run(train=[{"path": path, "max_samples": n}], max_length=100).train) for n in (12, 20))
    assert (len(more), set(first) < set(more)) == (20, True)
    every = run(train=[{"path": path, "max_samples": 40}], max_length=100).report["train"]
    assert (every["used"], every["unsampled"], every["rejected"]) == (30, 0, {"identical_answers": 30, "too_long": 30})


def test_max_samples_of_each_source_holds_with_weights_splits_and_duplicates(run, write_rows):
    path, other = write_rows(mixed_rows(90)), write_rows([pair(number) for number in range(100, 109)], "other.jsonl")
    sampled = {"path": path, "max_samples": 12}
    assert len(run(train=[{**sampled, "weight": 0.5}, other], max_length=100).train) == 6 + 9
    assert len(run(train=[{**sampled, "weight": 2}, other], max_length=100).train) == 24 + 9
    split = run(train=[sampled], eval_size=0.4, max_length=100)
    assert len(split.train) + len(split.evals["eval"]) == 12
    assert set(prompts(split.train)).isdisjoint(prompts(split.evals["eval"]))
    again = write_rows(mixed_rows(90) + mixed_rows(90), "again.jsonl")
    assert len(run(train=[{"path": again, "max_samples": 25}], max_length=100, duplicates="drop").train) == 25


def test_rows_that_max_samples_does_not_need_are_not_tokenized(run, write_rows, monkeypatch):
    seen = []
    encode = RecordEncoder.encode
    monkeypatch.setattr(
        RecordEncoder, "encode", lambda self, records, sources: seen.extend(records) or encode(self, records, sources)
    )
    path = write_rows(mixed_rows(3000))
    assert len(run(train=[{"path": path, "max_samples": 10}], max_length=100).train) == 10
    assert len(seen) < 200


def test_several_sources_are_read_in_order_each_in_its_format(run, write_rows):
    plain = write_rows([pair(0)], "plain.jsonl")
    hh = write_rows(
        [{"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}], "hh.jsonl"
    )
    prepared = run(train=[plain, hh])
    assert prompts(prepared.train) == ["question 0?", "\n\nHuman: q\n\nAssistant:"]
    assert [source["format"] for source in prepared.report["train"]["sources"]] == ["trl-explicit", "hh"]


@pytest.mark.parametrize(("policy", "records", "rejected"), [("keep", 3, {}), ("drop", 2, {"duplicate": 1})])
def test_duplicates_are_counted_and_dropped_if_asked(run, write_rows, policy, records, rejected):
    prepared = run(train=[write_rows([pair(0), pair(1), pair(0)])], duplicates=policy)
    account = prepared.report["train"]
    assert (len(prepared.train), account["duplicates"], account["rejected"]) == (records, 1, rejected)


def test_truncated_rows_and_missing_ends_are_counted(run, write_rows, tokenizer):
    rows = [pair(0), pair(1, words=200), pair(2) | {"prompt": "long " * 200}]
    prepared = run(train=[write_rows(rows)], overlong="truncate", max_length=64)
    account = prepared.report["train"]
    assert account["prompts_truncated"] == 1
    assert (account["answers_truncated"], account["rows_without_eos"]) == (2, 1)
    assert account["tokens"]["chosen"]["max"] < 64
    for index in range(3):
        example = prepared.train.example(index)
        ends = [suffix[-1] == tokenizer.eos_token_id for suffix in example.suffixes]
        assert ends == [index != 1] * 2
        assert all(len(example.shared) + len(suffix) <= 64 for suffix in example.suffixes)


def test_rows_that_are_equal_only_after_truncation_are_rejected(run, write_rows):
    same = " same" * 100
    rows = [{"prompt": "q", "chosen": same + " a", "rejected": same + " b"}, pair(0)]
    account = run(train=[write_rows(rows)], overlong="truncate", max_length=50).report["train"]
    assert account["rejected"] == {"identical_tokens": 1}


def test_a_set_without_usable_rows_is_refused_with_the_reasons(run, write_rows, tmp_path):
    path = write_rows([pair(0) | {"chosen": ""}, pair(1) | {"rejected": pair(1)["chosen"]}])
    with pytest.raises(DataError) as error:
        run(train=[path])
    assert f"none of 2 rows can be used: 1 empty_answer ({path}:1" in str(error.value)
    assert "1 identical_answers" in str(error.value)
    assert not list((tmp_path / "cache" / "tokens").iterdir())


def test_an_empty_file_is_refused(run, write_rows):
    with pytest.raises(DataError, match="no rows"):
        run(train=[write_rows([])])


def test_stdin_cannot_be_data_of_a_recipe(run):
    with pytest.raises(DataError, match="stdin"):
        run(train=["-"])


def test_demonstrations_come_from_messages_or_from_the_chosen_side(run, write_rows, tokenizer):
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "b"},
    ]
    messages, pairs = write_rows([{"messages": turns}], "messages.jsonl"), write_rows([pair(0)], "pairs.jsonl")
    prepared = run("sft", train=[messages, pairs])
    assert prepared.train.texts(1).responses == (pair(0)["chosen"],)
    assert prepared.train.num_tokens[0] == len(tokenizer("a<|im_end|>b<|im_end|>")["input_ids"])
    last = run("sft", train=[messages, pairs], sft={"loss_on": "last"})
    assert last.train.num_tokens[0] == len(tokenizer("b<|im_end|>")["input_ids"])


def test_single_answers_are_no_preference(run, write_rows):
    with pytest.raises(DataError, match="1 no_pair"):
        run(train=[write_rows([{"prompt": "q", "completion": "a"}])])


def test_only_eval_leaves_the_training_set_alone(run, write_rows):
    path = write_rows([pair(number) for number in range(20)])
    prepared = run(train=["gone.jsonl"], eval={"a": [path], "b": [path]}, only_eval=True)
    assert prepared.evals.keys() == {"a", "b"}
    assert prepared.train_store is None
    assert prepared.report["evals"]["a"]["used"] == 20


def test_the_grammar_can_be_prepared_for_both_methods(run):
    for method, records in (("sft", 4800), ("dpo", 1200)):
        train, test = ({"path": "demo:reviewer2", "split": split} for split in ("unreviewed", "test"))
        prepared = run(method, train=[train], eval=[test])
        assert len(prepared.train) == records
        assert prepared.report["evals"]["eval"]["rejected"] == {}


def test_texts_for_a_tokenizer_are_those_of_the_training_rows(make_recipe, write_rows):
    recipe = make_recipe(train=[write_rows([pair(0), pair(1) | {"chosen": ""}])], eval=["gone.jsonl"])
    assert list(iter_texts(recipe)) == [pair(0)["prompt"], pair(0)["chosen"], pair(0)["rejected"]]


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("DPOCTL_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("DPOCTL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "dpoctl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir().parts[-2:] == (".cache", "dpoctl")


def test_real_transcripts_are_prepared_and_accounted_for(run, hh_file):
    account = run(train=[str(hh_file)], max_length=4096).report["train"]
    assert account["rows"] == 1500 == account["used"] + sum(account["rejected"].values())


SLOW = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.long("1-1 row is left out-read once", "1-1 row is left out-read twice", "2-2 rows are left out-read once")
@pytest.mark.parametrize("contradict", [False, True], ids=["read once", "read twice"])
@pytest.mark.parametrize(("slow", "named"), [(1, "1 row is left out"), (2, "2 rows are left out")])
def test_rows_that_a_busy_machine_leaves_out_are_not_kept_out_of_later_runs(
    run, write_rows, tokenizer, monkeypatch, tmp_path, slow, named, contradict
):
    def chat(asked, chosen="yes", rejected="no"):
        turns = {"prompt": ("user", asked), "chosen": ("assistant", chosen), "rejected": ("assistant", rejected)}
        return {name: [{"role": role, "content": text}] for name, (role, text) in turns.items()}

    rows = [chat("quick"), *(chat(f"slow {number}") for number in range(slow))]
    if contradict:
        rows += [chat("which"), chat("which"), chat("which", "no", "yes")]
    path = write_rows(rows)
    mine = copy.deepcopy(tokenizer)
    mine.chat_template = (
        f"{{% if 'slow' in messages[0].content and busy %}}{SLOW}{{% endif %}}{tokenizer.chat_template}"
    )
    monkeypatch.setattr("dpoctl.data.chat_template.RENDER_SECONDS", 0.5)
    with pytest.raises(DataError) as refused:
        run(using=mine, train=[path], chat_template_kwargs={"busy": True})
    message = str(refused.value)
    assert message.startswith(f"train: {named} ({path}:2): the chat template took more than 0.5 s for one conv")
    assert message.endswith("; start again on an idle machine, or set model.chat_template to another one")
    assert not list((tmp_path / "cache").rglob("*.bin"))
    assert run(using=mine, train=[path], chat_template_kwargs={"busy": False}).report["train"]["used"] > slow


def test_transcripts_read_as_messages_are_the_tokens_of_those_messages(run, write_rows):
    turns = ["why?", "so", "really?"]
    chosen, rejected = "\n\nHuman: why?\n\nAssistant: so\n\nHuman: really?\n\nAssistant:", " yes"
    transcript = write_rows([{"chosen": chosen + rejected, "rejected": chosen + " no"}] * 3, "hh.jsonl")
    roles = ["user", "assistant", "user"]
    talk = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
    answers = {side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "yes"), ("rejected", "no"))}
    messages = write_rows([{"prompt": talk} | answers] * 3, "messages.jsonl")
    one, other = (
        run(train=[source]).train.example(0)
        for source in ({"path": transcript, "format_options": {"as": "messages"}}, messages)
    )
    assert one.shared.tolist() == other.shared.tolist()
    assert [row.tolist() for row in one.suffixes] == [row.tolist() for row in other.suffixes]
    with pytest.raises(UsageError, match=r"messages\.jsonl: option as: messages would do nothing"):
        run(train=[{"path": messages, "format_options": {"as": "messages"}}])
