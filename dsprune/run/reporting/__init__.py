"""What finished models are worth: the report that closes a run, and the scorecard of any one folder."""
