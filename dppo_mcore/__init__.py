"""dppo_mcore: Deliberate Practice Policy Optimization for Qwen2.5-VL on Megatron-Core."""

__version__ = "0.1.0"
