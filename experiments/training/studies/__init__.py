"""What single studies train and measure, beyond what all training shares."""
