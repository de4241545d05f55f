"""The keys of a config.json: those that are used, those that are skipped, and all others.

used       describes the model; each layout names its own (layouts.py), under two names if need be
skipped    changes nothing that the model computes: names, training tasks, how text is generated
one value  a GPT computes that value only; any other is refused
others     are refused, by name: what they change is not known here

null counts as not given, but for n_inner and window, of which it is a value.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

TIED = "tie_word_embeddings"
TOKENIZER = "gptkernels_tokenizer"  # the name of a tokenizer; a key of ours

# Other names that transformers takes for its keys.
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
# reorder_and_upcast_attn is skipped: attention here always sums and exponentiates in fp32.
_SKIPPED_NAMES = """
    architectures model_type transformers_version torch_dtype dtype name_or_path tokenizer_class
    initializer_range gradient_checkpointing use_cache output_past torchscript use_bfloat16
    model_parallel tf_legacy_loss attn_implementation experts_implementation is_decoder n_ctx
    transformers.js_config unsloth_version model_max_length license language tags
    predict_special_tokens reorder_and_upcast_attn chunk_size_feed_forward tie_last_hidden_states
    output_attentions output_hidden_states output_scores return_dict return_dict_in_generate

    finetuning_task id2label label2id num_labels problem_type task_specific_params
    classifier_dropout hidden_dropout summary_type summary_use_proj summary_activation
    summary_proj_to_labels summary_first_dropout summary_last_dropout summary_hidden_size

    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
    forced_bos_token_id forced_eos_token_id bad_words_ids suppress_tokens begin_suppress_tokens
    prefix max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups
    num_return_sequences temperature top_k top_p typical_p epsilon_cutoff eta_cutoff
    repetition_penalty encoder_repetition_penalty length_penalty diversity_penalty
    exponential_decay_length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    remove_invalid_values renormalize_logits assistant_confidence_threshold
    assistant_lookbehind num_assistant_tokens num_assistant_tokens_schedule target_lookbehind
"""
_MAY_BE_NULL = ("n_inner", "window")
_SKIPPED = frozenset(_SKIPPED_NAMES.split())
_ONE_VALUE: dict[str, Any] = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "per_layer_config": {},
    "n_special": 0,
}


def settle(given: dict[str, Any], used: Iterable[str]) -> dict[str, Any]:
    """What `given` says of the keys `used`, whichever of their names it has.

    Raises ValueError, in one sentence, for two names that disagree and for a key that is neither
    used nor skipped.
    """
    used = {*used, TIED}
    given = {k: value for k, value in given.items() if value is not None or k in _MAY_BE_NULL}
    aliases = {alias: key for alias, key in _ALIASES.items() if key in used}
    settled = {key: given[key] for key in used if key in given}
    for alias in sorted(aliases.keys() & given.keys()):
        key = aliases[alias]
        if settled.setdefault(key, given[alias]) != given[alias]:
            raise ValueError(
                f"{alias} and {key} are one setting, got {given[alias]!r} and {settled[key]!r}"
            )
    for key in sorted(given.keys() - used - aliases.keys() - _SKIPPED):
        _check_other(key, given[key])
    if not isinstance(settled.setdefault(TIED, True), bool):
        raise ValueError(f"{TIED} must be true or false, got {json.dumps(settled[TIED])}")
    return settled


def _check_other(key: str, value: Any) -> None:
    # transformers keeps what is its own under names with an underscore.
    if key.startswith("_") or key == TOKENIZER:
        return
    if key not in _ONE_VALUE:
        raise ValueError(
            f"{key} is not known here, so what it may change cannot be computed, got "
            f"{json.dumps(value, default=str)} (remove it if it changes nothing)"
        )
    wanted = _ONE_VALUE[key]
    if type(value) is not type(wanted) or value != wanted:
        raise ValueError(
            f"{key} must be {json.dumps(wanted)}, got {json.dumps(value, default=str)}"
        )
