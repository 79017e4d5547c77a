"""What a run can be."""
