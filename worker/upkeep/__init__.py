"""What runs on a clock: heartbeat, rescue, reconcile, prune."""
