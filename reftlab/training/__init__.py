"""Data, batches, losses and the Trainer: how edits learn on a frozen model, and how one asks it."""

from reftlab.training.collate import Collator
from reftlab.training.data import Encoded, Example, as_examples, encode, format_prompt
from reftlab.training.evaluation import Evaluation, Outcome, evaluate
from reftlab.training.files import read_examples
from reftlab.training.loss import answer_loss, training_batch
from reftlab.training.replies import reply
from reftlab.training.result import TrainResult, TrainStep
from reftlab.training.trainer import train

__all__ = [
    "Collator",
    "Encoded",
    "Evaluation",
    "Example",
    "Outcome",
    "TrainResult",
    "TrainStep",
    "answer_loss",
    "as_examples",
    "encode",
    "evaluate",
    "format_prompt",
    "read_examples",
    "reply",
    "train",
    "training_batch",
]
