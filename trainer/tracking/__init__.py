"""How does the journal of a run reach MLflow?"""
