import pytest

from dpoctl.data.grouping import GROUPED, Grouper, Labels, Majority, unpaired
from dpoctl.data.records import Record, Reject


def rankings(*rows):
    grouper = Grouper()
    for at, (prompt, answer, score) in enumerate(rows):
        grouper.add(Record(prompt, (answer,), scores=(score,)), at)
    return list(grouper.records())


def comparisons(*rows):
    labels = Labels()
    for at, (prompt, answer, label) in enumerate(rows):
        labels.add(Record(prompt, (answer,), label=label), at)
    return list(labels.records())


def preference(prompt, chosen, rejected):
    return Record(prompt, (chosen, rejected), ((0, 1),))


def outcomes(*records):
    """Return each record after the majority has decided, or the reason for its rejection."""
    majority = Majority()
    for record in records:
        majority.add(record)
    found = []
    for record in records:
        try:
            found.append(majority.filter(record))
        except Reject as reject:
            found.append(reject.reason)
    return found


def test_answers_come_together_by_prompt_however_far_apart_they_stand():
    assert rankings(("p", "a", 3), ("q", "b", 1), ("p", "c", 4), ("q", "d", 2), ("r", "e", 0)) == [
        ((0, 2), Record("p", ("a", "c"), scores=(3, 4))),
        ((1, 3), Record("q", ("b", "d"), scores=(1, 2))),
        ((4,), Record("r", ("e",), scores=(0,))),
    ]


def test_a_prompt_with_other_tools_is_another_prompt():
    grouper = Grouper()
    for name in ("f", "g"):
        grouper.add(Record("p", ("a",), scores=(1,), tools=[{"name": name}]), 0)
    assert len(list(grouper.records())) == 2


def test_formats_that_need_grouping_exist():
    from dpoctl.data.formats import FORMATS

    assert FORMATS.keys() >= GROUPED


def test_every_good_answer_beats_every_bad_one():
    found = comparisons(("p", "g1", True), ("p", "b1", False), ("p", "g2", True), ("p", "b2", False))
    assert found == [((0, 1, 2, 3), Record("p", ("g1", "b1", "g2", "b2"), ((0, 1), (0, 3), (2, 1), (2, 3))))]


def test_a_prompt_with_one_kind_of_answer_is_rejected_where_it_stood():
    found = comparisons(("p", "g", True), ("q", "b", False), ("p", "g2", True), ("q", "g", True))
    (first, reject), (second, record) = found
    assert (first, reject.reason, second, record.pairs) == ((0, 2), "one_sided", (1, 3), ((1, 0),))


def test_an_answer_called_both_good_and_bad_is_left_out_and_one_said_twice_counts_once():
    found = comparisons(
        ("p", "both", True), ("p", "both ", False), ("p", "good", True), ("p", "bad", False), ("p", "bad", False)
    )
    assert found == [((0, 1, 2, 3, 4), Record("p", ("good", "bad"), ((0, 1),)))]


def test_pairs_become_labels_and_back():
    labelled = unpaired(preference("p", "a", "b"))
    assert labelled == [Record("p", ("a",), label=True), Record("p", ("b",), label=False)]
    found = comparisons(*((record.prompt, record.responses[0], record.label) for record in labelled))
    assert found == [((0, 1), preference("p", "a", "b"))]


def test_an_answer_that_won_and_lost_has_no_label():
    record = Record("p", ("a", "b", "c", "d"), ((0, 1), (1, 2)), scores=(3, 2, 1, 0), target=0)
    assert unpaired(record) == [Record("p", ("a",), label=True), Record("p", ("c",), label=False)]


def test_the_majority_of_votes_wins():
    ab, ba, other = preference("p", "a", "b"), preference("p", "b", "a"), preference("q", "b", "a")
    assert outcomes(ab, ba, other, ab) == [ab, "outvoted", other, ab]


def test_equal_votes_are_a_tie():
    ab, ba = preference("p", "a", "b"), preference("p", "b", "a")
    assert outcomes(ab, ba) == ["tie", "tie"]


def test_votes_know_a_pair_by_its_answers_up_to_white_space():
    one, other = preference("p", "a b", "c"), preference("p", "c\n", "a  b")
    assert outcomes(one, other, one) == [one, "outvoted", one]


def test_exact_duplicates_are_kept():
    ab = preference("p", "a", "b")
    assert outcomes(ab, ab, ab) == [ab, ab, ab]


def test_a_record_of_several_pairs_loses_those_that_are_outvoted():
    several, against = Record("p", ("a", "b", "c"), ((0, 1), (0, 2))), preference("p", "c", "a")
    assert outcomes(several, against, against) == [preference("p", "a", "b"), against, against]


@pytest.mark.parametrize("record", [Record("p", ("a",), label=True), Record("p", ("a", "b"), scores=(1, 2))])
def test_records_without_pairs_are_not_voted_on(record):
    assert outcomes(record) == [record]


def test_rows_that_contradict_each_other_are_noticed():
    majority = Majority()
    majority.add(preference("p", "a", "b"))
    majority.add(preference("p", "a", "b"))
    majority.add(preference("q", "b", "a"))
    assert not majority.has_conflicts
    majority.add(preference("p", "b", "a"))
    assert majority.has_conflicts
