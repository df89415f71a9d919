"""What each part is trained on."""
