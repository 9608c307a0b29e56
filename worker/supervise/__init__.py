"""Several worker processes below one parent, which starts them, restarts the dead and gives their jobs back."""
