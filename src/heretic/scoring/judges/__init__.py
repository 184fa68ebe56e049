"""Who decides whether an answer is a refusal."""
