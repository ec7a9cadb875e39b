"""Patching, ablation and noise over sites × positions (× heads), and paths between heads."""

from reftlab.sweeping.metric import (
    Metric,
    answer_log_probability,
    answer_logit,
    answer_probability,
    kl_divergence,
    logit_diff,
)
from reftlab.sweeping.path_result import PathResult
from reftlab.sweeping.paths import sweep_paths
from reftlab.sweeping.result import Agreement, SiteLabel, SweepResult
from reftlab.sweeping.sweep import sweep

__all__ = [
    "Agreement",
    "Metric",
    "PathResult",
    "SiteLabel",
    "SweepResult",
    "answer_log_probability",
    "answer_logit",
    "answer_probability",
    "kl_divergence",
    "logit_diff",
    "sweep",
    "sweep_paths",
]
