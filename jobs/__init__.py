"""The jobs of this repository: user code, one file per subject, on top of the front door only."""
