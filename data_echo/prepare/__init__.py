"""Where are raw examples turned into arrays? In this process, in others of this machine, or in Ray actors."""
