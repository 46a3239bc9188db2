"""Two reporting checklists, each item in a few words with the place where this study answers it.

CLAIM: Mongan et al. 2020, Radiology: Artificial Intelligence 2(2) e200029, 42 items. TRIPOD+AI: Collins et
al. 2024, BMJ 385 e078378, 27 items. The words are this library's own; read the papers for the full text.
"""

from __future__ import annotations

from dataclasses import dataclass

Path = tuple[str, ...]


@dataclass(frozen=True)
class Item:
    """One item of a checklist.

    Attributes
    ----------
    number : str
    asks : str
        What should be told.
    where : str
        The section, notebook or file that tells it; empty where nothing does.
    needs : tuple of paths
        Facts without which ``where`` would tell nothing; each a path of keys.
    reason : str
        Why it is not answered, where it is not.
    """

    number: str
    asks: str
    where: str = ""
    needs: tuple[Path, ...] = ()
    reason: str = ""


_PUBLIC = "the sets are public and carry no data on patients"
_SOFTWARE = "not a study of patients"

CLAIM: tuple[Item, ...] = (
    Item("1", "title names the method and its use of AI", "MODEL_CARD, Model"),
    Item("2", "structured summary", "MODEL_CARD, Model; report, first page"),
    Item("3", "background and intended role", "MODEL_CARD, Intended use"),
    Item("4", "aims and hypotheses", "notebooks 01 to 06, the question at the top of each"),
    Item("5", "prospective or retrospective", "DATA_SHEET, Collection"),
    Item("6", "goal of the study", "MODEL_CARD, Intended use"),
    Item("7", "sources of the data", "DATA_SHEET, Sets"),
    Item("8", "who or what is eligible", "DATA_SHEET, Exclusions", (("audit", "findings"),)),
    Item("9", "preprocessing", "MODEL_CARD, Input and output; notebook 02_preprocessing"),
    Item("10", "which parts of the data were used", "DATA_SHEET, Exclusions", (("audit", "findings"),)),
    Item("11", "definitions of what is predicted", "MODEL_CARD, Input and output; hematovision/classes.py"),
    Item("12", "removal of identities", "DATA_SHEET, People"),
    Item("13", "missing data", "DATA_SHEET, Exclusions", (("audit", "findings"),)),
    Item("14", "reference standard", "DATA_SHEET, Labels"),
    Item("15", "why that standard", "DATA_SHEET, Labels"),
    Item("16", "who annotated, and their training", reason="the sets' authors tell it in part only"),
    Item("17", "tools of annotation", reason="not told by the sets' authors"),
    Item("18", "agreement between annotators", reason="the sets hold one label an image"),
    Item("19", "sample size and its choice", reason="all images of public sets; no size was planned"),
    Item("20", "how data were divided", "DATA_SHEET, Partitions", (("splits",),)),
    Item("21", "level at which parts are disjoint", "DATA_SHEET, Partitions", (("splits",), ("proofs",))),
    Item("22", "the model in detail", "MODEL_CARD, Model; hematovision/learn/backbones.py"),
    Item("23", "software and versions", "report, manifest.json", (("manifest", "packages"),)),
    Item("24", "initial weights", "MODEL_CARD, Training"),
    Item("25", "training, augmentation, hyperparameters", "MODEL_CARD, Training", (("profile",),)),
    Item("26", "how the model was chosen", "MODEL_CARD, Training", (("metrics", "final", "rule"),)),
    Item("27", "ensembles", "MODEL_CARD, Training", (("ensemble",),), "no ensemble is part of this model"),
    Item("28", "measures of performance", "MODEL_CARD, Performance", (("bundle", "metrics"),)),
    Item("29", "uncertainty and significance", "MODEL_CARD, Performance", (("bundle", "metrics"),)),
    Item("30", "robustness", "MODEL_CARD, Failure modes", (("robustness",),)),
    Item("31", "explanation of single predictions", "MODEL_CARD, Failure modes", (("explanation",),)),
    Item("32", "test on data from elsewhere", "MODEL_CARD, Other laboratories", (("generalisation",),)),
    Item(
        "33", "flow of cases", "DATA_SHEET, Exclusions and Partitions", (("audit", "findings"), ("splits",))
    ),
    Item("34", "demographics of each part", reason=_PUBLIC),
    Item("35", "performance on every part", "MODEL_CARD, Performance", (("bundle", "metrics"),)),
    Item("36", "estimates with their precision", "MODEL_CARD, Performance", (("bundle", "metrics"),)),
    Item("37", "analysis of failures", "MODEL_CARD, Failure modes", (("failure_modes",),)),
    Item("38", "limits of the study", "MODEL_CARD, Limits"),
    Item("39", "what follows for practice", "MODEL_CARD, Intended use"),
    Item("40", "registration", reason="not registered: " + _SOFTWARE),
    Item("41", "where the protocol is", "profiles/ and notebooks/, which are the whole protocol"),
    Item("42", "funding", reason="nothing to declare was handed in"),
)

TRIPOD_AI: tuple[Item, ...] = (
    Item("1", "title", "MODEL_CARD, Model"),
    Item("2", "abstract", "report, first page"),
    Item("3", "context, target population, inequalities", "MODEL_CARD, Intended use and Limits"),
    Item("4", "aims: developed, evaluated or both", "MODEL_CARD, Intended use"),
    Item("5", "sources and dates of the data", "DATA_SHEET, Sets and Collection"),
    Item("6", "setting, eligibility, treatments", reason=_PUBLIC),
    Item("7", "preparation of the data", "MODEL_CARD, Input and output; DATA_SHEET, Exclusions"),
    Item("8", "outcome and who judged it", "DATA_SHEET, Labels"),
    Item("9", "predictors", "MODEL_CARD, Input and output"),
    Item("10", "sample size", reason="all images of public sets; no size was planned"),
    Item("11", "missing data", "DATA_SHEET, Exclusions", (("audit", "findings"),)),
    Item("12", "methods of analysis", "MODEL_CARD, Training and Performance", (("profile",),)),
    Item("13", "imbalance of classes", "MODEL_CARD, Training", (("training",),)),
    Item("14", "fairness", reason="cannot be measured: " + _PUBLIC),
    Item("15", "what the model returns, and thresholds", "MODEL_CARD, Input and output and Thresholds"),
    Item("16", "how training and evaluation differ", "DATA_SHEET, Partitions", (("splits",),)),
    Item("17", "ethical approval", reason="not needed here: published images without identities"),
    Item("18", "funding, protocol, registration, data, code", "DATA_SHEET, Sets; the repository"),
    Item("19", "involvement of patients and the public", reason="none: " + _SOFTWARE),
    Item("20", "flow and description of participants", reason=_PUBLIC),
    Item("21", "numbers in each analysis", "DATA_SHEET, Partitions", (("splits",),)),
    Item("22", "the whole model, so that others can use it", "model.keras and model.json", (("bundle",),)),
    Item("23", "performance with intervals", "MODEL_CARD, Performance", (("bundle", "metrics"),)),
    Item("24", "results of updating the model", reason="this model was not updated"),
    Item("25", "interpretation", "MODEL_CARD, Performance and Other laboratories", (("bundle", "metrics"),)),
    Item("26", "limits", "MODEL_CARD, Limits"),
    Item("27", "use: poor input, expertise, next steps", "MODEL_CARD, Thresholds and Intended use"),
)
