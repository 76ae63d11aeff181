"""Qwen2.5-VL from Megatron-Core parts."""
