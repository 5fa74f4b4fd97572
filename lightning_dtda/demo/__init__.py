"""Module and data of the demo: ordinary Lightning classes without any code for attribution."""
