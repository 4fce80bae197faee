"""From prompts to text in compiled buckets: what covers a call, loading it, stepping, sampling, and the engine."""
