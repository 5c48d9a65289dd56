"""The templates that come with the program, by name."""

from collections.abc import Mapping

from llmtrain.data.chat.markup_template import MarkupTemplate

RESERVED = {"<reserved_106>": 195, "<reserved_107>": 196}  # Baichuan 2: user_token_id, assistant_token_id

TEMPLATES: Mapping[str, MarkupTemplate] = {
    # Taori et al. 2023, https://github.com/tatsu-lab/stanford_alpaca, with the line break before the response of
    # alpaca-lora and others
    "alpaca": MarkupTemplate(
        user="### Instruction:\n{instruction}\n\n",
        user_with_input="### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n",
        before="### Response:\n",
        after="\n\n",
        default_system="Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.",
        default_with_input="Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.",
        begins_text=True,
    ),
    # OpenAI's Chat Markup Language; Qwen, SmolLM2 and others
    "chatml": MarkupTemplate(
        system="<|im_start|>system\n{system}<|im_end|>\n",
        user="<|im_start|>user\n{prompt}<|im_end|>\n",
        before="<|im_start|>assistant\n",
        end="<|im_end|>",
        after="\n",
    ),
    # https://www.llama.com/docs/model-cards-and-prompt-formats/meta-llama-3
    "llama3": MarkupTemplate(
        system="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n{prompt}<|eot_id|>",
        before="<|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
        begins_text=True,
        strips=True,
    ),
    # Baichuan 2's own fine-tuning: a reserved id before each message and nothing between them.  The end-of-text token
    # comes only at the very end; after each earlier response it is the target, while the input is the next user's
    # marker.
    "baichuan": MarkupTemplate(
        system="{system}",
        user="<reserved_106>{prompt}",
        before="<reserved_107>",
        ends_once=True,
    ),
    "plain": MarkupTemplate(user="{prompt}", begins_text=True),  # only the messages and the end of the text
}
