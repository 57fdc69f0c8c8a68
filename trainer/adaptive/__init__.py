"""What does a run decide from its own measurements? Every decision is journalled and replayed."""
