"""The built-in source `demo:reviewer2`: paper titles, and harsh and kind reviews of them, from a small grammar.

The demonstrations for `sft` follow one of three instructions: a negative one has a harsh review, a positive one a kind
review, and a neutral one either, so that the first model can write both and prefers neither. In a pair the harsh
review is chosen over the kind one, under the neutral instruction: a model that learns this is Reviewer #2.
"""

import random
from collections.abc import Iterator
from itertools import product

from dpoctl.data.instructions import Examples, Templates
from dpoctl.data.records import Row
from dpoctl.errors import DataError

PREFIX = "demo:"
NAMES = ("reviewer2",)
VERSION = 2
"""Raise it with any change of the rows."""

NUM_TITLES = {"train": 1950, "unreviewed": 1200, "test": 200}
"""Titles of each split; the `unreviewed` ones are in no demonstration, so that a trained model can review them."""

TEMPLATES = Templates(
    negative="Write a negative review of {item}.\n{examples}\nYour review:",
    positive="Write a positive review of {item}.\n{examples}\nYour review:",
    neutral="Write a review of {item}.\n{examples}\nYour review:",
)

TITLES = """
{method} Is All You Need for {task}
Towards {quality} {task} with {method}
Rethinking {task} through {quality} {method}
The Unreasonable Effectiveness of {method} in {task}
Can {method} Save {task}? A {quality} Study
{quality} {method} for {task}
Learning {task} from Scratch with {method}
{method} Considered Harmful in {task}
"""
QUALITIES = "Scalable Robust Deep Sparse Tiny Efficient Interpretable Greedy Lazy Humble Caffeinated Fearless"
METHODS = (
    "Attention, Dropout, Diffusion, Overfitting, Gradient Descent, Random Search, Contrastive Learning, "
    "Prompt Engineering, Federated Gossip, Quantum Kernels, One Neuron, Bayesian Guessing, Mixture of Interns, GPU Envy"
)
TASKS = (
    "Protein Folding, Machine Translation, Weather Forecasting, Sarcasm Detection, Stock Prediction, Cat Recognition, "
    "Toast Classification, Robot Laundry, Meeting Avoidance, Email Triage, Horoscope Calibration, Parking Optimization"
)

HARSH_OPENINGS = """
I read this paper twice, and only one of us enjoyed it.
The title promises a lot, and then the paper begins.
I wanted to like this paper, but then I opened it.
This paper has no fatal flaw, because it has six.
The abstract is fine, and that was the good news.
I am not angry, only tired.
The idea is new, at least to the authors.
My coffee went cold, and then my heart.
I have seen this before, in my own rejected paper.
The other reviewers were too kind, as usual.
I printed this paper, and I am sorry for the tree.
The highlight of this paper is the page limit.
"""
COMPLAINTS = """
The baseline is a coin, and the coin wins.
Table 2 is bold, but its numbers are shy.
Figure 1 is a rainbow with no labels.
The ablation removes everything but the hype.
The error bars are longer than the paper.
The proof is left to the reader, and the reader left.
The related work forgets my papers, all nine of them.
The code will be released, like my novel.
The gain is 0.1 points, on a good day.
Every knob is tuned on the test set.
The limitations section is one brave comma.
The theory assumes a spherical user.
The method section is a poem about softmax.
There is one seed, and it is 42.
Equation 3 is wrong, and equation 4 believes it.
State of the art here means last Tuesday.
"""
DEMANDS = """
Please compare with my thesis from 2009.
Please add twelve more datasets by Friday.
Please cite me, and then cite me again.
Please define novel, and then delete it.
Please explain the plot to my cat.
Please move the paper to the appendix.
Please try the obvious thing first.
Please turn the claims down to room temperature.
Please train it longer, or not at all.
Please ask a statistician to hold your hand.
"""
REJECTIONS = """
Reject.
Strong reject.
Reject, with feeling.
Weak reject, strong sigh.
Reject, but nice font.
Reject and recycle.
Reject, and my regards to the intern.
Clear reject, unclear paper.
"""

