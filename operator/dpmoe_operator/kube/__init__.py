"""The edge to Kubernetes: the only room that imports kopf or kubernetes."""
