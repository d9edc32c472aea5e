"""What a durable commit costs: its time, what it writes to the device, and a recovery."""
