"""The durable history: what was acknowledged, in order. `interface` first; `sqlite` is the embedded default."""
