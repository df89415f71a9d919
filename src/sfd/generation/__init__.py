"""From a model directory to images."""
