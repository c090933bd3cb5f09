"""The analysis that `herder demo` runs: a permutation test of a classifier on scikit-learn's handwritten digits.

The question: can a linear classifier tell the digits apart, or would it do as well with labels that mean nothing? So
it is fitted once with the true labels and some hundred times with shuffled ones; the p-value is the share of fits that
did at least as well as the true one. Every fit is a task, so a process of its own; the images are loaded once per node,
by `load`, before the fork point.

These are the tasks only, importable where they run and light: numpy and scikit-learn are imported when they are used,
which in a forked child costs nothing, as its template has preloaded them. The command is in `herder.cli.demo`.
"""

from __future__ import annotations

from typing import Any

#: Imported in each node's template before its fork point.
PRELOAD = ("numpy", "sklearn.datasets", "sklearn.linear_model", "sklearn.model_selection", "herder.demo")

#: Which images are held out to score on. Part of the question, so it is fixed.
SPLIT_SEED = 20
TEST_SHARE = 0.25

TRUE_LABELS = 0


def load() -> dict[str, Any]:
    """Setup: the images, scaled to 0..1, and their labels, split for training and scoring."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    train, test, train_labels, test_labels = train_test_split(
        images / 16.0, labels, test_size=TEST_SHARE, stratify=labels, random_state=SPLIT_SEED
    )
    return {"train": train, "test": test, "train_labels": train_labels, "test_labels": test_labels}


def fit(permutation: int) -> float:
    """Fit and score once: the accuracy on the held-out images.

    `TRUE_LABELS` (0) uses the true labels; any other number shuffles those of the training images, each in its own way.
    """
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    import herder

    digits = herder.shared()
    labels = digits["train_labels"]
    if permutation != TRUE_LABELS:
        labels = np.random.default_rng(permutation).permutation(labels)
    model = LogisticRegression(max_iter=1000).fit(digits["train"], labels)
    return float(model.score(digits["test"], digits["test_labels"]))


def nothing() -> None:
    """The task whose start is timed."""
