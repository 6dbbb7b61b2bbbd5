"""The round: snapshot → pure decisions → actions. No effect happens in this room.

`views` is what the operator sees, `accounts` and `planning` turn manifests into accounts and plans,
`allocation` runs the scheduling policy, `settlement` closes grants, `projection` writes what people
read, and `decide` puts them together.
"""
