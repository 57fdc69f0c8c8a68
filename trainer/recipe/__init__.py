"""What did the user write? The sections of a recipe, how a file becomes one, and how mistakes are told."""
