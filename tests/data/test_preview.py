import io

from data_rows import pair
from rich.console import Console

from dpoctl.data.prepare import prepare
from dpoctl.data.preview import decode_runs, mask_preview, show_record


def shown(recipe, tokenizer, tmp_path, rows=2):
    store = prepare(recipe, tokenizer, cache_dir=tmp_path / "cache").train
    out = io.StringIO()
    Console(file=out, width=200, soft_wrap=True).print(mask_preview(store, tokenizer, rows))
    return out.getvalue()


def test_prompts_and_answers_are_told_apart_without_colour(make_recipe, write_rows, tokenizer, tmp_path):
    text = shown(make_recipe(train=[write_rows([pair(0), pair(1), pair(2)])]), tokenizer, tmp_path)
    assert text.count("prompt, ") == 2
    assert "question 0?" in text
    assert f"⟦{pair(0)['chosen']}<|im_end|>⟧" in text
    assert f"⟦{pair(1)['rejected']}<|im_end|>⟧" in text


def test_turns_that_are_not_trained_on_stand_outside_the_brackets(make_recipe, write_rows, tokenizer, tmp_path):
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    text = shown(make_recipe("sft", train=[write_rows([{"messages": turns}])]), tokenizer, tmp_path)
    assert "⟦b<|im_end|>⟧\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n⟦d<|im_end|>⟧" in text


def test_long_texts_are_cut_and_control_characters_made_visible(make_recipe, write_rows, tokenizer, tmp_path):
    row = pair(0) | {"prompt": "start \x1b[2J" + "x " * 2000 + "end"}
    recipe = make_recipe(train=[write_rows([row])], max_length=10_000)
    text = shown(recipe, tokenizer, tmp_path)
    assert "\x1b" not in text
    assert "start ␛[2J" in text
    assert "characters ..." in text
    assert len(text) < 2000


def test_runs_together_are_the_decoded_whole(tokenizer):
    ids = tokenizer("hello wörld, yes")["input_ids"]
    scored = [index % 3 == 0 for index in range(len(ids))]
    runs = decode_runs(tokenizer, ids, scored)
    assert "".join(run.text for run in runs) == tokenizer.decode(ids)
    assert [token for run in runs for token in run.ids] == ids
    assert [run.kind for run in runs] == [
        flag for index, flag in enumerate(scored) if not index or flag != scored[index - 1]
    ]


def test_control_tokens_stand_in_boxes_and_text_that_reads_like_them_does_not(
    make_recipe, write_rows, tokenizer, tmp_path
):
    row = {
        "prompt": [{"role": "user", "content": "say <|im_end|>"}],
        "chosen": [{"role": "assistant", "content": "no"}],
        "rejected": [{"role": "assistant", "content": "yes"}],
    }
    store = prepare(make_recipe(train=[write_rows([row])]), tokenizer, cache_dir=tmp_path / "cache").train
    text = show_record(store, tokenizer, 0, boxes=True, ids=True).plain
    assert "say <|im_end|>⟨<|im_end|>⟩\n⟨<|im_start|>⟩assistant" in text
    assert "⟦no⟨<|im_end|>⟩⟧" in text
    assert " ".join(map(str, store.example(0).suffixes[0])) in text


def test_turns_that_only_one_answer_has_are_shown_with_it(make_recipe, write_rows, tokenizer, tmp_path):
    row = {
        "prompt": [{"role": "user", "content": "q"}],
        "chosen": [
            {"role": role, "content": text} for role, text in (("assistant", "a"), ("user", "b"), ("assistant", "c"))
        ],
        "rejected": [{"role": "assistant", "content": "d"}],
    }
    text = shown(make_recipe(train=[write_rows([row])]), tokenizer, tmp_path)
    prompt, _, answers = text.partition("chosen, ")
    assert prompt.endswith("<|im_start|>assistant\n\n")
    assert "\na<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n⟦c<|im_end|>⟧" in answers
    assert "⟦d<|im_end|>⟧" in answers
