"""The specification: every op in plain torch, written to be read. Each fast path is tested against it."""
