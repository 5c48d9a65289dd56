"""A checkpoint's ``config.json``: every key is read, checked, known to have no effect, or reported."""

import json
import math
from pathlib import Path
from typing import Any, NoReturn

NAME = "config.json"
LARGEST = 1 << 24  # bytes

# Keys that do not change the logits of a causal language model: settings of generation, of storage and of training, and
# names.  Dropout is set by a key of ours and not taken over.
INERT = frozenset({
    "_commit_hash", "_from_model_config", "_name_or_path", "_flash_attn_2_enabled", "add_bos_token", "add_eos_token",
    "architectures", "attention_dropout", "attn_implementation", "attn_pdrop", "auto_map", "bad_words_ids",
    "begin_suppress_tokens", "bos_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping", "embd_pdrop",
    "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "id2label", "initializer_range",
    "is_encoder_decoder", "is_llama_config", "keys_to_ignore_at_inference", "label2id", "length_penalty", "max_length",
    "min_length", "model_max_length", "model_type", "n_ctx", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_labels", "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "pad_token_id",
    "prefix", "pretraining_tp", "problem_type", "pruned_heads", "remove_invalid_values", "reorder_and_upcast_attn",
    "repetition_penalty", "resid_pdrop", "return_dict", "return_dict_in_generate", "sep_token_id", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p",
    "torch_dtype", "torchscript", "transformers.js_config", "transformers_version", "typical_p", "unsloth_fixed",
    "unsloth_version", "use_bfloat16", "use_cache", "use_return_dict", "z_loss_weight",
})  # fmt: skip

# Keys that would change the computation of any family, with the values that leave it unchanged.
PLAIN: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None, {}),
    "compression_config": (None, {}),
    "add_cross_attention": (False, None),
    "is_decoder": (True, False, None),
    "cross_attention_hidden_size": (None,),
    "chunk_size_feed_forward": (0, None),
    "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1),
    "n_routed_experts": (None, 0),
    "attn_logit_softcapping": (None, 0),
    "final_logit_softcapping": (None, 0),
    "logits_soft_cap": (None, 0),
    "logit_scale": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1, 1.0),
    "partial_rotary_factor": (None, 1, 1.0),
    "rope_interleaved": (False, None),
    "no_rope_layers": (None, []),
    "clip_qkv": (None,),
    "use_qk_norm": (False, None),
}
REASONS = {
    "quantization_config": "its weights are quantised; take the checkpoint that they were quantised from",
    "num_experts": "mixtures of experts are not supported",
    "num_local_experts": "mixtures of experts are not supported",
    "n_routed_experts": "mixtures of experts are not supported",
}


class ConfigJson:
    """The keys of a ``config.json``, with a record of those that were read."""

    def __init__(self, values: dict[str, Any], file: Path) -> None:
        self.values, self.file = values, file
        self._read: set[str] = set()
        for key, plain in PLAIN.items():
            if values.get(key) not in plain and key in values:
                self.refuse(key, REASONS.get(key, "not supported here"))

    @classmethod
    def read(cls, folder: Path) -> "ConfigJson":
        """Read the file of a directory.  Raises ValueError, naming the file."""
        file = folder / NAME
        if not file.is_file():
            raise ValueError(
                f"{folder}: there is no {NAME} in it, as a checkpoint of transformers has; give the directory that "
                "save_pretrained wrote (a run of this program: weights=checkpoint)"
            )
        if file.stat().st_size > LARGEST:
            raise ValueError(f"{file}: {file.stat().st_size:,} bytes; too large for a model's configuration")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{file}: cut or damaged, not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{file}: not a JSON object")
        return cls(values, file)

    def refuse(self, key: str, why: str) -> NoReturn:
        """Raise a ValueError that names file, key and value."""
        value = json.dumps(self.values.get(key))
        raise ValueError(f"{self.file}: {key}={value if len(value) < 80 else value[:77] + '...'}: {why}")

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is."""
        self._read.add(key)
        return self.values.get(key, default)

    def text(self, key: str) -> str:
        """A string; it must be present."""
        value = self.get(key)
        if not isinstance(value, str):
            self.refuse(key, "a name is needed")
        return value

    def count(self, *keys: str, default: int | None = None) -> int:
        """A positive integer, under the first of ``keys`` that is present."""
        key = next((key for key in keys if self.get(key) is not None), keys[0])
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.refuse(key, "a positive integer is needed")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            self.refuse(key, "a positive number is needed")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(key, "true or false is needed")
        return value

    def expect(self, key: str, *allowed: Any, default: Any, why: str) -> None:
        """Raise ValueError unless the value, ``default`` where there is none, is one of ``allowed``."""
        if self.get(key, default) not in allowed:
            self.refuse(key, why)

    @property
    def is_tied(self) -> bool:
        """True if the head is the embedding; without the key, the default of each family."""
        return self.flag("tie_word_embeddings", self.get("model_type") == "gpt2")

    def check_architecture(self, *, is_classifier: bool = False) -> None:
        """Raise ValueError for a head other than a language model's (or a classifier's, with ``is_classifier``)."""
        ends = ("ForSequenceClassification",) if is_classifier else ("ForCausalLM", "LMHeadModel", "Model")
        for name in self.get("architectures") or ():
            if not str(name).endswith(ends):
                self.refuse(
                    "architectures",
                    "the head is not a language model's; name the language model that it was made from",
                )

    def unknown(self) -> list[str]:
        """Keys that were not read and may have an effect."""
        return sorted(
            key for key, value in self.values.items()
            if key not in self._read and key not in INERT and key not in PLAIN and value not in (None, False, [], {})
        )  # fmt: skip
