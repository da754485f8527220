"""What a network costs, from its configuration alone: variables, operations, memory."""
