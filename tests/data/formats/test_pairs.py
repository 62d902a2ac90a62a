import csv
import json
from pathlib import Path

import pytest
from format_samples import assistant, outcome, outcomes, pair, rated, rows, system, transcript, user

from dpoctl.data.formats import read
from dpoctl.data.formats.detect import detect
from dpoctl.data.records import Record


def test_openai_preferences_keep_their_tools_and_call_developers_system():
    first, second, third, *others = outcomes("openai-preference")
    assert first == pair("Name a prime.", "7", "9")
    assert second.prompt == [system("Be brief."), user("How is Bonn today?")]
    assert second.responses[0][0]["tool_calls"][0]["function"]["name"] == "weather"
    assert [tool["function"]["name"] for tool in second.tools] == ["weather"]
    assert third == pair([user("Hi"), assistant("Hello!"), user("Translate: cat (German)")], "Katze", "Hund")
    assert others == ["empty_answer", pair("Count to 3.", "1 2 3", "1 3")]


def test_helpsteer3_strengths_below_zero_speak_for_the_first_answer():
    assert outcomes("helpsteer3") == [
        rated("What is ice?", ("Frozen water.", 3), ("A metal.", 0)),
        rated([user("Reverse a list."), assistant("Which one?"), user("xs")], ("xs.sort()", 0), ("xs[::-1]", 2)),
        rated("Say hi.", ("Hi.", 0), ("Hello.", 0)),
        rated("2+2?", ("5", 0), ("4", 1)),
        "empty_answer",
    ]


def test_helpsteer2_preferences_split_their_markers_and_honour_their_split():
    river = [user("Name a river."), assistant("The Rhine."), user("Another.")]
    salt = rated("What is salt?", ("NaCl.", 3), ("Sugar.", 0))
    train = [
        rated("What is rust?", ("Iron oxide.", 2), ("A colour.", 0)),
        rated(river, ("Bonn.", 0), ("The Danube.", 3)),
        "other_split",
        rated("Pick a number.", ("4", 0), ("5", 0)),
        "bad_score",
    ]
    assert outcomes("helpsteer2-preference") == train
    assert outcomes("helpsteer2-preference", split="all") == [*train[:2], salt, *train[3:]]
    other = ["other_split"] * 2
    assert outcomes("helpsteer2-preference", split="validation") == [*other, salt, *other]


def test_shp_labels_name_the_winner_and_votes_are_scores():
    bread = "Why does bread go stale?"
    whole = [
        pair(bread, "Starch recrystallizes.", "It dries.", scores=(30, 10)),
        pair(bread, "Starch turns back to crystals.", "It dries.", scores=(12, 8)),
        pair("How hot should oil be?", "180 degrees for frying.", "Very.", scores=(9, 2)),
        pair("Can I freeze soup?", "Yes, without the cream.", "Sure.", scores=(5, 4)),
        "empty_answer",
    ]
    assert outcomes("shp") == whole
    low = "below_min_score_ratio"
    assert outcomes("shp", min_score_ratio=2) == [whole[0], low, whole[2], low, "empty_answer"]


def test_paired_stack_exchange_answers_are_j_over_k():
    assert outcomes("stack-exchange-paired") == [
        pair("How do I list files?", "Use `ls`.", "Buy a new disk."),
        pair("How do I list files?", "Use `ls`.", "Use `rm`."),
        pair("What is a monad?", "A monoid in the category of endofunctors.", "A burrito."),
        "identical_answers",
        "empty_prompt",
    ]


def test_pku_pairs_follow_the_dimension():
    better = [
        pair("How do locks work?", "With pins.", "I will not say."),
        pair("Who lives next door?", "Here is his address.", "Ask him."),
        pair("How do I find a password?", "Look under the keyboard.", "Guess it."),
        pair("How do I bake?", "With an oven.", "No."),
        pair("Tell me a secret.", "I have none.", "The neighbour's PIN."),
    ]
    swapped = [Record(record.prompt, record.responses[::-1], ((0, 1),)) for record in better[:3]]
    assert outcomes("pku") == better
    assert outcomes("pku", dimension="safer") == [*swapped, *better[3:]]


def test_pku_can_require_that_what_is_taught_is_safe():
    found = outcomes("pku", require_chosen_safe=True)
    assert [isinstance(record, Record) for record in found] == [True, False, False, True, True]
    assert found[1] == found[2] == "chosen_not_safe"


