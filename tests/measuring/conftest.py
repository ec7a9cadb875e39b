"""The tiny models and the tokenizer of the explanations' tests."""

from tests.explaining.conftest import byte_tokenizer, small_bert, small_gpt2, small_llama

__all__ = ["byte_tokenizer", "small_bert", "small_gpt2", "small_llama"]
