"""Did you mean: the key that a wrong one stands for."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from dpoctl.recipe.expect import Path
from dpoctl.recipe.foreign import our_key
from dpoctl.recipe.problems import dotted

LONGEST = 64


def closest(text: str, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The candidate that a text most likely misspells; None where none is near."""
    if len(text) > LONGEST:
        return None
    names = {name.lower(): name for name in candidates}
    matches = get_close_matches(text.lower(), list(names), n=1, cutoff=cutoff)
    return names[matches[0]] if matches else None


class Suggester:
    """Finds the key that was meant.

    Args:
        known: All keys of the schema.
    """

    def __init__(self, known: Sequence[Path]) -> None:
        self._known = set(known)
        self._leaves: dict[str, Path] = {}
        for path in known:
            self._leaves.setdefault(str(path[-1]), path)

    def meant(self, section: Path, key: str, siblings: Sequence[str]) -> Path | None:
        """Look for a key among its siblings, among other tools' keys, then in all sections.

        Args:
            section: Where the key was written.
            key: The key that is not known there.
            siblings: The keys that are.
        """
        if sibling := closest(key, siblings, cutoff=0.8):
            return (*section, sibling)
        theirs = our_key(dotted(section), key)
        if theirs and (ours := tuple(theirs.split("."))) in self._known:
            return ours
        if key in self._leaves:
            return self._leaves[key]
        if sibling := closest(key, siblings):
            return (*section, sibling)
        anywhere = closest(key, self._leaves, cutoff=0.75)
        return self._leaves[anywhere] if anywhere else None
