"""The questions of MMLU's dev split, which lm-eval has as few-shot examples: a benchmark without a download."""

import json
import re
from pathlib import Path
from typing import Any

import lm_eval.tasks
from datasets import Dataset

EXAMPLES = Path(lm_eval.tasks.__file__).parent / "mmlu" / "flan_cot_fewshot" / "_cot_prompts.json"
QUESTION = re.compile(
    r"Q: (.*?)\n\(A\) (.*?) ?\(B\) (.*?) ?\(C\) (.*?) ?\(D\) ([^\n]*)\nA: .*The answer is \(([A-D])\)", re.S
)


def questions(**_: Any) -> dict[str, Dataset]:
    """Return the questions with four choices, and the number of the right one."""
    texts = json.loads(EXAMPLES.read_text(encoding="utf-8")).values()
    found = (QUESTION.match(part) for text in texts for part in re.split(r"\n\n(?=Q: )", text))
    rows = [
        {"question": one[1].strip(), "choices": list(one.groups()[1:5]), "answer": "ABCD".index(one[6])}
        for one in found
        if one is not None
    ]
    return {"test": Dataset.from_list(rows)}
