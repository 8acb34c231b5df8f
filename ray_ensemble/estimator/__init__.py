"""What fine-tuning on a group of tasks would do, from gradients at θ₀ alone (no Ray, no model).

- `features`: a task as projected gradients, and the two halves of its validation data
- `loss`: value, gradient and curvature of a group's loss, and its examples left out
- `fit`: the regularised logistic fit, by preconditioned Newton steps that never raise the objective
- `batched`: the same for many groups at once, in torch on a CPU or a GPU, with their losses in `batch_loss`
- `models`: second-order models of the tasks' losses, which add up to where a group's fit starts
- `predict`: loss and accuracy from linearised label scores
- `budget`: λ of a group by the steps that it will be trained for, and the choice of λ
- `calibration`: the choice of λ by really fine-tuned subsets
- `estimator`: the estimate of a group, cached, and the objective of a partition
- `planted`: generated tasks with a known grouping, for tests and benchmarks
- `similarity`: how alike tasks are by one vector each, for groupings that estimate nothing
- `affinity`: which task helps which, over sampled subsets
"""

from ray_ensemble.estimator.affinity import Affinity, sample_subsets
from ray_ensemble.estimator.budget import RegularizationChoice, choose_regularization, group_regularization
from ray_ensemble.estimator.calibration import Truth, calibrate_regularization, estimates_along
from ray_ensemble.estimator.estimator import Estimator, Group, GroupEstimate
from ray_ensemble.estimator.features import TaskFeatures, pairwise_margins, validation_halves
from ray_ensemble.estimator.fit import Fit, Model, fit_margins, fit_path
from ray_ensemble.estimator.predict import Estimate, estimate_task

__all__ = [
    "Affinity",
    "Estimate",
    "Estimator",
    "Fit",
    "Group",
    "GroupEstimate",
    "Model",
    "RegularizationChoice",
    "TaskFeatures",
    "Truth",
    "calibrate_regularization",
    "choose_regularization",
    "estimate_task",
    "estimates_along",
    "fit_margins",
    "fit_path",
    "group_regularization",
    "pairwise_margins",
    "sample_subsets",
    "validation_halves",
]
