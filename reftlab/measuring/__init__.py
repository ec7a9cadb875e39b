"""What a bound model makes of examples, run after run: one number an example, with intervals."""

from reftlab.measuring.behaviour import Behaviour, behaviour_of
from reftlab.measuring.intervals import Estimate, mean_of, share_kept
from reftlab.measuring.runs import AnswerRuns

__all__ = ["AnswerRuns", "Behaviour", "Estimate", "behaviour_of", "mean_of", "share_kept"]
