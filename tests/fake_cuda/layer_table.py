"""Prints what one decoder layer does in a traced step: `python layer_table.py [full|lora|4bit|8bit]`, as Markdown.

Calls of one operator with the same results stand in one line, in the order in which they first came.
"""

import sys
from collections.abc import Iterator
from typing import Any

import traces

LAYERS, WATCHED = 3, 1
MIB = 2**20


def mark_layers(scene: Any) -> None:
    """Let the tracker's phase say which layer is at work, forward and backward."""
    tracker = scene.tracker
    for number, layer in enumerate(scene.policy.causal.model.layers):

        def before(*_: Any, number: int = number) -> None:
            tracker.phase = f"layer {number} forward"

        def after(_module: Any, _inputs: Any, output: Any, number: int = number) -> None:
            tracker.phase = "forward"
            hidden = output[0] if isinstance(output, tuple) else output

            def backward(_gradient: Any) -> None:
                tracker.phase = f"layer {number} backward"

            hidden.register_hook(backward)

        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)


def calls_of(kind: str) -> tuple[int, list[Any]]:
    """Return the rows of a step, and the calls of all its layers."""
    import models
    import steps

    fakes = models.world()
    with models.fakes_count_as_parameters():
        policy = models.build(fakes, "llama", kind, num_hidden_layers=LAYERS)
        scene = steps.prepare(fakes, policy, kind, keep_calls=True)
        mark_layers(scene)
        steps.run(scene)
    return scene.batches[0].input_ids.shape[1], scene.tracker.calls


def lines(calls: list[Any], phase: str) -> Iterator[str]:
    """Yield the lines of a table."""
    found: dict[Any, list[int]] = {}
    for call in calls:
        if call.phase == phase:
            found.setdefault((call.name.removeprefix("aten::"), call.made), []).append(call.read)
    total_read = total_made = 0
    for (name, made), reads in found.items():
        size = sum(size for _, _, size in made) * len(reads)
        total_read, total_made = total_read + sum(reads), total_made + size
        shapes = "; ".join(f"{dtype}{list(shape)}" for shape, dtype, _ in made) or "in place"
        yield f"| {name} | {len(reads)} | {shapes} | {size / MIB:,.1f} | {sum(reads) / MIB:,.1f} |"
    yield f"| all | {sum(map(len, found.values()))} | | {total_made / MIB:,.1f} | {total_read / MIB:,.1f} |"


def main(kind: str) -> None:
    """Print the tables of a kind of training."""
    traces.load()
    rows, calls = calls_of(kind)
    for direction in ("forward", "backward"):
        print(f"\n{kind}, {rows} rows, {direction} of one layer\n")  # noqa: T201
        print("| operator | calls | makes | MiB made | MiB read |\n|---|--:|---|--:|--:|")  # noqa: T201
        print("\n".join(lines(calls, f"layer {WATCHED} {direction}")))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "lora")
