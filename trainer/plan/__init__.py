"""What follows from a recipe before anything runs? Lengths, schedules, sizes and contradictions."""
