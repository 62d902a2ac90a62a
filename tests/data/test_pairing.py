import pytest

from dpoctl.data.pairing import Pairing, pair_up, with_pairs
from dpoctl.data.records import Record, Reject


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
    for seed, pair in reversed(drawn.items()):
        assert pairs_of(SEVEN, mode="best-random", seed=seed) == [pair]
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
