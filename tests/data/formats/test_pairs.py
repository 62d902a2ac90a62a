import json

import pytest
from format_samples import assistant, outcome, outcomes, pair, rated, rows, system, user

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
