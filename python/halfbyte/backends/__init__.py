"""What computes the operators on each device."""
