"""From label maps to scores: Dice, HD95 and NSD per class and case, and their tables."""
