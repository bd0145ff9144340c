"""What a training run needs, before it is paid for: parameters, memory, time, disk."""
