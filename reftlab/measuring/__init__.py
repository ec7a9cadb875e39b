"""What a bound model makes of examples, run after run: one number an example, with intervals."""

from reftlab.measuring.behaviour import Behaviour, behaviour_of, measured_on
from reftlab.measuring.intervals import Estimate, mean_of, share_kept
from reftlab.measuring.question import Question, checked_examples, metrics_of, question_of
from reftlab.measuring.runs import AnswerRuns

__all__ = ["AnswerRuns", "Behaviour", "Estimate", "Question", "behaviour_of", "checked_examples", "mean_of"]
__all__ += ["measured_on", "metrics_of", "question_of", "share_kept"]
