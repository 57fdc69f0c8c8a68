"""What do many runs together say? Sweeps of one recipe, the laws that they follow, reports and advice."""
