"""Times as Kubernetes writes them."""

from datetime import UTC, datetime


def parse_time(text: str) -> datetime:
    """An RFC 3339 time, as Kubernetes writes it."""
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def format_time(moment: datetime) -> str:
    """An RFC 3339 time in UTC to the second, as Kubernetes reads it."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
