"""What flash-attn, PyTorch, xformers and transformers call arguments of attention, and what the
functions of this folder say to those names."""

from __future__ import annotations

from gptkernels.core.keywords import renamed

_SHARED = {
    **renamed("softmax_scale", "scale", "scaling", "sm_scale"),
    **renamed("window", "window_size", "sliding_window", note=", (left, right)"),
    **renamed("softcap", "logits_soft_cap", "logit_softcapping", "attn_logit_softcapping"),
    **renamed("alibi_slopes", "alibi", note=", one slope for each query head"),
    **renamed("sinks", "learnable_sink", "s_aux", note=", one for each query head"),
    **renamed("return_lse", "return_softmax_lse"),
    **dict.fromkeys(
        ("need_weights", "output_attentions", "return_attn_probs"),
        "the weights are never stored; return_lse=True returns the logsumexp of the scores too",
    ),
    **renamed("impl", "backend", "implementation"),
    "enable_gqa": "k and v may have fewer heads than q without it",
}  # fmt: skip
_DROPOUT = {
    **renamed("dropout_p", "dropout", "p", "attn_dropout", "attention_dropout"),
    "training": "it drops whenever dropout_p is greater than 0: give 0.0 outside training",
}
_CAUSAL = renamed(
    "causal", "is_causal", "use_causal_mask", note=", and aligned at the last query and key"
)

ATTENTION = {
    **_SHARED,
    **_DROPOUT,
    **_CAUSAL,
    **renamed("attn_mask", "attn_bias", "attention_mask", "mask", "bias",
              note=", True where a key is seen, or added to the scores"),
    **renamed("key_lengths", "seqused_k", "k_lengths", "seqlens_k", "lengths"),
    "key_padding_mask": "key_lengths says how many keys each text has; keys that are missing "
    "elsewhere are an attn_mask (B, 1, 1, Tk), True where a key is seen",
}  # fmt: skip

_NO_MASK = dict.fromkeys(
    ("attn_bias", "attn_mask", "attention_mask", "mask", "bias"),
    "it takes no mask tensor; gptkernels.attention does",
)

VARLEN = {
    **_SHARED,
    **_DROPOUT,
    **_CAUSAL,
    **_NO_MASK,
    **dict.fromkeys(
        ("key_padding_mask", "key_lengths", "seqused_k"),
        "cu_seqlens_k says where the keys of each text begin and end",
    ),
    "block_table": "gptkernels.attention_decode reads pages",
}

_WRITTEN = dict.fromkeys(
    ("k", "v", "key", "value"), "write the new keys and values into k_cache and v_cache first"
)

DECODE = {
    **_SHARED,
    **_NO_MASK,
    **_CAUSAL,
    **_WRITTEN,
    **dict.fromkeys(("dropout_p", *_DROPOUT), "it is for inference and has no dropout"),
    **renamed("block_table", "page_table", "block_tables", "page_tables"),
    **renamed("cache_lengths", "cache_seqlens", "key_lengths", "seqused_k"),
    "cache_batch_idx": "give the rows of the caches that q belongs to, k_cache[cache_batch_idx]",
    "rotary_cos": "rotate q and the new keys before the call",
    "rotary_sin": "rotate q and the new keys before the call",
    "deterministic": "its result always has the same bits",
    "key_padding_mask": "cache_lengths says how many keys each text has",
}
