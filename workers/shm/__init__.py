"""Shared memory between the workers: arenas of slots for payload, rings of descriptors to hand slots over."""
