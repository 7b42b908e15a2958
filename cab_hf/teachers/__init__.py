"""What a teacher shows: queries, keys and outputs of its attention, layer by layer."""
