"""Small random checkpoints for tasks, with tokenizers trained on a few sentences, as Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordPiece
from tokenizers.processors import RobertaProcessing, TemplateProcessing
from tokenizers.trainers import BpeTrainer, WordPieceTrainer

SENTENCES = [
    "A tally stick was an ancient memory aid used to record and document numbers, quantities and messages.",
    "The split tally was a technique which became common in medieval Europe.",
    "A stick was marked with notches and then split lengthwise.",
    "This way the two halves both bear the same notches and each party keeps one half.",
    "Anna Meyer of Berlin sold the old mill to Tom Brown in 1887.",
    "Who keeps the longer half of the stick? The lender keeps the stock, the borrower the foil.",
    "naïve café, 東京 and a few more words that nobody needs",
]
BERT_SMALL: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 128, "type_vocab_size": 2, "pad_token_id": 0,
}  # fmt: skip
SEQ2SEQ_SMALL: dict[str, Any] = {
    "vocab_size": 200, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0,
    "scale_embedding": False,
}  # fmt: skip
LANGUAGES = ["eng_Latn", "fra_Latn", "deu_Latn"]


def save(model: Any, folder: Path, tokenizer: Tokenizer, settings: dict[str, Any], scale: float = 3.0) -> Path:
    """Write a model whose weights are livelier than at initialisation, with its tokenizer and a licence."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
            elif "norm" not in name.lower():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval().save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "README.md").write_text("---\nlicense: cc0-1.0\n---\n\nRandom weights, for tests.\n")
    return folder


def bert(folder: Path, head: str, *, seed: int = 0, **changes: Any) -> Path:
    """A tiny BERT with a head: "MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"."""
    torch.manual_seed(seed)
    model = getattr(transformers, f"BertFor{head}")(transformers.BertConfig(**{**BERT_SMALL, **changes}))
    return save(model, folder, wordpiece(), BERT_TOKENS)


def bert_without_a_head(folder: Path, *, seed: int = 0) -> Path:
    """A tiny BERT whose output is its last hidden rows."""
    torch.manual_seed(seed)
    model = transformers.BertModel(transformers.BertConfig(**BERT_SMALL), add_pooling_layer=False)
    return save(model, folder, wordpiece(), BERT_TOKENS)


def classifier(folder: Path, family: str, head: str, *, seed: int = 1, **changes: Any) -> Path:
    """A tiny "Roberta", "DistilBert", "Electra" or "Llama" with a head, and a tokenizer as the family has it."""
    torch.manual_seed(seed)
    own: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokenizer, settings = wordpiece(), dict(BERT_TOKENS)
    if family == "Roberta":
        own |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1}
        tokenizer, settings = byte_level(), dict(ROBERTA_TOKENS)
    elif family == "DistilBert":
        own = {"dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
    elif family == "Electra":
        own |= {"embedding_size": 32}
    elif family == "Llama":
        own |= {"num_key_value_heads": 2, "pad_token_id": 0}
        tokenizer = metaspace(template="<s> $A")
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "model_max_length": 64}
    own |= {"vocab_size": 340, "max_position_embeddings": 130}
    model = getattr(transformers, f"{family}For{head}")(getattr(transformers, f"{family}Config")(**{**own, **changes}))
    return save(model, folder, tokenizer, settings)


def byte_level() -> Tokenizer:
    """A tokenizer as RoBERTa's: bytes, "Ġ" for a space before, <s> … </s>, two of them between two texts."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False)
    return tokenizer


ROBERTA_TOKENS = {
    "tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"],
    "model_max_length": 64, "mask_token": "<mask>", "unk_token": "<unk>", "pad_token": "<pad>", "cls_token": "<s>",
    "sep_token": "</s>", "bos_token": "<s>", "eos_token": "</s>",
}  # fmt: skip
BERT_TOKENS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
    "model_max_length": 64, "mask_token": "[MASK]", "unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]",
    "sep_token": "[SEP]",
}  # fmt: skip


def wordpiece() -> Tokenizer:
    """A BERT tokenizer trained on the sentences: lower case, "##", [CLS] … [SEP]."""
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = WordPieceTrainer(vocab_size=250, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", tokenizer.token_to_id("[CLS]")), ("[SEP]", tokenizer.token_to_id("[SEP]"))],
    )  # fmt: skip
    return tokenizer


def marian(folder: Path, *, seed: int = 0, generation: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A tiny Marian model, built as the original transformer was, but for the layout of its positions."""
    torch.manual_seed(seed)
    own = {"share_encoder_decoder_embeddings": True, "scale_embedding": True, "activation_function": "relu"}
    config = transformers.MarianConfig(**{**SEQ2SEQ_SMALL, **own, **changes})
    model = transformers.MarianMTModel(config)
    _enliven(model)
    with torch.no_grad():
        model.model.shared.weight /= config.d_model**0.5  # scaled up again where it enters
    torch.nn.init.normal_(model.final_logits_bias, std=0.02)
    model.final_logits_bias[0, 2] = 2.1  # it ends now and then
    model.generation_config = transformers.GenerationConfig(**{**MARIAN_GENERATION, **(generation or {})})
    return save(model, folder, metaspace(), {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}, 1.0)


