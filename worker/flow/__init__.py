"""One file per step of the life of a job."""
