"""References to variables in what a pod says, by Kubernetes' rules."""

import re
from collections.abc import Mapping

_REFERENCE = re.compile(r"\$\$|\$\(([^)]+)\)")


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Replaces `$(NAME)` as Kubernetes does: unknown names stay, `$$` is a plain `$`.

    Example:
        >>> expand("$(A) $(B) $$(A)", {"A": "x"})
        'x $(B) $(A)'
    """

    def value(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else variables.get(match[1], match[0])

    return _REFERENCE.sub(value, text)
