"""What a layout will take: memory, traffic, bubble and time, in plain numbers and without processes."""
