"""Private tables as rows, privacy units and physical batches."""
