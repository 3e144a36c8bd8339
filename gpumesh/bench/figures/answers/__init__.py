"""What is known of a stage's answers: of each one, of their tokens, and for how many a figure is known. Pure."""
