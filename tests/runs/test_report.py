"""The report: everything a run left, on one page, with its data as text and nothing fetched."""

import base64
import hashlib
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpoctl.errors import UsageError
from dpoctl.runs.report import MOST_SAMPLES, refresh_report, write_report
from dpoctl.runs.results import fingerprint

EVIL = "</p><script>alert('x')</script><img src=http://evil/x onerror=alert(1)> & \x1b[31m \u202e\x9b \ud800"
VOID = {"meta", "link", "br", "img", "input", "hr"}
ACTIVE = {"script", "iframe", "object", "embed", "form", "img", "base", "video", "audio"}


class Page(HTMLParser):
    """The elements, attributes and text of a page; it must be well-formed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.css = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag in ("td", "th"):
            self.text += " "

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["style"]:
            self.css += data
        else:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def dpo_rows(steps: int = 40) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(0, steps + 1, 10):
        gap = step / steps
        pairs = {
            "loss": math.log(2) - 0.2 * gap,
            "rewards/chosen": 0.1 * gap,
            "rewards/rejected": -0.4 * gap,
            "rewards/margins": 0.5 * gap,
            "rewards/accuracies": 0.9 * bool(step),
            "logps/chosen": -30 - gap,
            "logps/rejected": -30 - 5 * gap,
        }
        if step:
            state = {"grad_norm": 1.5 - gap, "learning_rate": 5e-6 * (1 - gap / 2), "epoch": gap}
            state["tokens_per_second"] = 1234.5 + step
            rows.append({"step": step, **pairs, **state})
        rows.append({"step": step, **{f"eval_{name}": value for name, value in pairs.items()}})
        rows.append({"step": step, **{f"eval_hard_{name}": value for name, value in pairs.items()}})
    return rows


def account(used: int, **rejected: int) -> dict[str, Any]:
    return {
        "rows": used + sum(rejected.values()),
        "used": used,
        "rejected": rejected,
        "duplicates": 3,
        "tokens": {"total": 12345, "scored": 678, "prompt": {"mean": 24.8, "p5": 20, "p50": 24, "p95": 33, "max": 35}},
        "sources": [{"path": f"pairs{EVIL}.jsonl", "format": "hh", "rows": used}],
        "first_rejected": {name: {"file": "a.jsonl", "line": 7, "detail": EVIL} for name in rejected},
    }


def origin(folder: Path, **changes: Any) -> dict[str, Any]:
    """The provenance of the official result of a run, with changes."""
    data = {"eval": {"sources": ["heldout.jsonl"], "key": "k", "records": 200}}
    about = {"run": "x", "model": fingerprint(folder), "step": 40, "data": data, "limit": None, "baseline": "me/base"}
    return {**about, "official": True, "date": "2026-11-27T00:00:00+00:00", **changes}


def add_result(run: Path, name: str, numbers: dict[str, Any], **changes: Any) -> None:
    """Add a result of `dpoctl eval` to a run."""
    (run / "evals" / f"{name}.json").write_text(json.dumps(origin(run, **changes) | numbers))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished DPO run with everything that a run may leave, as hostile as data can be."""
    folder = tmp_path / "my-run"
    (folder / "samples").mkdir(parents=True)
    recipe = {
        "method": "dpo",
        "model": {"model_name_or_path": f"me/model-{EVIL}"},
        "lora": {"r": 8},
        "dpo": {"loss": {"type": "sigmoid", "beta": 0.1}},
        "training": {"global_batch_size": 16, "learning_rate": 5e-6},
    }
    (folder / "recipe.resolved.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "recipe.yaml").write_text(f"# {EVIL!r} hf_AbCdEfGhIjKlMnOp\n" + yaml.safe_dump(recipe))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dpo_rows()))
    report = {"train": account(900, too_long=100), "evals": {"eval": account(200), "hard": account(50)}}
    (folder / "data_report.json").write_text(json.dumps(report))
    (folder / "env.json").write_text(json.dumps({"packages": {"torch": "2.13"}, "command": ["dpoctl", EVIL]}))
    (folder / "model.safetensors").write_bytes(b"weights")
    evaluation = origin(folder) | {
        "loss": 0.493, "rewards/accuracies": 0.9, "rewards/accuracies_ci": [0.85, 0.93], "num_pairs": 200,
        "sets": {"hard": {"loss": 0.6}},
        "judge": {
            "policy": {"harsh": {"share": 0.97, "ci": [0.93, 0.99]}},
            "reference": {"harsh": {"share": 0.49, "ci": [0.42, 0.56]}},
        },
    }  # fmt: skip
    measured = folder / "evals" / "official-1.json"
    measured.parent.mkdir()
    measured.write_text(json.dumps(evaluation))
    advice = [
        {"grade": "note", "key": "data.eval", "message": EVIL, "line": 4, "override": None},
        {"grade": "warning", "key": "training.learning_rate", "message": "it is high", "line": None, "override": 1},
    ]
    (folder / "advice.json").write_text(json.dumps(advice))
    files = [(f"step-{step:06d}", step, folder / "samples" / f"step-{step:06d}.jsonl") for step in (20, 40)]
    for name, step, file in (*files, ("eval", 40, measured.with_suffix(".samples.jsonl"))):
        sample = {
            "step": step, "prompt": f"{name} {EVIL}", "reference": "kind words", "policy": EVIL,
            "reference_finished": True, "policy_finished": False,
        }  # fmt: skip
        file.write_text(json.dumps(sample) + "\n")
    return folder


def page(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def test_a_report_is_one_file_beside_the_run_or_where_it_is_wanted(run: Path, tmp_path: Path) -> None:
    assert write_report(run) == run / "report.html"
    assert write_report(run, tmp_path / "other.html").is_file()
    with pytest.raises(UsageError, match="there is no folder"):
        write_report(run, tmp_path / "nowhere" / "other.html")
    with pytest.raises(UsageError, match="is not a run of dpoctl"):
        write_report(tmp_path)


def test_data_stays_text(run: Path) -> None:
    found = page(run)
    assert {tag for tag, _ in found.elements} & ACTIVE == set()
    assert found.text.count("<script>alert('x')</script>") >= 7
    assert not any(name.startswith("on") or name == "style" for _, attrs in found.elements for name in attrs)
    assert "\x1b" not in found.html
    assert "\\x1b[31m \\u202e" in found.text


def test_nothing_is_fetched_and_no_script_could_run(run: Path) -> None:
    found = page(run)
    assert found.all("link") == [{"rel": "icon", "href": "data:,"}]
    assert all((a["href"] or "").startswith("#") for a in found.all("a"))
    assert not any("src" in attrs for _, attrs in found.elements)
    assert "url(" not in found.css
    assert "@import" not in found.css
    (policy,) = [m["content"] or "" for m in found.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    digest = base64.b64encode(hashlib.sha256(found.css.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in policy
    assert "script-src" not in policy


def test_links_lead_to_sections_that_are_there(run: Path) -> None:
    found = page(run)
    ids = [attrs["id"] for _, attrs in found.elements if "id" in attrs]
    assert {(a["href"] or "")[1:] for a in found.all("a")} == set(ids)
    assert ids == ["curves", "samples", "evaluation", "advice", "data", "recipe", "environment"]


def test_every_metric_has_a_curve_that_says_what_it_shows(run: Path) -> None:
    found = page(run)
    told = [svg["aria-label"] or "" for svg in found.all("svg") if svg.get("role") == "img"]
    assert [label.split(":")[0] for label in told] == [
        "Loss", "Reward accuracy", "Reward margin", "Rewards", "Log-probabilities",
        "Learning rate", "Gradient norm", "Tokens per second",
    ]  # fmt: skip
    assert told[0] == "Loss: train from 0.643 to 0.493; eval from 0.693 to 0.493; hard from 0.693 to 0.493"
    assert "ln 2" in found.text
    assert "summed over an answer's tokens, not averaged per token" in found.text


def test_a_metric_of_ones_own_gets_a_curve_too(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 40, "my/metric": 3.0}) + "\n")
    assert any(
        (svg["aria-label"] or "").startswith("my/metric: train") for svg in page(run).all("svg") if "role" in svg
    )


def test_the_numbers_that_count_stand_at_the_top_with_their_intervals(run: Path) -> None:
    text = page(run).text.replace("\u00a0", " ")
    top = text[: text.index("Evaluations on")]
    for words in (
        "90 %95 % interval 85 % to 93 %, 200 pairs; eval set, dpoctl eval",
        "Loss0.493from 0.693; eval set, dpoctl eval",
        "Log-prob of chosen\u22121nats per answer since step 0; eval set, step 40",
        "chosen answers less likely by 1 nats, and rejected answers less likely by 5 nats",
        "only the gap is trained",
    ):
        assert words in top, words


def test_samples_stand_side_by_side_the_newest_first(run: Path) -> None:
    found = page(run)
    order = [found.text.index(f"{name} </p>") for name in ("eval", "step-000040", "step-000020")]
    assert order == sorted(order)
    assert found.text.count("kind words") == 3
    assert found.text.count("cut off at the length limit") == 3


def test_a_conversation_is_a_prompt_and_many_samples_are_not_all_shown(run: Path) -> None:
    sample = {"step": 50, "prompt": [{"role": "user", "content": "hello there"}], "reference": "a", "policy": "b"}
    lines = [json.dumps(sample)] * (MOST_SAMPLES + 5)
    (run / "evals" / "official-1.samples.jsonl").write_text("\n".join([*lines, "torn {"]))
    text = page(run).text
    assert text.count("user: hello there") == MOST_SAMPLES
    assert "5 more in evals/official-1.samples.jsonl" in text


def test_evaluation_compares_the_policy_with_its_reference(run: Path) -> None:
    text = " ".join(page(run).text.replace("\u00a0", " ").split())
    assert "judge reference policy harsh 49 % 42 % to 56 % 97 % 93 % to 99 %" in text
    assert "hard loss 0.6" in text


def test_advice_comes_with_its_place_and_the_gravest_first(run: Path) -> None:
    text = page(run).text
    section = text[text.index("\nAdvice") :]
    assert section.index("it is high") < section.index("data.eval, line 4 of the recipe")
    assert "training.learning_rate, set on the command line" in section


def test_every_row_of_the_data_is_accounted_for(run: Path) -> None:
    text = page(run).text
    assert "900 of 1,000 rows used" in text
    assert "dropped: too_long100" in text
    assert "too_long: a.jsonl:7" in text


def test_secrets_are_kept_out(run: Path) -> None:
    assert "hf_AbCdEfGhIjKlMnOp" not in page(run).html


def test_a_run_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "recipe.resolved.yaml").write_text(
        "method: sft\nmodel: {from_scratch: {config: {model_type: llama}}}\n"
    )
    assert "SFT of a new llama" in page(tmp_path).text
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 2.5}\n{"step": 20, "loss": "nan"}\n{"step": 3')
    found = page(tmp_path)
    assert "Loss: train from 2.5 to 2.5" in found.html
    assert "Some values are not finite: loss." in found.text


def test_sft_gets_its_perplexity_and_a_word_on_overfitting(tmp_path: Path) -> None:
    (tmp_path / "recipe.resolved.yaml").write_text("method: sft\n")
    losses = [3.0, 1.0, 0.5, 0.9]
    rows = [{"step": 10 * n, "eval_loss": loss, "eval_loss_se": 0.1} for n, loss in enumerate(losses)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = page(tmp_path).text
    assert "Perplexity2.46" in text
    assert "It was lowest at step 20 (0.5) and has risen since" in text
    assert "loss_se" not in text[: text.index("Evaluations on")]


@pytest.mark.parametrize(
    ("losses", "error"),
    [([0.6931, 0.6957], 0.004), ([0.6931, 0.69, 0.6957], 0.004), ([2.0, 1.9, 2.1], 0.2)],
    ids=str,
)
def test_a_change_that_chance_explains_is_told_as_that(tmp_path: Path, losses: list[float], error: float) -> None:
    (tmp_path / "recipe.resolved.yaml").write_text("method: dpo\ndpo: {loss: {type: sigmoid, beta: 0.1}}\n")
    rows = [{"step": 10 * n, "eval_loss": loss, "eval_loss_se": error * bool(n)} for n, loss in enumerate(losses)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = page(tmp_path).text
    assert "contains no change: more held-out rows would tell more" in text
    for advice in ("fewer steps", "learning rate.", "learned nothing"):
        assert advice not in text


def test_a_change_whose_error_is_not_known_gives_no_advice(tmp_path: Path) -> None:
    (tmp_path / "recipe.resolved.yaml").write_text("method: sft\n")
    rows = [{"step": 10 * n, "eval_loss": loss} for n, loss in enumerate([3.0, 0.5, 0.9])]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = page(tmp_path).text
    assert "The loss on held-out rows went from 3 to 0.9." in text
    assert "fewer steps" not in text


def test_a_policy_that_has_learned_nothing_is_told_so(run: Path) -> None:
    rows = [{"step": step, "eval_loss": math.log(2) - step * 1e-5, "eval_loss_se": 1e-4} for step in (0, 40)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "the policy has learned nothing yet" in page(run).text


def test_a_weighted_sum_of_losses_is_named_by_its_terms(run: Path) -> None:
    recipe = yaml.safe_load((run / "recipe.resolved.yaml").read_text())
    terms = [{"type": "sigmoid", "beta": 0.1, "weight": 0.7}, {"type": "hinge", "beta": 0.05, "weight": 0.3}]
    recipe["dpo"] = {"loss": terms}
    (run / "recipe.resolved.yaml").write_text(yaml.safe_dump(recipe))
    found = page(run)
    assert "DPO (0.7 x sigmoid, β 0.1 + 0.3 x hinge, β 0.05) of" in found.text
    assert "ln 2" not in found.html


def test_symptoms_of_a_run_that_is_not_well_are_told(run: Path) -> None:
    symptom = {"code": "stuck", "step": 1200, "message": "the loss is still there", "hint": "raise <b>it</b>"}
    (run / "health.json").write_text(json.dumps([symptom]))
    assert "Step 1,200: the loss is still there; raise <b>it</b>." in page(run).text


def test_a_report_that_fails_does_not_fail_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "advice.json").write_text("[{")
    with pytest.raises(UsageError, match=r"advice\.json is not JSON"):
        write_report(run)
    refresh_report(run)
    assert "the report was not written" in capsys.readouterr().err


def tiles(found: Page) -> str:
    """The text of the headline numbers."""
    return found.text[: found.text.index("Training made")].replace("\u00a0", " ")


OTHER = {"eval": {"sources": ["other.jsonl"], "key": "o", "records": 5}}


@pytest.mark.parametrize(
    "changes",
    [
        {"official": False, "data": OTHER},
        {"official": False, "limit": 5},
        {"official": False, "settings": ["eval.samples.num=9"]},
        {"official": False, "data": OTHER, "limit": 5, "baseline": None},
    ],
    ids=str,
)
def test_numbers_of_other_data_stay_out_of_the_headline(run: Path, changes: dict[str, Any]) -> None:
    before = tiles(page(run))
    later = {"date": "2026-11-28T00:00:00+00:00"} | changes
    add_result(run, "other-2", {"loss": 7.77, "rewards/accuracies": 0.111, "num_pairs": 5}, **later)
    found = page(run)
    assert tiles(found) == before
    section = found.text[found.text.index("95 % intervals") :]
    assert section.index("0.493") < section.index("Other evaluation") < section.index("7.77")
    told = section[section.index("Other evaluation") : section.index("7.77")]
    assert "not the run's own result" in told
    assert ("other.jsonl" in told) == ("data" in changes)
    assert ("the first" in told) == ("limit" in changes)
    assert ("eval.samples.num=9" in told) == ("settings" in changes)


def test_a_result_of_weights_that_were_trained_further_is_no_headline(run: Path) -> None:
    (run / "model.safetensors").write_bytes(b"other weights")
    found = page(run)
    assert "dpoctl eval" not in tiles(found)
    assert "eval set, step 40" in tiles(found)
    assert "of earlier weights of this run" in found.text


def test_headlines_of_a_run_with_named_sets_are_all_of_one_set(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [row for row in rows if not any(name.startswith("eval_") and "hard" not in name for name in row)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    data = {name: {"sources": [f"{name}.jsonl"], "key": name, "records": 9} for name in ("easy", "hard")}
    sets = {"easy": {"loss": 0.1, "rewards/accuracies": 0.99}, "hard": {"loss": 0.6, "rewards/accuracies": 0.55}}
    add_result(run, "official-1", {"sets": sets, "loss": 9.9}, data=data)
    top = tiles(page(run))
    assert "Reward accuracy55 %hard set, dpoctl eval" in top
    assert "Loss0.6from 0.693; hard set, dpoctl eval" in top
    assert "easy" not in top


@pytest.mark.parametrize("name", ["data_report.json", "health.json", "advice.json"])
def test_a_file_whose_values_are_of_other_kinds_is_one_line(run: Path, name: str) -> None:
    (run / name).write_text("7")
    with pytest.raises(UsageError, match="is not as dpoctl wrote it"):
        write_report(run)


def test_a_file_that_is_no_result_is_named(run: Path) -> None:
    for text in ("[1", "{}"):
        (run / "evals" / "mine.json").write_text(text)
        with pytest.raises(UsageError, match=r"evals/mine\.json is not a result of `dpoctl eval`"):
            write_report(run)


@pytest.mark.parametrize(
    ("first", "last", "said"),
    [
        ("2026-11-27T10:00:00+00:00", "2026-11-27T12:05:10+00:00", "2026-11-27 10:00 to 12:05 UTC (2h 5m)"),
        ("2026-11-27T23:59:30+00:00", "2026-11-28T00:00:10+00:00", "2026-11-27 23:59 to 2026-11-28 00:00 UTC (40s)"),
    ],
)
def test_a_report_says_when_the_run_was_and_how_long_it_took(run: Path, first: str, last: str, said: str) -> None:
    rows = [{"step": 1, "loss": 0.6, "time": first}, {"step": 2, "loss": 0.5, "time": last}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert said in page(run).text
    rows[0]["time"] = "yesterday"
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "UTC" not in page(run).text
