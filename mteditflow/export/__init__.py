"""What a run gives back, in the forms that others load."""