def _enliven(model: Any) -> None:
    """Weights so large that the source and the tokens so far decide the next one, not the tied head alone."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed_positions" not in name:
                parameter.normal_(0.0, 0.6 if "self_attn" in name or "fc" in name else 1.0)


MARIAN_GENERATION = {
    "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "bad_words_ids": [[0]], "num_beams": 4,
    "max_length": 24, "forced_eos_token_id": 2,
}  # fmt: skip
"""As the Marian checkpoints of the hubs have it."""


SUMMARY_GENERATION = {
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_bos_token_id": 1,
    "forced_eos_token_id": 2, "min_length": 6, "max_length": 16, "length_penalty": 2.0, "no_repeat_ngram_size": 3,
    "num_beams": 4, "early_stopping": True,
}  # fmt: skip
"""As BART's checkpoints for summaries have it, but shorter."""


def summarizer(folder: Path, family: str = "Bart", *, seed: int = 3, **generation: Any) -> Path:
    """A tiny encoder-decoder of BART's kin: "Bart", "MBart", "M2M100", "Pegasus". generation: what differs."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**SEQ2SEQ_SMALL, "decoder_start_token_id": 2})
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    _enliven(model)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias[0, 2] = 2.0  # it ends now and then
    model.generation_config = transformers.GenerationConfig(**{**SUMMARY_GENERATION, **generation})
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    return save(model, folder, metaspace(template="<s> $A </s>"), settings, 1.0)


def t5(folder: Path, *, seed: int = 3, own_head: bool = False, **changes: Any) -> Path:
    """A tiny T5. own_head: stored as T5 1.1 and Flan-T5 are, with a head that is not the embedding's table."""
    torch.manual_seed(seed)
    config = transformers.T5Config(**{
        "vocab_size": 200, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2,
        "num_heads": 4, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, **changes,
    })  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    _enliven(model)
    ids = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    model.generation_config = transformers.GenerationConfig(**ids)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    save(model, folder, metaspace(), settings, 1.0)
    if own_head:
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"] = torch.randn_like(weights["shared.weight"])
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        written = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
        del written["scale_decoder_outputs"]
        (folder / "config.json").write_text(json.dumps(written))
    return folder


def multilingual(folder: Path, *, seed: int = 0) -> Path:
    """A tiny M2M100 model with NLLB's language codes: the source code comes first, the target code is forced."""
    torch.manual_seed(seed)
    model = transformers.M2M100ForConditionalGeneration(transformers.M2M100Config(**SEQ2SEQ_SMALL))
    _enliven(model)
    model.generation_config = transformers.GenerationConfig(
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, max_length=20, num_beams=3,
        no_repeat_ngram_size=2,
    )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    return save(model, folder, metaspace(LANGUAGES, "eng_Latn $A </s>"), settings, 1.0)


def metaspace(added: list[str] | None = None, template: str = "$A </s>") -> Tokenizer:
    """A subword tokenizer that writes spaces as "▁", with <pad>, <s>, </s>, <unk> and `added` as special tokens."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        SENTENCES, BpeTrainer(vocab_size=190, special_tokens=special, show_progress=False)
    )
    tokenizer.add_special_tokens(added or [])
    named = [token for token in template.split() if token != "$A"]
    tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[(token, tokenizer.token_to_id(token)) for token in named]
    )
    return tokenizer


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def llama(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A tiny causal model with a chat template."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**{
        "vocab_size": 200, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, **changes,
    })  # fmt: skip
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.lm_head.weight.data[2] += model.lm_head.weight.data[10:24].sum(0) / 3
    return save(model, folder, metaspace(template="<s> $A"), settings, 5.0)


def fast_tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer in transformers."""
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def whole(folder: Path, auto_class: str) -> Any:
    """The whole checkpoint in transformers, fp32."""
    cls = getattr(transformers, auto_class)
    return cls.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
