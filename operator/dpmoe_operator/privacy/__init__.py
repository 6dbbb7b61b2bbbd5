"""Privacy arithmetic: mechanisms → Rényi curves → integer budget, and back to (ε, δ) for people."""
