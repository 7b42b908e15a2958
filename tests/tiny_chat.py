"""A tokenizer of single bytes with chat templates, for tests of conversations."""

from transformers import PreTrainedTokenizerFast

from cab_hf.teachers.demo import random_llama


CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
BARE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi, é!"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye?"},
    {"role": "assistant", "content": "Bye\nnow."},
]


def chat_tokenizer(template: str | None = CHATML, eos: str = "<|end|>") -> PreTrainedTokenizerFast:
    """Tokens of single bytes, 0 to 256, and `<|start|>` 257, `<|end|>` 258, `<|text|>` 259 and `<|pad|>` 260."""
    _, tokenizer = random_llama()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>", "<|text|>", "<|pad|>"]})
    tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token = eos, "<|text|>", "<|pad|>"
    tokenizer.chat_template = template
    return tokenizer
