"""What networks and operators cost: parameters, operations, time and memory, measured on this machine."""
