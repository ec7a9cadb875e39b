"""What a bound model makes of examples, run after run: one number an example, with intervals."""

from reftlab.measuring.behaviour import Behaviour, behaviour_of, measured_on
from reftlab.measuring.intervals import ROUNDING, Estimate, change_of, mean_of, rounding_in, share_kept
from reftlab.measuring.question import Question, checked_examples, metrics_of, question_of
from reftlab.measuring.runs import AnswerRuns

__all__ = ["ROUNDING", "AnswerRuns", "Behaviour", "Estimate", "Question", "behaviour_of", "change_of"]
__all__ += ["checked_examples", "mean_of", "measured_on", "metrics_of", "question_of", "rounding_in"]
__all__ += ["share_kept"]