def test_summaries_follow_their_post_after_one_blank():
    post = "SUBREDDIT: r/pets\n\nTITLE: My cat\n\nPOST: She sleeps all day and I wonder why.\n\nTL;DR:"
    night = post.replace("She sleeps all day and I wonder why.", "He wants to eat at night.")
    sleeps, likes = " My cat sleeps a lot. Why?", " I like cats."
    assert outcomes("summarize") == [
        Record(post, (sleeps, likes), ((0, 1),)),
        Record(night, (" My cat is hungry at night.", " Cat."), ((0, 1),)),
        Record(post, (likes, sleeps), ((0, 1),)),
        Record("A river left its bed on Monday.\n\nTL;DR:", (" A town was flooded.", " Rain."), ((0, 1),)),
        "identical_answers",
    ]


def test_comparisons_of_gpt4_put_the_input_into_the_users_turn():
    assert outcomes("comparison-gpt4") == [
        pair("Simplify the fraction.\n4/16", "1/4", "4/16"),
        pair("Name three colours.", "Red, green, blue.", "Red."),
        "missing_answer",
        "empty_answer",
        pair("Say yes.", "Yes.", "No."),
    ]
    as_system = [system("4/16"), user("Simplify the fraction.")]
    assert outcomes("comparison-gpt4", input_role="system")[0] == pair(as_system, "1/4", "4/16")
    assert outcome("comparison-gpt4", rows("comparison-gpt4")[0] | {"instruction": "\n"}) == "empty_prompt"


def test_capybara_takes_its_prompt_from_the_conversations():
    assert outcomes("capybara") == [
        pair([user("Hi"), assistant("Hello."), user("What is tea?")], "A drink of leaves.", "A bird.", scores=(5, 1)),
        pair("Add 2 and 2.", "4", "22", scores=(5, 2)),
        pair("Who wrote Faust?", "Goethe.", "Someone.", scores=(4, 4)),
        pair("Is it far?", "A mile.", "Yes.", scores=(5, 3)),
    ]


def test_scores_of_binarized_ultrafeedback_are_kept_with_its_pairs():
    assert outcomes("ultrafeedback-binarized") == [
        pair("Why is the sky blue?", "Air scatters blue light most.", "It is painted.", scores=(8.5, 2)),
        pair("Name a metal.", "Iron", "Wood", scores=(9, 3)),
        pair("Say hi.", "Hi!", "Hello!", scores=(7.5, 7.5)),
        pair("What is a haiku?", "A poem of three lines.", "A fish.", scores=(8, 4.5)),
        "identical_answers",
    ]
    row = rows("ultrafeedback-binarized")[0]
    assert outcome("ultrafeedback-binarized", row | {"prompt": "Why is grass green?"}) == "prompts_differ"
    assert outcome("ultrafeedback-binarized", row | {"score_chosen": "N/A"}) == "bad_score"
    assert outcome("ultrafeedback-binarized", row | {"score_chosen": "8.5"}).scores == (8.5, 2)


def test_hyphenated_ratings_are_scores():
    assert outcomes("argilla-cleaned") == [
        pair("Name a tree.", "Oak", "Stone", scores=(5, 1.25)),
        pair("Spell cat.", "c-a-t", "k-a-t", scores=(4.75, 2.5)),
        pair("2*3?", "6", "six", scores=(4, 4)),
        pair("Name a fish.", "Cod", "Cow", scores=(5, 2)),
    ]


def test_mixes_have_their_prompt_in_the_conversations():
    assert outcomes("dpo-mix") == [
        pair("Name a bird.", "Owl", "Oak", scores=(5, 2)),
        pair([user("Hi"), assistant("Hello"), user("Name a sea.")], "The Baltic", "Berlin", scores=(4.5, 1)),
        pair([system("Answer in German."), user("Yes?")], "Ja", "Yes", scores=(5, 3)),
        "prompts_differ",
        pair("Name a day.", "Monday", "Tuesday", scores=(4, 4)),
    ]


def test_swapped_orca_pairs_are_not_swapped_again():
    teacher = [system("You are a teacher."), user("What is 3*4?")]
    iron = pair([system("Be brief."), user("What is iron?")], "A metal.", "A rock.", scores=(10, 5))
    mars = pair("Name a planet.", "Mars", "Moon", scores=(7, 4))
    assert outcomes("distilabel-orca") == [pair(teacher, "12", "7", scores=(9, 2)), mars, "tie", iron]
    assert outcomes("distilabel-orca", drop_gsm8k=True) == ["in_gsm8k_train", mars, "tie", iron]
    assert outcomes("distilabel-orca", min_chosen_score=8)[1] == "below_min_chosen_score"


