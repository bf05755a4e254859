"""SmolLM2 without the Hub: the converted model answers, and layers can be dropped."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from student_trainer.study.smollm2 import drop_layers, fetch_smollm2
from student_trainer.study.toy import toy_tokenizer


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, dtype="float32"
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    toy_tokenizer().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_dropping_layers_skips_them(llama_folder: Path, tmp_path: Path) -> None:
    student = AutoModelForCausalLM.from_pretrained(drop_layers(llama_folder, tmp_path / "student", [1, 2]))
    assert student.config.num_hidden_layers == 2
    ids = torch.tensor([[5, 6, 7, 8]])

    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    for skipped in (1, 2):  # a block whose two outputs are zero adds nothing to the residual stream
        torch.nn.init.zeros_(model.model.layers[skipped].self_attn.o_proj.weight)
        torch.nn.init.zeros_(model.model.layers[skipped].mlp.down_proj.weight)
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
    assert AutoTokenizer.from_pretrained(tmp_path / "student").get_vocab() == toy_tokenizer().get_vocab()


@pytest.mark.parametrize("layers", [[4], [-1], [1, 1], [0, 1, 2, 3]])
def test_wrong_layers_are_refused(llama_folder: Path, tmp_path: Path, layers: list[int]) -> None:
    with pytest.raises(ValueError, match=r"need different numbers of 0\.\.3"):
        drop_layers(llama_folder, tmp_path / "student", layers)


@pytest.mark.slow
@pytest.mark.parametrize(("question", "answer"), [("What is the capital of France?", "Paris"), ("What is 2+2?", "4")])
def test_smollm2_answers(smollm2: Path, question: str, answer: str) -> None:
    model, tokenizer = LlamaForCausalLM.from_pretrained(smollm2), AutoTokenizer.from_pretrained(smollm2)
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=30)[0, inputs["input_ids"].shape[1] :]  # pyright: ignore[reportAttributeAccessIssue]
    assert answer in tokenizer.decode(output)
    assert output[-1] == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.slow
def test_smollm2_tokenizer_round_trips(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = "Hello 1234  world\n\ttäst 你好 🙂"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(ids)[2:6] == ["1", "2", "3", "4"]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert prompt.endswith("<|im_start|>user\nhi<|im_end|>\n")
    assert len(tokenizer) == AutoModelForCausalLM.from_pretrained(smollm2).config.vocab_size == 49_152


@pytest.mark.slow
def test_smollm2_is_fetched_once(smollm2: Path) -> None:
    weights = smollm2 / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert fetch_smollm2(smollm2.parent) == smollm2
    assert weights.stat().st_mtime_ns == written
