"""From a scan to its label map: sliding window, and back to the scan's own grid."""
