"""What the engine refuses, as errors that name the thing refused and the remedy.

They tell of the model, never of a batch: not even how many samples it has, which is private.
"""


class NotPerSample(ValueError):
    """The model, batch or loss has no bounded per-sample gradient that the engine can vouch for."""


class UncoveredParameter(NotPerSample):
    """A trained parameter is used in a way for which the engine has no per-sample norm."""


class AmbiguousBatch(Exception):
    """A batch has as many samples as tokens, and a table's ids may be samples' or positions'."""
