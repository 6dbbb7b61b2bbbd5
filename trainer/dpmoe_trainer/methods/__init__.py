"""Training methods: how a step turns a sample of units into an update of the model."""
