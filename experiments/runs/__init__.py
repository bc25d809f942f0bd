"""All about what lies on disk: folders, records, locks, checkpoints."""
