"""What did a sweep, a run or a published table find? Shown as text, tables, figures, and a page to send."""
