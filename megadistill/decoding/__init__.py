"""Writing and reading text with a model: decoder, cache, sampling, rollout."""
