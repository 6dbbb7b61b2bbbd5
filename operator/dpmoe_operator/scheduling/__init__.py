"""The privacy knapsack: which waiting tasks get budget this round, and why the others wait."""
