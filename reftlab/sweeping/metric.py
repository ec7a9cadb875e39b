"""What a sweep measures of each run: numbers made from the logits at the prompt's last token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from reftlab.errors import DataError
from reftlab.sweeping.recognising import UnrecognisedError, fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Measured",
    "Metric",
    "References",
    "answer_log_probability",
    "answer_logit",
    "answer_probability",
    "as_metric",
    "kl_divergence",
    "logit_diff",
]

Answer = str | int
Answers = Answer | Sequence[Answer]
Measured = Callable[[Tensor], Tensor]
"""From logits `(row, vocab)` at the last token to one number a row, `(row,)`."""


@dataclass(frozen=True)
class References:
    """Logits `(vocab,)` at the last token of a pair's runs, which metrics may compare with."""

    clean: Tensor
    corrupt: Tensor | None


class Metric(ABC):
    """What is measured.

    Attributes:
        name: as figures and tables show it.
        unit: of its numbers.
    """

    name: str
    unit: str

    @abstractmethod
    def for_pair(
        self, pair: int, tokenizer: PreTrainedTokenizerBase | None, references: References
    ) -> Measured:
        """The function that measures the runs of one pair of prompts."""

    def tokens(self, pair: int, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...] | None:
        """The tokens whose logits are all that it looks at; None where it looks at every one."""
        return None

    def check(self, pairs: int, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Refuse answers that are no tokens, or too few, before anything runs."""
        del pairs, tokenizer

    @abstractmethod
    def key(self) -> str:
        """What tells this metric from all others, for results kept on disk."""

    def finite(
        self, pair: int, tokenizer: PreTrainedTokenizerBase | None, references: References
    ) -> Measured:
        """As `for_pair`, and refuse numbers that are none."""
        measured = self.for_pair(pair, tokenizer, references)

        def checked(logits: Tensor) -> Tensor:
            found = measured(logits)
            if not bool(torch.isfinite(found).all()):
                where = "metric" if bool(torch.isfinite(logits).all()) else "model's weights and dtype"
                raise DataError(
                    f"{self.name} of pair {pair} came to numbers that are not finite; look at the {where}"
                )
            return found

        return checked


@dataclass(frozen=True)
class _OfAnswers(Metric):
    """A metric of the next token's being one or another."""

    kind: Literal["difference", "logit", "probability", "log-probability"]
    answers: tuple[Answers, ...]

    @property
    def name(self) -> str:  # type: ignore[override]
        shown = [repr(a) if isinstance(a, str | int) else "answer" for a in self.answers]
        if self.kind == "difference":
            return "logit difference" + (
                f", {shown[0]} − {shown[1]}" if "answer" not in shown else ", right − wrong answer"
            )
        return f"{self.kind} of {'the answer' if shown[0] == 'answer' else shown[0]}"

    @property
    def unit(self) -> str:  # type: ignore[override]
        units = {"difference": "logits", "logit": "logits", "probability": "", "log-probability": "nats"}
        return units[self.kind]

    def check(self, pairs: int, tokenizer: PreTrainedTokenizerBase | None) -> None:
        for answers in self.answers:
            if not isinstance(answers, str | int) and len(answers) != pairs:
                raise DataError(
                    f"the metric has {len(answers)} answers, {list(answers)!r}, and there are {pairs} "
                    "pairs of prompts; give one answer, or one a pair"
                )
            for answer in [answers] if isinstance(answers, str | int) else answers:
                _token(answer, tokenizer)

    def for_pair(
        self, pair: int, tokenizer: PreTrainedTokenizerBase | None, references: References
    ) -> Measured:
        ids = self._ids(pair, tokenizer)
        size = references.clean.shape[-1]
        for number in ids:
            if not 0 <= number < size:
                raise DataError(f"the metric's answer {number} is no token: the model has {size}")

        def measured(logits: Float[Tensor, "row vocab"]) -> Float[Tensor, " row"]:
            logits = logits.float()
            if self.kind == "difference":
                return logits[:, ids[0]] - logits[:, ids[1]]
            if self.kind == "logit":
                return logits[:, ids[0]]
            found = logits[:, ids[0]] - logits.logsumexp(-1)
            return found.exp() if self.kind == "probability" else found

        return measured

    def tokens(self, pair: int, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...] | None:
        return self._ids(pair, tokenizer) if self.kind in ("difference", "logit") else None

    def key(self) -> str:
        return f"{self.kind} {self.answers!r}"

    def _ids(self, pair: int, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
        return tuple(_token(a if isinstance(a, str | int) else a[pair], tokenizer) for a in self.answers)


@dataclass(frozen=True)
class _Divergence(Metric):
    """Kullback–Leibler divergence from one of the pair's own runs."""

    reference: Literal["clean", "corrupt"]
    unit = "nats"

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"divergence from the {'clean' if self.reference == 'clean' else 'corrupted'} run"

    def for_pair(
        self, pair: int, tokenizer: PreTrainedTokenizerBase | None, references: References
    ) -> Measured:
        logits = references.clean if self.reference == "clean" else references.corrupt
        if logits is None:
            raise DataError("kl_divergence('corrupt') needs corrupted prompts, and corrupt is None")
        wanted = logits.float().log_softmax(-1)

        def measured(logits: Float[Tensor, "row vocab"]) -> Float[Tensor, " row"]:
            found = logits.float().log_softmax(-1)
            return (wanted.exp() * (wanted - found)).sum(-1)

        return measured

    def key(self) -> str:
        return f"divergence {self.reference}"


@dataclass(frozen=True)
class _Own(Metric):
    """A function of the caller's."""

    function: Callable[[Tensor], Tensor]
    unit = ""

    @property
    def name(self) -> str:  # type: ignore[override]
        found = str(getattr(self.function, "__name__", type(self.function).__name__))
        return "metric" if found == "<lambda>" else found.replace("_", " ")

    def for_pair(
        self, pair: int, tokenizer: PreTrainedTokenizerBase | None, references: References
    ) -> Measured:
        def measured(logits: Float[Tensor, "row vocab"]) -> Float[Tensor, " row"]:
            found = self.function(logits)
            if not isinstance(found, Tensor) or found.shape != logits.shape[:1]:
                what = tuple(found.shape) if isinstance(found, Tensor) else repr(found)
                raise DataError(
                    f"metric={self.function!r} returned {what} for logits of shape {tuple(logits.shape)}; it "
                    f"takes (row, vocab) at the last token and returns one number a row, {(logits.shape[0],)}"
                )
            if found.is_complex():
                raise DataError(f"metric={self.function!r} returned complex numbers; expected real ones")
            return found.float()

        return measured

    def key(self) -> str:
        own = getattr(self.function, "key", None)
        if own is not None:
            return f"key {own}"
        try:
            return f"code {fingerprint(self.function)}"
        except UnrecognisedError as error:
            raise DataError(
                f"metric={self.function!r} cannot be recognised again, so its results cannot be kept in "
                f"folder=: {error}; give the function an attribute `key` that names what it measures, or "
                "leave folder= out"
            ) from error


def logit_diff(right: Answers, wrong: Answers) -> Metric:
    """The logit of one next token minus that of another.

    Args:
        right, wrong: texts of one token each, spaces included, or token ids; one for all pairs of
            prompts, or a list with one a pair.

    Source: Wang et al., "Interpretability in the Wild" (2022), section 2.

    >>> logit_diff(" Mary", " John").name
    "logit difference, ' Mary' − ' John'"
    """
    if right == wrong:
        raise DataError(
            f"logit_diff({right!r}, {wrong!r}): the two are the same, so the difference is always 0"
        )
    return _OfAnswers("difference", (_answers(right), _answers(wrong)))


def answer_logit(answer: Answers) -> Metric:
    """The logit of one next token; `answer` as in `logit_diff`."""
    return _OfAnswers("logit", (_answers(answer),))


def answer_probability(answer: Answers) -> Metric:
    """The probability of one next token; `answer` as in `logit_diff`."""
    return _OfAnswers("probability", (_answers(answer),))


def answer_log_probability(answer: Answers) -> Metric:
    """The log-probability of one next token, in nats; `answer` as in `logit_diff`."""
    return _OfAnswers("log-probability", (_answers(answer),))


def kl_divergence(reference: Literal["clean", "corrupt"] = "clean") -> Metric:
    """KL(reference ‖ run) of the next token, in nats: 0 where a run answers as the reference run does.

    Args:
        reference: which of the pair's own runs to compare with.
    """
    if reference not in ("clean", "corrupt"):
        raise DataError(f"kl_divergence({reference!r}): expected 'clean' or 'corrupt'")
    return _Divergence(reference)


def as_metric(metric: Any) -> Metric:
    """A metric as an object.

    Raises:
        DataError: it is none, and no function.
    """
    if isinstance(metric, Metric):
        return metric
    if getattr(metric, "__module__", None) == __name__:
        raise DataError(f"metric={metric.__name__}: call it, as in rl.logit_diff(' Mary', ' John')")
    if callable(metric):
        return _Own(metric)
    raise DataError(
        f"metric={metric!r}: expected rl.logit_diff(' Mary', ' John'), another of reftlab's metrics, or a "
        "function from logits (row, vocab) to one number a row"
    )


def _answers(value: Any) -> Answers:
    if isinstance(value, str | int) and not isinstance(value, bool):
        return value
    if isinstance(value, torch.Tensor):
        value = value.tolist()
        value = [value] if isinstance(value, int) else value
    if isinstance(value, list | tuple) and value and all(type(v) in (str, int) for v in value):
        return tuple(value)
    raise DataError(f"{value!r} is no answer: expected a text such as ' Mary', a token id, or a list of them")


def _token(answer: Answer, tokenizer: PreTrainedTokenizerBase | None) -> int:
    if isinstance(answer, int):
        return answer
    if tokenizer is None:
        raise DataError(
            f"the answer {answer!r} is a text, and there is no tokenizer; give tokenizer= or token ids"
        )
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        pieces = [tokenizer.decode([number]) for number in ids]
        raise DataError(
            f"the answer {answer!r} is {len(ids)} tokens, {pieces!r}, and metrics look at one next "
            "token; give a "
            f"text of one token (a space before it often matters) or a token id, such as {ids[:1]}"
        )
    return int(ids[0])
