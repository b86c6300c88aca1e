"""Many trainings under one roof: networks, seeds, folds and scales of data compared as the paper's tables do."""