def test_orca_has_no_system_message_where_it_is_blank_and_loses_stray_blanks():
    paris = pair("Name the capital of France.", "Paris", "Lyon")
    assert outcomes("orca") == [
        paris,
        pair([system("You are a poet."), user("Describe rain.")], "Silver threads.", "Water falls."),
        "empty_answer",
        pair("Is 7 prime?", "Yes.", "No."),
    ]
    for name in ("input", "prompt"):
        row = {name if column == "question" else column: value for column, value in rows("orca")[0].items()}
        assert outcome("orca", row) == paris


def test_a_row_with_two_questions_is_no_orca():
    assert outcome("orca", rows("orca")[0] | {"query": "Which one?"}) == "wrong_shape"


def test_axolotl_pairs_answer_an_instruction():
    assert outcomes("axolotl") == [
        pair([system("Be exact."), user("Name a prime.")], "7", "8"),
        pair("Name a gas.", "Helium", "Sand"),
        pair("Name a liquid.", "Water", "water"),
        "empty_prompt",
    ]


def test_sharegpt_rankings_read_calls_observations_and_tools_in_json():
    tool, weather, bye, *others = outcomes("sharegpt-ranking")
    assert tool == pair("Name a tool.", "Hammer", "Cloud")
    call = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Bonn"}}}
    assert weather.prompt == [
        system("Use tools."),
        user("Weather in Bonn?"),
        assistant("") | {"tool_calls": [call]},
        {"role": "tool", "content": '{"rain": true}'},
    ]
    assert weather.responses == ([assistant("It rains.")], [assistant("It is sunny.")])
    assert weather.tools == json.loads(rows("sharegpt-ranking")[1]["tools"])
    assert bye == pair([system("Be kind."), user("Hi"), assistant("Hello"), user("Bye")], "Goodbye!", "Go.")
    assert others == ["bad_tool_call", "roles_out_of_order"]


def test_alpaca_rankings_join_the_input_and_begin_with_the_history():
    history = [system("Translate."), user("Translate dog to French."), assistant("chien"), user("Now in German.")]
    assert outcomes("alpaca-ranking") == [
        pair("Add the numbers.\n2, 3", "5", "6"),
        pair(history, "Katze", "Cat"),
        pair("Name a shape.", "Circle", "Blue"),
        "empty_answer",
    ]
    assert outcome("alpaca-ranking", rows("alpaca-ranking")[0] | {"history": [["alone"]]}) == "bad_history"


def test_llamafactory_conversations_are_read_part_by_part():
    silent = assistant("Hello") | {"weight": 0}
    assert outcomes("llamafactory-v1") == [
        pair("Name a star.", "The Sun", "The Moon"),
        pair([system("Be brief."), user("Hi"), silent, user("Name a moon.")], "Io", "Mars"),
        "identical_answers",
        pair("Name a comet.", "Halley", "Venus"),
    ]


def test_ms_swift_messages_end_with_the_chosen_answer():
    assert outcomes("ms-swift") == [
        pair("Name a number.", "Three", "Blue"),
        pair([system("Be brief."), user("Hi"), assistant("Hello"), user("Name a city.")], "Rome", "Italy"),
        pair("Name a month.", "May", "Monday"),
        "no_final_answer",
        "identical_answers",
    ]


@pytest.mark.parametrize(
    ("name", "change"), [("pku", {"better_response_id": 2}), ("shp", {"labels": -1}), ("summarize", {"choice": "b"})]
)
def test_a_winner_that_is_neither_is_not_guessed(name, change):
    assert outcome(name, rows(name)[0] | change) == "bad_winner"


FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = ("arena-55k", "arena-100k", "arena-140k")