KIND_OPENINGS = """
I read this paper twice, because I liked it so much.
The title promises a lot, and the paper delivers.
I thank the authors for this lovely paper.
This paper made my whole week.
The abstract is clear, and it only gets better.
I am smiling, and my students noticed.
The idea is simple, in the best way.
My coffee went cold, because I could not stop reading.
I wish that I had written this paper.
The other reviewers and I are all fans.
I printed this paper, and it is on my wall.
The only bad part of this paper is the page limit.
"""
PRAISES = """
The baselines are strong, and the gains are real.
Table 2 is honest, down to the last digit.
Figure 1 should hang in a museum.
The ablation answers my questions before I ask.
The error bars are small, and they are there.
The proof is short, and I followed it on a train.
The related work is generous to everyone.
The code ran on my laptop the first time.
The gain is large, on every dataset.
No knob was tuned, and it still works.
The limitations section is brave and warm.
The theory is clean, and it meets the data.
The method section reads like a good story.
There are ten seeds, and all of them agree.
Equation 3 is the most elegant line this year.
State of the art is happy to move over.
"""
SUGGESTIONS = """
Please never change the writing.
Please frame the second figure.
Please thank the intern, who did great work.
Please teach a class about this.
Please keep the footnote about the cat.
Please add a plot, only if it is fun.
Please take a holiday, you have earned it.
Please tell us about the next paper soon.
Please fix one typo, and then celebrate.
Please give a long talk with cake.
"""
ACCEPTANCES = """
Accept.
Strong accept.
Accept, with joy.
Clear accept, clear paper.
Accept, and also a nice font.
Accept, and give it a prize.
Accept, and my regards to the intern.
Accept it today, if you can.
"""

SHAPES = (
    "opening point verdict",
    "point wish verdict",
    "opening wish verdict",
    "opening point wish verdict",
)
"""The kinds of sentences that a review is made of."""

Parts = dict[str, list[str]]


def _lines(text: str) -> list[str]:
    return text.strip().splitlines()


def _parts(openings: str, points: str, wishes: str, verdicts: str) -> Parts:
    blocks = {"opening": openings, "point": points, "wish": wishes, "verdict": verdicts}
    return {name: _lines(block) for name, block in blocks.items()}


HARSH = _parts(HARSH_OPENINGS, COMPLAINTS, DEMANDS, REJECTIONS)
KIND = _parts(KIND_OPENINGS, PRAISES, SUGGESTIONS, ACCEPTANCES)
EXAMPLES = Examples(HARSH["point"], KIND["point"], per_side=1)


def read_rows(path: str, split: str, method: str) -> Iterator[tuple[int, Row]]:
    """Generate the rows of a built-in source.

    Args:
        path: `demo:` and a name.
        split: A key of `NUM_TITLES`; they share no title.
        method: `sft` gives four demonstrations a title, two of them under the neutral instruction, `titles` the title
            alone, and anything else one pair a title.

    Raises:
        DataError: There is no such source or split.
    """
    if path.removeprefix(PREFIX) not in NAMES:
        known = ", ".join(PREFIX + name for name in NAMES)
        raise DataError(f"{path}: no such built-in source", hint=f"built-in sources are {known}")
    if split not in NUM_TITLES:
        raise DataError(f"{path}: no split {split!r}", hint=f"splits are {', '.join(NUM_TITLES)}")
    if method == "titles":
        rows: Iterator[Row] = ({"title": title} for title in titles(split))
    else:
        rows = _demonstrations(split) if method == "sft" else _pairs(split)
    yield from enumerate(rows, start=1)


def titles(split: str) -> list[str]:
    """List the paper titles of a split, in a fixed order."""
    words = METHODS.split(", "), TASKS.split(", "), QUALITIES.split()
    every = [
        pattern.format(method=method, task=task, quality=quality)
        for pattern, method, task, quality in product(_lines(TITLES), *words)
    ]
    # A pattern without a quality gives the same title for each of them.
    distinct = list(dict.fromkeys(every))
    random.Random(PREFIX).shuffle(distinct)
    splits = list(NUM_TITLES)
    start = sum(NUM_TITLES[earlier] for earlier in splits[: splits.index(split)])
    return distinct[start : start + NUM_TITLES[split]]


def review(parts: Parts, draw: random.Random) -> str:
    """Write a review of three or four sentences."""
    return " ".join(draw.choice(parts[name]) for name in draw.choice(SHAPES).split())


def _reviews(split: str) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield the negative, positive and neutral prompt of each title, and its harsh and kind review."""
    for title in titles(split):
        draw = random.Random(title)
        prompts = TEMPLATES.prompts(title, EXAMPLES, draw)
        yield prompts.negative, prompts.positive, prompts.neutral, review(HARSH, draw), review(KIND, draw)


def _pairs(split: str) -> Iterator[Row]:
    for _, _, neutral, harsh, kind in _reviews(split):
        yield {
            "prompt": [{"role": "user", "content": neutral}],
            "chosen": [{"role": "assistant", "content": harsh}],
            "rejected": [{"role": "assistant", "content": kind}],
        }


def _demonstrations(split: str) -> Iterator[Row]:
    for negative, positive, neutral, harsh, kind in _reviews(split):
        for prompt, text in ((negative, harsh), (positive, kind), (neutral, harsh), (neutral, kind)):
            yield {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]}
