"""What does a run leave on disk, and how is it read back?"""
