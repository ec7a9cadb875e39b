"""Epochs of a classification data set on a model of Llama-3-8B's shape: the cone beside PEFT's LoRA.

    python analyses/benchmarks/large.py           # 4,788 examples of about 250 + 2 tokens; a GPU of 80 GB
    python analyses/benchmarks/large.py --small   # the same script on a toy model, to see that it works

Both train a random model on the same examples in one process, with the same Trainer settings, in
bfloat16: reftlab a LoReFT of rank 4 after block 16 of 32 at the last token; PEFT a LoRA of rank 4 on
every block's queries and values, and one on block 16's output projection alone. Each training starts
anew, with an empty store; one epoch and three are timed. LoRA computes logits only where labels are.
An answer is one of two labels and the end of the text.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

import reftlab as rl
from reftlab.training import Collator, encode

LABELS = ("yes", "no")
LEARNING_RATE = 4e-3


@dataclass(frozen=True)
class Size:
    """How large everything is; the defaults are Llama-3-8B's and the public write-up's."""

    blocks: int = 32
    width: int = 4096
    heads: int = 32
    shared_heads: int = 8
    inner: int = 14336
    vocabulary: int = 128256
    examples: int = 4788
    tokens: int = 250
    rows: int = 16

    @property
    def middle(self) -> int:
        return self.blocks // 2


SMALL = Size(4, 64, 4, 2, 128, 49152, 48, 30, 8)


def model_of(size: Size, device: str) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=size.width, intermediate_size=size.inner, num_hidden_layers=size.blocks,
        num_attention_heads=size.heads, num_key_value_heads=size.shared_heads, vocab_size=size.vocabulary,
        rope_theta=500_000.0, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def examples_of(size: Size, tokenizer: Any) -> list[tuple[str, str]]:
    """Random words, a tenth more or less of them than asked for, and a random label."""
    generator = torch.Generator().manual_seed(1)
    pieces = (piece for piece in tokenizer.get_vocab() if piece.startswith("Ġ"))
    words = sorted(piece[1:] for piece in pieces if piece[1:].isascii() and piece[1:].isalpha())

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    pairs = []
    for _ in range(size.examples):
        count = number(int(0.9 * size.tokens), int(1.1 * size.tokens))
        text = " ".join(words[number(0, len(words))] for _ in range(count))
        pairs.append((text, LABELS[number(0, 2)]))
    return pairs


def arguments_of(size: Size, epochs: int, folder: str) -> TrainingArguments:
    return TrainingArguments(
        folder, num_train_epochs=epochs, per_device_train_batch_size=size.rows, learning_rate=LEARNING_RATE,
        weight_decay=0.0, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        remove_unused_columns=False, use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False,
    )  # fmt: skip


class FewLogits(Trainer):
    """Logits of the last columns alone; batches are padded on the left, so the answers stand there."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        kept = 1 + int((inputs["labels"] != -100).sum(1).max())
        labels = inputs.pop("labels")[:, -kept:]
        return model(**inputs, labels=labels, logits_to_keep=kept).loss


@contextlib.contextmanager
def adapted(model: Any, **where: Any) -> Iterator[Any]:
    """The model with a LoRA in it, which is taken out again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, **where))
    try:
        yield wrapped
    finally:
        wrapped.unload()
        model.requires_grad_(False)


def lora(size: Size, model: Any, tokenizer: Any, pairs: Any, epochs: int, **where: Any) -> float:
    encoded = encode(tokenizer, rl.training.as_examples(pairs))
    with adapted(model, **where) as wrapped, tempfile.TemporaryDirectory() as folder:
        trainer = FewLogits(
            wrapped, arguments_of(size, epochs, folder), Collator.of(tokenizer, "left"), encoded
        )
        trainer.remove_callback(PrinterCallback)
        return seconds(trainer.train)


def on_the_cone(size: Size, model: Any, tokenizer: Any, pairs: Any, epochs: int, memory: str) -> float:
    edit = rl.Edit(
        "edit", at=f"blocks[{size.middle}].output", positions="last", intervention=rl.LoReFT(rank=4)
    )
    reft = rl.InterventionGraph(edit).bind(model, tokenizer)

    def train() -> None:
        result = rl.train(
            reft, pairs, epochs=epochs, batch_size=size.rows, learning_rate=LEARNING_RATE, chat=False,
            cone=rl.ConeStore(memory=memory, disk=0), progress=False,
        )  # fmt: skip
        if not result.on_cone:
            raise RuntimeError(f"the cone was not taken: {result.why_plain}")

    return seconds(train)


def seconds(call: Callable[[], Any]) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a toy model and 48 short examples")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--examples", type=int, help="so many of the examples")
    parser.add_argument("--memory", default="100GB", help="the store's budget in main memory")
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    size = SMALL if options.small else Size()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.small:
        raise SystemExit("no GPU here: 8 billion parameters would take days; say --small to try the script")
    tokenizer = rl.load_model()[1]
    model = model_of(size, device)
    pairs = examples_of(size, tokenizer)[: options.examples]
    count = sum(map(len, encode(tokenizer, rl.training.as_examples(pairs)))) / len(pairs)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{name}, torch {torch.__version__}; {parameters / 1e9:.3g} billion parameters in bfloat16, "
        f"{len(pairs)} examples of {count:.0f} tokens on average, batches of {size.rows}\n"
    )
    every = {"target_modules": ["q_proj", "v_proj"]}
    one = {"target_modules": ["o_proj"], "layers_to_transform": [size.middle]}
    ways: dict[str, Callable[[int], float]] = {
        "PEFT, LoRA on queries and values of all blocks": lambda n: lora(
            size, model, tokenizer, pairs, n, **every
        ),
        f"PEFT, LoRA on block {size.middle}'s output projection": lambda n: lora(
            size, model, tokenizer, pairs, n, **one
        ),
        f"reftlab, LoReFT after block {size.middle}": lambda n: on_the_cone(
            size, model, tokenizer, pairs, n, options.memory
        ),
    }
    print("| training | epochs | seconds | times reftlab's |\n|---|---:|---:|---:|")
    for epochs in options.epochs:
        taken = {name: way(epochs) for name, way in ways.items()}
        own = list(taken.values())[-1]
        for name, value in taken.items():
            print(f"| {name} | {epochs} | {value:.1f} | {value / own:.2f} |", flush=True)


if __name__ == "__main__":
    main()
