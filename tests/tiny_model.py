"""A tiny Qwen3 with no weights: enough for vLLM's `--load-format dummy` to serve exact lengths.

The tokenizer is trained on text that every Python has, so nothing is downloaded. It needs
`tokenizers`, which comes with vLLM, not with the tests: run it with the interpreter that has vLLM.

    $LLMSERVE_VLLM_PYTHON tests/tiny_model.py OUT [--vocab 2048]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_model(directory: Path, vocab: int = 2048) -> Path:
    """Write config.json and a byte-level BPE tokenizer of exactly `vocab` entries; give the folder.

    2 layers, 128 wide, 4 heads of 32, 2 of them for keys and values, 2,048 positions, bfloat16.
    Raises ValueError if the local text is too short for so large a vocabulary.
    """
    import pydoc_data.topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        show_progress=False,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(sorted(pydoc_data.topics.topics.values()), trainer)
    if tokenizer.get_vocab_size() != vocab:
        raise ValueError(f"vocab={vocab}: the text gives {tokenizer.get_vocab_size()} entries")

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    _write(
        directory / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=2048,
        chat_template=_CHAT,
    )
    _write(
        directory / "config.json",
        architectures=["Qwen3ForCausalLM"],
        model_type="qwen3",
        vocab_size=vocab,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        hidden_act="silu",
        max_position_embeddings=2048,
        rope_theta=1000000.0,
        rms_norm_eps=1e-6,
        attention_bias=False,
        tie_word_embeddings=True,
        bos_token_id=_SPECIAL.index("<|endoftext|>"),
        eos_token_id=_SPECIAL.index("<|im_end|>"),
        torch_dtype="bfloat16",
        initializer_range=0.02,
        use_cache=True,
    )
    return directory


def _write(path: Path, **content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--vocab", type=int, default=2048, help="entries of the vocabulary")
    arguments = parser.parse_args()
    print(make_tiny_model(arguments.directory, arguments.vocab))


if __name__ == "__main__":
    main()
