"""Who are the workers of a group, and how do their gradients add up?"""
