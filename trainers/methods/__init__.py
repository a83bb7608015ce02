"""The methods, one file each: what a step computes."""
