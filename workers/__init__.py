"""The data plane: one process a core, each with a shard of the carriers and flows."""
