"""What is computed from every example at once, in NumPy: average precision, and tables per class."""

import csv
import json
from pathlib import Path

import numpy as np


def average_precision(score: np.ndarray, label: np.ndarray) -> float:
  """Area under the precision-recall steps of one class; NaN without a positive. score [n], label [n] of 0 and 1.

  Examples of equal score enter together, as in scikit-learn's average_precision_score.
  """
  if not label.any():
    return float("nan")
  order = np.argsort(-score, kind="stable")
  score, label = score[order], label[order]
  last = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)  # of each group of equal scores
  hits = np.cumsum(label, dtype=np.float64)[last]
  precision, recall = hits / (last + 1), hits / hits[-1]
  return float((precision * np.diff(recall, prepend=0.0)).sum())


def mean_average_precision(score: np.ndarray, label: np.ndarray) -> float:
  """Mean over the classes that occur. score, label: [n, C]; NaN when none occurs."""
  values = [average_precision(score[:, c], label[:, c]) for c in range(label.shape[1])]
  values = [value for value in values if not np.isnan(value)]
  return float(np.mean(values)) if values else float("nan")


def confusion_matrix(label: np.ndarray, guess: np.ndarray, num_classes: int) -> np.ndarray:
  """int64 [C, C]: row = true class, column = predicted class. label, guess: int [n]."""
  flat = label.astype(np.int64) * num_classes + guess
  return np.bincount(flat, minlength=num_classes**2).reshape(num_classes, num_classes)


def write_csv(path: Path, rows: list) -> Path:
  with path.open(
    "w", newline="", encoding="utf-8", errors="backslashreplace"
  ) as file:  # names need not be valid text
    csv.writer(file).writerows(rows)
  return path


def write_jsonl(path: Path, rows: list[dict]) -> Path:
  path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
  return path


def mean_iou(intersection: np.ndarray, predicted: np.ndarray, labelled: np.ndarray) -> dict[str, np.ndarray]:
  """From pixel counts per class [C], summed over the whole set.

  Returns:
    IoU and Acc per class (NaN where a class is absent), their means over the classes that occur (mIoU, mAcc), and the
    accuracy over all pixels (aAcc).
  """
  with np.errstate(divide="ignore", invalid="ignore"):
    iou = intersection / (predicted + labelled - intersection)
    accuracy = intersection / labelled

  def mean(x: np.ndarray) -> float:
    return float(np.nanmean(x)) if np.isfinite(x).any() else float("nan")

  return {
    "IoU": iou,
    "Acc": accuracy,
    "mIoU": mean(iou),
    "mAcc": mean(accuracy),
    "aAcc": float(intersection.sum() / max(labelled.sum(), 1)),
  }
