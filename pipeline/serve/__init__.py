"""The engine behind Ray Serve: what a batch answers by night, this answers by day, with the same words."""
