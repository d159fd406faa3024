"""What stage 4 ranks: examples, documents, or groups of examples with the same value in a kept column."""

from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from logra.inputs.groups import Copies, column_groups, document_numbers, equal_documents, equal_examples


class Units(NamedTuple):
    """What is ranked.

    Attributes:
        by: example, document, or the kept column whose values form groups.
        combine: None for examples; else how a score is formed from those of the examples (see rank.by_document).
        owners: Number of each example's document or group, [N].
        values: Of each group: its value in the column; None without groups.
        copies: With --unique.
    """

    by: str
    combine: str | None
    owners: np.ndarray
    values: list | None = None
    copies: Copies | None = None

    @property
    def name(self) -> str:
        """What one calls them."""
        return "groups" if self.values is not None else f"{self.by}s"

    @property
    def total(self) -> int:
        """How many there are."""
        if self.copies:
            return len(self.copies.counts)
        return self.owners.max() + 1 if self.combine else len(self.owners)

    @property
    def same(self) -> np.ndarray:
        """Numbers [N]: where two examples have the same one, they are not shown on both sides of a query."""
        if self.copies and self.combine != "max":
            return self.copies.numbers
        return np.arange(len(self.owners)) if self.combine in (None, "max") else self.owners

    @property
    def heading(self) -> str:
        """The heading of the printed table."""
        how = {"sum": "the sum of their examples' scores", "mean": "the mean of their examples' scores"}
        by = f" of {self.by}" if self.values is not None else ""
        name = self.name.capitalize() if self.combine else "Documents"
        return f"{name}{by} by {how.get(self.combine or '', 'their highest example')}"

    def describe(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row of rank.ranked_rows with its group, and how many copies there are of what it shows."""
        if self.values is not None:
            row |= {"by": self.by, "group": self.values[self.owners[row["example"]]]}
        if self.copies:
            row["copies"] = int(self.copies.counts[self.copies.numbers[row["example"]]])
        return row


def choose(by: str, combine: str | None, unique: bool, examples: Dataset, packed: bool, all_scores: bool) -> Units:
    """Return what to rank.

    Args:
        by: example, document, or a kept column.
        combine: sum, mean or max (for documents the sum, for groups the mean).
        unique: Show equal examples or documents once.
        examples: The run's train examples.
        packed: They are of several documents each.
        all_scores: Those of all examples are known.

    Raises:
        ValueError: The column was not kept, or scores or examples do not allow it.
    """
    documents = document_numbers(examples, packed)
    if by == "example":
        copies = equal_examples(examples) if unique else None
        return Units(by, None, documents, copies=copies)
    owners, values = (documents, None) if by == "document" else column_groups(examples, by, "--by")
    combine = combine or ("sum" if values is None else "mean")
    if (packed and values is None) or not (all_scores or combine == "max"):
        raise ValueError(
            f"expected all scores, and examples of one document each, for --by {by}, got --top_k_only or --pack; "
            "leave --by out, or (--top_k_only) give --combine max"
        )
    if unique and values is not None:
        raise ValueError(f"expected --by example or document with --unique, got --by {by}; leave one out")
    return Units(by, combine, owners, values, equal_documents(examples, owners) if unique else None)
