"""Settings of the property-based tests."""

from hypothesis import settings

# How long an example takes says nothing on a busy machine.
settings.register_profile("data_echo", deadline=None, max_examples=40)
settings.load_profile("data_echo")
