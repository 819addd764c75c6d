"""The toy world: a procedurally drawn cartoon world in which the true answer to every video edit is known."""
