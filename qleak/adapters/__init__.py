"""Updates from elsewhere: files that other programs wrote, matched to a model and read like any other message."""
