"""How does one worker compute its part of a step, and the metrics of a split?"""
