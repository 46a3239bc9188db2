"""Labels that look wrong: confident learning on probabilities from outside the fold.

A suspect is a question to a person who knows cells and not an answer. Nothing here changes a label: what
is suspected is shown, and a score without the suspects stands beside the official one, never in its place.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hematovision.config import cache_folder
from hematovision.data.sides import Sides
from hematovision.errors import DataError
from hematovision.learn import backbones
from hematovision.learn.evaluation import Predictions
from hematovision.learn.features import frozen_features

COLUMNS = (
    "rank",
    "source",
    "given",
    "suggested",
    "self_confidence",
    "image",
    "worst_confidence",
    "copies",
    "copies_disagreeing",
)

_INVERSE_PENALTY = 0.01
"""Inverse strength of the L2 penalty, for a thousand and more standardised features. On MobileNetV2's
frozen features of 150 PBC cells a class, 3 % of the labels exchanged at random, it named most true classes
(91 %) of 0.001 to 1, and 32 of 36 exchanged labels were among the suspects, 29 of them in the first 36."""

_MAX_ITERATIONS = 500


def out_of_fold_probabilities(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    groups: NDArray[np.str_],
    *,
    folds: int = 5,
    seed: int = 0,
) -> NDArray[np.float32]:
    """Return what a linear probe says of each image that has seen no copy of its photograph.

    Logistic regression on standardised frozen features, trained on all folds but the image's own.

    Parameters
    ----------
    features : float32 array of shape (N, D)
        From `features.frozen_features`; may be memory-mapped. The network must not have been trained on
        these labels: it would repeat them, wrong ones too.
    labels : int64 array of shape (N,), 0 to C - 1
    groups : array of str, shape (N,)
        The photograph (or linked group of photographs) behind each image; none is in two folds.
    folds, seed : int

    Returns
    -------
    float32 array of shape (N, C), rows sum to 1

    Raises
    ------
    DataError
        If a class has fewer photographs than there are folds.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    _require_photographs(labels, groups, folds)
    out = np.zeros((len(labels), int(labels.max()) + 1), np.float32)
    parts = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(features, labels, groups)
    for train, held_out in parts:
        probe = make_pipeline(
            StandardScaler(), LogisticRegression(C=_INVERSE_PENALTY, max_iter=_MAX_ITERATIONS)
        )
        probe.fit(features[train], labels[train])
        out[np.ix_(held_out, probe.classes_)] = probe.predict_proba(features[held_out])
    return out


def _require_photographs(labels: NDArray[np.int64], groups: NDArray[np.str_], folds: int) -> None:
    photographs = pd.Series(groups).groupby(labels).nunique()
    if photographs.empty or photographs.min() < folds:
        fewest = 0 if photographs.empty else int(photographs.min())
        raise DataError(
            f"{folds} folds need {folds} photographs of every class, one has {fewest}", "ask for fewer folds"
        )


