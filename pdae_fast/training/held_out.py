"""How good a linear attribute classifier is: accuracy and area under the ROC curve of each attribute."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from .. import cli

INSTALL = "AUROC needs scikit-learn: pip install 'pdae_fast[experiments]'"


def evaluate(logits: Tensor, labels: Tensor, columns: list[str], exclusive: bool = False) -> dict[str, Any]:
    """Quality of ``logits`` [K, n] against ``labels`` [K, n] of 0 and 1, for attributes called ``columns``.

    Each attribute: how many of the K are positive, the accuracy at probability one half, the accuracy of always
    answering with the more frequent value ("majority"), and the area under the ROC curve, None where it is not
    defined (all K alike) or scikit-learn is missing; "auroc_available" says which. ``exclusive``: exactly one label
    of each row is 1, and "class_accuracy" is that of the largest logit.
    """
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError:
        roc_auc_score = None
    labels = labels.bool()
    attributes = {}
    for i, name in enumerate(columns):
        truth, positives = labels[:, i], float(labels[:, i].float().mean())
        defined = roc_auc_score is not None and 0 < positives < 1
        attributes[name] = {
            "positives": int(truth.sum()),
            "accuracy": float(((logits[:, i] > 0) == truth).float().mean()),
            "majority": max(positives, 1 - positives),
            "auroc": float(roc_auc_score(truth.numpy(), logits[:, i].double().numpy())) if defined else None,
        }
    areas = [values["auroc"] for values in attributes.values() if values["auroc"] is not None]
    report = {
        "images": len(labels),
        "mean_accuracy": fmean(values["accuracy"] for values in attributes.values()),
        "mean_auroc": fmean(areas) if areas else None,
        "auroc_available": roc_auc_score is not None,
        "attributes": attributes,
    }
    if exclusive:
        report["class_accuracy"] = float((logits.argmax(1) == labels.int().argmax(1)).float().mean())
    return report


@torch.inference_mode()
def logits_of(classifier: torch.nn.Linear, z: Tensor) -> Tensor:
    """Logits float32 [K, n] of normalised z [K, D], on the CPU."""
    return classifier.cpu()(z.float())


def summary(report: dict[str, Any]) -> str:
    """``report`` of `evaluate` as a table, and a line for what is missing from it."""

    def area(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    rows = [
        [name, str(v["positives"]), f"{v['majority']:.4f}", f"{v['accuracy']:.4f}", area(v["auroc"])]
        for name, v in report["attributes"].items()
    ]
    rows.append(["mean", "", "", f"{report['mean_accuracy']:.4f}", area(report["mean_auroc"])])
    lines = [cli.table(["attribute", "positives", "majority", "accuracy", "AUROC"], rows)]
    if "class_accuracy" in report:
        lines.append(f"class of the largest logit: accuracy {report['class_accuracy']:.4f}")
    if not report["auroc_available"]:
        lines.append(INSTALL)
    return "\n".join(lines)
