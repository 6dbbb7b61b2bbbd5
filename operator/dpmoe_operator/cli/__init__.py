"""`dpmoe`, also installed as the kubectl plugin `kubectl-dpmoe`."""
