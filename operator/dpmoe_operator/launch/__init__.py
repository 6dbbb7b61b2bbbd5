"""A granted job → Job, Service, ConfigMap, NetworkPolicy: pure builders, no effects."""
