"""A small language model for experiments on a CPU: the teacher of `grid.yaml` beside this file.

    python benchmarks/data/prepare_text.py --only speeches brown
    python benchmarks/quality/small_lm/teacher.py

A Llama of 0.4M parameters (3 layers, width 96, byte-level BPE of 1,024 tokens) reads the training speeches twice. It
is too small to copy from its context: for that see `../recall`. Teacher, tokenizer and the tokens of training and
held-out documents go to `outputs/small_lm`.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed

from cab_hf.data.documents import load_documents, split_documents
from cab_hf.data.packing import LanguageCollator, pack_documents, save_tokens


TEXTS = Path(__file__).parents[2] / "data/cache"
OUTPUT = Path("outputs/small_lm")
HOLDOUT = {"speeches": r"^\d{3}9", "brown": 0.1}
VOCABULARY, BLOCK, BATCH = 1024, 256, 16
SIZES = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 3}


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1600, help="of 16 rows of 256 tokens")
    options = parser.parse_args()
    torch.set_num_threads(1)
    set_seed(0)
    parts = {name: split_documents(load_documents(str(TEXTS / name)), holdout) for name, holdout in HOLDOUT.items()}
    training = parts["speeches"][0]
    tokenizer = make_tokenizer(training["text"])
    (OUTPUT / "tokens").mkdir(parents=True, exist_ok=True)
    files = {"speeches.train": training, "speeches.heldout": parts["speeches"][1], "brown.heldout": parts["brown"][1]}
    for name, documents in files.items():
        print(f"{name}: {save_tokens(OUTPUT / f'tokens/{name}.npz', documents, tokenizer):,} tokens", flush=True)

    blocks = pack_documents(training, tokenizer, BLOCK, isolate_documents=False)
    config = LlamaConfig(vocab_size=len(tokenizer), **SIZES, max_position_embeddings=1024, tie_word_embeddings=True)
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=options.steps,
        per_device_train_batch_size=BATCH,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=0.01,
        logging_steps=100,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_drop_last=True,
    )
    model = LlamaForCausalLM(config)
    print(f"{model.num_parameters():,} parameters", flush=True)
    Trainer(model, args, train_dataset=blocks, data_collator=LanguageCollator(tokenizer.eos_token_id)).train()
    model.save_pretrained(OUTPUT / "teacher")
    tokenizer.save_pretrained(OUTPUT / "teacher")


if __name__ == "__main__":
    main()
