"""The table of notebooks: what is run, after what, and the question each one answers.

To add a notebook is one row of `STEPS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hematovision.config import Profile, project_root
from hematovision.errors import ConfigError

BACKBONE_TITLES = {"vgg16": "VGG16", "mobilenetv2": "MobileNetV2", "resnet50": "ResNet50"}


@dataclass(frozen=True)
class Step:
    """One notebook of the study.

    Attributes
    ----------
    name : str
        Name of the step, and of its page of the report.
    notebook : str
        File name in ``notebooks/``.
    title, question : str
        As the index of the report and the README show them.
    writes : str
        What it leaves behind, in a few words.
    after : tuple of str
        Names of the steps whose files it reads.
    per_backbone : bool
        Whether it is a template, run once for each backbone of the profile.
    when : callable, optional
        Takes the `Profile`; the step is left out where it returns False.
    """

    name: str
    notebook: str
    title: str
    question: str
    writes: str
    after: tuple[str, ...] = ()
    per_backbone: bool = False
    when: Callable[[Profile], bool] | None = None


STEPS: tuple[Step, ...] = (
    Step(
        "01_eda",
        "01_eda.ipynb",
        "The images",
        "What is in the images, and can they be trusted?",
        "data quality, photographs, the leak",
    ),
    Step(
        "02_preprocessing",
        "02_preprocessing.ipynb",
        "From smear to cell",
        "How does a field of a smear become what a network reads?",
        "cells, splits",
        after=("01_eda",),
    ),
    Step(
        "03_transfer_learning",
        "03_transfer_learning.ipynb",
        "Transfer learning",
        "How far does a network get that has learned to see elsewhere?",
        "models, curves, predictions",
        after=("02_preprocessing",),
        per_backbone=True,
    ),
    Step(
        "04_tuning",
        "04_tuning.ipynb",
        "Tuning",
        "How much is gained by searching for better hyperparameters?",
        "best hyperparameters, the tuned model",
        after=("03_transfer_learning",),
        when=lambda profile: profile.tuning_trials > 0 and profile.tuning_backbone in profile.backbones,
    ),
    Step(
        "05_comparison",
        "05_comparison.ipynb",
        "Comparison",
        "Which network is best, by how much, and how sure can we be?",
        "metrics.json, the final model",
        after=("03_transfer_learning", "04_tuning"),
    ),
    Step(
        "06_generalisation",
        "06_generalisation.ipynb",
        "Generalisation",
        "What is left of it in another laboratory?",
        "transfer between sets",
        after=("05_comparison",),
    ),
    Step(
        "07_final_model",
        "07_final_model.ipynb",
        "The final model",
        "How good is the best model that can honestly be handed out, and when is it sure?",
        "the final model, its calibration",
        after=("06_generalisation",),
        when=lambda profile: "final_model" in profile.extra_notebooks,
    ),
    Step(
        "08_release",
        "08_release.ipynb",
        "The release",
        "What does it get wrong, where does it look, and are the labels right?",
        "the bundle, its card, the label audit",
        after=("07_final_model",),
        when=lambda profile: "final_model" in profile.extra_notebooks,
    ),
    Step(
        "09_learning_curves",
        "09_learning_curves.ipynb",
        "Learning curves",
        "What are learned weights worth, in photographs?",
        "scores by number of photographs",
        after=("02_preprocessing",),
        when=lambda profile: "learning_curves" in profile.extra_notebooks,
    ),
)


@dataclass(frozen=True)
class Job:
    """One execution of a notebook: a step, with its backbone where it is a template.

    Attributes
    ----------
    step : Step
    backbone : str
        ``""`` where the step is not a template.
    after : tuple of str
        Names of the jobs that come before.
    """

    step: Step
    backbone: str
    after: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the job and of its page: the step's, with the backbone's after a hyphen."""
        return f"{self.step.name}-{self.backbone}" if self.backbone else self.step.name

    @property
    def title(self) -> str:
        """Title for people."""
        return f"{self.step.title}: {BACKBONE_TITLES[self.backbone]}" if self.backbone else self.step.title

    @property
    def path(self) -> Path:
        """The notebook's file."""
        return project_root() / "notebooks" / self.step.notebook


def plan_jobs(profile: Profile, steps: tuple[Step, ...] = STEPS) -> list[Job]:
    """Return the jobs of a profile, each after those it depends on.

    Raises
    ------
    ConfigError
        If a notebook's file does not exist, or a step depends on one that does not come before it.
    """
    chosen = [s for s in steps if s.when is None or s.when(profile)]
    names: dict[str, tuple[str, ...]] = {}
    jobs: list[Job] = []
    for step in chosen:
        unknown = [name for name in step.after if name not in {s.name for s in steps[: steps.index(step)]}]
        if unknown:
            raise ConfigError(f"step {step.name} depends on '{unknown[0]}'", "list that step above it")
        after = tuple(job for name in step.after for job in names.get(name, ()))
        mine = [Job(step, b, after) for b in (profile.backbones if step.per_backbone else ("",))]
        names[step.name] = tuple(job.name for job in mine)
        jobs += mine
    for job in jobs:
        if not job.path.is_file():
            raise ConfigError(
                f"there is no notebook notebooks/{job.step.notebook}", f"step {job.step.name} needs it"
            )
    return jobs
