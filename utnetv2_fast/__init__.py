"""UTNetV2 for medical scans: operators, models, and the whole way from a scan to its segmentation."""
