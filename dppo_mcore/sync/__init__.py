"""Megatron shards to an engine's weights: plan, buckets, transports, verification."""
