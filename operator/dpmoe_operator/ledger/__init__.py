"""The append-only log of budget: what is true for ever.

`entry` seals records into a hash chain, `fold` turns the chain into accounts and grants, `log`
appends by compare-and-swap. Consumed budget cannot be observed again, so nothing else holds it.
"""
