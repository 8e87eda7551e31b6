"""Flavours of U-Net, as changes of a small one, and what its output may be."""

from pdae_fast import ScheduleConfig

BASE = {
    "input_channel": 3,
    "base_channel": 32,
    "channel_multiplier": (1, 2),
    "num_residual_blocks_of_a_block": 1,
    "attention_resolutions": (2,),
    "num_heads": 2,
}
GOOGLE = {
    "use_scale_shift_norm": False,
    "downsample": "conv_asymmetric",
    "upsample": "conv",
    "norm_eps": 1e-6,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "num_heads": 1,
}
FLAVOURS = {
    "google": GOOGLE,
    "course": {"use_scale_shift_norm": False, "downsample": "conv", "upsample": "conv", "head_channel": 8},
    "improved": {"downsample": "conv", "upsample": "conv", "time_scale": 0.25, "learn_sigma": True},
    "pooled": {"downsample": "pool", "upsample": "nearest", "norm_groups": 8},
    "narrow": {"channel_multiplier": (0.5, 1, 1.5), "stem_channel": 32, "norm_groups": 16},
    "middle-scaled": {"middle_scale_factor": 2.0**0.5, "middle_attention_norm": False},
    "middle-scaled-add": {"middle_scale_factor": 2.0, "use_scale_shift_norm": False},
    "middle-plain": {"middle": "plain", "use_scale_shift_norm": False},
    "middle-none": {"middle": "none"},
    "heads-above": {"num_heads": 4, "num_heads_upsample": 1, "attention_resolutions": (1, 2)},
    "centred": {"center_input_sample": True},
}
PREDICTIONS = {
    "v": {"prediction": "v_prediction", "schedule": ScheduleConfig("cosine", 100)},
    "x0": {"prediction": "sample", "schedule": ScheduleConfig("scaled_linear", 50, 0.001, 0.02)},
}
