"""One run on many processes: who they are, what they exchange, and who holds which experts."""
