"""The networks that the paper compares with UTNetV2, a file each: its configuration, its module, how it fits a task."""
