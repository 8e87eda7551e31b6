"""The experiments of `pdae_fast.report`, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import UserError


@dataclass(frozen=True)
class Experiment:
    """A command and what of its results goes on the page.

    ``module`` and ``arguments`` follow "python -m pdae_fast."; ``quick`` takes the arguments' place in a quick report.
    ``labels``: the command takes --attributes and --columns. ``pictures``: files with what they show, for those who
    see them and for those who cannot. ``tables``: CSV files, or "metrics.json:KEY" for a list of rows there, with
    titles.
    """

    name: str
    title: str
    about: str
    module: str
    arguments: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()
    labels: bool = False
    pictures: dict[str, str] = field(default_factory=dict)
    tables: dict[str, str] = field(default_factory=dict)
    optional: bool = False  # only when it is asked for


EXPERIMENTS = (
    Experiment(
        "evaluate",
        "Autoencoding",
        "How close reconstructions come to the images: from inferred x_T, from random x_T, and by the prior alone.",
        "evaluate",
        quick=("--steps", "10", "--limit", "8"),
        pictures={"grid.png": "Input images in the first row, then one row of reconstructions for each setting"},
        tables={"table.csv": "Mean quality and cost of each setting"},
    ),
    Experiment(
        "interpolate",
        "Interpolation",
        "Between two images: latent codes with slerp of x_T, and trajectories that mix the two gradients.",
        "interpolate",
        quick=("--steps", "10", "--points", "5"),
        pictures={"grid.png": "Each row goes from one image to another; rows alternate between the two kinds"},
        tables={"metrics.json:rows": "Evenness of the paths"},
    ),
    Experiment(
        "manipulate",
        "Manipulation",
        "Attributes moved along the classifier's directions; everything is decoded from the image's own x_T.",
        "manipulate",
        quick=("--preset", "fast", "--pair-limit", "4"),
        pictures={
            "grid.png": "Input, reconstruction, then one row for every attribute and scale",
            "pairs.png": "Pairs that differ in one attribute: the first image, its edits, and the true second image",
        },
        tables={"metrics.json:rows": "What each edit changes", "metrics.json:pairs.rows": "Against the true edit"},
    ),
    Experiment(
        "sample",
        "Unconditional sampling",
        "New images: z from the latent DPM, decoded from random x_T with G for the first 70% of the steps.",
        "sample",
        arguments=("--prior-only",),
        quick=("--steps", "20", "--count", "10", "--prior-only"),
        pictures={"grid.png": "Samples in rows of ten, and the data nearest to the first row"},
        tables={"metrics.json:rows": "Samples against data"},
    ),
    Experiment(
        "few-shot",
        "Few-shot conditional sampling",
        "A classifier on z from a few labels accepts or rejects codes drawn from the latent DPM.",
        "few_shot",
        quick=("--steps", "10", "--count", "5", "--epochs", "5"),
        labels=True,
        pictures={"grid.png": "Accepted samples, one row for each class and setting"},
        tables={"metrics.json:rows": "Accepted samples"},
    ),
    Experiment(
        "probe",
        "What is in z",
        "Linear probes on z against pixels and their principal components, and nearest neighbours.",
        "probe",
        labels=True,
        pictures={
            "probe.png": "Quality of linear probes on each feature set, with 95% intervals",
            "neighbours.png": "Test images, each beside its nearest training images in z and in pixels",
        },
        tables={"metrics.json:features": "Linear probes"},
    ),
    Experiment(
        "features",
        "Which block, which t",
        "Linear read-outs of the network's features, block by block along t, beside z and pixels.",
        "probe",
        arguments=("--features", "middle", "decoder2", "--times", "0", "100", "400"),
        quick=("--features", "middle", "--times", "0", "400", "--grid", "4"),
        labels=True,
        pictures={
            "features.png": "A panel for each target, one curve along t for each block; dotted: without features"
        },
        tables={"features.csv": "All read-outs"},
    ),
    Experiment(
        "students",
        "What a small student learns",
        "A small network taught with few labels: from scratch, after learning the model's features, and controls.",
        "students",
        quick=("--steps", "20", "--tune-steps", "20", "--seeds", "1", "--arms", "scratch", "0"),
        pictures={"students.png": "Quality of each arm, fine-tuned and frozen, with a dot for each seed"},
        tables={"metrics.json:rows": "Each arm, and its gain over scratch"},
    ),
    Experiment(
        "gap",
        "Posterior-mean gap",
        "How far the model's posterior mean is from the true one at every t, with and without the shift.",
        "analyze gap",
        quick=("--limit", "8", "--times", "12"),
        pictures={
            "gap.png": "Squared posterior-mean gap over t, logarithmic: one curve without the shift, one with it"
        },
        tables={"metrics.json:ranges": "The gap in each tenth of t", "gap.csv": "The gap at each t"},
    ),
    Experiment(
        "loss",
        "Loss along t",
        "Error of the predicted noise at every t, unconditional and conditional on z.",
        "analyze loss",
        quick=("--limit", "8", "--times", "12"),
        pictures={"loss.png": "Loss over t, unweighted on the left and weighted on the right, both logarithmic"},
        tables={"metrics.json:ranges": "The unweighted loss in each tenth of t", "loss.csv": "The loss at each t"},
    ),
    Experiment(
        "one-step",
        "One-step estimate of x0",
        "The image estimated from x_t at once: what the prior alone believes, and what z adds.",
        "analyze one-step",
        quick=("--limit", "8", "--times", "12"),
        pictures={
            "grid.png": "For falling t three rows each: x_t, the estimate without G, and with G",
            "one_step.png": "MSE of the one-step estimate over t, without and with G",
        },
        tables={"metrics.json:ranges": "MSE in each tenth of t", "one_step.csv": "MSE at each t"},
    ),
    Experiment(
        "shift",
        "G along t",
        "The gradient that z adds, each picture scaled to its own largest value (grey is 0), its size and direction.",
        "analyze shift",
        quick=("--limit", "8", "--times", "12"),
        pictures={
            "grid.png": "Input images, then G for falling t",
            "shift.png": "Size of the shift against what the prior misses, and the cosine of the angle between the two",
        },
        tables={"shift.csv": "The shift at each t"},
    ),
    Experiment(
        "critical-stage",
        "Critical stage",
        "Classifier guidance in a part of the trajectory only, scored by another classifier on the finished images.",
        "analyze critical-stage",
        quick=("--count", "10", "--stages", "3", "--steps", "15", "--epochs", "10"),
        labels=True,
        pictures={
            "heat_map.png": "Accuracy by where guidance begins and ends; the shortest stage that is enough is framed",
            "grid.png": "Samples not guided, guided throughout, and in the shortest stage; a class in each column",
        },
        tables={"stages.csv": "Accuracy of each stage"},
    ),
    Experiment(
        "inversion",
        "What an inferred x_T is worth",
        "Every way to infer x_T: whether it is still normal noise, how it interpolates, and how its edits compare with "
        "the truth where that is known.",
        "analyze inversion",
        quick=("--limit", "4", "--ways", "fast", "balanced", "--pair-limit", "2"),
        pictures={
            "inversion.png": "A panel for each statistic with one point for each way; grey is where true noise falls",
            "grid.png": "Input images and their reconstructions by each way",
            "interpolations.png": "One interpolation by each way",
        },
        tables={"inversion.csv": "Each way to infer x_T"},
    ),
    Experiment(
        "pareto",
        "Quality against cost",
        "Many settings on the same images, by evaluations and by time.",
        "pareto",
        quick=("--set", "quick", "--limit", "4"),
        pictures={"pareto.png": "Error against evaluations, and against time, one point for each setting"},
        tables={"pareto.csv": "All settings"},
        optional=True,
    ),
)


def choose(names: Sequence[str] | None) -> list[Experiment]:
    """The experiments called ``names``, or all that are not optional; UserError naming those that there are."""
    known = {experiment.name: experiment for experiment in EXPERIMENTS}
    for name in names or ():
        if name not in known:
            raise UserError(f"--only: no experiment {name!r}; there are {', '.join(known)}")
    if names:
        return [experiment for experiment in EXPERIMENTS if experiment.name in names]
    return [experiment for experiment in EXPERIMENTS if not experiment.optional]
