"""What PyTorch, flash-attn, Liger, nanoGPT and transformers call the arguments of layers, and what
the layers of this folder say to those names."""

from __future__ import annotations

from gptkernels.core.keywords import renamed

_WIDTH = ("hidden_size", "n_embd", "dim", "in_features")
_INNER = ("hidden_features", "intermediate_size", "n_inner", "d_ff", "d_hidden")
_HEADS = ("n_heads", "num_attention_heads")
_AT_THE_CALL = "it is an argument of the call, not of the layer"
_EVERY = {
    **dict.fromkeys(("impl", "backend"), "set the layer's attribute .impl"),
    **renamed("bias", "use_bias", "qkv_proj_bias"),
}

LAYER_NORM = {
    **_EVERY,
    **renamed("normalized_shape", "d_model", "embed_dim", *_WIDTH),
    **renamed("eps", "epsilon", "layer_norm_eps", "variance_epsilon"),
    **dict.fromkeys(("residual", "dropout_p", "prenorm", "residual_in_fp32"), _AT_THE_CALL),
    **dict.fromkeys(("p", "dropout"), "the call has an argument dropout_p"),
}

MLP = {
    **_EVERY,
    **renamed("d_model", "embed_dim", *_WIDTH),
    **renamed("d_inner", "dim_feedforward", *_INNER),
    **dict.fromkeys(
        ("activation", "act", "hidden_act"),
        "its activation is GELU, exact with approximate='none', by tanh with 'tanh'",
    ),
    **dict.fromkeys(("p", "dropout", "dropout_p"), "it has no dropout: drop from its result"),
    "recompute": "set the layer's attribute .recompute",
}

CAUSAL_SELF_ATTENTION = {
    **_EVERY,
    **renamed("d_model", "embed_dim", *_WIDTH),
    **renamed("n_head", "num_heads", "nhead", *_HEADS),
    **renamed("n_kv_head", "num_kv_heads", "num_heads_kv", "num_key_value_heads"),
    **renamed("dropout", "dropout_p", "p", "attn_dropout", "attention_dropout"),
    **renamed("window", "window_size", "sliding_window", note=", (left, right)"),
    **dict.fromkeys(
        ("causal", "is_causal"),
        "it is always causal; gptkernels.MultiheadAttention is causal where the call asks for it",
    ),
    **dict.fromkeys(("block_size", "max_seq_len"), "it takes texts of any length"),
    "batch_first": "the batch always comes first",
}

MULTIHEAD_ATTENTION = {
    **_EVERY,
    **renamed("embed_dim", "d_model", *_WIDTH),
    **renamed("num_heads", "n_head", "nhead", *_HEADS),
    **renamed("dropout", "dropout_p", "p", "attn_dropout", "attention_dropout"),
    **dict.fromkeys(("causal", "is_causal"), "the call has an argument is_causal"),
    **dict.fromkeys(("need_weights", "attn_mask", "key_padding_mask"), _AT_THE_CALL),
}

TRANSFORMER_LAYER = {
    **_EVERY,
    **renamed("d_model", "embed_dim", *_WIDTH),
    **renamed("nhead", "num_heads", "n_head", *_HEADS),
    **renamed("dim_feedforward", "d_inner", *_INNER),
    **renamed("dropout", "dropout_p", "p"),
    **renamed("layer_norm_eps", "eps"),
    **renamed("norm_first", "pre_norm", "prenorm"),
    **dict.fromkeys(("causal", "is_causal"), "the call has an argument is_causal"),
}

LINEAR_CROSS_ENTROPY = {
    **_EVERY,
    **renamed("d_model", "embed_dim", *_WIDTH),
    **renamed("classes", "out_features", "vocab_size", "num_classes"),
    **renamed("ignore_index", "ignored_index"),
    **renamed("label_smoothing", "smoothing"),
    **renamed("z_loss", "lse_square_scale", "z_loss_scale"),
    **renamed("softcap", "logit_softcapping", "final_logit_softcapping"),
}
