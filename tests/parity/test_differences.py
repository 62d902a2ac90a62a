"""Where TRL 1.16 and dpoctl differ: what each of them does, and the values of both."""

import pytest
from parity.labels import labelled_rows, labelled_store, train_on_labels
from parity.two_programs import BATCH, Row, World, alike, pair_rows

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

CLOSE = 2e-3
"""Of values that were written down here."""


def losses_of_halves(world: World, loss: Row, rows: list[Row]) -> list[float]:
    """The loss of each half of the first step, before any update: what TRL takes the mean of."""
    return world.ours(loss, rows, global_batch_size=BATCH // 2, learning_rate=0.0)["loss"][:2]


def test_trl_s_sigmoid_ignores_label_smoothing(world: World) -> None:
    """A smoothed loss has 1 - 2 eps of the gradient where policy and reference are equal; TRL's has all of it."""
    plain = world.ours({"type": "sigmoid"}, pair_rows())
    assert alike(plain, world.theirs("dpo", pair_rows(), label_smoothing=0.2))
    smoothed = world.ours({"type": "sigmoid", "label_smoothing": 0.2}, pair_rows())
    assert smoothed["grad_norm"][0] / plain["grad_norm"][0] == pytest.approx(0.6, abs=1e-5)
    assert plain["loss"][1] == pytest.approx(0.5110, abs=CLOSE)
    assert smoothed["loss"][1] == pytest.approx(0.6033, abs=CLOSE)


def test_trl_s_ipo_averages_over_tokens_and_the_paper_s_sum_is_ours_alone(world: World) -> None:
    """Equal models have the same loss either way, 1 / (2 beta)^2, and 24 times the gradient of one from the other."""
    mine = world.ours({"type": "ipo", "average": False}, pair_rows())
    theirs = world.theirs("dpo", pair_rows(), loss_type=["ipo"])
    assert (mine["loss"][0], theirs["loss"][0]) == (25.0, 25.0)
    assert mine["grad_norm"][0] == pytest.approx(988.2, abs=1)
    assert theirs["grad_norm"][0] == pytest.approx(41.53, abs=0.1)


def test_trl_s_bco_has_no_running_mean(world: World) -> None:
    """Its delta is 0 at every step; dpoctl's is the mean reward so far, which is 0 in the first step alone."""
    mine = world.ours({"type": "bco_pair"}, pair_rows())
    theirs = world.theirs("dpo", pair_rows(), loss_type=["bco_pair"])
    assert mine["delta"][0] == 0
    assert mine["loss"][0] == pytest.approx(theirs["loss"][0], abs=1e-6)
    rewards = [*mine["rewards/chosen"][:3], *mine["rewards/rejected"][:3]]
    assert mine["delta"][2] == pytest.approx(sum(rewards) / 6, rel=1e-5)
    assert mine["delta"][2] == pytest.approx(0.288, abs=0.01)
    assert mine["loss"][2] == pytest.approx(1.449, abs=0.01)
    assert theirs["loss"][2] == pytest.approx(1.526, abs=0.01)


def test_trl_s_weights_are_not_clamped(world: World) -> None:
    """Answers that are the likeliest to a model weigh more than 1 in TRL, and 1 in dpoctl and its authors' code.

    All pairs do here, so that dpoctl's first loss is ln 2.
    """
    heard = [" maybe", " maybe yes"] * 8 + [" hello", " no", " world", " of"]
    rows = pair_rows()
    demonstrations = [{"prompt": row["prompt"], "completion": one} for row, one in zip(rows, heard, strict=True)]
    after, _ = world.imitate(demonstrations, num_train_epochs=2, learning_rate=1e-2)
    likely = [{**row, "chosen": " maybe", "rejected": " maybe yes"} for row in rows]
    clamped = after.ours({"type": "wpo", "beta": 0.1}, likely)
    theirs = after.theirs("dpo", likely, use_weighting=True)
    assert alike(after.ours({"type": "wpo", "beta": 0.1, "clamp": False}, likely), theirs)
    assert clamped["loss"][0] == pytest.approx(0.6931, abs=1e-4)
    assert theirs["loss"][0] == pytest.approx(0.919, abs=0.02)


def test_trl_s_orpo_imitates_the_prompt_too(world: World) -> None:
    """TRL's loss is the odds ratio and the likelihood of prompt and answer; dpoctl's has the answer's alone."""
    first = [world.tokenizer.decode(world.tokenizer(row["prompt"])["input_ids"][0]) for row in pair_rows()]
    texts = [
        {"prompt": token, "completion": row["prompt"].removeprefix(token) + row["chosen"]}
        for token, row in zip(first, pair_rows(), strict=True)
    ]
    _, whole = world.imitate(texts, learning_rate=0.0)
    odds = world.ours({"type": "orpo", "sft_weight": 0.0}, pair_rows(), learning_rate=0.0)
    mine, theirs = world.ours({"type": "orpo"}, pair_rows()), world.theirs("orpo", pair_rows())
    assert theirs["loss"][0] == pytest.approx(odds["loss"][0] + whole["loss"][0], rel=1e-6)
    assert mine["loss"][0] == pytest.approx(odds["loss"][0] + mine["nll_loss"][0], rel=1e-6)
    assert mine["loss"][0] == pytest.approx(6.198, abs=CLOSE)
    assert theirs["loss"][0] == pytest.approx(6.218, abs=CLOSE)
    assert mine["grad_norm"][0] == pytest.approx(3.867, abs=CLOSE)
    assert theirs["grad_norm"][0] == pytest.approx(3.020, abs=CLOSE)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_trl_s_kto_looks_for_mismatched_answers_within_a_micro_batch(micro_batches: int, world: World) -> None:
    """dpoctl takes them from all the data, once, and z0 from the whole step.

    With two micro-batches TRL has a z0 for each; what it logs is their mean.
    """
    store = labelled_store(labelled_rows(), world.tokenizer)
    mine = train_on_labels(world, {"type": "kto"}, store)
    theirs = world.theirs("kto", labelled_rows(), micro_batches=micro_batches)
    assert (mine["kl"][0], theirs["kl"][0]) == (0.0, 0.0)
    assert mine["loss"][0] == pytest.approx(theirs["loss"][0], abs=1e-6)
    assert mine["kl"][1] == pytest.approx(5.72, abs=0.05)
    assert theirs["kl"][1] == pytest.approx({1: 7.92, 2: 8.18}[micro_batches], abs=0.05)
    assert mine["loss"][1] == pytest.approx(0.3746, abs=CLOSE)
    assert theirs["loss"][1] == pytest.approx({1: 0.3990, 2: 0.4734}[micro_batches], abs=CLOSE)


def test_trl_sorts_within_a_micro_batch(world: World) -> None:
    """Both sort the same four pairs unless TRL accumulates gradients: then it sorts two and two."""
    fast, spec = {"learning_rate": 3e-3}, {"type": "aot", "beta": 0.1}
    mine = world.ours(spec, pair_rows(), **fast)
    whole = world.theirs("dpo", pair_rows(), loss_type=["aot"], **fast)
    halves = world.theirs("dpo", pair_rows(), loss_type=["aot"], micro_batches=2, **fast)
    assert alike(mine, whole)
    assert mine["loss"][1] == pytest.approx(0.3318, abs=CLOSE)
    assert halves["loss"][1] == pytest.approx(0.3737, abs=CLOSE)


def test_equal_micro_batches_of_independent_pairs_change_nothing_in_trl(world: World) -> None:
    assert alike(world.ours({"type": "sigmoid"}, pair_rows()), world.theirs("dpo", pair_rows(), micro_batches=2))


def test_trl_s_pairs_of_a_smaller_micro_batch_weigh_more(world: World) -> None:
    """Three pairs in micro-batches of two and one: TRL takes the mean of their means, dpoctl the mean of the pairs."""
    rows, spec = pair_rows()[:3], {"type": "cpo", "sft_weight": 0.0}
    mine = world.ours(spec, rows)["loss"][0]
    two, one = losses_of_halves(world, spec, rows)
    theirs = world.theirs("cpo", rows, micro_batches=2, cpo_alpha=0.0)["loss"][0]
    assert mine == pytest.approx((2 * two + one) / 3, rel=1e-5)
    assert theirs == pytest.approx((two + one) / 2, rel=1e-5)
    assert abs(mine - theirs) > 0.1


@pytest.mark.parametrize("trainer", ["dpo", "cpo"])
def test_trl_s_likelihood_is_a_mean_of_the_micro_batches_means(trainer: str, world: World) -> None:
    """dpoctl counts the tokens of the whole step; a token of a shorter micro-batch weighs more in TRL."""
    spec, options = {
        "dpo": ({"type": "sigmoid", "sft_weight": 1.0}, {"loss_type": ["sigmoid", "sft"]}),
        "cpo": ({"type": "cpo"}, {}),
    }[trainer]
    mine = world.ours(spec, pair_rows())["loss"][0]
    theirs = world.theirs(trainer, pair_rows(), micro_batches=2, **options)["loss"][0]  # type: ignore[arg-type]
    assert theirs == pytest.approx(sum(losses_of_halves(world, spec, pair_rows())) / 2, rel=1e-6)
    assert theirs - mine == pytest.approx(0.0120, abs=1e-3)
