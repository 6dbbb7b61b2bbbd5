"""Differentially private fine-tuning of mixture-of-experts models."""
