"""A recipe and the stages that it asks for."""
