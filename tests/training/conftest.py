import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import reftlab as rl

PAIRS = [
    ("where is the cat", "red"),
    ("who", "green blue"),
    ("what is the sea like", "blue"),
    ("tell me", "red red green"),
    ("how is the cat", "green"),
]
WORDS = sorted({word for pair in PAIRS for text in pair for word in text.split()})
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(template: bool = False) -> PreTrainedTokenizerFast:
    vocabulary = ["<pad>", "<end>", "<unk>", "<user>", "<system>", "<assistant>", *WORDS]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.WordPiece(prefix="##")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )
    if template:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,  # large enough for attention to carry what an edit writes
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def make_graph(at: str = "blocks[0,2].output", **arguments: float) -> rl.InterventionGraph:
    lesson = rl.LoReFT(rank=4, **arguments)
    return rl.InterventionGraph(rl.Edit("colour", at=at, positions="last", intervention=lesson))


def bind(graph: rl.InterventionGraph | None = None, dtype: torch.dtype = torch.float32) -> rl.BoundModel:
    model = make_model(dtype)
    torch.manual_seed(1)
    return (graph or make_graph()).bind(model, make_tokenizer())


def batch_loss(twin: rl.BoundModel, pairs: list[tuple[str, str]]) -> torch.Tensor:
    """The mean cross-entropy of the answers' tokens, by hand."""
    batch = rl.training.Collator.of(twin.tokenizer)(
        rl.training.encode(twin.tokenizer, rl.training.as_examples(pairs))
    )
    labels, logits = batch["labels"], twin(**batch).logits
    kept = labels[:, 1:] != -100
    return torch.nn.functional.cross_entropy(logits[:, :-1][kept], labels[:, 1:][kept])


@pytest.fixture
def reft() -> rl.BoundModel:
    return bind()


@pytest.fixture
def tokenizer_with_template() -> PreTrainedTokenizerFast:
    return make_tokenizer(template=True)


def splits(**rows):
    tables = {
        name: datasets.Dataset.from_list([{"prompt": p, "answer": a} for p, a in pairs])
        for name, pairs in rows.items()
    }
    return datasets.DatasetDict(tables)