def find_suspects(
    labels: NDArray[np.int64],
    probabilities: NDArray[np.float32],
    ids: NDArray[np.str_],
    groups: NDArray[np.str_],
    classes: Sequence[str],
) -> pd.DataFrame:
    """Return the photographs whose label is probably wrong, by confident learning.

    A photograph is judged once, by the mean probabilities of its copies (Northcutt et al. 2021, as in
    cleanlab's ``find_label_issues``, pruned by noise rate): copies are no independent witnesses, and
    an unlucky crop is not a wrong label. Only photographs that look at least as much like another class
    as that class's own do on average are counted as evidence, so that not every wrong label is found,
    and cells that are merely hard to name are among the suspects.

    Parameters
    ----------
    labels : int64 array of shape (N,), positions in ``classes``
    probabilities : float array of shape (N, C)
        By a model that has not seen the photograph, as from `out_of_fold_probabilities`.
    ids : array of str, shape (N,)
    groups : array of str, shape (N,)
        The photograph behind each image. Where linked photographs have different labels, each label of
        the group is judged apart.
    classes : sequence of str

    Returns
    -------
    DataFrame
        One row a suspected photograph, the most suspect first. ``rank`` from 1; ``source``; ``given`` and
        ``suggested`` class (the most probable one); ``self_confidence``, the mean probability of the given
        class; ``image``, the copy that is least like the given class, and its ``worst_confidence``;
        ``copies``, and how many of them look more like another class, ``copies_disagreeing``.
    """
    from cleanlab.filter import find_label_issues

    rows = np.arange(len(labels))
    own = probabilities[rows, labels].astype(float)
    frame = pd.DataFrame({"label": labels, "source": groups, "image": ids, "own": own})
    frame["disagrees"] = probabilities.argmax(axis=1) != labels
    grouped = frame.groupby(["source", "label"], sort=True)
    photographs = grouped.agg(
        self_confidence=("own", "mean"),
        worst_confidence=("own", "min"),
        copies=("own", "size"),
        copies_disagreeing=("disagrees", "sum"),
    )
    worst = frame.loc[grouped["own"].idxmin()].set_index(["source", "label"])["image"]
    photographs["image"] = worst
    photographs = photographs.reset_index()
    means = _means(grouped.ngroup().to_numpy(), probabilities.astype(np.float64))
    given = photographs["label"].to_numpy()
    with warnings.catch_warnings():
        # it warns of every class that does not occur, and of those with one photograph, which it can't judge
        warnings.filterwarnings("ignore", message="May not flag all label issues")
        suspect = find_label_issues(given, means, filter_by="prune_by_noise_rate", n_jobs=1)
    names = np.asarray(classes)
    photographs["given"], photographs["suggested"] = names[given], names[means.argmax(axis=1)]
    found = photographs[suspect].sort_values(["self_confidence", "source"], ignore_index=True)
    found["rank"] = np.arange(1, len(found) + 1)
    return found[list(COLUMNS)]


def _means(codes: NDArray[np.integer], values: NDArray[np.float64]) -> NDArray[np.float64]:
    sums = np.zeros((int(codes.max()) + 1, values.shape[1]))
    np.add.at(sums, codes, values)
    return sums / np.bincount(codes)[:, None]


def apply_audit(predictions: Predictions, suspects: pd.DataFrame) -> Predictions:
    """Return the predictions without the photographs under suspicion.

    Its score is "on audited labels: the suspected photographs left out". It stands beside the score
    on the official labels and never in its place: leaving out what a model finds hard flatters models.
    Suspects are not given the suggested label, which is one more model's opinion.

    Parameters
    ----------
    predictions : Predictions
    suspects : DataFrame
        From `find_suspects`, on the same names of photographs. All copies of a suspected photograph that
        have the suspected label are left out.

    Raises
    ------
    DataError
        If no photograph is left.
    """
    names = np.asarray(predictions.classes)
    own = pd.MultiIndex.from_arrays([predictions.sources, names[predictions.labels]])
    suspected = pd.MultiIndex.from_frame(suspects[["source", "given"]])
    kept = ~own.isin(suspected)
    if not kept.any():
        raise DataError("every photograph is under suspicion", "give the score on the official labels alone")
    p = predictions
    return Predictions(p.probabilities[kept], p.labels[kept], p.sources[kept], p.image_ids[kept], p.classes)


def audit_sides(sides: Sides, backbone: str, weights: str, seed: int = 0) -> pd.DataFrame:
    """Return the suspects of a whole set: a probe on frozen features, out of fold, and confident learning.

    Parameters
    ----------
    sides : Sides
        All of its cells are judged, whatever side they are on; nothing is trained for keeps.
    backbone, weights : str
        Of the network whose features are used; it must not have been trained on these labels.
    seed : int
    """
    base = backbones.build_base(backbone, weights, seed)
    extractor = backbones.build_feature_extractor(backbone, base, sides.cells.size)
    features = frozen_features(extractor, sides.cells, cache_folder())
    labels = sides.labels.argmax(axis=1)
    beliefs = out_of_fold_probabilities(features, labels, sides.groups, seed=seed)
    paths = sides.cells.table["path"].to_numpy(str)
    return find_suspects(labels, beliefs, paths, sides.groups, sides.classes)
