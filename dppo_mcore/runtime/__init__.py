"""Devices, process groups, logging, metrics and faults."""
