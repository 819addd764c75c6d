"""What is measured of a result and of the machine: metrics, seconds, memory."""