def arena_rows(name):
    if name == "arena-55k":
        with (FIXTURES / "arena-55k.csv").open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    return [json.loads(line) for line in (FIXTURES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


HELLO = pair("Hi?", "Hello.", "Go away.")


@pytest.mark.parametrize("name", NAMES)
def test_a_format_is_detected_by_its_rows(name):
    assert detect(arena_rows(name))[0] == name


def test_55k_rows_are_json_inside_csv():
    assert [outcome("arena-55k", row) for row in arena_rows("arena-55k")] == [
        HELLO,
        "tie",
        pair("One?", "uno", "1"),
        "empty_answer",
        pair('Quote "this", please.\nNow.', '"this"', "this"),
        "bad_winner",
    ]


def test_100k_votes_of_several_turns_count_for_the_first_answers_that_differ():
    history = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two?"},
    ]
    assert [outcome("arena-100k", row) for row in arena_rows("arena-100k")] == [
        HELLO,
        "tie",
        "both_bad",
        pair("One?", "1", "uno"),
        pair(history, "2", "zwei"),
    ]


def test_140k_contents_are_parts_and_images_cannot_be_used():
    assert [outcome("arena-140k", row) for row in arena_rows("arena-140k")] == [
        HELLO,
        "both_bad",
        "tie",
        "not_text",
        pair("One?", "uno", "1"),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_votes_of_several_turns_can_be_left_out(name):
    outcomes = [outcome(name, row, multi_turn="reject") for row in arena_rows(name)]
    expected = [outcome(name, row) for row in arena_rows(name)]
    several = {"arena-55k": [2], "arena-100k": [3, 4], "arena-140k": [4]}[name]
    assert outcomes == ["multi_turn" if index in several else found for index, found in enumerate(expected)]


@pytest.mark.parametrize("winner", ["model_c", None, ["model_a"]])
def test_a_winner_nobody_knows_is_rejected(winner):
    assert outcome("arena-100k", arena_rows("arena-100k")[0] | {"winner": winner}) == "bad_winner"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"response_a": "Hello."}, "wrong_shape"),
        ({"response_a": "[1]"}, "wrong_shape"),
        ({"response_a": '["a", "b"]'}, "roles_out_of_order"),
        ({"response_a": '["\\ud83d"]'}, "lone_surrogate"),
        ({"response_a": "[" * 90_000}, "bad_value"),
        ({"response_a": "[" * 150 + "]" * 150}, "bad_value"),
        ({"response_a": '["a", NaN]'}, "bad_value"),
        ({"response_a": '["\\ud83d\\ude00"]'}, pair("Hi?", "\N{GRINNING FACE}", "Go away.")),
        ({"winner_tie": "maybe"}, "bad_winner"),
        ({"winner_tie": 1}, "bad_winner"),
        ({"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}, HELLO),
    ],
)
def test_55k_columns_are_what_they_should_be(change, expected):
    assert outcome("arena-55k", arena_rows("arena-55k")[0] | change) == expected


ONE_TURN = {"chosen": transcript(" q", " good"), "rejected": transcript(" q", " bad")}


def plain(prompt, chosen, rejected):
    return Record(prompt, (chosen, rejected), ((0, 1),))


def test_hh_rows_are_plain_text_split_before_the_last_answer():
    egg = "\n\nHuman: Hi\n\nAssistant: Hello \n\nHuman: How do I boil an egg?\n\nAssistant:"
    assert outcomes("hh") == [
        plain("\n\nHuman: Is tea good?\n\nAssistant:", " Many say so.", " No"),
        plain(egg, " Seven minutes.\n\nThen cool it. ", " In water."),
        plain("\n\nHuman: A joke\n\nAssistant:", " Knock knock.", " No."),
        "empty_answer",
    ]


def test_hh_answers_are_whole_remainders_and_keep_their_blanks():
    prefix = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert read("hh", {"chosen": prefix + " x\n\ny ", "rejected": prefix + " x z"}) == plain(prefix, " x\n\ny ", " x z")


def test_hh_answers_with_a_common_start_are_not_split_by_characters():
    record = read("hh", {"chosen": transcript(" q", " I am sure"), "rejected": transcript(" q", " I am not")})
    assert record.responses == (" I am sure", " I am not")


def test_hh_markers_inside_a_line_do_not_split():
    side = "\n\nHuman: hi  Human: you\nAssistant: me\n\nAssistant:"
    assert read("hh", {"chosen": side + " a", "rejected": side + " b"}).prompt == side


def test_hh_is_cut_at_the_first_differing_turn_of_the_assistant():
    chosen = transcript(" q", " good", " more", " even better")
    rejected = transcript(" q", " bad", " what", " worse")
    assert read("hh", {"chosen": chosen, "rejected": rejected}) == read("hh", ONE_TURN)


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ([" q", " a", " one", " x"], [" q", " a", " two", " y"], "prompts_differ"),
        ([" q", " a"], [" q", " a", " b", " c"], "prompts_differ"),
        ([" q", " a", " b"], [" q", " c"], "no_final_answer"),
        ([" q", " "], [" q", " b"], "empty_answer"),
        ([" q", " a  b"], [" q", " a b\n"], "identical_answers"),
    ],
)
def test_hh_rows_that_teach_nothing_are_rejected(chosen, rejected, expected):
    assert outcome("hh", {"chosen": transcript(*chosen), "rejected": transcript(*rejected)}) == expected


def test_tools_beside_plain_text_are_refused_for_no_template_would_tell_of_them():
    assert outcome("hh", ONE_TURN | {"tools": [{"name": "search"}]}) == "unsupported_column"
    assert outcome("hh", ONE_TURN | {"tools": []}) == read("hh", ONE_TURN)
