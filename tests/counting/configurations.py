"""Small networks that together have every variable."""

# CoAtNet-6's layout, small: 8 and 12 heads, and 42 classes that nothing divides.
MIXED = dict(
    widths=(16, (48, 64), 96),
    depths=(1, (1, 1), 1),
    layout=("C", "CT", "T"),
    stem_width=8,
    head_dim=8,
)

VARIANTS = {
    "convnext": {
        "conv_block": "convnext",
        "conv_layer_scale": 1e-6,
        "stride_on": "depthwise",
    },
    "mixed": {},
    "batch_norm": {"transformer_norm": "batch", "layer_scale": 1e-6, "final_norm": "before_pool"},
    "mlp": {"relative_position": "mlp", "attention_from": "input", "head_dim": 16},
    "bare": {
        "stem_bias": False,
        "conv_bias": False,
        "attention_bias": False,
        "transformer_shortcut_bias": False,
        "ffn_bias": False,
        "final_norm": None,
        "hidden_head": False,
        "stride_on": "depthwise",
        "expansion_from": "input",
    },
}
